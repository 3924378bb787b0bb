"""The equations of Dynamic-LLaVA (arXiv 2412.00876) as pure functions on tensors: scores in, decisions out."""

import math
from itertools import product

import torch
import torch.nn.functional as F


# Largest block of attention scores that the backward pass of `masked_attention` holds at once, in elements.
SCORE_BLOCK = 2**25
# Queries of one block: later keys of a block are never computed.
QUERY_BLOCK = 128


def count_kept_tokens(tokens: int, keep_rate: float, budget: int | None = None) -> int:
    """Number of tokens of an image that survive (Sec. 3.2).

    Args:
        tokens (`int`): Tokens of the image.
        keep_rate (`float`): Share that is kept, in `(0, 1]`.
        budget (`int`, *optional*): Number of tokens instead of a share; wins over `keep_rate`.

    Returns:
        `int`: `int(tokens * keep_rate)` or the budget, at least 1 and at most `tokens`. Products that miss an integer
        by rounding alone count as that integer (`100 * 0.29` is 29).
    """
    kept = budget if budget is not None else math.floor(round(tokens * keep_rate, 6))
    return min(max(kept, 1), tokens)


def select_tokens(logits: torch.Tensor, kept: int) -> torch.Tensor:
    """Index the tokens with the highest keep probability in their original order (Sec. 3.2).

    Args:
        logits (`torch.FloatTensor` of shape `(images, tokens, 2)`): Raw scores, column 0 = keep.
        kept (`int`): Tokens that survive, in `[1, tokens]`.

    Returns:
        `torch.LongTensor` of shape `(images, kept)`: positions on the token axis, increasing.
    """
    scores = logits.float().log_softmax(dim=-1)[..., 0]
    return scores.topk(kept, dim=-1).indices.sort(dim=-1).values


def decide_text(logits: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """Whether the key and value of a generated token are kept: P(keep) above a threshold; a tie drops (Sec. 3.2).

    Args:
        logits (`torch.FloatTensor` of shape `(..., 2)`): Raw scores, column 0 = keep, column 1 = drop.
        threshold (`float`): In `[0, 1]`; 0.5 compares the two scores.

    Returns:
        `torch.BoolTensor` of shape `(...)`: True = kept.
    """
    margin = logits[..., 0].float() - logits[..., 1].float()
    if threshold <= 0:
        return torch.ones_like(margin, dtype=torch.bool)
    if threshold >= 1:
        return torch.zeros_like(margin, dtype=torch.bool)
    return margin > math.log(threshold / (1 - threshold))


def sample_mask(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Draw hard keep decisions with the straight-through Gumbel-softmax (Sec. 3.3).

    Args:
        logits (`torch.FloatTensor` of shape `(..., 2)`): Raw scores, column 0 = keep.
        temperature (`float`): Above 0; lower is closer to a hard choice.

    Returns:
        `torch.FloatTensor` of shape `(...)`: 1 = kept, 0 = dropped, with the gradient of the soft probability.
    """
    return F.gumbel_softmax(logits.float().log_softmax(dim=-1), tau=temperature, hard=True)[..., 0]


def gumbel_temperature(start: float, end: float, progress: float) -> float:
    """Temperature at a share of training (Sec. 4.1): `start * (end / start) ** progress`, progress in `[0, 1]`."""
    return start * (end / start) ** progress


def right_align(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather index that moves the kept tokens of each row to its end, in their order.

    Args:
        keep (`torch.BoolTensor` of shape `(batch, tokens)`): True = kept.

    Returns:
        `index` (`torch.LongTensor` of shape `(batch, kept)`, `kept` that of the longest row) and `valid`
        (`torch.BoolTensor` of the same shape): False where a shorter row is filled up on its left.
    """
    kept = int(keep.sum(dim=1).max())
    index = keep.long().argsort(dim=1, stable=True)[:, keep.shape[1] - kept :]
    return index, keep.gather(1, index)


def find_answers(labels: torch.Tensor, attended: torch.Tensor, is_image: torch.Tensor) -> torch.Tensor:
    """Find the answer tokens, the only ones whose keep decision is learned from text (Sec. 3.3).

    The answer of a row is what is attended, labelled, no image token and after the last attended position whose label
    is -100: earlier answers of a conversation count as prompt, trailing padding does not matter.

    Args:
        labels (`torch.LongTensor` of shape `(batch, tokens)`): -100 = not a target.
        attended (`torch.BoolTensor` of shape `(batch, tokens)`): False = padding.
        is_image (`torch.BoolTensor` of shape `(batch, tokens)`): True = image token.

    Returns:
        `torch.BoolTensor` of shape `(batch, tokens)`: True = answer token.

    Raises:
        ValueError: If a row has no attended position with label -100, or the shapes differ.
    """
    if labels.shape != attended.shape:
        raise ValueError(
            f"`labels` must have the shape of the tokens, got {tuple(labels.shape)} for {tuple(attended.shape)}: "
            "label every token, with -100 where there is no target."
        )
    prompt = attended & (labels == -100)
    if not bool(prompt.any(dim=1).all()):
        row = int((~prompt.any(dim=1)).nonzero()[0])
        raise ValueError(
            f"`labels` must tell the prompt from the answer, got row {row} without any -100 among its attended tokens"
            ": mask the prompt with -100."
        )
    columns = torch.arange(labels.shape[1], device=labels.device)
    last_prompt = torch.where(prompt, columns, -1).amax(dim=1, keepdim=True)
    return attended & (labels != -100) & ~is_image & (columns > last_prompt)


def keep_rate_loss(kept_shares: torch.Tensor, targets: torch.Tensor | float) -> torch.Tensor:
    """Mean squared distance between the shares of kept tokens and their targets (Eq. 9).

    Args:
        kept_shares (`torch.FloatTensor` of shape `(samples,)`): Mean of each sample's mask.
        targets (`torch.FloatTensor` of shape `(samples,)` or `float`): Target shares, in `(0, 1]`.

    Returns:
        `torch.FloatTensor` of shape `()`; 0 for no sample.
    """
    if kept_shares.numel() == 0:
        return kept_shares.sum()
    return ((kept_shares - targets) ** 2).mean()


def prefill_flops(tokens: int, hidden_size: int, layers: int) -> int:
    """The paper's FLOPs of `layers` decoder layers over `tokens` tokens: `32 N C^2 + 4 N^2 C` a layer (Sec. 4)."""
    return layers * (32 * tokens * hidden_size**2 + 4 * tokens**2 * hidden_size)


def visible_keys(visible: torch.Tensor) -> torch.Tensor:
    """Attention mask of the training path: a query sees itself and the earlier visible keys (Eq. 7).

    Args:
        visible (`torch.BoolTensor` of shape `(batch, tokens)`): True = kept and no padding.

    Returns:
        `torch.BoolTensor` of shape `(batch, 1, tokens, tokens)`: True = query (axis 2) sees key (axis 3).
    """
    tokens = visible.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=visible.device).tril()
    itself = torch.eye(tokens, dtype=torch.bool, device=visible.device)
    return ((visible[:, None, :] & causal) | itself)[:, None]


class MaskedAttention(torch.autograd.Function):
    """Attention over the kept keys, differentiable in the keep mask.

    With `e_ij = exp(q_i k_j * scale)` and the mask `M_ij = m_j` for earlier keys, 1 for `i = j`, 0 for later ones, the
    output is `o_i = sum_j e_ij M_ij v_j / sum_j e_ij M_ij`. Its derivative by the mask is
    `do_i / dm_j = e_ij / Z_i * (v_j - o_i)`, with `Z_i` the denominator: it is defined for dropped keys too.
    """

    @staticmethod
    def forward(ctx, query, key, value, policy, valid, scaling):  # noqa: ANN001, ANN205 - torch's own signature
        """Attend, with the fused kernel of the host."""
        visible = policy > 0.5
        if valid is not None:
            visible = visible & valid
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=visible_keys(visible), scale=scaling)
        ctx.save_for_backward(query, key, value, output, visible, valid)
        ctx.scaling = scaling
        ctx.policy_dtype = policy.dtype
        return output

    @staticmethod
    def backward(ctx, grad_output):  # noqa: ANN001, ANN205
        """Recompute the scores block by block, so that no `(tokens, tokens)` matrix outlives the step."""
        query, key, value, output, visible, valid = ctx.saved_tensors
        batch, heads, tokens, _ = query.shape
        wide = torch.promote_types(query.dtype, torch.float32)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(states, dtype=wide) for states in (key, value))
        grad_policy = torch.zeros(batch, tokens, dtype=ctx.policy_dtype, device=query.device)
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril(diagonal=-1)
        queries = min(tokens, QUERY_BLOCK)
        fitting = max(1, SCORE_BLOCK // (queries * tokens))
        some_heads, some_rows = min(heads, fitting), max(1, fitting // heads)
        for row in range(0, batch, some_rows):
            rows = slice(row, row + some_rows)
            hidden = ~visible_keys(visible[rows])  # (rows, 1, tokens, tokens)
            later = ~causal if valid is None else ~(causal & valid[rows, None, None, :])
            for head, start in product(range(0, heads, some_heads), range(0, tokens, queries)):
                end = min(start + queries, tokens)
                part = (rows, slice(head, head + some_heads))
                asking, asked = (*part, slice(start, end)), (*part, slice(end))  # no query sees a later key
                unseen = hidden[..., start:end, :end]
                q, k, v, g = query[asking], key[asked], value[asked], grad_output[asking].to(query.dtype)
                scores = (q @ k.transpose(2, 3)).to(wide) * ctx.scaling  # (rows, heads, queries, keys)
                total = scores.masked_fill(unseen, -math.inf).logsumexp(dim=-1, keepdim=True)
                # a dropped key may outweigh all kept ones: its virtual weight is capped, kept weights are at most 1
                weight = scores.sub_(total).clamp_(max=20.0).exp_()
                inner = (g.to(wide) * output[asking].to(wide)).sum(dim=-1, keepdim=True)
                change = (g @ v.transpose(2, 3)).to(wide).sub_(inner).mul_(weight)
                each = change.sum(dim=1, keepdim=True).masked_fill_(later[..., start:end, :end], 0.0)
                grad_policy[rows, :end] += each.sum(dim=(1, 2))
                weight = weight.masked_fill_(unseen, 0.0).to(q.dtype)
                change = change.masked_fill_(unseen, 0.0).to(q.dtype)
                grad_value[asked] += weight.transpose(2, 3) @ g
                grad_query[asking] = (change @ k) * ctx.scaling
                grad_key[asked] += (change.transpose(2, 3) @ q) * ctx.scaling
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_policy, None, None


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    policy: torch.Tensor,
    valid: torch.Tensor | None = None,
    scaling: float | None = None,
) -> torch.Tensor:
    """Exact causal attention in which dropped keys are seen by themselves alone (Eq. 7).

    The authors' code adds `eps / N` to every weight, by which dropped and future keys leak; here nothing leaks.

    Args:
        query (`torch.FloatTensor` of shape `(batch, heads, tokens, head_dim)`): Queries.
        key (`torch.FloatTensor` of shape `(batch, heads, tokens, head_dim)`): Keys.
        value (`torch.FloatTensor` of shape `(batch, heads, tokens, head_dim)`): Values.
        policy (`torch.FloatTensor` of shape `(batch, tokens)`): 1 = kept, 0 = dropped; receives a gradient.
        valid (`torch.BoolTensor` of shape `(batch, tokens)`, *optional*): False = padding.
        scaling (`float`, *optional*): Factor on the scores, `head_dim ** -0.5` by default.

    Returns:
        `torch.FloatTensor` of shape `(batch, heads, tokens, head_dim)`.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = query.device.type
    if torch.is_autocast_enabled(device):  # rotary embeddings leave queries and keys wider than values
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return MaskedAttention.apply(query, key, value, policy, valid, scaling)


__all__ = [
    "count_kept_tokens",
    "decide_text",
    "find_answers",
    "gumbel_temperature",
    "keep_rate_loss",
    "masked_attention",
    "prefill_flops",
    "right_align",
    "sample_mask",
    "select_tokens",
    "visible_keys",
]
