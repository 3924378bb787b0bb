"""Tiny sparse LLaVAs: 16 image tokens, 4 decoder layers, predictors with clear opinions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

from hf_efficient import DynamicLlavaForConditionalGeneration


IMAGE, PAD, TOKENS = 120, 0, 16
TEXT = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
BACKBONES = tuple(TEXT)


def text_config(backbone: str = "llama", **kwargs: Any) -> Any:
    settings = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": PAD,
    }
    if backbone == "mistral":
        settings["sliding_window"] = None
    return TEXT[backbone](**{**settings, **kwargs})


def llava_config(backbone: str = "llama", **kwargs: Any) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        projection_dim=16,
    )
    return LlavaConfig(
        text_config=text_config(backbone, **kwargs),
        vision_config=vision,
        image_token_index=IMAGE,
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
    )


@pytest.fixture
def make_llava() -> Callable[..., LlavaForConditionalGeneration]:
    """A stock LLaVA whose logits differ enough for greedy choices to be clear."""

    def make(backbone: str = "llama", attention: str = "sdpa", **kwargs: Any) -> LlavaForConditionalGeneration:
        torch.manual_seed(0)
        config = llava_config(backbone, **kwargs)
        config._attn_implementation = attention
        model = LlavaForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(6)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = PAD
        model.generation_config.suppress_tokens = [IMAGE]
        return model

    return make


def opinionated(model: DynamicLlavaForConditionalGeneration) -> DynamicLlavaForConditionalGeneration:
    """Give the predictors random weights large enough for margins far above rounding errors."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name in ("image_score_predictor", "output_text_score_predictor"):
            for parameter in getattr(model.model, name).parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5 * 2)
        # about as many tokens kept as dropped
        text = model.model.output_text_score_predictor
        logits = text(model.get_input_embeddings().weight)
        text.output_mlp[-1].bias[1] += (logits[:, 0] - logits[:, 1]).median()
    return model


@pytest.fixture
def make_sparse(make_llava: Callable) -> Callable[..., DynamicLlavaForConditionalGeneration]:
    """A sparse LLaVA on top of `make_llava`; keyword arguments are settings."""

    def make(backbone: str = "llama", attention: str = "sdpa", **settings: Any) -> Any:
        defaults = {
            "vision_keep_rate": 0.3,
            "predictor_hidden_size": 16,
            "predictor_num_heads": 2,
            "predictor_intermediate_size": 32,
            "predictor_num_layers": 1,
        }
        text = {
            name: settings.pop(name) for name in list(settings) if name in ("sliding_window", "use_sliding_window")
        }
        llava = make_llava(backbone, attention, **text)
        return opinionated(DynamicLlavaForConditionalGeneration.from_llava(llava, **{**defaults, **settings}))

    return make


@pytest.fixture
def make_batch() -> Callable[..., dict[str, torch.Tensor]]:
    """Prompts as rows: an int is a number of text tokens, "image" an image; `pad` is the side that is filled up."""

    def make(*rows: list[int | str], pad: str = "left", seed: int = 3) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        sequences, pixels = [], []
        for row in rows:
            ids: list[int] = [1]
            for part in row:
                if part == "image":
                    ids += [IMAGE] * TOKENS
                    pixels.append(torch.randn(3, 16, 16, generator=generator))
                else:
                    ids += torch.randint(3, 110, (part,), generator=generator).tolist()
            sequences.append(torch.tensor(ids))
        longest = max(map(len, sequences))
        inputs = torch.full((len(rows), longest), PAD)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for row, ids in enumerate(sequences):
            where = slice(longest - len(ids), longest) if pad == "left" else slice(0, len(ids))
            inputs[row, where] = ids
            mask[row, where] = 1
        batch = {"input_ids": inputs, "attention_mask": mask}
        if pixels:
            batch["pixel_values"] = torch.stack(pixels)
        return batch

    return make


@pytest.fixture
def word_processor() -> Any:
    """A `LlavaProcessor` over the words w0 .. w127, padding on the left, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(128) if index not in (PAD, 1, 2, IMAGE)}
    tokenizer = Tokenizer(models.WordLevel({**words, "<pad>": PAD, "<s>": 1, "</s>": 2, "<image>": IMAGE}, "w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    template = (
        "{% for message in messages %}{% for part in message.content %}"
        "{% if part.type == 'image' %} <image> {% else %}{{ part.text }} {% endif %}"
        "{% endfor %}{% endfor %}"
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=fast,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
