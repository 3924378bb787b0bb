"""Train a small LLaVA that describes scenes, then drop half of its words and four fifths of its image.

    python examples/dynamic_llava_scenes.py --output runs/scenes --card model_cards/dynamic-llava-scenes
    python examples/dynamic_llava_scenes.py --smoke

The vision tower first learns what lies in each place, then a stock LLaVA around it learns to describe the picture in
60 to 120 words, then `DynamicLlavaTrainer` sparsifies it. 1,000 held-out scenes are described by greedy `generate()`
with the weights rounded to fp16, as they are saved. Every stage goes on from its last checkpoint, finished stages are
not repeated. About an hour on one core; expected are 96 % of the facts right dense, 97 % with half of the words.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from dynamic_llava_scenes_card import write_checkpoint
from dynamic_llava_scenes_data import HELD_OUT_SEED, PatchDataset, SceneDataset, build_processor
from dynamic_llava_scenes_model import SEED, RandomTextScores, TowerWithHeads, build_dense, vision_config
from dynamic_llava_scenes_report import evaluate_scenes, summarise
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_efficient import DynamicLlavaForConditionalGeneration, DynamicLlavaTrainer, DynamicLlavaTrainingArguments
from hf_efficient.results import run_meta, write_whole


TOWER = {"steps": 1200, "batch": 32, "rate": 1.5e-3}
DENSE = {"steps": 900, "batch": 16, "rate": 1.5e-3}
FURTHER = {"steps": 200, "batch": 16, "rate": 5e-4}  # the controls go on with the same
IMAGE = {"steps": 330, "batch": 16, "rate": 5e-4}  # after 200 steps which patches to keep is still undecided
PREDICTOR_RATES = {"image_20_text_50": 4e-3, "text_50": 1e-3, "text_50_random": 1e-3}
PREDICTORS = {
    "predictor_hidden_size": 64,
    "predictor_num_heads": 4,
    "predictor_intermediate_size": 128,
    "predictor_num_layers": 1,
    "output_text_keep_rate": 0.5,
    "output_text_min_length": 50,
}
# run -> share of the image tokens that is kept
RUNS = {"dense": 1.0, "dense_further": 1.0, "text_50": 1.0, "text_50_random": 1.0, "image_20_text_50": 0.2}
# measured with the weights of another run and a share of the image tokens set after training
RATES_SET_LATER = {"image_40_text_50": ("image_20_text_50", 0.4)}


class WholeTrainer(Trainer):
    """A `Trainer` whose resumed run really has the weights of its checkpoint.

    transformers saves a LLaVA under the names of its first versions and renames them in `from_pretrained`; `Trainer`
    resumes without renaming and would go on with the weights of the fresh model.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not hasattr(self.model, "save_pretrained"):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        self.model.load_state_dict(saved.state_dict())


def fit(folder, model, dataset, *, steps, batch, rate, trainer=WholeTrainer, arguments=TrainingArguments, **extra):
    """Train with the last checkpoint of `folder` as the start, if there is one; return what the run was."""
    args = arguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.01,
        logging_steps=min(25, steps),
        save_steps=min(100, steps),
        save_total_limit=1,
        seed=SEED,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        **extra,
    )
    run = trainer(model=model, args=args, train_dataset=dataset, data_collator=dataset.collate)
    done = run.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    logs = [log for log in run.state.log_history if "loss" in log]
    record = {"steps": steps, "batch": batch, "learning_rate": rate, **extra, "seed": SEED}
    return {**record, "seconds": round(done.metrics["train_runtime"], 1), "loss": float(logs[-1]["loss"]), "log": logs}


def keep(folder, model, record):
    """Save the weights in fp16, the form in which they are measured and shipped, and what the run was."""
    half = folder / "weights.tmp"
    model.half().save_pretrained(half)
    write_whole(folder / "record.json", json.dumps(record))
    half.rename(folder / "weights")


def train_dense(output, processor, tower_steps=None, dense_steps=None):
    """Tower, then the dense LLaVA; return the folder of its weights."""
    folder = output / "tower"
    if not (folder / "tower.pt").exists():
        set_seed(SEED)
        model, settings = TowerWithHeads(vision_config()), TOWER | ({"steps": tower_steps} if tower_steps else {})
        record = fit(folder, model, PatchDataset(processor, settings["steps"] * settings["batch"]), **settings)
        data = PatchDataset(processor, 500, HELD_OUT_SEED)
        with torch.no_grad():
            right = model.eval()(**data.collate([data[i] for i in range(len(data))]))["right"].tolist()
        record["held_out_right"] = dict(zip(("rank", "size", "colour", "shape", "field", "next field"), right))
        write_whole(folder / "record.json", json.dumps(record))
        torch.save(model.tower.state_dict(), folder / "tower.tmp")
        (folder / "tower.tmp").rename(folder / "tower.pt")
        print("tower", record["seconds"], record["held_out_right"], flush=True)
    folder = output / "dense"
    if not (folder / "weights").exists():
        tower = CLIPVisionModel(vision_config())
        tower.load_state_dict(torch.load(output / "tower" / "tower.pt"))
        model, settings = build_dense(processor, tower), DENSE | ({"steps": dense_steps} if dense_steps else {})
        first = TOWER["steps"] * TOWER["batch"]
        data = SceneDataset(processor, settings["steps"] * settings["batch"], first)
        keep(folder, model, fit(folder, model, data, **settings))
    return folder / "weights"


def load(name, folder, random_rate=None):
    """A trained run with its fp16 weights in fp32 arithmetic."""
    kind = LlavaForConditionalGeneration if name.startswith("dense") else DynamicLlavaForConditionalGeneration
    model = kind.from_pretrained(folder, dtype=torch.float32)
    if random_rate:
        model.model.output_text_score_predictor = RandomTextScores(random_rate)
    if name in RATES_SET_LATER:
        model.config.vision_keep_rate = RATES_SET_LATER[name][1]
    return model


def train_further(output, processor, dense, name, random_rate=None, steps=None):
    """Go on from the dense weights: densely, or sparsified by the settings of the run."""
    folder, settings = output / name, IMAGE if RUNS[name] < 1 else FURTHER
    settings = settings | ({"steps": steps} if steps else {})
    if (folder / "weights").exists():
        return
    set_seed(SEED)
    first = TOWER["steps"] * TOWER["batch"] + DENSE["steps"] * DENSE["batch"]
    data = SceneDataset(processor, settings["steps"] * settings["batch"], first)
    if name.startswith("dense"):
        model = load(name, dense)
        model.model.vision_tower.requires_grad_(False)
        keep(folder, model, fit(folder, model, data, **settings))
        return
    rate, predictor_rate = RUNS[name], PREDICTOR_RATES[name]
    model = DynamicLlavaForConditionalGeneration.from_llava(
        str(dense), dtype=torch.float32, vision_keep_rate=rate, use_vision_predictor=rate < 1, **PREDICTORS
    )
    if random_rate:
        model.model.output_text_score_predictor = RandomTextScores(random_rate)
    sparse = {"trainer": DynamicLlavaTrainer, "arguments": DynamicLlavaTrainingArguments}
    keep(folder, model, fit(folder, model, data, **settings, **sparse, predictor_learning_rate=predictor_rate))


def measure(output, processor, name, scenes, random_rate=None):
    """Evaluate a run once; return its summary."""
    path = output / name / f"evaluation_{scenes}.json"
    if not path.exists():
        start = time.perf_counter()
        weights = output / RATES_SET_LATER.get(name, (name,))[0] / "weights"
        found = evaluate_scenes(load(name, weights, random_rate), processor, scenes)
        found["seconds"] = round(time.perf_counter() - start, 1)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(found))
    found = json.loads(path.read_text())
    summary = summarise(found)
    rounded = {key: [round(value, 4) for value in values] for key, values in summary.items()}
    print(name, json.dumps(rounded), flush=True)
    return summary


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/scenes"), help="checkpoints of the runs")
    parser.add_argument("--card", type=Path, help="checkpoint folder to write with results.json and the card")
    parser.add_argument("--only", choices=RUNS, help="train and measure one run (the dense one first)")
    parser.add_argument("--scenes", type=int, default=1000, help="held-out scenes")
    parser.add_argument("--smoke", action="store_true", help="two steps of everything in a temporary folder")
    args = parser.parse_args()
    if args.only and args.card:
        parser.error("--card needs all runs: leave --only out.")
    card = args.card
    if card and card.exists() and any(card.iterdir()) and not (card / "results.json").is_file():
        parser.error(f"--card {card} holds other files, which would be deleted: name a new folder.")
    if args.scenes < 1:
        parser.error(f"--scenes must be at least 1, got {args.scenes}.")
    if args.smoke:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder), Path(folder) / "card", 4, tuple(RUNS), steps=2)
    else:
        run(args.output, args.card, args.scenes, (args.only,) if args.only else tuple(RUNS))


def run(output, card, scenes, names, steps=None):
    meta, processor, summaries = run_meta(), build_processor(), {}
    dense = train_dense(output, processor, steps, steps)
    for name in names:
        chance = None
        if name == "text_50_random":  # the rate that the learned predictor shows on the held-out scenes
            chance = measure(output, processor, "text_50", scenes)["text_kept"][0]
        if name != "dense":
            train_further(output, processor, dense, name, chance, steps)
        summaries[name] = measure(output, processor, name, scenes, chance)
    for name, (trained, _) in RATES_SET_LATER.items():
        if trained in names:
            summaries[name] = measure(output, processor, name, scenes)
    if card:
        records = {name: json.loads((output / name / "record.json").read_text()) for name in ("tower", *names)}
        best = max((name for name in summaries if name.startswith("image")), key=lambda name: summaries[name]["facts"])
        model = load(best, output / RATES_SET_LATER.get(best, (best,))[0] / "weights")
        write_checkpoint(card, model, best, processor, meta, records, summaries, scenes)


if __name__ == "__main__":
    main()
