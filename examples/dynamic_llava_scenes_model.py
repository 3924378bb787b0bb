"""The networks of `dynamic_llava_scenes.py`: vision tower with its teaching heads, dense LLaVA, random control."""

import torch
from dynamic_llava_scenes_data import COLOURS, FIELDS, IMAGE_SIZE, IMAGE_TOKENS, PATCH_SIZE, SHAPES, SIZES
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    set_seed,
)


TOWER_WIDTH, TEXT_WIDTH, SEED = 128, 96, 0


class TowerWithHeads(nn.Module):
    """The vision tower with one linear head a fact; every patch names what lies in its cell of the grid."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.tower = CLIPVisionModel(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        classes = (7, len(SIZES) + 1, len(COLOURS) + 1, len(SHAPES) + 1, len(FIELDS) + 1, len(FIELDS) + 1)
        self.heads = nn.ModuleList(nn.Linear(config.hidden_size, count) for count in classes)

    def forward(self, pixel_values, labels):
        """Loss, and the share of right names of each kind among the patches of occupied places."""
        states = self.norm(self.tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:])
        logits = [head(states) for head in self.heads]
        losses = [nn.functional.cross_entropy(x.flatten(0, 1), labels[..., i].flatten()) for i, x in enumerate(logits)]
        there = labels[..., 0] > 0
        right = [(x.argmax(-1) == labels[..., i])[there].float().mean() for i, x in enumerate(logits)]
        return {"loss": sum(losses), "right": torch.stack(right)}


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=2 * TOWER_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu_pytorch_tanh",
        initializer_range=0.04,
    )


def build_dense(processor, tower):
    """A stock LLaVA around the trained tower: CLIP-type vision, six Llama-type layers, fresh decoder."""
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    text = LlamaConfig(
        vocab_size=96,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.04,
        **ids,
    )
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_id=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        projector_hidden_act="gelu",
        **ids,
    )
    set_seed(SEED)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False)
    model.generation_config.update(max_new_tokens=130, do_sample=False, suppress_tokens=[config.image_token_id], **ids)
    return model


class RandomTextScores(nn.Module):
    """Keeps each word by chance: stands in for the learned predictor as a control and has no parameters."""

    def __init__(self, keep_rate: float):
        super().__init__()
        self.keep_rate, self.random = keep_rate, torch.Generator().manual_seed(SEED)

    def forward(self, hidden_states):
        """Decide by chance, in the form of the predictor's two scores."""
        keep = torch.rand(hidden_states.shape[:-1], generator=self.random) < self.keep_rate
        return torch.where(keep, 20.0, -20.0)[..., None] * torch.tensor([1.0, -1.0])  # (batch, tokens, 2)
