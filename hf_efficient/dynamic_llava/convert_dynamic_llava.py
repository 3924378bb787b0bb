"""Checkpoints of the Dynamic-LLaVA authors, and stock LLaVA checkpoints, to checkpoints of this package.

Weights stream tensor by tensor from safetensors to safetensors, so that a model of any size converts in about two
gigabytes of memory beside a vision tower that is read from elsewhere. Pickled weights are never read.
"""

import os
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AddedToken,
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlavaProcessor,
)
from transformers.utils import is_sentencepiece_available, is_torchvision_available, logging

from .configuration_dynamic_llava import OWN_FIELDS, DynamicLlavaConfig
from .layout_dynamic_llava import COMPUTED, TOKEN_IDS, TOWER, Layout, check_model_type, convert_config
from .loading_dynamic_llava import PREDICTORS
from .modeling_dynamic_llava import DynamicLlavaForConditionalGeneration
from .weights_dynamic_llava import (
    Weights,
    cast_tensor,
    check_destination,
    find_files,
    first_line,
    parse_dtype,
    read_json,
    resolve_folder,
    staged,
    write_tensors,
)


logger = logging.get_logger(__name__)

IMAGE_TOKEN = "<image>"

# The prompt of LLaVA-1.5 (conversation "v1" of its authors).
CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. {% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ 'USER: ' }}"
    "{% elif message.role == 'assistant' %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content if part.type == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{% endif %}"
    "{{ eos_token if message.role == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def convert_dynamic_llava_checkpoint(
    source: str | os.PathLike, destination: str | os.PathLike, *, overwrite: bool = False
) -> Path:
    """Convert a checkpoint in the layout of the Dynamic-LLaVA authors.

    A plain LLaVA-1.5 in that layout (no `sparse_config`) gets fresh predictors. `image_token_id` becomes the old
    vocabulary size and the vocabulary is filled up to a multiple of 64; the logits of the old ids stay as they were
    and the generation config suppresses the new ones. The dtype is kept.

    Args:
        source (`str` or `os.PathLike`): Folder or Hub id with `config.json` (`model_type` "llava_llama" or
            "dynamic_llava_llama"), safetensors weights and, where there is one, a tokenizer. Where the weights hold no
            vision tower, it is read from `mm_vision_tower`: an absolute path, a path relative to `source`, or a Hub
            id.
        destination (`str` or `os.PathLike`): Folder of the new checkpoint, absent or empty; it appears when it is
            whole. With a tokenizer in `source` it also holds a `LlavaProcessor`.
        overwrite (`bool`, defaults to `False`): Replace a `destination` that holds files.

    Returns:
        `pathlib.Path`: The folder written.

    Raises:
        FileExistsError: If `destination` holds files and `overwrite` is false.
        FileNotFoundError: If `source`, its `config.json`, a shard or the vision tower is missing.
        ImportError: If the tokenizer is a sentencepiece model and sentencepiece is not installed.
        ValueError: If `source` has no safetensors weights, another layout, or tensors that are missing or do not fit.
    """
    check_destination(destination, overwrite)
    folder = resolve_folder(source)
    original = read_json(folder / "config.json")
    check_model_type(original)
    weights = Weights(folder)
    tower = _find_tower(original, folder)
    config = convert_config(original, weights, tower)
    processor = _build_processor(folder, tower, config, original)
    with torch.device("meta"):
        model = DynamicLlavaForConditionalGeneration(config)
    layout = Layout.read(weights, config, original["vocab_size"], bool(original.get("sparse_config")))
    layout.check(model)
    old, new = original["vocab_size"], config.text_config.vocab_size
    _set_generation(model.generation_config, folder, list(range(old, new)), processor)

    parts = [layout.tensors(weights, new)]
    if not layout.has_tower:
        parts.append(_tower_tensors(tower, config.dtype))
    parts.append(_fresh_predictors(model, layout.fresh, config.dtype))
    with staged(destination, overwrite, folder, tower) as staging:
        write_tensors(chain.from_iterable(parts), staging, len(model.state_dict()))
        _save_rest(model, processor, staging)
    return Path(destination)


def convert_llava_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    overwrite: bool = False,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    **settings: Any,
) -> Path:
    """Give a LLaVA-1.5 checkpoint in the layout of transformers fresh predictors.

    The same as `DynamicLlavaForConditionalGeneration.from_llava(source).save_pretrained(destination)`, without holding
    the model in memory, and with the processor.

    Args:
        source (`str` or `os.PathLike`): Folder or Hub id with safetensors weights.
        destination (`str` or `os.PathLike`): Folder of the new checkpoint, absent or empty; it appears when it is
            whole.
        overwrite (`bool`, defaults to `False`): Replace a `destination` that holds files.
        dtype (`str` or `torch.dtype`, defaults to `"auto"`): dtype of the weights; "auto" keeps the stored one.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        **settings: Sparsity settings, fields of [`DynamicLlavaConfig`].

    Returns:
        `pathlib.Path`: The folder written.

    Raises:
        FileExistsError: If `destination` holds files and `overwrite` is false.
        FileNotFoundError: If `source`, its `config.json` or a shard is missing.
        ValueError: If `source` has no safetensors weights or is no LLaVA-1.5, or a setting or dtype is wrong.
    """
    check_destination(destination, overwrite)
    for name in settings:
        if name not in OWN_FIELDS:
            raise ValueError(
                f"`settings` must be sparsity settings, got {name!r}: choose among {', '.join(sorted(OWN_FIELDS))}."
            )
    cast = parse_dtype(dtype)
    folder = resolve_folder(source, revision)
    read_json(folder / "config.json")
    base = AutoConfig.from_pretrained(folder)
    if base.model_type != "llava":
        raise ValueError(f"`source` must be a LLaVA-1.5 (`model_type` 'llava'), got {base.model_type!r}.")
    fields = {name: value for name, value in base.to_dict().items() if name not in ("model_type", "auto_map")}
    config = DynamicLlavaConfig(**{**fields, **settings})
    weights = Weights(folder)
    config.dtype = cast or base.dtype or weights.dtype("lm_head.weight", "embed_tokens.weight")
    for part in (config.text_config, config.vision_config):
        part.dtype = config.dtype
    with torch.device("meta"):
        model = DynamicLlavaForConditionalGeneration(config)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    processor = _load_processor(folder, config)

    fresh = _fresh_predictors(model, [name for name in PREDICTORS if hasattr(model.model, name)], config.dtype)
    with staged(destination, overwrite, folder) as staging:
        stored = ((name, cast_tensor(tensor, cast)) for name, tensor in weights.read())
        write_tensors(chain(stored, fresh), staging, len(model.state_dict()))
        _save_rest(model, processor, staging)
    return Path(destination)


def _save_rest(model: DynamicLlavaForConditionalGeneration, processor: Any, folder: Path) -> None:
    """Write configuration, generation config, shipped code and processor as any save does."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        model.save_pretrained(name, state_dict={})
        for path in Path(name).iterdir():
            if path.suffix != ".safetensors":
                os.replace(path, folder / path.name)
    if processor is not None:
        processor.save_pretrained(folder)


def _fresh_predictors(
    model: DynamicLlavaForConditionalGeneration, names: list[str], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    if not names:
        return
    logger.warning(
        "The predictors %s of this sparse LLaVA are untrained: it will drop tokens by chance until it is trained, for "
        "example with `DynamicLlavaTrainer`.",
        " and ".join(names),
    )
    for name in names:
        predictor = getattr(model.model, name).to_empty(device="cpu")
        predictor.apply(model.model._init_weights)
        for key, value in predictor.state_dict().items():
            yield f"model.{name}.{key}", value.to(dtype)


def _find_tower(original: dict[str, Any], folder: Path) -> str | Path:
    """Folder or Hub id of the vision tower, known to be a CLIP one."""
    name = original.get("mm_vision_tower")
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"`mm_vision_tower` in config.json must name a folder or Hub id of a CLIP vision model, got {name!r}."
        )
    tower = folder / name if (folder / name).is_dir() else name  # an absolute `name` wins over `folder`
    if isinstance(tower, str) and os.path.isabs(tower):
        raise FileNotFoundError(f"`mm_vision_tower` in config.json names the folder {tower}, which does not exist.")
    try:
        found = CLIPVisionConfig.get_config_dict(tower)[0].get("model_type")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"`mm_vision_tower` in config.json must name a folder (absolute, or relative to `source`) or a Hub id "
            f"of a CLIP vision model, got {name!r}: {first_line(error)}"
        ) from error
    if found not in ("clip", "clip_vision_model"):
        raise ValueError(f"`mm_vision_tower` in config.json must name a CLIP vision model, got {name!r} ({found}).")
    return tower


def _tower_tensors(tower: str | Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the vision half of a CLIP checkpoint."""
    if isinstance(tower, Path):
        find_files(tower, "mm_vision_tower")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the report of the unused text half
    try:
        model, report = CLIPVisionModel.from_pretrained(
            tower, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
    except OSError as error:
        raise ValueError(
            f"`mm_vision_tower` must hold safetensors weights, pickled ones are never read, got {str(tower)!r}: "
            f"{first_line(error)}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if report["missing_keys"]:
        raise ValueError(
            f"`mm_vision_tower` must hold a whole CLIP vision model, got {str(tower)!r} without "
            f"{min(report['missing_keys'])!r}."
        )
    for name, tensor in model.state_dict().items():
        if not COMPUTED.fullmatch(name):
            yield TOWER + name.removeprefix("vision_model."), tensor


def _set_generation(generation: GenerationConfig, folder: Path, new_ids: list[int], processor: Any) -> None:
    """Take over the special ids and suppress the ids that the original model does not have."""
    path = folder / "generation_config.json"
    stored = read_json(path) if path.is_file() else {}
    for name in TOKEN_IDS:
        if stored.get(name) is not None:
            setattr(generation, name, stored[name])
    if generation.pad_token_id is None and processor is not None:
        generation.pad_token_id = processor.tokenizer.pad_token_id
    generation.suppress_tokens = new_ids
    generation._from_model_config = False


# ---------------------------------------------------------------------------------------------------------- processor


def _build_processor(
    folder: Path, tower: str | Path, config: DynamicLlavaConfig, original: dict[str, Any]
) -> LlavaProcessor | None:
    """Build the processor around the tokenizer in `folder`; None where there is no tokenizer."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        logger.warning("No tokenizer lies in %s: no processor is saved.", folder)
        return None
    if not (folder / "tokenizer.json").is_file() and not is_sentencepiece_available():
        raise ImportError(
            f"Reading {folder / 'tokenizer.model'} needs sentencepiece: run `pip install sentencepiece protobuf`, or "
            "convert a copy of the folder without tokenizer files."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=config.text_config, trust_remote_code=False, padding_side="left"
        )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"`source` must hold a tokenizer that can be read, got {folder} ({first_line(error)}): mend it or convert "
            "a copy of the folder without tokenizer files."
        ) from error
    _add_image_token(tokenizer, config.image_token_id)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return LlavaProcessor(
        image_processor=_build_image_processor(tower, config, original.get("image_aspect_ratio") == "pad"),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=tokenizer.chat_template or CHAT_TEMPLATE,
    )


def _add_image_token(tokenizer: Any, image_token_id: int) -> None:
    """Give `<image>` the first id behind the old vocabulary; ids without a token get fillers before it."""
    fillers = [f"<unused_{i}>" for i in range(len(tokenizer), image_token_id)]
    tokens = [AddedToken(token, special=True, normalized=False) for token in [*fillers, IMAGE_TOKEN]]
    tokenizer.add_tokens(tokens, special_tokens=True)
    found = tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False)
    if found != [image_token_id]:
        raise ValueError(
            f"`source` must hold a tokenizer without {IMAGE_TOKEN} and with at most `vocab_size` ({image_token_id}) "
            f"tokens, got one in which {IMAGE_TOKEN} becomes {found}: use the tokenizer that belongs to the weights."
        )


def _build_image_processor(tower: str | Path, config: DynamicLlavaConfig, pad: bool) -> Any:
    if is_torchvision_available():
        from transformers import LlavaImageProcessor as ImageProcessor
    else:
        from transformers import LlavaImageProcessorPil as ImageProcessor
    try:
        stored = CLIPImageProcessor.get_image_processor_dict(tower)[0]
    except OSError:
        stored = {}
    taken = ("resample", "rescale_factor", "image_mean", "image_std")
    size = config.vision_config.image_size
    return ImageProcessor(
        do_pad=pad,
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        **{name: stored[name] for name in taken if stored.get(name) is not None},
    )


def _load_processor(folder: Path, config: DynamicLlavaConfig) -> Any:
    """Load the processor of a LLaVA in transformers' layout, its image token count completed where it is left open."""
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = first_line(error).split(". ")[0].rstrip(".")
        logger.warning("No processor is saved, because none loads from %s: %s.", folder, reason)
        return None
    if getattr(processor, "patch_size", 0) is None:
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1
    return processor


__all__ = ["convert_dynamic_llava_checkpoint", "convert_llava_checkpoint"]
