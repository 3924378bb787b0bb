"""Masked attention of the training path: exact, without leaks, differentiable in the keep decisions."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from hf_efficient.dynamic_llava.decoder_dynamic_llava import attend_with_policy
from hf_efficient.dynamic_llava.sparsity_dynamic_llava import masked_attention


def naive(query, key, value, policy, valid=None, scaling=None):
    """`softmax` over `exp(scores) * M` written out, `M_ij = policy_j` for `j < i`, 1 for `j = i`, 0 for `j > i`."""
    tokens = query.shape[2]
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    earlier = torch.ones(tokens, tokens, dtype=torch.bool).tril(-1)
    mask = policy[:, None, None, :] * earlier + torch.eye(tokens, dtype=policy.dtype)
    if valid is not None:
        mask = mask * torch.where(torch.eye(tokens, dtype=torch.bool), 1, valid[:, None, None, :].to(policy.dtype))
    kept = scores.masked_fill(mask == 0, -math.inf).amax(dim=-1, keepdim=True).detach()
    weights = (scores - kept).exp() * mask
    return weights / weights.sum(dim=-1, keepdim=True) @ value


def draw(batch=2, heads=3, tokens=7, dim=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, batch, heads, tokens, dim, generator=generator, dtype=torch.float64).to(dtype)
    policy = (torch.rand(batch, tokens, generator=generator) > 0.5).to(dtype)
    assert 0 < policy.sum() < policy.numel()
    return [tensor.requires_grad_() for tensor in (query, key, value, policy)]


def padding(batch, tokens):
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    valid[0, :2], valid[-1, -2:] = False, False  # one row on its left, one on its right
    return valid


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_equals_a_masked_softmax_with_all_gradients(padded, scaling):
    inputs = draw()
    valid = padding(2, 7) if padded else None
    output, expected = masked_attention(*inputs, valid, scaling), naive(*inputs, valid, scaling)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)
    direction = torch.randn_like(output)
    gradients = torch.autograd.grad(output, inputs, direction)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, inputs, direction)):
        assert wanted.abs().sum() > 0
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


def test_gradcheck_in_double_precision():
    query, key, value, policy = draw(batch=1, heads=2, tokens=5, dim=3)
    policy = policy.detach()
    assert torch.autograd.gradcheck(lambda q, k, v: masked_attention(q, k, v, policy), (query, key, value))

    # the policy is used as a hard 0/1: its derivative is compared with steps of the formula that also takes fractions
    soft = policy.clone().requires_grad_()
    direction = torch.randn(1, 2, 5, 3, dtype=torch.float64)
    (got,) = torch.autograd.grad(masked_attention(query, key, value, soft), soft, direction)
    step = 1e-6
    for token in range(5):
        change = torch.zeros(1, 5, dtype=torch.float64)
        change[0, token] = step
        sign = -1 if policy[0, token] else 1
        moved = naive(query, key, value, policy + sign * change) - naive(query, key, value, policy)
        wanted = sign * (moved * direction).sum() / step
        torch.testing.assert_close(got[0, token], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scores", [1, 2 * 7 * 7, 4 * 7 * 7, 8 * 7 * 7, 1000])
def test_blocks_do_not_change_the_gradient(monkeypatch, scores):
    """The backward pass holds a bounded number of scores at once: single heads, some heads, whole rows, all rows."""
    inputs = draw(batch=3, heads=4)
    valid = padding(3, 7)
    direction = torch.randn(3, 4, 7, 4, dtype=torch.float64)
    whole = torch.autograd.grad(naive(*inputs, valid), inputs, direction)
    monkeypatch.setattr("hf_efficient.dynamic_llava.sparsity_dynamic_llava.SCORE_BLOCK", scores)
    for one, other in zip(whole, torch.autograd.grad(masked_attention(*inputs, valid), inputs, direction)):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_nothing_leaks_from_dropped_future_or_padded_keys():
    query, key, value, policy = [tensor.detach() for tensor in draw(tokens=9)]
    policy[:] = 1
    policy[:, 3] = 0
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[:, 0] = False
    output = masked_attention(query, key, value, policy, valid)
    for token, blind in ((3, [1, 2, 4, 5, 6, 7, 8]), (7, list(range(1, 7))), (0, list(range(1, 9)))):
        key_, value_ = key.clone(), value.clone()
        key_[:, :, token] += 50.0  # a key that would outweigh all others
        value_[:, :, token] = 1e6
        changed = masked_attention(query, key_, value_, policy, valid)
        assert torch.equal(changed[:, :, blind], output[:, :, blind])
        assert not torch.equal(changed[:, :, token], output[:, :, token]), "it sees itself"


def test_a_dominant_dropped_key_leaves_output_and_gradients_finite():
    query, key, value, policy = draw(dtype=torch.float32)
    with torch.no_grad():
        policy[:, 2] = 0
        key[:, :, 2] = query[:, :, 5] * 500
    output = masked_attention(query, key, value, policy)
    without = key.detach().clone()
    without[:, :, 2] = 0  # nobody but itself sees it
    others = [0, 1, 3, 4, 5, 6]
    expected = naive(query, without, value, policy)[:, :, others]
    torch.testing.assert_close(output[:, :, others], expected, atol=1e-5, rtol=0)
    for gradient in torch.autograd.grad(output.sum(), (query, key, value, policy)):
        assert gradient.isfinite().all()


def test_all_kept_is_causal_attention():
    query, key, value, policy = draw()
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(masked_attention(query, key, value, torch.ones_like(policy)), expected)


def test_grouped_queries_share_keys():
    query, key, value, policy = draw(heads=6)
    key, value = key[:, :2].detach().requires_grad_(), value[:, :2].detach().requires_grad_()
    output, weights = attend_with_policy(torch.nn.Module(), query, key, value, None, token_policy=policy)
    assert weights is None
    wide = [tensor.repeat_interleave(3, dim=1) for tensor in (key, value)]
    expected = naive(query, *wide, policy).transpose(1, 2)
    torch.testing.assert_close(output, expected)
    inputs = (query, key, value, policy)
    for got, wanted in zip(torch.autograd.grad(output.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
        torch.testing.assert_close(got, wanted)


def test_bfloat16_is_near_the_exact_result_and_gradient():
    exact = draw(tokens=12)
    rough = [tensor.detach().to(torch.bfloat16).requires_grad_() for tensor in exact[:3]]
    policy = exact[3].detach().float().requires_grad_()
    output = masked_attention(*rough, policy)
    assert output.dtype == torch.bfloat16
    expected = naive(*exact)
    torch.testing.assert_close(output.double(), expected, atol=0.03, rtol=0.03)
    gradients = torch.autograd.grad(output.sum(), (*rough, policy))
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 3 + [torch.float32]
    for got, wanted in zip(gradients, torch.autograd.grad(expected.sum(), exact)):
        error = (got.double() - wanted).abs().max() / wanted.abs().max()
        assert error < 0.03


def test_autocast_takes_queries_wider_than_values():
    query, key, value, policy = draw(dtype=torch.float32)
    value = value.detach().to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = masked_attention(query, key, value, policy)
    assert output.dtype == torch.bfloat16
    gradients = torch.autograd.grad(output.sum(), (query, key, value, policy))
    assert [gradient.dtype for gradient in gradients] == [t.dtype for t in (query, key, value, policy)]
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_agrees_with_the_authors_attention(repository):
    """Fixture of the authors' module; theirs adds `eps / N` to every weight, so equality ends near 1e-4."""
    fixtures = repository / "tests" / "fixtures"
    tensors = load_file(fixtures / "dynamic_llava.safetensors")
    assert "eps" in json.loads((fixtures / "dynamic_llava.json").read_text())["tensors"]["module.policy_attention.*"]
    query, key, value, policy = (tensors[f"module.policy_attention.{name}"] for name in ("q", "k", "v", "policy"))
    assert 0 < policy.sum() < policy.numel()
    output = masked_attention(query, key, value, policy[..., 0])
    torch.testing.assert_close(output, tensors["module.policy_attention.out_causal"], atol=1e-4, rtol=0)


def test_attention_dropout_is_refused():
    query, key, value, policy = draw()
    with pytest.raises(ValueError, match=r"`text_config.attention_dropout` must be 0 .* got 0.1"):
        attend_with_policy(torch.nn.Module(), query, key, value, None, dropout=0.1, token_policy=policy)
