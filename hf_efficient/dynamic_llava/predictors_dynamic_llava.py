"""The two score predictors of Dynamic-LLaVA (Sec. 3.2): plain modules that know no host model."""

import torch
import torch.nn.functional as F
from torch import nn


def _scores_head(dim: int) -> list[nn.Module]:
    return [
        nn.Linear(dim, dim // 2),
        nn.GELU(),
        nn.Linear(dim // 2, dim // 4),
        nn.GELU(),
        nn.Linear(dim // 4, 2),
    ]


class PredictorAttention(nn.Module):
    """Full self-attention over the tokens of one image; fused q, k, v without bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Mix the tokens of each image, `(images, tokens, dim)` to `(images, tokens, dim)`."""
        images, tokens, dim = hidden_states.shape
        qkv = self.qkv(hidden_states).view(images, tokens, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (images, heads, tokens, head_dim) each
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(images, tokens, dim))


class PredictorMLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(..., dim)` to `(..., dim)`."""
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class PredictorBlock(nn.Module):
    """Pre-norm transformer block without position embedding and without dropout."""

    def __init__(self, dim: int, num_heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = PredictorAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = PredictorMLP(dim, intermediate_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(images, tokens, dim)` to `(images, tokens, dim)`."""
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        return hidden_states + self.mlp(self.norm2(hidden_states))


def _follow(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """States in the dtype of a weight and on its device, unless that is only known when its layer runs (offload)."""
    return hidden_states.to(weight.dtype) if weight.is_meta else hidden_states.to(weight)


class ImageScorePredictor(nn.Module):
    """Scores every token of an image against the others of the same image (Dynamic-LLaVA, Sec. 3.2).

    Half of the channels stay with their token, the other half is replaced by its mean over the image, so that a token
    is judged against the whole.

    Args:
        input_size (`int`): Hidden size of the language model.
        dim (`int`): Width of the predictor, a multiple of 4.
        num_heads (`int`): Attention heads.
        intermediate_size (`int`): Width of the feed-forward layers.
        num_layers (`int`): Number of transformer blocks.
    """

    def __init__(self, input_size: int, dim: int, num_heads: int, intermediate_size: int, num_layers: int) -> None:
        super().__init__()
        self.down_mlp = nn.Sequential(nn.LayerNorm(input_size), nn.Linear(input_size, dim), nn.GELU())
        self.transformer = nn.ModuleList(PredictorBlock(dim, num_heads, intermediate_size) for _ in range(num_layers))
        self.output_mlp = nn.Sequential(*_scores_head(dim))

    def forward(self, hidden_states: torch.Tensor, policy: torch.Tensor | None = None) -> torch.Tensor:
        """Score the tokens of images of one size.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(images, tokens, input_size)`): States entering the sparse
                layer; cast to the predictor's own dtype.
            policy (`torch.FloatTensor` of shape `(images, tokens, 1)`, *optional*): Decision of an earlier stage,
                1 = kept; scales the input and weighs the mean. All ones when left out.

        Returns:
            `torch.FloatTensor` of shape `(images, tokens, 2)`: raw logits, column 0 = keep, column 1 = drop.
        """
        hidden_states = self.down_mlp(_follow(hidden_states, self.down_mlp[0].weight))
        if policy is not None:
            hidden_states = hidden_states * policy
        for block in self.transformer:
            hidden_states = block(hidden_states)
        own, shared = hidden_states.chunk(2, dim=-1)  # (images, tokens, dim / 2) each
        if policy is None:
            shared = shared.mean(dim=1, keepdim=True)
        else:
            shared = (shared * policy).sum(dim=1, keepdim=True) / policy.sum(dim=1, keepdim=True)
        shared = shared.expand_as(own)
        return self.output_mlp(torch.cat([own, shared], dim=-1))


class TextScorePredictor(nn.Module):
    """Scores every text token alone (Dynamic-LLaVA, Sec. 3.2).

    Args:
        input_size (`int`): Hidden size of the language model.
        dim (`int`): Width of the predictor, a multiple of 4.
    """

    def __init__(self, input_size: int, dim: int) -> None:
        super().__init__()
        self.output_mlp = nn.Sequential(
            nn.LayerNorm(input_size), nn.Linear(input_size, dim), nn.GELU(), *_scores_head(dim)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Score tokens, `(..., input_size)` to raw logits `(..., 2)`, column 0 = keep, column 1 = drop."""
        return self.output_mlp(_follow(hidden_states, self.output_mlp[0].weight))


__all__ = ["ImageScorePredictor", "TextScorePredictor"]
