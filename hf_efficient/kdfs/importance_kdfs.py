"""How much the loss depends on every filter, per multiply-add that it costs: where the keep/drop logits start."""

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import set_seed

from .masking_kdfs import KDFSMaskedModel


CHUNK = 16  # images behind one gradient: few enough that those of a trained network do not cancel out
FARTHEST = 3.0  # standard deviations


def first_rows(dataset: Any, count: int, collate: Callable) -> Iterator[dict[str, Any]]:
    """Collated chunks of rows that lie evenly over a dataset; of one that is read in its order, the first.

    Args:
        dataset (`Any`): A dataset as the Trainer takes it.
        count (`int`): Number of rows, at least 1.
        collate (`Callable`): Makes a batch of rows.

    Yields:
        `dict`: At most `CHUNK` rows.
    """
    streams = isinstance(dataset, IterableDataset)  # has an empty __getitem__, and often a __len__
    if not streams and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        count = min(count, len(dataset))
        places = [round(place) for place in np.linspace(0, len(dataset) - 1, count)]
        yield from DataLoader(Subset(dataset, places), batch_size=CHUNK, collate_fn=collate)
        return
    rows = itertools.islice(iter(dataset), count)
    while chunk := list(itertools.islice(rows, CHUNK)):
        yield collate(chunk)


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside; outside, all generators go on as if nothing had been drawn.

    Args:
        seed (`int`): The seed.
    """
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def measure_sensitivity(model: KDFSMaskedModel, batches: Iterator[dict[str, Any]]) -> Tensor:
    """First-order change of the cross entropy when a filter is masked, root mean square over batches.

    Args:
        model ([`KDFSMaskedModel`]): The network with all its filters; it runs in evaluation mode and is left in the
            mode it was in.
        batches (`Iterator[dict]`): `pixel_values` of shape `(batch, channels, height, width)` and `labels` of shape
            `(batch,)`, on the model's device.

    Returns:
        `torch.DoubleTensor` of shape `(filters,)`: All groups, one after the other; zeros without batches.
    """
    training, device = model.training, model.frozen_masks.device
    total, count = torch.zeros(len(model.frozen_masks), dtype=torch.float64, device=device), 0
    model.eval()
    try:
        for batch in batches:
            masks = torch.ones_like(model.frozen_masks, requires_grad=True)
            loss = model.run_under(masks, batch["pixel_values"], batch["labels"])
            (gradient,) = torch.autograd.grad(loss, masks)
            total += gradient.double().square()
            count += 1
    finally:
        model.train(training)
    return (total / max(1, count)).sqrt()


def marginal_cost(model: KDFSMaskedModel) -> Tensor:
    """Multiply-adds that go with one filter while all others stay.

    Args:
        model ([`KDFSMaskedModel`]): The network.

    Returns:
        `torch.DoubleTensor` of shape `(filters,)`.
    """
    masks = torch.ones(len(model.frozen_masks), requires_grad=True)
    (gradient,) = torch.autograd.grad(model.cost.to("cpu").count_macs(masks), masks)
    return gradient.double()


def keep_logits(sensitivity: Tensor, cost: Tensor, margin: float, spread: float) -> Tensor:
    """Keep logits at the start: `margin + spread z`, `z` the standardised logarithm of sensitivity per multiply-add.

    Filters that change nothing count as the least sensitive of the others; `z` is cut at three standard deviations.

    Args:
        sensitivity (`torch.DoubleTensor` of shape `(filters,)`): Not negative.
        cost (`torch.DoubleTensor` of shape `(filters,)`): Multiply-adds, above 0.
        margin (`float`): Logit of an average filter.
        spread (`float`): Logits per standard deviation.

    Returns:
        `torch.FloatTensor` of shape `(filters,)`.
    """
    worth = sensitivity / cost
    known = worth[(worth > 0) & worth.isfinite()]
    if len(known) < 2:
        return torch.full_like(worth, margin, dtype=torch.float32)
    logs = worth.nan_to_num(0.0, posinf=0.0).clamp(min=known.min(), max=known.max()).log()
    deviation = logs.std()
    z = (logs - logs.mean()) / deviation if deviation > 0 else torch.zeros_like(logs)
    return (margin + spread * z.clamp(-FARTHEST, FARTHEST)).float()


def start_from_sensitivity(model: KDFSMaskedModel, batches: Iterator[dict[str, Any]]) -> None:
    """Measure, and set the keep/drop logits of a network whose masks were not trained yet.

    Args:
        model ([`KDFSMaskedModel`]): The network.
        batches (`Iterator[dict]`): As of [`measure_sensitivity`].
    """
    config = model.pruning_config
    sensitivity = measure_sensitivity(model, batches).cpu()
    keep = keep_logits(sensitivity, marginal_cost(model), config.initial_keep_margin, config.initial_importance_spread)
    with torch.no_grad():
        for logits, values in zip(model.mask_logits, keep.split(model.sizes), strict=True):
            logits.copy_(torch.stack([torch.zeros_like(values), values], dim=1))
