"""Tiny sparse LLaVAs: 16 image tokens, 4 decoder layers, predictors with clear opinions."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

from hf_efficient import DynamicLlavaForConditionalGeneration


gc.freeze()  # a Trainer collects garbage once a run: the imports, a quarter of a second, need not be searched

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


@pytest.fixture
def make_trainable(make_llava: Callable) -> Callable[..., DynamicLlavaForConditionalGeneration]:
    """A sparse LLaVA as training meets it: small weights, fresh predictors, answers of 4 tokens count as long."""

    def make(backbone: str = "llama", opinions: bool = False, **settings: Any) -> DynamicLlavaForConditionalGeneration:
        llava = make_llava(backbone)
        with torch.no_grad():
            for parameter in llava.parameters():
                if parameter.dim() > 1:
                    parameter.div_(6)
        defaults = {
            "vision_keep_rate": 0.3,
            "output_text_min_length": 4,
            "predictor_hidden_size": 16,
            "predictor_num_heads": 2,
            "predictor_intermediate_size": 32,
            "predictor_num_layers": 1,
        }
        model = DynamicLlavaForConditionalGeneration.from_llava(llava, **{**defaults, **settings})
        return opinionated(model) if opinions else model

    return make


@pytest.fixture
def make_examples() -> Callable[..., list[dict[str, torch.Tensor]]]:
    """Training examples of one length: BOS, an image (or none), 4 question tokens, an answer repeating the last."""

    def make(count: int = 8, answer: int = 6, image: bool = True, seed: int = 5) -> list[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        examples = []
        for _ in range(count):
            question = torch.randint(3, 110, (4,), generator=generator)
            prompt = torch.cat([torch.tensor([1, *[IMAGE] * (TOKENS if image else 0)]), question])
            ids = torch.cat([prompt, question[-1:].expand(answer)])
            labels = ids.clone()
            labels[: len(prompt)] = -100
            example = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
            if image:
                example["pixel_values"] = torch.randn(3, 16, 16, generator=generator)
            examples.append(example)
        return examples

    return make


@pytest.fixture(scope="session")
def numbers(repository: Path) -> dict[str, Any]:
    """Settings, decisions and tolerances of the run of the authors' code."""
    return json.loads((repository / "tests" / "fixtures" / "dynamic_llava.json").read_text())


@pytest.fixture(scope="session")
def tensors(repository: Path) -> dict[str, torch.Tensor]:
    """Weights, inputs and outputs of the run of the authors' code."""
    return load_file(repository / "tests" / "fixtures" / "dynamic_llava.safetensors")


def write_authors_folder(
    folder: Path, numbers: dict, tensors: dict, weights: Callable | None = None, shards: int = 1, **fields: Any
) -> Path:
    """Write a checkpoint folder in the authors' layout, with their weights and a random vision tower.

    `fields` change `config.json` (None removes one); `weights` is called with the tensors before they are written;
    `shards` is their number of files.
    """
    torch.manual_seed(5)
    folder.mkdir()
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    CLIPVisionModel(vision).save_pretrained(folder / "tower")
    stored = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    stored["model.mm_projector.0.weight"], stored["model.mm_projector.0.bias"] = (
        torch.randn(64, 32),
        torch.randn(64),
    )
    stored["model.mm_projector.2.weight"], stored["model.mm_projector.2.bias"] = (
        torch.randn(64, 64),
        torch.randn(64),
    )
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(8)  # old files hold it
    if weights is not None:
        stored = weights(stored)
    config = {
        **numbers["config"],
        "model_type": "dynamic_llava_llama",
        "architectures": ["DynamicLlavaLlamaForCausalLM"],
        "torch_dtype": "float32",
        "use_cache": False,
        "mm_vision_tower": "tower",
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "sparse_config": numbers["sparse_config"],
        **fields,
    }
    config = {name: value for name, value in config.items() if value is not None or name in numbers["config"]}
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(stored, folder / "model.safetensors")
        return folder
    homes = {}
    for number in range(shards):
        file, names = f"part-{number}.safetensors", sorted(stored)[number::shards]
        save_file({name: stored[name] for name in names}, folder / file)
        homes |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    return folder


@pytest.fixture
def authors_folder(tmp_path: Path, numbers: dict, tensors: dict) -> Callable[..., Path]:
    """A checkpoint folder in the authors' layout; arguments as in `write_authors_folder`."""
    return lambda *args, **fields: write_authors_folder(tmp_path / "authors", numbers, tensors, *args, **fields)


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory, numbers: dict, tensors: dict) -> Path:
    """The authors' checkpoint, converted; not to be written to."""
    from hf_efficient import convert_dynamic_llava_checkpoint

    folder = tmp_path_factory.mktemp("parity")
    source = write_authors_folder(folder / "authors", numbers, tensors)
    return convert_dynamic_llava_checkpoint(source, folder / "converted")
