"""Train a small LLaVA on easy-VQA from scratch, then teach it to answer from 20 % of its image tokens (Dynamic-LLaVA).

The dense model (1 M parameters: CLIP-type tower, six Llama layers, 64 image tokens) comes from
`dynamic_llava_easy_vqa_pretrain.py`. From decoder layer 2 on the sparse one works with 12 of 64 image tokens. Three
ways to choose them get the same steps, seeds, data and learning rates: `learned` (the image predictor of
Dynamic-LLaVA), `random` (drawn anew for every image and step) and `uniform` (evenly spaced). The dense model, trained
on for the same steps, shows what the steps alone bring. Answers come from `generate()`; weights are rounded to fp16
before they are measured, as they are published. An interrupted run goes on where it was.

    python examples/dynamic_llava_easy_vqa.py --final --card model_cards/dynamic-llava-easy-vqa

measures on the test split (9,673 questions) and writes the checkpoint of the first seed with its card: dense 99.8 %,
sparse 99.7 %, in about an hour on one core (OMP_NUM_THREADS=1). Without `--final` everything is measured on the 400
training images that are held out: there the settings were chosen.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from dynamic_llava_easy_vqa_card import write_checkpoint
from dynamic_llava_easy_vqa_data import (
    COLORS,
    SHAPES,
    EasyVQA,
    QuestionCollator,
    encode,
    load_easy_vqa,
    make_processor,
)
from dynamic_llava_easy_vqa_pretrain import STEPS as PRETRAINING_STEPS
from dynamic_llava_easy_vqa_pretrain import TRAIN_IMAGES, arguments, fit, pretrain
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, Trainer, set_seed
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_efficient import DynamicLlavaForConditionalGeneration, DynamicLlavaTrainer, DynamicLlavaTrainingArguments
from hf_efficient.metrics import load_metric
from hf_efficient.results import run_meta, write_whole


KEEP_RATE = 0.2
ARMS = ("learned", "random", "uniform")
STEPS, BATCH = 120, 24
LEARNING_RATE, PREDICTOR_LEARNING_RATE = 5e-4, 3e-3


class FixedChoice(nn.Module):
    """Takes the place of the image predictor: keeps `int(tokens * rate)` tokens at random or evenly spaced."""

    def __init__(self, arm: str, keep_rate: float = KEEP_RATE):
        super().__init__()
        self.arm, self.keep_rate = arm, keep_rate

    def forward(self, hidden_states: Tensor, policy: Tensor | None = None) -> Tensor:
        """Logits `(images, tokens, 2)`, so far apart that Gumbel noise changes no decision."""
        images, tokens, _ = hidden_states.shape
        kept = int(tokens * self.keep_rate)
        if self.arm == "random":
            chosen = torch.rand(images, tokens).topk(kept, 1).indices
        else:
            chosen = ((torch.arange(kept) + 0.5) * tokens / kept).long().expand(images, -1)
        keep = torch.zeros(images, tokens).scatter(1, chosen, 1.0) * 200 - 100
        return torch.stack([keep, -keep], -1)


def make_sparse(dense: Path, arm: str) -> DynamicLlavaForConditionalGeneration:
    """The dense model with a small image predictor, or with a fixed choice in its place."""
    model = DynamicLlavaForConditionalGeneration.from_llava(
        dense,
        vision_keep_rate=KEEP_RATE,
        use_output_text_predictor=False,
        predictor_hidden_size=64,
        predictor_num_heads=4,
        predictor_intermediate_size=128,
        predictor_num_layers=1,
    )
    if arm != "learned":
        model.model.image_score_predictor = FixedChoice(arm)
    return model


def train_arm(output: Path, arm: str, seed: int, data: EasyVQA, processor: LlavaProcessor, steps: int) -> tuple:
    """Train one arm from the dense model; gives the model and the seconds it took."""
    set_seed(seed)
    rows = [row for row, image in enumerate(data.image_of) if image < TRAIN_IMAGES]
    common = {"train_dataset": rows, "data_collator": QuestionCollator(data, processor)}
    folder = output / f"{arm}-{seed}"
    if arm == "dense_continued":
        model = LlavaForConditionalGeneration.from_pretrained(output / "dense", dtype=torch.float32)
        model.model.vision_tower.requires_grad_(False)
        trainer = Trainer(model, arguments(folder, steps, BATCH, LEARNING_RATE, seed), **common)
    else:
        model = make_sparse(output / "dense", arm)
        settings = arguments(
            folder,
            steps,
            BATCH,
            LEARNING_RATE,
            seed,
            DynamicLlavaTrainingArguments,
            predictor_learning_rate=PREDICTOR_LEARNING_RATE,
        )
        trainer = DynamicLlavaTrainer(model, settings, **common)
    return model, fit(trainer)


@torch.no_grad()
def measure(model: nn.Module, data: EasyVQA, processor: LlavaProcessor, rows: list[int], batch: int = 256) -> dict:
    """Share of the questions `rows` that `generate()` answers right, in percent, by kind of answer."""
    start, tokenizer, encoded = time.time(), processor.tokenizer, encode(data, processor)
    model.half().float().eval()
    torch.manual_seed(0)  # for the random control
    images = sorted({data.image_of[row] for row in rows})
    parts = [data.pixels(torch.tensor(images[begin : begin + batch])) for begin in range(0, len(images), batch)]
    parts = [feature for part in parts for feature in model.get_image_features(part, return_dict=True).pooler_output]
    features = dict(zip(images, parts, strict=True))  # each image is encoded once, not once a question
    answers = {"all": []}  # kind -> what was said, and what is true
    for begin in range(0, len(rows), batch):
        part = rows[begin : begin + batch]
        inputs = tokenizer.pad({"input_ids": [encoded[row][0] for row in part]}, return_tensors="pt")
        shown = BaseModelOutputWithPooling(pooler_output=[features[data.image_of[row]] for row in part])
        tokens = model.generate(**inputs, mm_encoder_outputs={"image": shown}, do_sample=False)
        said = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, answer in zip(part, said, strict=True):
            truth = data.answers[row]
            kind = "shape" if truth in SHAPES else "color" if truth in COLORS else "yes_no"
            for name in ("all", kind):
                answers.setdefault(name, []).append((answer, truth))
    metric, shares = load_metric("accuracy"), {}
    for kind, found in answers.items():
        said, true = zip(*found)
        shares[kind] = 100 * metric.compute(predictions=said, references=true)["accuracy"]
    return {**shares, "questions": len(rows), "seconds": round(time.time() - start, 1)}


def run_arm(options: argparse.Namespace, arm: str, seed: int, train: EasyVQA, processor: LlavaProcessor, split: tuple):
    """Train one arm and measure it on a split `(name, data, rows)`, or read what an earlier call left of both."""
    file = options.output / "runs" / f"{arm}-{seed}.json"
    record = json.loads(file.read_text()) if file.exists() else {"arm": arm, "seed": seed}
    name, data, rows = split
    if name in record:
        return record
    steps = 2 if options.smoke else STEPS
    if arm == "dense":
        model = LlavaForConditionalGeneration.from_pretrained(options.output / "dense", dtype=torch.float32)
        record.setdefault("steps", 0)
    else:
        model, seconds = train_arm(options.output, arm, seed, train, processor, steps)
        record.setdefault("steps", steps)
        record.setdefault("train_seconds", round(seconds))
    record[name] = measure(model, data, processor, rows)
    if arm == "learned":
        model.half().save_pretrained(options.output / f"sparse-{seed}")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(record, indent=1))
    print(json.dumps(record), flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of all trainings, by default runs/easy_vqa")
    parser.add_argument("--data", help="folder of parquet files instead of the easy-vqa wheel")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the sparsification")
    arms = ["dense", "dense_continued", *ARMS]
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms, help="which arms to run (default: all)")
    parser.add_argument("--final", action="store_true", help="measure on the test split too")
    parser.add_argument("--card", type=Path, help="folder for the checkpoint of the first seed and its card")
    parser.add_argument("--smoke", action="store_true", help="two steps of everything and 16 questions, for a test")
    options = parser.parse_args()
    if options.card and not {"dense", "learned"} <= set(options.arms):
        parser.error("--card needs the arms dense and learned: add them to --arms.")
    card = options.card
    if card and card.exists() and any(card.iterdir()) and not (card / "results.json").is_file():
        parser.error(f"--card {card} holds other files, which would be deleted: name a new folder.")
    options.output = options.output or Path("runs/easy_vqa_smoke" if options.smoke else "runs/easy_vqa")
    if options.smoke:
        options.seeds, options.card = options.seeds[:1], options.card or options.output / "card"
    meta = run_meta()
    train = load_easy_vqa("train", options.data)
    processor = make_processor(train)
    pretraining = pretrain(options.output, train, processor, (2, 2) if options.smoke else PRETRAINING_STEPS)
    data = load_easy_vqa("test", options.data) if options.final else train
    rows = [row for row, image in enumerate(data.image_of) if options.final or image >= TRAIN_IMAGES]
    split = ("test" if options.final else "held_out", data, rows[:16] if options.smoke else rows)
    jobs = [(arm, seed) for seed in options.seeds for arm in options.arms]
    jobs = [(arm, seed) for arm, seed in jobs if arm in ARMS or seed == options.seeds[0]]  # dense: one seed
    runs = [run_arm(options, *job, train, processor, split) for job in jobs]
    if options.card:
        write_checkpoint(options.card, options.output, split, processor, pretraining, runs, options.seeds, meta)


if __name__ == "__main__":
    main()
