"""The part of Dynamic-LLaVA in `hf-efficient quickstart`: ten questions and one scene, dense beside sparse."""

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import evaluate
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor
from transformers.utils import logging

from .figures_dynamic_llava import plot_kept_tokens
from .modeling_dynamic_llava import DynamicLlavaForConditionalGeneration


EASY_VQA, SCENES = "dynamic-llava-easy-vqa", "dynamic-llava-scenes"
QUESTIONS, REPEATS = 10, 5


def run(checkpoints: Path, output: Path) -> dict[str, Any]:
    """Answer ten easy-VQA questions and describe one scene, once with sparsity off and once with it on.

    Both columns use the same weights: "dense" is the checkpoint with everything kept, not a model trained densely.

    Args:
        checkpoints (`Path`): Folder that holds `dynamic-llava-easy-vqa` and `dynamic-llava-scenes`.
        output (`Path`): Folder for the pictures.

    Returns:
        `dict`: Table, summary, pictures and notes, as `hf_efficient.quickstart` describes.

    Raises:
        FileNotFoundError: If a checkpoint is missing.
        ImportError: If the easy-vqa package is not installed.
    """
    questions = _pick_questions()
    model, processor = load_checkpoint(checkpoints / EASY_VQA)
    answers = [
        {"truth": truth, **compare_answers(model, processor, Image.open(path).convert("RGB"), question, 8)}
        for question, truth, path in logging.tqdm(questions, desc="easy-VQA questions")
    ]
    scene_model, scene_processor = load_checkpoint(checkpoints / SCENES)
    sample = _read_sample(checkpoints / SCENES)
    scene_image = Image.open(checkpoints / SCENES / sample["file"]).convert("RGB")
    scene = compare_answers(scene_model, scene_processor, scene_image, sample["text"], 160)
    pictures = _draw(output, answers[0], scene)

    scene["truth"], facts = sample.get("truth", ""), _count_facts(scene, sample.get("truth", ""))
    items = [*answers, scene]
    rows = [_row(item) for item in items]
    right = {mode: sum(item[mode]["answer"] == item["truth"] for item in answers) for mode in ("dense", "sparse")}
    return {
        "table": {
            "title": "ten questions and one scene; pairs are dense / sparse",
            "columns": list(rows[0]),
            "rows": [list(r.values()) for r in rows],
        },
        "summary": [
            [f"right answers of {len(answers)}", right["dense"], right["sparse"]],
            *_medians("question", answers),
            *facts,
            *_medians("scene", [scene]),
        ],
        "pictures": pictures,
        "notes": [
            "Dense and sparse are the same weights with sparsity off and on; the cards compare with dense training.",
            "On easy-VQA the kept patches mean little: layers 0 and 1 see all of them and have read the answer.",
            "At a million parameters the overhead outweighs what is saved: compare FLOPs and bytes, not ms.",
            "Tokens are those the sparse layers hold after the answer; milliseconds and FLOPs count the whole prefill "
            "and the vision tower.",
            *([f"Scene, truth:  {scene['truth']}"] if scene["truth"] else []),
            f"Scene, dense:  {scene['dense']['answer']}",
            f"Scene, sparse: {scene['sparse']['answer']}",
        ],
        "details": {
            "items": [{k: item[k] for k in ("text", "truth", "dense", "sparse") if k in item} for item in items]
        },
    }


def _pick_questions() -> list[tuple[str, str, str]]:
    """Pick questions with ten different answers, spread over the test split."""
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError('easy-vqa is not installed; run pip install -e ".[quickstart]".') from error
    paths = easy_vqa.get_test_image_paths()
    texts, answers, images = easy_vqa.get_test_questions()
    picked: dict[str, tuple[str, str, str]] = {}
    for i in range(0, len(texts), 97):
        picked.setdefault(answers[i], (texts[i], answers[i], paths[images[i]]))
    return list(picked.values())[:QUESTIONS]


def _count_facts(scene: dict[str, Any], truth: str) -> list[list[Any]]:
    """Row of the summary: places, colours and shapes of the scene that both descriptions get right."""
    if not truth:
        return []
    metric = evaluate.load(str(Path(__file__).resolve().parent.parent / "metrics" / "facts"), keep_in_memory=True)
    answers = [scene[mode]["answer"] for mode in ("dense", "sparse")]
    found = metric.compute(predictions=answers, references=[truth] * len(answers))["per_description"]
    right = [row["place"] + row["colour"] + row["shape"] for row in found]
    return [[f"scene, facts right of {3 * found[0]['objects']}", *right]]


def _read_sample(folder: Path) -> dict[str, str]:
    """Name the sample picture of a checkpoint and the words that go with it."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if not results.get("sample"):
        raise ValueError(f"{folder}/results.json names no sample picture; check out the folder again.")
    return results["sample"]


def load_checkpoint(folder: Path) -> tuple[DynamicLlavaForConditionalGeneration, Any]:
    """Load a sparse LLaVA in float32 and its processor from a folder.

    Args:
        folder (`Path`): The checkpoint.

    Returns:
        `tuple`: The model in `eval()` mode, and the processor.

    Raises:
        FileNotFoundError: If the folder holds no checkpoint.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no checkpoint; check out model_cards/{folder.name} of the repository again."
        )
    model = DynamicLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)


@contextmanager
def _sparsity_off(model: DynamicLlavaForConditionalGeneration) -> Iterator[None]:
    """Keep everything inside the block: the host's own path. Twin: `sparsity_off` of `report/llava_report.py`."""
    config = model.config
    before = {
        name: getattr(config, name) for name in ("vision_keep_rate", "vision_keep_tokens", "use_output_text_predictor")
    }
    config.vision_keep_rate, config.vision_keep_tokens, config.use_output_text_predictor = 1.0, None, False
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@torch.no_grad()
def compare_answers(
    model: DynamicLlavaForConditionalGeneration,
    processor: Any,
    image: Image.Image,
    text: str,
    length: int,
    **rates: float,
) -> dict[str, Any]:
    """Answer dense and sparse with the same weights, and measure both prefills taking turns.

    Args:
        model ([`DynamicLlavaForConditionalGeneration`]): Model in `eval()` mode.
        processor (`Any`): Its processor.
        image (`PIL.Image.Image`): Picture.
        text (`str`): Question.
        length (`int`): Most tokens of an answer.
        **rates (`float`): Sparsity of this call, such as `vision_keep_rate`; default: the model's.

    Returns:
        `dict`: `text`, `image`; `dense` and `sparse`, each with `answer`, `image_tokens` and `text_tokens` (those that
        the sparse layers hold after the answer), `kv_bytes`, `prefill_flops` and `prefill_ms` (median of five);
        `record` ([`SparsityRecord`], None if the rates drop nothing) and `words` (tokens of the sparse answer).
    """
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    image_tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    with _sparsity_off(model):
        dense = _generate(model, processor, inputs, length)
    sparse = _generate(model, processor, inputs, length, **rates)
    record, ids = model.last_sparsity, sparse.pop("ids")
    dense["image_tokens"], dense["text_tokens"] = image_tokens, len(dense.pop("ids")) - 1  # the last is not fed back
    sparse["image_tokens"], sparse["text_tokens"] = image_tokens, len(ids) - 1
    if record is not None:
        sparse["image_tokens"] = sum(len(index) for index in record.image_index[0])
        sparse["text_tokens"] = int(record.text_keep[0].sum())
    seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(REPEATS):
        with _sparsity_off(model):
            seconds["dense"].append(_time_prefill(model, inputs))
        seconds["sparse"].append(_time_prefill(model, inputs, **rates))
    dense["prefill_ms"], sparse["prefill_ms"] = (1e3 * statistics.median(seconds[mode]) for mode in seconds)
    words = processor.tokenizer.convert_ids_to_tokens(ids)
    return {"text": text, "dense": dense, "sparse": sparse, "image": image, "record": record, "words": words}


def _draw(output: Path, question: dict[str, Any], scene: dict[str, Any]) -> list[dict[str, str]]:
    """Write one picture of the first question and one of the scene."""
    captions = {
        "dynamic_llava_question.png": (question, "image tokens kept to answer the first question"),
        "dynamic_llava_scene.png": (scene, "image tokens kept for the scene, words of the answer kept in the cache"),
    }
    for file, (item, _) in captions.items():
        plot_kept_tokens(item["image"], item["record"], item["words"], title=item["text"]).savefig(output / file)
    return [{"file": file, "caption": caption} for file, (_, caption) in captions.items()]


def _generate(
    model: DynamicLlavaForConditionalGeneration, processor: Any, inputs: dict, length: int, **rates: float
) -> dict[str, Any]:
    # the counter knows no fused attention of the CPU; the plain one has the same multiply-adds
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs, use_cache=True, logits_to_keep=1, **rates)
    settings = {"max_new_tokens": length, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(**inputs, **settings, **rates)
    new = out.sequences[0, inputs["input_ids"].shape[1] :]
    return {
        "ids": new.tolist(),
        "answer": processor.decode(new, skip_special_tokens=True).strip(),
        "kv_bytes": _cache_bytes(out["cache"] if "cache" in out else out["past_key_values"]),
        "prefill_flops": counter.get_total_flops(),
    }


def _time_prefill(model: DynamicLlavaForConditionalGeneration, inputs: dict, **rates: float) -> float:
    start = time.perf_counter()
    model(**inputs, use_cache=True, logits_to_keep=1, **rates)
    return time.perf_counter() - start


def _cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values, each storage once. Twin: `cache_bytes` of `report/llava_report.py`."""
    storages = [tensor.untyped_storage() for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _row(item: dict[str, Any]) -> dict[str, str]:
    dense, sparse = item["dense"], item["sparse"]

    def pair(key: str, scale: float = 1.0, digits: int = 0) -> str:
        return f"{dense[key] * scale:.{digits}f} / {sparse[key] * scale:.{digits}f}"

    return {
        "question": _shorten(item["text"], 40),
        "truth": _shorten(item["truth"], 12),
        "answer": f"{_shorten(dense['answer'], 12)} / {_shorten(sparse['answer'], 12)}",
        "image tokens": pair("image_tokens"),
        "words in cache": pair("text_tokens"),
        "prefill ms": pair("prefill_ms", digits=1),
        "KV kB": pair("kv_bytes", 1e-3),
        "MFLOPs": pair("prefill_flops", 1e-6),
    }


def _shorten(text: str, width: int) -> str:
    """Cut a text that is too long for its column, and show that it was cut."""
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."


def _medians(name: str, items: list[dict[str, Any]]) -> list[list[Any]]:
    words = {
        "image_tokens": ("image tokens", 1),
        "text_tokens": ("words in the cache", 1),
        "prefill_ms": ("prefill ms", 1),
        "kv_bytes": ("KV kB", 1e-3),
        "prefill_flops": ("prefill MFLOPs", 1e-6),
    }
    return [
        [
            f"{name}, {label}",
            *(statistics.median(item[mode][key] * scale for item in items) for mode in ("dense", "sparse")),
        ]
        for key, (label, scale) in words.items()
        if name == "scene" or key != "text_tokens"
    ]
