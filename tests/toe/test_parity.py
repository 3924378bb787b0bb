"""Agreement with the authors' code: `tests/fixtures/toe.*`."""

import torch

from hf_efficient import ToEConfig, TokenExpansion


def test_first_stage_equals_the_authors_code(golden):
    assert "authors' ToE code" in golden["what"]
    expanded = TokenExpansion(ToEConfig())(golden["x_n65_c32"], stage=1)
    index = golden["n65_c32.s1.cosine.stage1.index"]
    assert index.shape == (3, 33)
    assert torch.equal(expanded.index, index.long())  # order included
    torch.testing.assert_close(expanded.tokens, golden["n65_c32.s1.cosine.stage1.tokens"], rtol=0, atol=1e-5)


def test_authors_numbers_survive_prefix_and_suffix(golden):
    """More prefix rows and a suffix shift the index and change nothing else."""
    x = golden["x_n65_c32"]
    more = torch.cat([torch.randn(3, 4, 32), x, torch.randn(3, 7, 32)], dim=1)
    expanded = TokenExpansion()(more, 1, num_prefix_tokens=5, num_suffix_tokens=7)
    index = golden["n65_c32.s1.cosine.stage1.index"].long()
    assert torch.equal(expanded.index[:, 4:-7], index + 4)
    assert torch.equal(expanded.index[:, -7:], torch.arange(69, 76).expand(3, -1))
    torch.testing.assert_close(expanded.tokens[:, 4:-7], golden["n65_c32.s1.cosine.stage1.tokens"], rtol=0, atol=1e-5)
    assert torch.equal(expanded.tokens[:, :4], more[:, :4])
    assert torch.equal(expanded.tokens[:, -7:], more[:, -7:])


def test_token_counts_of_the_paper():
    """196 patches: the counts of the authors' recipes, each exactly int(N * r)."""
    deit, lv_vit, efficient = map(TokenExpansion, map(ToEConfig.preset, ("deit", "lv-vit", "efficient-train")))
    assert [deit.num_kept(196, stage) for stage in range(4)] == [196, 98, 147, 196]
    assert [lv_vit.num_kept(196, stage) for stage in (1, 2)] == [78, 137]
    assert [efficient.num_kept(196, stage) for stage in (1, 2)] == [117, 156]
