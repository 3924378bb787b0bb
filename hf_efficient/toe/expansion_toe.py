"""Token Expansion on tensors: spread, expand, merge (arXiv 2404.00672, Sec. 3.2-3.4). Knows no model and no trainer.

Letters: N patch tokens of C channels, r_0 the initial and r_s the keep rate of stage s, k the sub-steps of a stage.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .configuration_toe import ToEConfig, check_config


class ExpandedTokens(NamedTuple):
    """What a stage hands on.

    Args:
        tokens (`torch.FloatTensor` of shape `(batch, n_out, dim)`): Prefix, kept patches, suffix.
        index (`torch.LongTensor` of shape `(batch, n_out)`): Input row of every output row.
    """

    tokens: Tensor
    index: Tensor


class Selection(NamedTuple):
    """Which rows stay and who takes over the others.

    Args:
        index (`torch.LongTensor` of shape `(batch, n_out)`): Input row of every output row.
        owner (`torch.LongTensor` of shape `(batch, n_in)`): Output row that every input row ends in.
    """

    index: Tensor
    owner: Tensor


def count_kept_tokens(num_tokens: int, keep_rate: float) -> int:
    """`int(num_tokens * keep_rate)`, with decimal rates taken at their word: `int(100 * 0.29)` is 29.

    Args:
        num_tokens (`int`): Patch tokens N.
        keep_rate (`float`): Rate r in `(0, 1]`.

    Returns:
        `int`: Tokens kept.
    """
    return int(num_tokens * keep_rate + 1e-6)


def stage_additions(num_tokens: int, stage: int, config: ToEConfig) -> tuple[int, list[int]]:
    """Tokens a stage starts from, and how many each sub-step up to its end adds (Sec. 3.3).

    Args:
        num_tokens (`int`): Patch tokens N.
        stage (`int`): Stage s, from 1.
        config (`ToEConfig`): The schedule.

    Returns:
        `tuple`: `int(N r_0)`, and one number for each of the `s * k` sub-steps, the earlier stages first.

    Raises:
        ValueError: If not a single token would be kept.
    """
    first = count_kept_tokens(num_tokens, config.initial_keep_rate)
    if first < 1:
        raise ValueError(
            f"`initial_keep_rate` must keep at least one of the {num_tokens} patch tokens, but "
            f"{config.initial_keep_rate} * {num_tokens} is below 1; raise it to {1 / max(num_tokens, 1):.3g} or more."
        )
    additions, kept = [], first
    for rate in config.keep_rates[:stage]:
        added = count_kept_tokens(num_tokens, rate) - kept
        share = added // config.expansion_steps
        additions += [share] * (config.expansion_steps - 1) + [added - share * (config.expansion_steps - 1)]
        kept += added
    return first, additions


@torch.no_grad()
def score_similarity(patches: Tensor, distance: str) -> Tensor:
    """Likeness of all pairs of L2-normalised tokens, higher is nearer; a zero token represents nobody.

    `"cosine"` a . b, `"euclidean"` -|a - b|^2, `"manhattan"` -sum |a - b|. The authors use the two distances as if
    they were likenesses (they add the nearest token and merge into the farthest); here they are distances.

    Args:
        patches (`torch.FloatTensor` of shape `(batch, N, dim)`): Tokens; scored in float32 at least.
        distance (`str`): Name of the distance.

    Returns:
        `torch.FloatTensor` of shape `(batch, N, N)`: Row = the token that represents, column = the one represented.
        Rows of zero tokens are -inf.
    """
    patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
    length = torch.linalg.vector_norm(patches, dim=-1, keepdim=True)  # (batch, N, 1)
    unit = patches / length.clamp_min(torch.finfo(patches.dtype).tiny)
    if distance == "manhattan":
        scores = -torch.cdist(unit, unit, p=1.0)
    else:
        scores = unit @ unit.transpose(1, 2)  # (batch, N, N)
        if distance == "euclidean":
            square = (length > 0).to(scores.dtype)  # |a|^2 after normalising
            scores = 2 * scores - square - square.transpose(1, 2)
    return scores.masked_fill_(length == 0, -torch.inf)


@torch.no_grad()
def expand_tokens(scores: Tensor, num_first: int, additions: list[int]) -> Tensor:
    """Grow the evenly spread tokens by those least like any token already in (Sec. 3.2, 3.3).

    The seeds are `floor(i * N / num_first)`: even for every rate, and the authors' for rates of 1/integer.

    Args:
        scores (`torch.FloatTensor` of shape `(batch, N, N)`): Likeness, see `score_similarity`.
        num_first (`int`): Seeds.
        additions (`list` of `int`): Tokens that each sub-step adds.

    Returns:
        `torch.LongTensor` of shape `(batch, kept)`: Seeds in ascending position, then the rest in order of addition.
    """
    batch, num_tokens = scores.shape[:2]
    seeds = torch.arange(num_first, device=scores.device) * num_tokens // num_first
    best = scores[:, seeds].amax(dim=1)  # (batch, N): likeness to the nearest token that is in
    best[:, seeds] = torch.inf
    selected = [seeds.expand(batch, -1)]
    for position, count in enumerate(additions):
        if count == 0:
            continue
        added = best.topk(count, dim=1, largest=False, sorted=True).indices  # (batch, count)
        selected.append(added)
        if position + 1 < len(additions):
            rows = scores.gather(1, added[..., None].expand(-1, -1, num_tokens))  # (batch, count, N)
            best = torch.maximum(best, rows.amax(dim=1)).scatter_(1, added, torch.inf)
    return torch.cat(selected, dim=1)


@torch.no_grad()
def assign_tokens(scores: Tensor, selected: Tensor) -> Tensor:
    """Give every token the selected token it is most like; a selected one belongs to itself (Sec. 3.4).

    Args:
        scores (`torch.FloatTensor` of shape `(batch, N, N)`): Likeness, see `score_similarity`.
        selected (`torch.LongTensor` of shape `(batch, kept)`): Selected tokens.

    Returns:
        `torch.LongTensor` of shape `(batch, N)`: Place among the selected tokens.
    """
    rows = scores.gather(1, selected[..., None].expand(-1, -1, scores.shape[2]))  # (batch, kept, N)
    places = torch.arange(selected.shape[1], device=selected.device).expand_as(selected)
    return rows.argmax(dim=1).scatter_(1, selected, places)


def merge_tokens(tokens: Tensor, owner: Tensor, num_out: int) -> Tensor:
    """Mean of all tokens that end in the same output row (Sec. 3.4); the only step with a gradient.

    Args:
        tokens (`torch.FloatTensor` of shape `(batch, n_in, dim)`): All rows, prefix and suffix among them.
        owner (`torch.LongTensor` of shape `(batch, n_in)`): Output row of every row; each output row occurs.
        num_out (`int`): Output rows.

    Returns:
        `torch.FloatTensor` of shape `(batch, num_out, dim)`
    """
    batch, num_in, dim = tokens.shape
    wide = torch.promote_types(tokens.dtype, torch.float32)  # half precision would round every single addition
    # rows of the whole batch in one index: both directions then move whole rows, without a sum in the backward pass
    flat = (owner + torch.arange(batch, device=owner.device)[:, None] * num_out).reshape(-1)  # (batch * n_in,)
    total = tokens.new_zeros(batch * num_out, dim, dtype=wide)
    total = total.scatter_add(0, flat[:, None].expand(-1, dim), tokens.to(wide).reshape(-1, dim))
    ones = total.new_ones(1).expand(batch * num_in)
    count = total.new_zeros(batch * num_out).scatter_add_(0, flat, ones)
    return (total / count[:, None]).view(batch, num_out, dim).to(tokens.dtype)


def restore_tokens(tokens: Tensor, index: Tensor, length: int, owner: Tensor | None = None) -> Tensor:
    """Put kept tokens back at their place on the full grid, for heads that read every position.

    Args:
        tokens (`torch.FloatTensor` of shape `(batch, n_out, dim)`): Rows after the encoder.
        index (`torch.LongTensor` of shape `(batch, n_out)`): Input row of every row, see `ExpandedTokens`.
        length (`int`): Rows of the full grid, prefix and suffix included.
        owner (`torch.LongTensor` of shape `(batch, length)`, *optional*): Row of `tokens` that every position ended
            in, see `TokenExpansion.select`. Positions that were not kept get its value; without it they are zero.

    Returns:
        `torch.FloatTensor` of shape `(batch, length, dim)`

    Raises:
        ValueError: If the shapes do not fit together, or `index` names rows that `length` does not have (seen on a
            CPU; a GPU stops by itself).
    """
    if index.shape != tokens.shape[:2]:
        raise ValueError(
            f"`index` must have one row number for each of the {tuple(tokens.shape[:2])} tokens (batch, n_out), got "
            f"shape {tuple(index.shape)}."
        )
    if length < tokens.shape[1]:
        raise ValueError(f"`length` must be at least the {tokens.shape[1]} rows of `tokens`, got {length}.")
    dim = tokens.shape[2]
    if owner is not None:
        if owner.shape != (tokens.shape[0], length):
            raise ValueError(
                f"`owner` must have shape {(tokens.shape[0], length)} (batch, length), got {tuple(owner.shape)}."
            )
        return tokens.gather(1, owner[..., None].expand(-1, -1, dim))
    grid = tokens.new_zeros(tokens.shape[0], length, dim)
    try:
        return grid.scatter(1, index[..., None].expand(-1, -1, dim), tokens)
    except RuntimeError as error:
        raise ValueError(
            f"`index` must hold row numbers (int64) from 0 to `length` - 1 = {length - 1}, got {index.dtype} up to "
            f"{index.max().item()}; count prefix and suffix rows in `length`."
        ) from error


class TokenExpansion:
    """The pure operation of a stage: spread, expand, merge.

    With cosine, `initial_keep_rate` 0.25 and the default keep rates the result equals the authors' code on square
    grids of patches, order included (compared in stage 1). Other schedules and numbers of patches keep exactly
    `int(N * r)` tokens, where the authors' sums of truncated differences may keep one or two fewer.

    Args:
        config (`ToEConfig`, *optional*): The schedule; the default one if left out.

    Raises:
        ValueError: If `config` is something else.

    Example:
        >>> expansion = TokenExpansion(ToEConfig())
        >>> expanded = expansion(torch.randn(2, 197, 384), stage=1)
        >>> expanded.tokens.shape, expanded.index.shape
        (torch.Size([2, 99, 384]), torch.Size([2, 99]))
    """

    def __init__(self, config: ToEConfig | None = None) -> None:
        check_config(config)
        self.config = ToEConfig() if config is None else config

    def num_kept(self, num_patches: int, stage: int) -> int:
        """Patch tokens that a stage hands on.

        Args:
            num_patches (`int`): Patch tokens N.
            stage (`int`): Stage from 1; 0 keeps all.

        Returns:
            `int`

        Raises:
            ValueError: If the stage does not exist.
        """
        self._check_stage(stage)
        return num_patches if stage == 0 else count_kept_tokens(num_patches, self.config.keep_rates[stage - 1])

    def select(self, tokens: Tensor, stage: int, num_prefix_tokens: int = 1, num_suffix_tokens: int = 0) -> Selection:
        """Choose the rows of a stage; without gradient, the same for the same input.

        Args:
            tokens (`torch.FloatTensor` of shape `(batch, prefix + N + suffix, dim)`): Encoder rows.
            stage (`int`): Stage from 1; 0 keeps all.
            num_prefix_tokens (`int`): Rows before the patches; kept first and never merged.
            num_suffix_tokens (`int`): Rows behind the patches; kept last and never merged.

        Returns:
            `Selection`

        Raises:
            ValueError: If the stage does not exist, the shape does not fit or no token would be kept.
        """
        num_patches = self._count_patches(tokens, num_prefix_tokens, num_suffix_tokens)
        batch, num_in = tokens.shape[:2]
        rows = torch.arange(num_in, device=tokens.device)
        kept = self.num_kept(num_patches, stage)
        if kept == num_patches:
            every = rows.expand(batch, -1)
            return Selection(index=every, owner=every)
        end = num_prefix_tokens + num_patches
        patches = tokens.detach()[:, num_prefix_tokens:end]
        selected, place = self._choose(patches, stage)
        prefix = rows[:num_prefix_tokens].expand(batch, -1)
        suffix = rows[end:].expand(batch, -1)
        index = torch.cat([prefix, selected + num_prefix_tokens, suffix], dim=1)  # (batch, n_out)
        owner = torch.cat([prefix, place + num_prefix_tokens, suffix - (num_patches - kept)], dim=1)  # (batch, n_in)
        return Selection(index=index, owner=owner)

    def _choose(self, patches: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        first, additions = stage_additions(patches.shape[1], stage, self.config)
        with torch.autocast(patches.device.type, enabled=False):
            scores = score_similarity(patches, self.config.distance)
        selected = expand_tokens(scores, first, additions)
        return selected, assign_tokens(scores, selected)

    def __call__(
        self, tokens: Tensor, stage: int, num_prefix_tokens: int = 1, num_suffix_tokens: int = 0
    ) -> ExpandedTokens:
        """Run a stage on encoder rows.

        Args:
            tokens (`torch.FloatTensor` of shape `(batch, prefix + N + suffix, dim)`): Rows after the first layers.
            stage (`int`): Stage from 1. Stage 0, and a keep rate of 1, return the very input.
            num_prefix_tokens (`int`): Rows before the patches.
            num_suffix_tokens (`int`): Rows behind the patches.

        Returns:
            `ExpandedTokens`: `tokens` `(batch, n_out, dim)` and `index` `(batch, n_out)`.

        Raises:
            ValueError: If the stage does not exist, the shape does not fit or no token would be kept.
        """
        index, owner = self.select(tokens, stage, num_prefix_tokens, num_suffix_tokens)
        if index.shape[1] == tokens.shape[1]:
            return ExpandedTokens(tokens, index)
        return ExpandedTokens(merge_tokens(tokens, owner, index.shape[1]), index)

    def _check_stage(self, stage: int) -> None:
        if not 0 <= stage <= self.config.num_stages:
            raise ValueError(
                f"`stage` must be 0 (all tokens) to {self.config.num_stages}, the number of stages, got {stage}."
            )

    @staticmethod
    def _count_patches(tokens: Tensor, num_prefix_tokens: int, num_suffix_tokens: int) -> int:
        if tokens.dim() != 3:
            raise ValueError(f"`tokens` must have shape (batch, tokens, dim), got {tuple(tokens.shape)}.")
        num_patches = tokens.shape[1] - num_prefix_tokens - num_suffix_tokens
        if num_prefix_tokens < 0 or num_suffix_tokens < 0 or num_patches < 1:
            raise ValueError(
                f"`tokens` must hold at least one patch between {num_prefix_tokens} prefix and {num_suffix_tokens} "
                f"suffix rows, got {tokens.shape[1]} rows."
            )
        return num_patches


class RandomDrop(TokenExpansion):
    """Control for comparisons: as many tokens as a stage of ToE keeps, chosen at random, the others dropped.

    What ToE gains over it is owed to the choice of tokens and to merging the others, not to their number. Draws from
    torch's global generator: neither fit for hosts that recompute hooks (timm with activation checkpointing) nor
    equal in two runs without the same seed, and augmentation that uses the same generator gets other numbers.

    Args:
        config (`ToEConfig`, *optional*): The schedule.
    """

    def __call__(
        self, tokens: Tensor, stage: int, num_prefix_tokens: int = 1, num_suffix_tokens: int = 0
    ) -> ExpandedTokens:
        """Drop tokens at random; arguments, results and errors as for `TokenExpansion`."""
        num_patches = self._count_patches(tokens, num_prefix_tokens, num_suffix_tokens)
        batch, num_in, dim = tokens.shape
        rows = torch.arange(num_in, device=tokens.device).expand(batch, -1)
        kept = self.num_kept(num_patches, stage)
        if kept == num_patches:
            return ExpandedTokens(tokens, rows)
        chosen = torch.rand(batch, num_patches, device=tokens.device).topk(kept, dim=1).indices + num_prefix_tokens
        index = torch.cat([rows[:, :num_prefix_tokens], chosen, rows[:, num_prefix_tokens + num_patches :]], dim=1)
        flat = (index + torch.arange(batch, device=index.device)[:, None] * num_in).reshape(-1)
        kept_rows = tokens.reshape(-1, dim).gather(0, flat[:, None].expand(-1, dim))
        return ExpandedTokens(kept_rows.view(batch, -1, dim), index)
