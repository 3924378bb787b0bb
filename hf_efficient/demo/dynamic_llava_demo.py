"""The tab of Dynamic-LLaVA in the demo: a question about a picture, answered dense and sparse by the same weights."""

import html
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_efficient.dynamic_llava.quickstart_dynamic_llava import compare_answers, load_checkpoint

from .pictures_demo import block, draw_patches, figure, paragraph, read_picture, table


MAX_QUESTION, MAX_ANSWER = 300, 160  # characters, tokens


@dataclass
class DynamicLlavaDemo:
    """Sparse LLaVAs to ask; each is loaded when it is first asked.

    Args:
        folders (`dict[str, Path]`): Checkpoint folders by the name that visitors read.
    """

    folders: dict[str, Path]
    _loaded: dict[str, Any] = field(default_factory=dict)

    def load(self, name: str) -> tuple[Any, Any]:
        """Load a checkpoint once.

        Args:
            name (`str`): One of `folders`.

        Returns:
            `tuple`: Model and processor.

        Raises:
            ValueError: If there is no checkpoint of this name.
        """
        if name not in self.folders:
            raise ValueError("There is no sparse LLaVA here: start the demo with --llava FOLDER, or from a clone.")
        if name not in self._loaded:
            self._loaded[name] = load_checkpoint(self.folders[name])
        return self._loaded[name]

    def rates(self, name: str) -> tuple[float, bool]:
        """What a checkpoint was trained for, read from its configuration.

        Args:
            name (`str`): One of `folders`.

        Returns:
            `tuple`: Its share of kept image tokens, and whether it judges the words of its answer.
        """
        config = json.loads((self.folders[name] / "config.json").read_text(encoding="utf-8"))
        return config.get("vision_keep_rate", 0.2), bool(config.get("use_output_text_predictor", True))

    def examples(self) -> list[list[str]]:
        """The sample picture and question that lie in each checkpoint.

        Returns:
            `list[list[str]]`: Name, picture and question of each.
        """
        found = []
        for name, folder in self.folders.items():
            results = folder / "results.json"
            sample = json.loads(results.read_text(encoding="utf-8")).get("sample") if results.is_file() else None
            if sample:
                found.append([name, str(folder / sample["file"]), sample["text"]])
        return [*found, *self._easy_vqa_examples()]

    def _easy_vqa_examples(self) -> list[list[str]]:
        """Two questions of easy-VQA's test split, if its package is installed."""
        name = next((name for name, folder in self.folders.items() if folder.name.endswith("easy-vqa")), None)
        if name is None:
            return []
        try:
            import easy_vqa
        except ImportError:
            return []
        texts, _, images = easy_vqa.get_test_questions()
        paths = easy_vqa.get_test_image_paths()
        return [[name, paths[images[row]], texts[row]] for row in (9, 1500)]

    def ask(
        self, name: str, path: str | None, question: str, image_rate: float, as_trained: bool, word_rate: float
    ) -> str:
        """Answer a question with everything kept and with the chosen shares kept.

        Args:
            name (`str`): One of `folders`.
            path (`str`, *optional*): The picture.
            question (`str`): The question.
            image_rate (`float`): Share of the image tokens to keep.
            as_trained (`bool`): Whether words are kept as the predictor was trained, above the score 0.5.
            word_rate (`float`): Else: share of the words of the answer to keep.

        Returns:
            `str`: HTML of the result.

        Raises:
            ValueError: If question or picture cannot be used; the message says why.
        """
        model, processor = self.load(name)
        question = " ".join((question or "").split())
        if not question:
            raise ValueError("The question is empty: ask something about the picture.")
        if len(question) > MAX_QUESTION:
            raise ValueError(f"The question has {len(question)} characters, at most {MAX_QUESTION} are read.")
        special = [token for token in processor.tokenizer.all_special_tokens if token in question]
        if special:
            raise ValueError(f"The question must not hold the model's own sign {special[0]}: leave it out.")
        picture = read_picture(path)
        rates = {"vision_keep_rate": float(image_rate)}
        judges = model.config.use_output_text_predictor
        if judges and not as_trained:
            rates["output_text_threshold"] = _find_threshold(model, processor, picture, question, rates, word_rate)
        found = compare_answers(model, processor, picture, question, MAX_ANSWER, **rates)
        return _show(found, judges, _unknown_words(processor.tokenizer, question))


@torch.no_grad()
def _find_threshold(
    model: Any, processor: Any, picture: Image.Image, question: str, rates: dict[str, float], share: float
) -> float:
    """Score above which a share of the words lies, by the scores of one answer from which no word is dropped."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    scores = []
    predictor = model.model.output_text_score_predictor
    handle = predictor.register_forward_hook(lambda module, args, logits: scores.append(logits.flatten(0, -2)))
    try:
        model.generate(**inputs, **{**rates, "output_text_threshold": 0.0}, max_new_tokens=MAX_ANSWER, do_sample=False)
    finally:
        handle.remove()
    if not scores:
        return 0.5
    logits = torch.cat(scores).float()
    keep = (logits[:, 0] - logits[:, 1]).sigmoid().sort(descending=True).values  # (words,)
    count = round(share * len(keep))
    if count >= len(keep):
        return 0.0
    return 1.0 if count == 0 else float(keep[count - 1 : count + 1].mean())


def _unknown_words(tokenizer: Any, question: str) -> list[str]:
    """Words of a question that the tokenizer has no token for."""
    if tokenizer.unk_token_id is None:
        return []
    encoded = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
    spans = zip(encoded["input_ids"], encoded["offset_mapping"])
    words = [question[start:end] for token, (start, end) in spans if token == tokenizer.unk_token_id]
    return [word for word in dict.fromkeys(words) if any(map(str.isalnum, word))]


def _show(found: dict[str, Any], judges: bool, unknown: list[str]) -> str:
    """The two answers side by side, and what they cost."""
    dense, sparse = found["dense"], found["sparse"]
    total = dense["image_tokens"]
    side = math.isqrt(total)
    kept = np.ones(total, dtype=bool)
    if found["record"] is not None:
        kept[:] = False
        kept[found["record"].image_index[0][0].cpu().numpy()] = True
    shape = (side, side) if side**2 == total else (1, total)
    pictures = {
        "dense": draw_patches(found["image"], np.ones(shape, dtype=bool)),
        "sparse": draw_patches(found["image"], kept.reshape(shape)),
    }
    captions = {
        "dense": f"Dense: all {total} image tokens",
        "sparse": f"Sparse: {sparse['image_tokens']} of {total} image tokens, outlined; the others are dimmed",
    }
    answers = {"dense": html.escape(dense["answer"]), "sparse": _mark_words(found)}
    cards = "".join(
        f"<div>{figure(pictures[mode], captions[mode], captions[mode])}"
        f'<p class="answer" id="hfe-{mode}">{answers[mode] or "<em>no answer</em>"}</p></div>'
        for mode in ("dense", "sparse")
    )
    measures = (
        ("image tokens kept", "image_tokens"),
        ("words of the answer kept", "text_tokens"),
        ("bytes of the KV cache", "kv_bytes"),
        ("multiply-adds of the prefill", "prefill_flops"),
        ("prefill, ms", "prefill_ms"),
    )
    halves = {"prefill_flops": 2}  # the counter counts a multiply-add as two operations
    rows = []
    for title, key in measures:
        values = [item[key] // halves[key] if key in halves else item[key] for item in (dense, sparse)]
        rows.append([title, *values, f"{values[1] / values[0]:.2f}" if values[0] else ""])
    same = dense["answer"] == sparse["answer"]
    return block(
        f"<h3>{html.escape(found['text'])}</h3>",
        paragraph(f"The model never learned {', '.join(unknown)}: it reads a placeholder there.", "note")
        if unknown
        else "",
        f'<div class="cards">{cards}</div>',
        paragraph("Both answers are the same." if same else "The answers differ."),
        table(["", "dense", "sparse", "sparse / dense"], rows),
        paragraph(_explain(judges), "soft"),
    )


def _mark_words(found: dict[str, Any]) -> str:
    """The sparse answer; words that left the cache are struck through."""
    record = found["record"]
    decisions = [] if record is None else record.text_keep[0].tolist()
    if all(decisions):
        return html.escape(found["sparse"]["answer"])
    parts = []
    for number, word in enumerate(found["words"][: len(decisions)]):
        text = html.escape(word.replace("\u2581", " ").replace("\u0120", " ").strip())
        parts.append(text if decisions[number] else f'<span class="gone">{text}</span>')
    return " ".join(parts)


def _explain(judges: bool) -> str:
    words = (
        "Struck words were written, then dropped from the caches of the sparse layers; later words do not see them. "
        if judges
        else "This checkpoint answers in a word and judges no words. "
    )
    return (
        "Dense and sparse are the same weights with sparsity off and on. The first layers see the whole picture in "
        "both cases, so an answer may have been read before patches are dropped: kept ones need not be where one "
        "would look. "
        + words
        + f"Milliseconds are wall clock, median of five, both taking turns, {torch.get_num_threads()} CPU thread(s) "
        "that all visitors share. In a model this small the overhead outweighs what is saved: compare multiply-adds "
        "and bytes, not milliseconds; README has the times of a larger one."
    )
