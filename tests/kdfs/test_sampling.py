"""Masks as pure functions: draws, gradients, budgets."""

import numpy as np
import pytest
import torch

from hf_efficient.kdfs.sampling_kdfs import (
    CostModel,
    allowed_counts,
    choose_filters,
    fit_masks,
    gumbel_noise,
    gumbel_temperature,
    reachable_reduction,
    sample_filters,
)


def chain(sizes: list[int]) -> CostModel:
    """Convolutions one after the other, 3 channels in, 10 labels out."""
    slots = 1 + sum(sizes)
    starts = 1 + np.cumsum([0, *sizes])
    inputs, outputs = torch.zeros(len(sizes) + 1, slots), torch.zeros(len(sizes) + 1, slots)
    inputs[0, 0], outputs[-1, 0] = 3, 10
    for layer in range(len(sizes)):
        outputs[layer, starts[layer] : starts[layer + 1]] = 1
        inputs[layer + 1, starts[layer] : starts[layer + 1]] = 1
    macs = torch.tensor([900.0] * len(sizes) + [1.0])
    weights = torch.tensor([9.0] * len(sizes) + [1.0])
    tables = (inputs, outputs, macs, weights, torch.ones(len(macs)))
    return CostModel(*(table.double() for table in tables))


def test_noise_depends_on_seed_and_step_alone():
    first = gumbel_noise((500, 2), seed=3, step=7)
    torch.rand(5)
    torch.testing.assert_close(gumbel_noise((500, 2), seed=3, step=7), first, rtol=0, atol=0)
    assert not torch.equal(gumbel_noise((500, 2), seed=3, step=8), first)
    assert not torch.equal(gumbel_noise((500, 2), seed=4, step=7), first)
    # mean of a standard Gumbel variable is Euler's constant, its variance pi^2 / 6
    many = gumbel_noise((200_000,), seed=0, step=0)
    assert abs(float(many.mean()) - 0.5772) < 0.01
    assert abs(float(many.var()) - 1.6449) < 0.03


def test_masks_are_hard_and_follow_the_logits():
    logits = torch.tensor([[0.0, 50.0], [50.0, 0.0], [1.0, 1.0]])
    masks = torch.stack([sample_filters(logits, gumbel_noise((3, 2), 0, step), 0.5) for step in range(400)])
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert masks[:, 0].all()
    assert not masks[:, 1].any()
    assert 0.4 < float(masks[:, 2].mean()) < 0.6
    assert choose_filters(logits).tolist() == [1.0, 0.0, 0.0]  # a tie drops


def test_gradient_is_the_closed_form():
    """dL/dw_keep = 2 (F/B - r)/B dF/dm p (1 - p) / tau, dL/dw_drop its negative."""
    cost, tau, rate = chain([4, 6]), 0.7, 0.4
    logits = torch.randn(10, 2, dtype=torch.float64, requires_grad=True)
    noise = gumbel_noise((10, 2), 0, 1).double()
    masks = sample_filters(logits, noise, tau)
    masks.retain_grad()
    macs = cost.count_macs(masks)
    base = float(cost.count_macs(torch.ones(10)))
    (macs / base - rate).pow(2).backward()
    kept = masks.detach()
    per_filter = torch.cat(
        [900.0 * (3 + kept[4:].sum()).expand(4), (900.0 * kept[:4].sum() + 10.0).expand(6)]
    ).double()
    keep = ((logits.detach() + noise) / tau).softmax(dim=1)[:, 1]
    expected = 2 * (float(macs.detach()) / base - rate) / base * per_filter * keep * (1 - keep) / tau
    torch.testing.assert_close(logits.grad[:, 1], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad[:, 0], -expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", [0.1, 0.35, 0.55, 0.8])
@pytest.mark.parametrize("margin", [-3.0, 0.0, 3.0])
def test_budget_is_met_wherever_the_logits_are(target, margin):
    sizes = [16, 32, 64]
    logits = [torch.randn(size, 2) + torch.tensor([0.0, margin]) for size in sizes]
    masks = fit_masks(logits, chain(sizes), keep_share=1 - target)
    share = float(chain(sizes).count_macs(torch.cat(masks)) / chain(sizes).count_macs(torch.ones(sum(sizes))))
    assert abs(share - (1 - target)) < 0.01
    assert min(int(mask.sum()) for mask in masks) >= 1


def test_the_least_certain_filters_go():
    sizes = [64, 64]
    logits = [torch.stack([torch.zeros(64), torch.linspace(1.0, 8.0, 64)], dim=1) for _ in sizes]
    logits[1][:, 1] += 20
    masks = fit_masks(logits, chain(sizes), keep_share=0.8)
    assert masks[1].all(), "every filter of the second layer is more certain"
    dropped = int((masks[0] == 0).sum())
    assert dropped > 0
    assert masks[0].tolist() == [0.0] * dropped + [1.0] * (64 - dropped)


def test_rounding_and_minimum():
    sizes = [16, 32, 64, 12]
    logits = [torch.randn(size, 2) for size in sizes]
    masks = fit_masks(logits, chain(sizes), keep_share=0.4, min_filters=9, round_to=8)
    counts = [int(mask.sum()) for mask in masks]
    assert all(count % 8 == 0 or count == size for count, size in zip(counts, sizes))
    assert counts[0] == 16
    assert min(counts) >= 9
    assert allowed_counts(16, 9, 8) == [16]
    assert allowed_counts(20, 1, 8) == [8, 16, 20]


@pytest.mark.parametrize("seed", range(4))
def test_wide_layers_keep_even_multiples(seed):
    """A vector of 16 floats holds 40 filters no better than 48; narrow layers stay as fine as they are."""
    sizes = [32, *[64] * 4, *[128] * 6, *[256] * 4]
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(size, 2, generator=generator) for size in sizes]
    cost = chain(sizes)
    masks = fit_masks(logits, cost, keep_share=0.5, round_to=8)
    counts = [int(mask.sum()) for mask in masks]
    assert all(count % 8 == 0 for count in counts)
    assert sum(count % 16 == 0 for count in counts[1:]) >= 12, counts
    share = float(cost.count_macs(torch.cat(masks)) / cost.count_macs(torch.ones(sum(sizes))))
    assert abs(share - 0.5) < 0.01


def test_sure_masks_that_meet_the_target_are_taken_as_they_are():
    """The lowest count of a wide layer, here 8, stands beside the even ones; else other layers paid for 16."""
    sizes, learned = [64, 64, 128, 128], [8, 64, 8, 128]
    margins = [torch.where(torch.arange(size) < count, 4.0, -4.0) for size, count in zip(sizes, learned)]
    logits = [torch.stack([torch.zeros_like(margin), margin], dim=1) for margin in margins]
    cost = chain(sizes)
    keep_share = float(cost.count_macs(torch.cat([margin > 0 for margin in margins]).float()))
    keep_share /= float(cost.count_macs(torch.ones(sum(sizes))))
    masks = fit_masks(logits, cost, keep_share, round_to=8)
    assert [int(mask.sum()) for mask in masks] == learned


@pytest.mark.parametrize("seed", range(3))
def test_even_multiples_alone_are_taken_where_steps_of_them_meet_the_target(seed):
    sizes = [64, 64, 128, 128]
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(size, 2, generator=generator) for size in sizes]
    cost = chain(sizes)
    masks = fit_masks(logits, cost, keep_share=0.5, round_to=8)
    assert not any(int(mask.sum()) % 16 for mask in masks)
    share = float(cost.count_macs(torch.cat(masks)) / cost.count_macs(torch.ones(sum(sizes))))
    assert abs(share - 0.5) < 0.005


def test_all_combinations_are_tried_where_steps_end_beside_the_target():
    """Steps end 1.05 % away for these logits, while 32, 64, 32 filters cost just half."""
    generator = torch.Generator().manual_seed(1)
    sizes, cost = [64, 64, 64], chain([64, 64, 64])
    logits = [torch.randn(size, 2, generator=generator) for size in sizes]
    masks = fit_masks(logits, cost, keep_share=0.5, round_to=8)
    share = float(cost.count_macs(torch.cat(masks)) / cost.count_macs(torch.ones(sum(sizes))))
    assert abs(share - 0.5) < 0.005


def test_odd_multiples_are_there_where_only_they_meet_the_target():
    sizes = [64, 64]
    logits = [torch.stack([torch.zeros(64), torch.ones(64)], dim=1) for _ in sizes]
    limit = reachable_reduction(chain(sizes), sizes, 1, 8)
    masks = fit_masks(logits, chain(sizes), keep_share=1 - limit, round_to=8)
    assert [int(mask.sum()) for mask in masks] == [8, 8]


def test_everything_can_go_but_one_filter():
    sizes = [4, 4]
    limit = reachable_reduction(chain(sizes), sizes, 1, 1)
    masks = fit_masks([torch.randn(4, 2) for _ in sizes], chain(sizes), keep_share=1 - limit)
    assert [int(mask.sum()) for mask in masks] == [1, 1]


def test_temperature_needs_an_epoch():
    with pytest.raises(ValueError, match="0"):
        gumbel_temperature(1, 0)
