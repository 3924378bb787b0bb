"""Before a LLaVA learns to answer: a CLIP-type tower that learns shapes, and how tower and decoder are joined."""

import math
import random
from collections.abc import Callable

import torch
from dynamic_llava_easy_vqa_data import COLORS, PATCH, SHAPES, SIZE, EasyVQA
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaForConditionalGeneration, LlavaProcessor


class TowerWithHeads(nn.Module):
    """A CLIP vision model and a linear reader of shape and colour on each patch that shows a piece of the shape."""

    def __init__(self, config: CLIPVisionConfig, patches_seen: int = 20):
        super().__init__()
        self.tower = CLIPVisionModel(config)
        self.reader = nn.Sequential(
            nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, len(SHAPES) + len(COLORS))
        )
        self.patches_seen = patches_seen
        for name, weight in self.tower.named_parameters():
            if weight.ndim == 2 and "position" not in name:
                nn.init.trunc_normal_(weight, std=0.8 / math.sqrt(weight.shape[1]))
        nn.init.normal_(self.tower.embeddings.patch_embedding.weight, std=1 / math.sqrt(3 * PATCH**2))
        with torch.no_grad():
            self.tower.embeddings.position_embedding.weight[1:] = 0.5 * grid_waves(SIZE // PATCH, config.hidden_size)

    def forward(self, pixel_values: Tensor, inked: Tensor, shape: Tensor, color: Tensor) -> dict[str, Tensor]:
        """`inked (batch, 64)` marks the patches that show the shape; unknown labels are -100."""
        hidden = self.tower.embeddings(pixel_values)
        if self.training and random.random() < 0.9:
            chosen = (inked + torch.rand_like(inked)).topk(self.patches_seen, 1).indices
            inked = inked.gather(1, chosen)
            chosen = chosen[..., None].expand(-1, -1, hidden.shape[-1])
            hidden = torch.cat([hidden[:, :1], hidden[:, 1:].gather(1, chosen)], 1)
        hidden = self.tower.encoder(inputs_embeds=self.tower.pre_layrnorm(hidden)).last_hidden_state[:, 1:]
        logits = self.reader(hidden)  # (batch, patches, 11)
        weight = inked / inked.sum(1, keepdim=True)
        losses = []
        for part, label in zip(logits.split([len(SHAPES), len(COLORS)], 2), (shape, color), strict=True):
            label = label[:, None].expand(part.shape[:2])
            losses.append((F.cross_entropy(part.transpose(1, 2), label, reduction="none") * weight).sum(1))
        return {"loss": (losses[0] + 0.5 * losses[1]).mean(), "logits": (logits * weight[..., None]).sum(1)}


def grid_waves(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column `(side * side, width)`: positions a tower need not find out by itself."""
    angles = (torch.arange(side) + 0.5)[:, None] * math.pi * 2.0 ** torch.linspace(-1, 3, width // 4) / side
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # (side, width / 2)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, width)


def collate_images(data: EasyVQA, augment: bool = True) -> Callable[[list[int]], dict[str, Tensor]]:
    """Collator from image numbers to the inputs of `TowerWithHeads`."""

    def collate(rows: list[int]) -> dict[str, Tensor]:
        images = torch.tensor(rows)
        pixels = data.pixels(images, augment)
        relief = (pixels - data.background[images]).abs().sum(1, keepdim=True)
        inked = F.max_pool2d((relief > 0.1).float(), PATCH).flatten(1)
        return {"pixel_values": pixels, "inked": inked, "shape": data.shape[images], "color": data.color[images]}

    return collate


@torch.no_grad()
def start_alike(model: LlavaForConditionalGeneration) -> None:
    """Start every attention layer with equal query and key weights: tokens look at what resembles them."""
    width = model.config.text_config.hidden_size
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        key = torch.randn_like(attention.k_proj.weight) / math.sqrt(width)
        attention.k_proj.weight.copy_(key)
        heads = key.view(-1, attention.head_dim, width).repeat_interleave(attention.num_key_value_groups, 0)
        attention.q_proj.weight.copy_(heads.reshape(-1, width))


def align_projector(
    model: LlavaForConditionalGeneration, batch: dict[str, Tensor], processor: LlavaProcessor, steps: int
) -> float:
    """Map each patch to the sum of the word embeddings of its shape and colour, background to that of `<image>`.

    Trains the projector alone, as LLaVA's own first stage does; gives the last loss as a share of the variance.
    """
    with torch.no_grad():
        tower = model.model.vision_tower.eval()
        parts = [tower(pixels).last_hidden_state[:, 1:] for pixels in batch["pixel_values"].split(200)]
        words = model.get_input_embeddings().weight
        ids = processor.tokenizer.convert_tokens_to_ids
        shapes, colors = (words[ids(list(names))] for names in (SHAPES, COLORS))
        shown = (shapes[batch["shape"]] + colors[batch["color"]])[:, None]
        inked = batch["inked"][..., None]
        target = (inked * shown + (1 - inked) * words[processor.image_token_id]).flatten(0, 1)
    features, inked = torch.cat(parts).flatten(0, 1), inked.flatten()
    projector, scale = model.model.multi_modal_projector, target.var()
    optimizer = torch.optim.AdamW(projector.parameters(), lr=3e-3)
    where = [inked.bool().nonzero()[:, 0], (1 - inked).nonzero()[:, 0]]
    for _ in range(steps):
        chosen = torch.cat([rows[torch.randint(len(rows), (1024,))] for rows in where])
        loss = ((projector(features[chosen]) - target[chosen]) ** 2).mean() / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()
