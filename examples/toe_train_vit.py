"""Train a vision transformer with Token Expansion, and show what it costs and keeps (ToE, arXiv 2404.00672).

Any image dataset of `datasets` (a name, a folder of images or of parquet files) and any supported model; the default
is a ViT of 64 tokens, 128 wide and 8 deep, from scratch. With `--compare` three arms get the same seeds, steps and
rows: `full` (all tokens), `toe`, and `random` (same hook, layer and count, the tokens drawn at random); `short` sees
all tokens for as many epochs as ToE's multiply-adds pay for, and `--fast-preset` gets one run. A run is a process of
one thread; interrupted, it goes on at its last epoch, kept in `--output`; its figures stay in `--results`. `--status`
lists both, `--time 5` measures steps and core-hours.

    python examples/toe_train_vit.py --dataset DIR/cifar10 --arms full --seeds 9 --output TRIAL
    python examples/toe_train_vit.py --dataset DIR/cifar10 --compare --output RUNS --results KEEP --final --card CARD

The first line is for choices, made on the last 5,000 training rows. The second takes 13 runs for CIFAR-10, of one to
two core-hours each, with `--bf16` half to 0.7 where the CPU multiplies bfloat16; each ends on the test split, read
behind `--final`. To expect: ToE near 1.29 times as fast, the bound by multiply-adds. The recipe: AdamW, cosine decay,
label smoothing 0.1, mirror images, crops of 2 pixels (best of 0, 2, 4; trials in KEEP/choices/NAME/ go to the card).
"""

import argparse
import copy
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from toe_train_vit_card import write_checkpoint
from toe_train_vit_clock import Clock, Yardstick, accuracy, show_timing, time_steps
from toe_train_vit_data import Batches, Rows, decode
from toe_train_vit_report import finish_run, print_bounds, report
from toe_train_vit_runs import (
    ARMS,
    check_arguments,
    check_recipe,
    epochs_of,
    last_checkpoint,
    list_jobs,
    make_recipe,
    preset_of,
    read_run,
    run_file,
    show_status,
    train_all,
)
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_efficient import ToECallback, ToEConfig
from hf_efficient.results import run_meta, write_whole
from hf_efficient.toe.expansion_toe import RandomDrop
from hf_efficient.toe.resume_toe import translate_names


class RandomDropCallback(ToECallback):
    """The control: random tokens, as many as ToE keeps."""

    expansion_class = RandomDrop


def make_model(args: argparse.Namespace, names: list[str]) -> PreTrainedModel:
    if args.model:
        return AutoModelForImageClassification.from_pretrained(
            args.model, num_labels=len(names), ignore_mismatched_sizes=True
        )
    size = {"hidden_size": args.width, "intermediate_size": 4 * args.width, "num_attention_heads": args.width // 32}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    grid = {"image_size": args.image_size, "patch_size": args.patch_size}
    # on CPUs the fused attention is slow backward in bfloat16; it is not saved in the checkpoint
    attention = {"attn_implementation": "eager"} if args.bf16 and not args.gpu else {}
    return ViTForImageClassification(ViTConfig(num_hidden_layers=args.depth, **size, **grid, **labels, **attention))


def make_callback(arm: str, args: argparse.Namespace) -> list[ToECallback]:
    if arm in ("full", "short"):
        return []
    return [(RandomDropCallback if arm == "random" else ToECallback)(ToEConfig.preset(preset_of(args, arm)))]


def keep_weights(model: PreTrainedModel, folder: Path) -> None:
    """Plain weights in fp16, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    copy.deepcopy(model).half().save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def train(args: argparse.Namespace, arm: str, seed: int) -> None:
    """One run; keeps its figures, and the weights of the run that becomes the card, when it has ended."""
    folder = args.output / f"{arm}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock", blocking=False)  # it ends with the process, however that ends
    try:
        lock.acquire()
    except Timeout:
        raise SystemExit(f"another process trains in {folder}; wait for it or end it.") from None
    recipe, meta = make_recipe(args, arm), run_meta()
    if (folder / "recipe.json").exists():
        check_recipe(recipe, folder / "recipe.json")
    write_whole(folder / "recipe.json", json.dumps(recipe) + "\n")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    images, labels, names = decode(args.dataset, "train", args.image_size, args.output / "decoded")
    split = len(labels) - min(args.validation_rows, len(labels) // 5)
    yardstick = None if args.gpu else Yardstick(lambda: make_model(args, names), args.batch_size, args.image_size)
    set_seed(seed)
    model = make_model(args, names)
    translate_names(model)  # an interrupted run without ToE would lose its weights as well
    training = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        num_train_epochs=epochs_of(args, arm, model),
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=250,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        warmup_steps=args.warmup,
        label_smoothing_factor=args.label_smoothing,
        lr_scheduler_type="cosine",
        optim="adamw_torch_fused",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        logging_steps=args.logging_steps,
        report_to="none",
        use_cpu=not args.gpu,
        bf16=args.bf16,
        disable_tqdm=True,
        dataloader_pin_memory=args.gpu,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer = Trainer(
        model,
        training,
        train_dataset=Rows(0, split, augment=True),
        eval_dataset=Rows(split, len(labels), augment=False),
        data_collator=Batches(images, labels, flip=args.flip, shift=args.shift),
        compute_metrics=accuracy,
        callbacks=[*make_callback(arm, args), Clock(yardstick, meta["cpu"])],
    )
    last = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(last[0]) if last else None)
    trainer.save_model(str(folder / "model"))
    log = trainer.state.log_history
    clocks = [entry for entry in log if "cpu_seconds" in entry]
    scores = [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry]
    history = [
        {"epoch": round(c["epoch"]), "cpu_seconds": c["cpu_seconds"], "accuracy": score}
        for c, score in zip(clocks, scores)
    ]
    run = {"arm": arm, "seed": seed}
    run |= {name: clocks[-1].get(name) for name in ("cpu_seconds", "wall_seconds", "yardsticks")}
    run |= {"validation_accuracy": scores[-1], "machines": sorted({c["cpu"] for c in clocks}), "recipe": recipe}
    run |= {"history": history, "meta": meta}
    if (arm, seed) == ("toe", args.seeds[0]):
        keep_weights(model, args.results / "weights")
    finish_run(args, run)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="name, folder, or `digits` of scikit-learn (default)")
    parser.add_argument("--model", help="checkpoint to fine-tune (default: a small ViT from scratch)")
    parser.add_argument("--compare", action="store_true", help="full tokens, ToE and random drop, and a faster preset")
    parser.add_argument("--arms", nargs="+", choices=(*ARMS, "fast"), help="only these runs, for choices of recipe")
    parser.add_argument("--final", action="store_true", help="measure on the test split as well")
    parser.add_argument("--output", type=Path, default=Path("toe_run"), help="runs that are under way")
    parser.add_argument("--results", type=Path, help="what is worth keeping of finished runs (default: --output)")
    parser.add_argument("--status", action="store_true", help="list runs done, under way and missing, and stop")
    parser.add_argument("--time", type=int, metavar="N", help="time N steps of each arm and stage in turn, and stop")
    parser.add_argument("--card", type=Path, metavar="DIR", help="write the first ToE model with its card there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the training, below 1, or steps")
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--shift", type=int, default=2, help="pixels of padding that a crop moves in; 0: no crops")
    parser.add_argument("--no-flip", dest="flip", action="store_false", help="never mirror images")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--validation-rows", type=int, default=5000, help="last training rows kept for choices")
    parser.add_argument("--preset", default="deit", help="schedule: deit, lv-vit, efficient-train or fast")
    parser.add_argument("--fast-preset", default="fast", help="schedule of the extra run at the first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time (default: one per core)")
    parser.add_argument("--logging-steps", type=int, default=50)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast; slow on CPUs without avx512_bf16")
    parser.add_argument("--gpu", action="store_true", help="use the GPU, in bfloat16; set --processes 1")
    parser.add_argument("--smoke", action="store_true", help="digits, a tiny model, one seed, under two minutes")
    parser.add_argument("--run", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        small = {"width": 32, "depth": 2, "image_size": 16, "epochs": 3, "seeds": [0], "logging_steps": 5}
        vars(args).update(small, dataset="digits", flip=False, compare=True, final=True, validation_rows=200)
        args.card = args.card or args.output / "card"
    args.bf16, args.flip = args.bf16 or args.gpu, args.flip and args.dataset != "digits"
    args.results = args.results or args.output
    return check_arguments(parser, args)


def main() -> None:
    args = parse()
    jobs = list_jobs(args)
    if args.status:
        show_status(args, jobs)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    args.results.mkdir(parents=True, exist_ok=True)
    if args.run:
        train(args, args.run[0], int(args.run[1]))
        return
    meta = run_meta()
    images, labels, names = decode(args.dataset, "train", args.image_size, args.output / "decoded")
    model = make_model(args, names)
    print_bounds(args, model)
    if args.time:
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        batches = Batches(images, labels, flip=args.flip, shift=args.shift)
        show_timing(args, time_steps(args, model.train(), batches, len(labels)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the runs as well
    train_all(args, jobs)
    runs = {job: read_run(args, *job) for job in jobs}
    missing = ", ".join(run_file(args, *job).stem for job, run in runs.items() if run is None)
    if missing:
        raise SystemExit(f"{missing} did not finish; the same command goes on with them.")
    for run in runs.values():
        finish_run(args, run)
    results = report(args, list(runs.values()), model, meta)
    if args.card:
        write_checkpoint(args, results)


if __name__ == "__main__":
    main()
