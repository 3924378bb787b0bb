"""Train a vision transformer with Token Expansion, and show what it costs and keeps (ToE, arXiv 2404.00672).

Any image dataset of `datasets` (a name, a folder of images or of parquet files) and any supported model; the default
is a ViT of 64 tokens, 128 wide and 8 deep, from scratch. With `--compare` three arms get the same seeds, steps and
data: `full` (all tokens), `toe`, and `random` (same hook, layer and count, the tokens drawn at random), and one run of
`--fast-preset`. Each run is a process of one thread; an interrupted run goes on at its last epoch, a finished one is
not repeated.

    python examples/toe_train_vit.py --dataset DIR/cifar10 --compare --output toe_cifar10
    python examples/toe_train_vit.py --dataset DIR/cifar10 --compare --output toe_cifar10 --final --card DIR

The first line takes some 12 core-hours for CIFAR-10 and chooses by the last 5,000 training rows. The second reads the
test split, for the first time, and writes the checkpoint with its card. To expect: ToE 1.29 times as fast as full
tokens by multiply-adds (the script prints the bound), at the accuracy of full tokens, above random drop.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from toe_train_vit_data import Batches, Rows, decode
from toe_train_vit_report import report, write_checkpoint
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_efficient import ToECallback, ToEConfig
from hf_efficient.metrics import load_metric
from hf_efficient.results import run_meta, write_whole
from hf_efficient.toe.expansion_toe import RandomDrop
from hf_efficient.toe.resume_toe import translate_names


ARMS = ("full", "toe", "random")
# one allocation after the other of the same few sizes: keep the memory instead of handing it back to the system
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_ARENA_MAX": "1"}


class RandomDropCallback(ToECallback):
    """The control: random tokens, as many as ToE keeps."""

    expansion_class = RandomDrop


class Clock(TrainerCallback):
    """CPU and wall time of the training epochs alone, kept in the trainer's log so that it survives a restart."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Start the clocks behind data set-up and resuming."""
        self.began = time.process_time(), time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        """Stop them before evaluating and saving."""
        before = next((e for e in reversed(state.log_history) if "cpu_seconds" in e), {})
        spent = time.process_time() - self.began[0], time.perf_counter() - self.began[1]
        entry = {name: before.get(name, 0.0) + value for name, value in zip(("cpu_seconds", "wall_seconds"), spent)}
        state.log_history.append({"epoch": state.epoch, "step": state.global_step, **entry})


def make_model(args: argparse.Namespace, names: list[str]) -> PreTrainedModel:
    if args.model:
        return AutoModelForImageClassification.from_pretrained(
            args.model, num_labels=len(names), ignore_mismatched_sizes=True
        )
    size = {"hidden_size": args.width, "intermediate_size": 4 * args.width, "num_attention_heads": args.width // 32}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    grid = {"image_size": args.image_size, "patch_size": args.patch_size}
    return ViTForImageClassification(ViTConfig(num_hidden_layers=args.depth, **size, **grid, **labels))


def make_callback(arm: str, args: argparse.Namespace) -> list[ToECallback]:
    if arm == "full":
        return []
    if arm == "random":
        return [RandomDropCallback(ToEConfig.preset(args.preset))]
    return [ToECallback(ToEConfig.preset(args.fast_preset if arm == "fast" else args.preset))]


def accuracy(prediction: tuple) -> dict[str, float]:
    answers = prediction.predictions.argmax(-1)
    return load_metric("accuracy").compute(predictions=answers, references=prediction.label_ids)


def train(args: argparse.Namespace, arm: str, seed: int) -> None:
    """One run; writes `run.json` when it has ended."""
    folder = args.output / f"{arm}-{seed}"
    if (folder / "run.json").exists():
        return
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    images, labels, names = decode(args.dataset, "train", args.image_size, args.output / "decoded")
    split = len(labels) - min(args.validation_rows, len(labels) // 5)
    set_seed(seed)
    model = make_model(args, names)
    translate_names(model)  # an interrupted run without ToE would lose its weights as well
    training = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=250,
        learning_rate=args.learning_rate,
        weight_decay=0.05,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        optim="adamw_torch_fused",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=args.logging_steps,
        report_to="none",
        use_cpu=not args.gpu,
        bf16=args.gpu,
        disable_tqdm=True,
        dataloader_pin_memory=args.gpu,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model,
        training,
        train_dataset=Rows(0, split, augment=True),
        eval_dataset=Rows(split, len(labels), augment=False),
        data_collator=Batches(images, labels, flip=args.flip),
        compute_metrics=accuracy,
        callbacks=[*make_callback(arm, args), Clock()],
    )
    # the trainer's state is written last: a checkpoint without it was cut short
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    last = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    trainer.save_model(str(folder / "model"))
    log = trainer.state.log_history
    clocks = [entry for entry in log if "cpu_seconds" in entry]
    scores = [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry]
    history = [
        {"epoch": round(c["epoch"]), "cpu_seconds": c["cpu_seconds"], "accuracy": score}
        for c, score in zip(clocks, scores)
    ]
    run = {"arm": arm, "seed": seed, "preset": {"full": None, "fast": args.fast_preset}.get(arm, args.preset)}
    run |= {"epochs": args.epochs, "cpu_seconds": clocks[-1]["cpu_seconds"]}
    run |= {"wall_seconds": clocks[-1]["wall_seconds"], "validation_accuracy": scores[-1], "history": history}
    write_whole(folder / "run.json", json.dumps(run, indent=2) + "\n")


def train_all(args: argparse.Namespace, jobs: list[tuple[str, int]]) -> None:
    """Start a process for each run, at most `--processes` at a time; the arms of a seed run close to each other."""
    waiting, running = list(jobs), []
    while waiting or running:
        while waiting and len(running) < args.processes:
            arm, seed = waiting.pop(0)
            command = [sys.executable, *sys.argv, "--run", arm, str(seed)]
            running.append((arm, seed, subprocess.Popen(command, env=os.environ | MEMORY | {"OMP_NUM_THREADS": "1"})))
        arm, seed, process = running.pop(0)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            running.append((arm, seed, process))
        else:
            print(f"{arm} {seed}: {'done' if process.returncode == 0 else 'failed, start again to go on'}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="name, folder, or `digits` of scikit-learn (default)")
    parser.add_argument("--model", help="checkpoint to fine-tune (default: a small ViT from scratch)")
    parser.add_argument("--compare", action="store_true", help="full tokens, ToE and random drop, and a faster preset")
    parser.add_argument("--final", action="store_true", help="measure on the test split as well")
    parser.add_argument("--output", type=Path, default=Path("toe_run"))
    parser.add_argument("--card", type=Path, metavar="DIR", help="write the first ToE model with its card there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--validation-rows", type=int, default=5000, help="last training rows kept for choices")
    parser.add_argument("--preset", default="deit", help="schedule: deit, lv-vit, efficient-train or fast")
    parser.add_argument("--fast-preset", default="fast", help="schedule of the extra run at the first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time (default: one per core)")
    parser.add_argument("--logging-steps", type=int, default=50)
    parser.add_argument("--gpu", action="store_true", help="use the GPU, in bfloat16; set --processes 1")
    parser.add_argument("--no-flip", dest="flip", action="store_false", help="never mirror images")
    parser.add_argument("--smoke", action="store_true", help="digits, a tiny model, one seed, under two minutes")
    parser.add_argument("--run", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        small = {"width": 32, "depth": 2, "image_size": 16, "epochs": 3, "seeds": [0], "logging_steps": 5}
        vars(args).update(small, dataset="digits", flip=False, compare=True, final=True, validation_rows=200)
        args.card = args.card or args.output / "card"
    args.flip = args.flip and args.dataset != "digits"
    return args


def main() -> None:
    args = parse()
    if args.run:
        train(args, args.run[0], int(args.run[1]))
        return
    meta = run_meta()
    args.output.mkdir(parents=True, exist_ok=True)
    names = decode(args.dataset, "train", args.image_size, args.output / "decoded")[2]
    jobs = [(arm, seed) for seed in args.seeds for arm in (ARMS if args.compare else ("toe",))]
    jobs += [("fast", args.seeds[0])] if args.compare else []
    train_all(args, jobs)
    folders = [args.output / f"{arm}-{seed}" for arm, seed in jobs]
    missing = [folder.name for folder in folders if not (folder / "run.json").exists()]
    if missing:
        raise SystemExit(f"{', '.join(missing)} did not finish; the same command goes on with them.")
    results = report(args, folders, make_model(args, names), meta)
    if args.card:
        write_checkpoint(args, results)


if __name__ == "__main__":
    main()
