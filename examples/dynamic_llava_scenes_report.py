"""What `dynamic_llava_scenes.py` measures on held-out scenes, with bootstrap intervals."""

import numpy as np
import torch
from dynamic_llava_scenes_data import HELD_OUT_SEED, SceneDataset, conversation, make_scene, names_total
from transformers import LlavaProcessor

from hf_efficient.metrics import load_metric


def _answers(output, prompt_length: int, pad: int) -> list[torch.Tensor]:
    return [row[row != pad] for row in output.sequences[:, prompt_length:]]


def _cache_bytes(output) -> int:
    cache = output.cache if "cache" in output else output.past_key_values
    if hasattr(cache, "allocated_bytes"):
        return cache.allocated_bytes()
    return sum(side.nbytes for layer in cache.layers for side in (layer.keys, layer.values))


@torch.no_grad()
def evaluate_scenes(model, processor: LlavaProcessor, count: int, batch: int = 100, kv_scenes: int = 30) -> dict:
    """Describe the first `count` held-out scenes greedily; count right facts, loss, kept words and cache bytes.

    Returns:
        `dict`: lists with one entry a scene: counts of the metric `facts`, `total` (whether the number of shapes is
        right), `loss` (sum over `tokens`), `generated` and `kept` (words fed back, and those written to the sparse
        layers), `texts`; for the first `kv_scenes` alone at batch 1: `kv_bytes` after the last word and
        `kv_prompt_bytes` before the first.
    """
    model.eval()
    scenes, pad = [make_scene(HELD_OUT_SEED + i) for i in range(count)], processor.tokenizer.pad_token_id
    data, found = SceneDataset(processor, count, HELD_OUT_SEED), {"texts": [], "generated": [], "kept": []}

    def ask(part, **options):
        inputs = processor.apply_chat_template(
            [conversation(scene.prompt, scene.image) for scene in part],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        )
        output = model.generate(**inputs, return_dict_in_generate=True, **options)
        return output, _answers(output, inputs["input_ids"].shape[1], pad)

    for start in range(0, count, batch):
        _, answers = ask(scenes[start : start + batch])
        sparsity = getattr(model, "last_sparsity", None)
        for row, answer in enumerate(answers):
            fed_back = len(answer) - 1
            words = sparsity.text_keep[row][:fed_back] if sparsity and sparsity.text_keep else torch.ones(fed_back)
            found["generated"].append(fed_back)
            found["kept"].append(int(words.sum()))
        found["texts"] += processor.batch_decode(answers, skip_special_tokens=True)
    truths = [scene.description for scene in scenes]
    facts = load_metric("facts").compute(predictions=found["texts"], references=truths)["per_description"]
    found |= {name: [fact[name] for fact in facts] for name in facts[0]}
    found["total"] = [int(names_total(text, scene)) for text, scene in zip(found["texts"], scenes)]
    found["loss"], found["tokens"] = [], []
    for start in range(0, count, batch):
        inputs = data.collate([data[i] for i in range(start, min(start + batch, count))])
        labels = inputs["labels"][:, 1:]
        logits = model(**inputs).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
        found["loss"] += losses.sum(1).tolist()  # the prompt's -100 count zero
        found["tokens"] += (labels != -100).sum(1).tolist()
    alone = scenes[: min(kv_scenes, count)]
    found["kv_bytes"] = [_cache_bytes(ask([scene])[0]) for scene in alone]
    found["kv_prompt_bytes"] = [_cache_bytes(ask([scene], max_new_tokens=1)[0]) for scene in alone]
    return found


def summarise(found: dict, draws: int = 2000) -> dict[str, list[float]]:
    """Shares with 95 % bootstrap intervals over the scenes: `name: [value, low, high]`."""
    lists = {name: np.array(values, dtype=float) for name, values in found.items() if name != "texts"}
    lists["facts"] = (lists["place"] + lists["colour"] + lists["shape"]) / 3
    scenes, first = len(found["objects"]), len(found["kv_bytes"])
    lists["kv_growth"], lists["kv_words"] = lists["kv_bytes"] - lists["kv_prompt_bytes"], lists["generated"][:first]
    lists["one"] = np.ones(scenes)
    ratios = {
        **{name: (name, "objects") for name in ("facts", "place", "colour", "shape", "size")},
        "total": ("total", "one"),
        "invented_per_scene": ("invented", "one"),
        "words_per_scene": ("generated", "one"),
        "text_kept": ("kept", "generated"),
        "perplexity": ("loss", "tokens"),
        "kv_bytes_per_word": ("kv_bytes", "kv_words"),
        "kv_growth_per_word": ("kv_growth", "kv_words"),
    }
    random, results = np.random.default_rng(0), {}
    picks = {size: random.integers(size, size=(draws, size)) for size in (scenes, first)}
    for name, (above, below) in ratios.items():
        above, below = lists[above], lists[below]
        pick = picks[len(above)]
        drawn = above[pick].sum(1) / below[pick].sum(1)
        values = [above.sum() / below.sum(), *np.quantile(drawn, [0.025, 0.975])]
        results[name] = [float(np.exp(value) if name == "perplexity" else value) for value in values]
    results["kv_scenes"] = [first] * 3
    return results
