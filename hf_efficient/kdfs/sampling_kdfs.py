"""Masks and their cost: pure functions on tensors, no network in sight.

Symbols: `logits` of shape `(filters, 2)`, column 0 = drop, column 1 = keep; `mask` is 1 for a kept filter; `margin` is
keep minus drop logit.
"""

import heapq
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


MOST_COMBINATIONS = 100_000  # of kept counts that are tried in all, about a second


def gumbel_temperature(epoch: float, epochs: int, start: float = 1.0, end: float = 0.1) -> float:
    """Temperature `start * (end / start)^(epoch / epochs)` (KDFS, Sec. 3.1).

    The authors set it at the start of every epoch with `epoch = 1 ... epochs`, so the last epoch runs at `end`.

    Args:
        epoch (`float`): Epoch, counted from 1; 0 gives `start`.
        epochs (`int`): Number of sampling epochs, at least 1.
        start (`float`, *optional*, defaults to 1.0): Temperature at epoch 0.
        end (`float`, *optional*, defaults to 0.1): Temperature at the last epoch.

    Returns:
        `float`: The temperature.

    Raises:
        ValueError: If `epochs` is below 1.
    """
    if epochs < 1:
        raise ValueError(f"`epochs` must be at least 1, but is {epochs}.")
    return start * (end / start) ** (min(epoch, epochs) / epochs)


def gumbel_noise(shape: tuple[int, ...], seed: int, step: int) -> Tensor:
    """Standard Gumbel noise that depends on the seed and the step alone.

    Every process of a distributed run draws the same, and a resumed run continues with the draws it would have made.

    Args:
        shape (`tuple[int, ...]`): Shape of the noise.
        seed (`int`): Seed of the run.
        step (`int`): Global step.

    Returns:
        `torch.FloatTensor` of shape `shape` on the CPU.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % (2**63 - 1))
    uniform = torch.rand(shape, generator=generator).clamp_(min=torch.finfo(torch.float32).tiny)
    return -torch.log((-torch.log(uniform)).clamp_(min=torch.finfo(torch.float32).tiny))


def sample_filters(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Draw a hard mask with the gradient of the soft one (Gumbel-softmax, straight through; KDFS, Eq. 4).

    `soft = softmax((logits + noise) / temperature)[:, 1]`, `hard = [keep wins]`, returned is `hard` with the gradient
    of `soft`.

    Args:
        logits (`torch.FloatTensor` of shape `(filters, 2)`): Drop and keep logits.
        noise (`torch.FloatTensor` of shape `(filters, 2)`): Standard Gumbel noise.
        temperature (`float`): Above 0.

    Returns:
        `torch.FloatTensor` of shape `(filters,)`: 1 = kept, 0 = dropped.
    """
    scores = (logits + noise) / temperature
    soft = scores.softmax(dim=1)[:, 1]
    hard = (scores[:, 1] > scores[:, 0]).to(soft.dtype)
    return hard + (soft - soft.detach())  # in this order the value stays exactly 0 or 1


def choose_filters(logits: Tensor) -> Tensor:
    """The mask without noise: a filter stays if its keep logit is the larger one; a tie drops it.

    Args:
        logits (`torch.FloatTensor` of shape `(filters, 2)`): Drop and keep logits.

    Returns:
        `torch.FloatTensor` of shape `(filters,)`: 1 = kept; without gradient.
    """
    return (logits[:, 1] > logits[:, 0]).to(logits.dtype).detach()


@dataclass
class CostModel:
    """Multiply-adds and parameters as functions of the masks.

    A slot is one filter that can go; slot 0 stands for everything that stays. Of layer `l`, `inputs[l, s]` and
    `outputs[l, s]` count its channels with slot `s`.

    Args:
        inputs (`torch.DoubleTensor` of shape `(layers, slots)`): Input channels.
        outputs (`torch.DoubleTensor` of shape `(layers, slots)`): Output channels.
        macs (`torch.DoubleTensor` of shape `(layers,)`): Multiply-adds per pair of channels.
        weights (`torch.DoubleTensor` of shape `(layers,)`): Parameters per pair of channels.
        extras (`torch.DoubleTensor` of shape `(layers,)`): Parameters per output channel.
        fixed_macs (`float`): Multiply-adds no mask changes and no layer lists.
        fixed_parameters (`float`): Parameters no mask changes and no layer lists.
    """

    inputs: Tensor
    outputs: Tensor
    macs: Tensor
    weights: Tensor
    extras: Tensor
    fixed_macs: float = 0.0
    fixed_parameters: float = 0.0

    def count_macs(self, masks: Tensor) -> Tensor:
        """Multiply-adds left by the masks, differentiable.

        Args:
            masks (`torch.FloatTensor` of shape `(filters,)`): All masks in the order of the slots.

        Returns:
            `torch.DoubleTensor` without axes.
        """
        slots = torch.cat([masks.new_ones(1), masks]).double()
        return (self.macs * (self.inputs @ slots) * (self.outputs @ slots)).sum() + self.fixed_macs

    def count_parameters(self, masks: Tensor) -> Tensor:
        """Parameters of the sliced network.

        Args:
            masks (`torch.FloatTensor` of shape `(filters,)`): All masks in the order of the slots.

        Returns:
            `torch.DoubleTensor` without axes.
        """
        slots = torch.cat([masks.new_ones(1), masks]).double()
        outputs = self.outputs @ slots
        return (self.weights * (self.inputs @ slots) * outputs + self.extras * outputs).sum() + self.fixed_parameters

    def to(self, device: torch.device) -> "CostModel":
        """The same on another device.

        Args:
            device (`torch.device`): Where the masks live.

        Returns:
            [`CostModel`]: A copy; `self` where nothing moves.
        """
        if self.inputs.device == device:
            return self
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return CostModel(**{**vars(self), **moved})

    def per_group(self, sizes: list[int]) -> "CostModel":
        """The cost as a function of kept counts: one column per group, valid since a layer reads whole groups.

        Args:
            sizes (`list[int]`): Filters per group in the order of the slots.

        Returns:
            [`CostModel`]: With `1 + groups` slots.
        """
        parts = [1, *sizes]
        inputs, outputs = (
            torch.stack([part.mean(dim=1) for part in table.split(parts, dim=1)], dim=1)
            for table in (self.inputs, self.outputs)
        )
        rest = (self.macs, self.weights, self.extras, self.fixed_macs, self.fixed_parameters)
        return CostModel(inputs, outputs, *rest)


def allowed_counts(size: int, min_filters: int, round_to: int) -> list[int]:
    """Kept counts a layer may end with: multiples of `round_to` of at least `min_filters`, and the whole layer.

    Args:
        size (`int`): Filters of the layer.
        min_filters (`int`): Fewest filters kept.
        round_to (`int`): Divisor of the kept count.

    Returns:
        `list[int]`: Increasing; never empty, never 0.
    """
    counts = [count for count in range(round_to, size, round_to) if count >= min_filters]
    return [*counts, size]


class _Ladder:
    """Kept counts of all layers, moved one allowed step at a time."""

    def __init__(
        self,
        margins: list[np.ndarray],
        cost: CostModel,
        min_filters: int,
        round_to: int,
        prefer_even: bool = False,
    ) -> None:
        self.sorted = [np.sort(margin)[::-1] for margin in margins]  # most certain first
        self.rungs = [allowed_counts(len(item), min_filters, round_to) for item in margins]
        if prefer_even:
            self.rungs = [
                rungs
                if rungs[-1] < 8 * round_to
                else [c for i, c in enumerate(rungs) if i == 0 or c % (2 * round_to) == 0 or c == rungs[-1]]
                for rungs in self.rungs
            ]
        self.doubts = [
            [float(np.maximum(-item[:count], 0).sum() + np.maximum(item[count:], 0).sum()) for count in rungs]
            for item, rungs in zip(self.sorted, self.rungs, strict=True)
        ]  # certainty of the filters that a count flips
        small = cost.per_group([len(margin) for margin in margins])
        self.inputs, self.outputs, self.weights = (
            table.cpu().numpy() for table in (small.inputs, small.outputs, small.macs)
        )
        self.fixed = small.fixed_macs
        self.level = []
        for margin, rungs in zip(self.sorted, self.rungs, strict=True):
            wanted = int((margin > 0).sum())
            self.level.append(min(range(len(rungs)), key=lambda index: (abs(rungs[index] - wanted), -index)))

    @property
    def top(self) -> list[int]:
        """Everything kept."""
        return [len(rungs) - 1 for rungs in self.rungs]

    def go_to(self, counts: list[int]) -> None:
        """Start from other counts, all of them allowed."""
        self.level = [rungs.index(count) for rungs, count in zip(self.rungs, counts, strict=True)]

    def counts(self) -> list[int]:
        return [rungs[index] for rungs, index in zip(self.rungs, self.level, strict=True)]

    def macs(self, level: list[int]) -> float:
        slots = np.array([1, *(rungs[index] for rungs, index in zip(self.rungs, level, strict=True))], np.float64)
        return float((self.weights * (self.inputs @ slots)) @ (self.outputs @ slots) + self.fixed)

    def certainty(self, layer: int, direction: int) -> float | None:
        """Mean certainty of the filters that the next step of a layer flips; `None` at the end of its ladder."""
        rungs, index = self.rungs[layer], self.level[layer]
        if not 0 <= index + direction < len(rungs):
            return None
        low, high = sorted((rungs[index], rungs[index + direction]))
        return -direction * float(self.sorted[layer][low:high].mean())

    def queue(self, direction: int) -> list[tuple[float, int]]:
        """Possible steps, least certain first, as a heap."""
        steps = [(self.certainty(layer, direction), layer) for layer in range(len(self.rungs))]
        heap = [step for step in steps if step[0] is not None]
        heapq.heapify(heap)
        return heap

    def moved(self, layer: int, direction: int) -> list[int]:
        level = list(self.level)
        level[layer] += direction
        return level

    def walk(self, direction: int, budget: float) -> None:
        """Step down until the budget is met, or up as long as steps fit into it."""
        heap = self.queue(direction)
        while heap and (direction > 0 or self.macs(self.level) > budget):
            _, layer = heapq.heappop(heap)
            level = self.moved(layer, direction)
            if direction > 0 and self.macs(level) > budget:
                continue
            self.level = level
            certainty = self.certainty(layer, direction)
            if certainty is not None:
                heapq.heappush(heap, (certainty, layer))

    def rate(self, level: list[int], budget: float) -> tuple[float, float]:
        """How good other counts are, least is best: how far from the budget, from half a percent on; how doubtful."""
        doubt = sum(doubts[index] for doubts, index in zip(self.doubts, level, strict=True))
        return max(abs(budget - self.macs(level)), 0.005 * budget), doubt

    def polish(self, budget: float) -> bool:
        """While the budget is missed by half a percent: take the step, or the pair of steps, that ends best.

        Whether it is met then.
        """
        gap = abs(budget - self.macs(self.level))
        while gap > 0.005 * budget:
            start, best = self.level, (gap, 0.0, self.level)
            steps = [(layer, direction) for direction in (1, -1) for _, layer in sorted(self.queue(direction))]
            for layer, direction in steps:
                self.level = self.moved(layer, direction)
                pairs = [self.moved(other, -1) for _, other in self.queue(-1) if direction > 0 and other != layer]
                best = min(best, *((*self.rate(level, budget), level) for level in [self.level, *pairs]))
                self.level = start
            if best[2] == start:
                return False
            gap, _, self.level = best
        return True

    def search(self, budget: float) -> None:
        """Take the best of all combinations, where they are few enough to try each."""
        if math.prod(len(rungs) for rungs in self.rungs) <= MOST_COMBINATIONS:
            levels = itertools.product(*(range(len(rungs)) for rungs in self.rungs))
            self.level = list(min(levels, key=lambda level: self.rate(level, budget)))


def reachable_reduction(cost: CostModel, sizes: list[int], min_filters: int, round_to: int) -> float:
    """The largest share of the multiply-adds that the masks can remove.

    Args:
        cost ([`CostModel`]): Cost of the masks.
        sizes (`list[int]`): Filters per group.
        min_filters (`int`): Fewest filters kept per layer.
        round_to (`int`): Divisor of kept counts.

    Returns:
        `float`: In [0, 1).
    """
    ladder = _Ladder([np.ones(size) for size in sizes], cost, min_filters, round_to)
    return 1.0 - ladder.macs([0] * len(sizes)) / ladder.macs(ladder.top)


def fit_masks(
    logits: list[Tensor], cost: CostModel, keep_share: float, min_filters: int = 1, round_to: int = 1
) -> list[Tensor]:
    """Flip the least certain filters until the masks cost what they should.

    Starts from [`choose_filters`] and rounds every layer to an allowed count. Then single layers move by one allowed
    step, always the one whose filters are least certain: down until the cost is no longer above `keep_share`, up as
    long as a step fits. Where that misses by more than 0.5 % of the cost, the step, or the pair of a step up and one
    down, that ends nearest is taken, on either side, until none ends nearer; of those within 0.5 % the one that flips
    the least certain filters. Where even that misses by more than 1 % of the whole network's cost and the layers have
    few counts, as with a large `round_to`, all combinations are tried.

    With `round_to` above 1 a layer of at least `8 * round_to` filters first takes steps twice as large, and single
    ones only where these miss by more than 0.5 %, so most of its counts are even multiples: for 8 that is 16, the
    floats of a 512-bit vector, which 40 filters would fill no better than 48. Its lowest count is a step likewise,
    even or odd: the masks of a layer may be sure of it.

    Args:
        logits (`list[torch.FloatTensor]`): Drop and keep logits of shape `(filters, 2)` per group.
        cost ([`CostModel`]): Cost of the masks.
        keep_share (`float`): Share of the multiply-adds to keep.
        min_filters (`int`, *optional*, defaults to 1): Fewest filters kept per layer.
        round_to (`int`, *optional*, defaults to 1): Divisor of kept counts.

    Returns:
        `list[torch.FloatTensor]`: One mask of shape `(filters,)` per group, with at least one filter each.
    """
    margins = [(item[:, 1] - item[:, 0]).detach().float().cpu().numpy() for item in logits]
    ladder = _Ladder(margins, cost, min_filters, round_to)
    budget = keep_share * ladder.macs(ladder.top)
    if round_to > 1:
        even = _Ladder(margins, cost, min_filters, round_to, prefer_even=True)
        even.walk(-1, budget)
        even.walk(1, budget)
        ladder.go_to(even.counts())
        if even.polish(budget):
            ladder.go_to(even.counts())
        else:
            ladder.walk(-1, budget)
    else:
        ladder.walk(-1, budget)
        ladder.walk(1, budget)
    ladder.polish(budget)
    if abs(budget - ladder.macs(ladder.level)) > 0.01 * ladder.macs(ladder.top):
        ladder.search(budget)
    masks = []
    for item, margin, count in zip(logits, margins, ladder.counts(), strict=True):
        kept = np.argsort(-margin, kind="stable")[:count]
        mask = np.zeros(len(margin), dtype=np.float32)
        mask[kept] = 1
        masks.append(torch.from_numpy(mask).to(item))
    return masks
