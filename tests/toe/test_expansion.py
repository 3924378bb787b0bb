from itertools import pairwise

import pytest
import torch

from hf_efficient import ToEConfig, TokenExpansion, restore_tokens
from hf_efficient.toe.expansion_toe import RandomDrop, count_kept_tokens, merge_tokens, stage_additions


SCHEDULES = [
    ToEConfig(),
    ToEConfig.preset("lv-vit", distance="euclidean"),
    ToEConfig.preset("efficient-train", distance="manhattan", expansion_steps=3),
    ToEConfig(keep_rates=(0.45, 0.7, 0.95), initial_keep_rate=0.15, expansion_steps=5),
    ToEConfig(keep_rates=(0.29,), initial_keep_rate=0.29, stage_starts=(0,), expansion_steps=1),
]


def naive_expansion(x, stage, config, prefix):
    """The paper, one image and one token at a time, by distances; differentiable."""
    images, indices = [], []
    for image in x:
        patches = image[prefix:]
        unit = [p / p.norm() for p in patches.detach()]

        def distance(a, b, unit=unit):
            if config.distance == "cosine":
                return 1 - (unit[a] * unit[b]).sum().item()
            difference = unit[a] - unit[b]
            return (difference.abs().sum() if config.distance == "manhattan" else difference.norm()).item()

        first, additions = stage_additions(len(patches), stage, config)
        inside = [i * len(patches) // first for i in range(first)]
        for count in additions:
            outside = [i for i in range(len(patches)) if i not in inside]
            far = sorted(outside, key=lambda u: -min(distance(u, s) for s in inside))
            inside = inside + far[:count]
        groups = {s: [patches[s]] for s in inside}
        for u in (i for i in range(len(patches)) if i not in inside):
            groups[min(inside, key=lambda s: distance(u, s))].append(patches[u])
        rows = [image[i] for i in range(prefix)] + [torch.stack(group).mean(0) for group in groups.values()]
        images.append(torch.stack(rows))
        indices.append(list(range(prefix)) + [i + prefix for i in inside])
    return torch.stack(images), torch.tensor(indices)


@pytest.mark.parametrize(
    ("config", "stage"),
    [(config, stage) for config in SCHEDULES for stage, rate in enumerate(config.keep_rates, 1) if rate < 1],
    ids=lambda v: f"{v.distance}-{v.keep_rates[0]}" if isinstance(v, ToEConfig) else str(v),
)
def test_equals_a_naive_version_with_its_gradient(config, stage):
    x = torch.randn(2, 1 + 36, 8, dtype=torch.float64, requires_grad=True)
    tokens, index = TokenExpansion(config)(x, stage)
    expected, expected_index = naive_expansion(x, stage, config, prefix=1)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(tokens, expected)
    weights = torch.randn_like(tokens)
    torch.testing.assert_close(
        torch.autograd.grad((tokens * weights).sum(), x), torch.autograd.grad((expected * weights).sum(), x)
    )


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda c: f"{c.distance}-{c.keep_rates[0]}")
@pytest.mark.parametrize(("prefix", "suffix", "patches"), [(1, 0, 100), (5, 0, 49), (1, 7, 60), (0, 0, 64)])
def test_invariants(config, prefix, suffix, patches):
    x = torch.randn(3, prefix + patches + suffix, 16)
    expansion = TokenExpansion(config)
    for stage in range(1, config.num_stages + 1):
        kept = int(round(patches * config.keep_rates[stage - 1], 6))
        tokens, index = expansion(x, stage, prefix, suffix)
        selection = expansion.select(x, stage, prefix, suffix)
        assert expansion.num_kept(patches, stage) == kept
        assert tokens.shape == (3, prefix + kept + suffix, 16)
        assert index.dtype == torch.int64
        assert torch.equal(index, selection.index)
        # nothing twice, prefix first, suffix last
        assert all(len(set(row.tolist())) == prefix + kept + suffix for row in index)
        ends = torch.cat([torch.arange(prefix), torch.arange(prefix + patches, prefix + patches + suffix)])
        assert torch.equal(torch.cat([index[:, :prefix], index[:, prefix + kept :]], 1), ends.expand(3, -1))
        assert torch.equal(torch.cat([tokens[:, :prefix], tokens[:, prefix + kept :]], 1), x[:, ends])
        # each row belongs to one output row, a kept one to itself, and an output row is the mean of its own
        assert torch.equal(selection.owner.gather(1, index), torch.arange(index.shape[1]).expand(3, -1))
        member = torch.nn.functional.one_hot(selection.owner, index.shape[1]).to(x)  # (batch, n_in, n_out)
        mean = member.transpose(1, 2) @ x / member.sum(1)[..., None]
        torch.testing.assert_close(tokens, mean, rtol=0, atol=1e-5)
        # the whole is kept: sums over all rows agree
        sizes = member.sum(1)[..., None]
        torch.testing.assert_close((tokens * sizes).sum(1), x.sum(1), rtol=1e-4, atol=1e-4)


def test_later_stages_contain_the_earlier_ones():
    x = torch.randn(2, 65, 16)
    expansion = TokenExpansion(ToEConfig(keep_rates=(0.3, 0.5, 0.8), initial_keep_rate=0.2))
    rows = [expansion(x, stage).index for stage in (1, 2, 3)]
    for shorter, longer in pairwise(rows):
        assert torch.equal(longer[:, : shorter.shape[1]], shorter)


@pytest.mark.parametrize("rate", [0.2, 0.3, 0.35, 0.6])
def test_seeds_are_even_for_any_rate(rate):
    """The authors' stride leaves the end of the raster out unless the rate is one over an integer."""
    config = ToEConfig(stage_starts=(0,), keep_rates=(rate,), initial_keep_rate=rate)
    index = TokenExpansion(config)(torch.randn(1, 197, 8), 1).index[0, 1:] - 1
    gaps = index.diff()
    assert len(index) == count_kept_tokens(196, rate)
    assert gaps.max() - gaps.min() <= 1
    assert index[-1] + gaps.max() >= 196 - 1


def test_counts_take_decimal_rates_at_their_word():
    assert int(100 * 0.29) == 28  # what floating point makes of it
    assert count_kept_tokens(100, 0.29) == 29
    for tokens in (49, 64, 100, 196, 1024, 4200):
        for percent in range(1, 101):
            assert count_kept_tokens(tokens, percent / 100) == tokens * percent // 100


@pytest.mark.parametrize("stage", [0, 3])
def test_full_stages_return_the_very_input(stage):
    x = torch.randn(2, 66, 8)
    tokens, index = TokenExpansion()(x, stage, num_prefix_tokens=2)
    assert tokens is x
    assert torch.equal(index, torch.arange(66).expand(2, -1))


def test_a_zero_token_neither_gives_nan_nor_swallows_its_neighbours():
    x = torch.randn(2, 65, 16)
    x[0, 1] = 0  # the first patch is a seed
    x[1, 30:33] = 0
    x.requires_grad_()
    for distance in ("cosine", "euclidean", "manhattan"):
        expansion = TokenExpansion(ToEConfig(distance=distance))
        index, owner = expansion.select(x, 1)
        tokens = expansion(x, 1).tokens
        assert torch.isfinite(tokens).all()
        (gradient,) = torch.autograd.grad(tokens.sum(), x)
        assert torch.isfinite(gradient).all()
        for image in range(2):
            for place in range(1, index.shape[1]):
                if not x[image, index[image, place]].any():
                    assert (owner[image] == place).sum() == 1, f"{distance}: a zero token swallowed others"


def test_all_tokens_zero_or_equal():
    for x in (torch.zeros(1, 65, 8), torch.ones(1, 65, 8)):
        tokens, index = TokenExpansion()(x, 1)
        assert torch.equal(tokens, x[:, :33])
        assert len(set(index[0].tolist())) == 33


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_chooses_like_single(dtype):
    x = torch.randn(2, 65, 32).to(dtype)
    tokens, index = TokenExpansion()(x, 1)
    single, single_index = TokenExpansion()(x.float(), 1)
    assert tokens.dtype == dtype
    assert torch.equal(index, single_index)
    assert torch.equal(tokens, single.to(dtype))  # summed in float32, rounded once


def test_autocast_does_not_touch_the_choice():
    x = torch.randn(2, 65, 32)
    plain = TokenExpansion()(x, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = TokenExpansion()(x, 2)
    assert torch.equal(cast.index, plain.index)
    assert torch.equal(cast.tokens, plain.tokens)


def test_images_of_a_batch_do_not_meet():
    x = torch.randn(4, 65, 16)
    whole = TokenExpansion()(x, 1)
    for i in range(4):
        alone = TokenExpansion()(x[i : i + 1], 1)
        assert torch.equal(alone.index[0], whole.index[i])
        torch.testing.assert_close(alone.tokens[0], whole.tokens[i], rtol=0, atol=1e-6)


def test_merge_has_second_derivatives():
    owner = torch.tensor([[0, 1, 1, 0, 2]])
    x = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: merge_tokens(t, owner, 3), (x,))
    assert torch.autograd.gradgradcheck(lambda t: merge_tokens(t, owner, 3), (x,))


def test_restore_puts_rows_back():
    x = torch.randn(2, 1 + 36 + 3, 8, requires_grad=True)
    expansion = TokenExpansion(ToEConfig(keep_rates=(0.4, 0.7, 1.0), initial_keep_rate=0.2))
    tokens, index = expansion(x, 1, 1, 3)
    grid = restore_tokens(tokens, index, 40)
    assert grid.shape == x.shape
    for image in range(2):
        kept = set(index[image].tolist())
        for row in range(40):
            wanted = tokens[image, index[image].tolist().index(row)] if row in kept else torch.zeros(8)
            assert torch.equal(grid[image, row], wanted)
    owner = expansion.select(x, 1, 1, 3).owner
    full = restore_tokens(tokens, index, 40, owner=owner)
    assert torch.equal(full.gather(1, index[..., None].expand(-1, -1, 8)), tokens)
    assert all(torch.equal(full[i, r], tokens[i, owner[i, r]]) for i in range(2) for r in range(40))
    (gradient,) = torch.autograd.grad(full.sum(), x)
    torch.testing.assert_close(gradient.sum(), torch.tensor(2 * 40 * 8.0))  # the mean hands on the whole of it


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e(torch.randn(2, 65, 8), 4), r"`stage` must be 0 \(all tokens\) to 3, .* got 4"),
        (lambda e: e(torch.randn(2, 65, 8), -1), r"`stage` must be 0 .* got -1"),
        (lambda e: e(torch.randn(65, 8), 1), r"`tokens` must have shape \(batch, tokens, dim\), got \(65, 8\)"),
        (lambda e: e(torch.randn(2, 3, 8), 1, 1, 2), r"at least one patch between 1 prefix and 2 suffix rows, got 3"),
        (lambda e: e(torch.randn(2, 4, 8), 1), r"`initial_keep_rate` must keep at least one of the 3 patch tokens"),
    ],
)
def test_bad_input_gets_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(TokenExpansion())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.zeros(2, 5, 3), torch.zeros(2, 4, dtype=torch.long), 9),
            r"`index` must have one row .*\(2, 4\)",
        ),
        ((torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long), 4), r"`length` must be at least the 5 rows"),
        (
            (torch.zeros(2, 5, 3), torch.tensor([[0, 1, 2, 3, 64]] * 2), 64),
            r"from 0 to `length` - 1 = 63, got torch.int64 up to 64; count prefix and suffix rows in",
        ),
        ((torch.zeros(2, 5, 3), torch.ones(2, 5), 9), r"`index` must hold row numbers .* got torch.float32 up to 1"),
        (
            (torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long), 9, torch.zeros(2, 8, dtype=torch.long)),
            r"`owner` must have shape \(2, 9\) \(batch, length\), got \(2, 8\)",
        ),
    ],
)
def test_restore_complains(arguments, message):
    with pytest.raises(ValueError, match=message):
        restore_tokens(*arguments)


def test_random_drop_differs_from_expansion_in_the_choice_alone():
    x = torch.randn(4, 1 + 64 + 3, 8, requires_grad=True)
    drop, expansion = RandomDrop(), TokenExpansion()
    for stage in (1, 2):
        tokens, index = drop(x, stage, 1, 3)
        assert tokens.shape == expansion(x, stage, 1, 3).tokens.shape
        assert torch.equal(tokens, x.gather(1, index[..., None].expand(-1, -1, 8)))
        assert torch.equal(index[:, [0, -3, -2, -1]], torch.tensor([0, 65, 66, 67]).expand(4, -1))
        assert all(len(set(row.tolist())) == len(row) for row in index)
        assert not torch.equal(index, drop(x, stage, 1, 3).index)
        (gradient,) = torch.autograd.grad(tokens.sum(), x)
        assert gradient.sum() == tokens.numel()
    assert drop(x, 3, 1, 3).tokens is x
