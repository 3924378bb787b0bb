r"""Cartoon to photograph with Pix2Pix, and how robust it is (arXiv 1611.07004 and 2101.09793).

Photographs are cartoonized, a U-Net of 16 base channels learns the way back at 128 pixels. Runs: one for each of three
cartoonizers, the same U-Net with L1 alone as a control, and with `--ablation` the paper's batch sizes 8 and 64 at as
many images seen. Each run is a process of one thread; an interrupted run goes on at its last checkpoint, a finished
one is not repeated.

    python examples/pix2pix_cartoon.py --dataset DIR/photos --output pix2pix_cartoon --ablation
    python examples/pix2pix_cartoon.py --dataset DIR/photos --output pix2pix_cartoon --ablation --final \
        --features DIR/efficientnet_lite0/model.safetensors --card model_cards/pix2pix-cartoon2photo

The first line takes ten minutes to an hour of one core for each of six runs; the second, 5 to 20 minutes, reads the
test split for the first time: every model on every cartoonizer and severity, beside the cartoon itself. With `--seed`
and another `--output` the runs `bilateral` and `l1` can be repeated and handed to `--repeats`. To expect on bilateral
cartoons: better than the cartoon itself in every figure; better than L1 alone in KID and feature cosine, worse in PSNR
and SSIM. Palette and mean-shift cartoons keep more of a photograph: there the cartoon itself has the higher PSNR.

Three settings differ from the paper's. The weight of the L1 loss, 1000, and no dropout were chosen on training
photographs that were held out, in trials such as

    python examples/pix2pix_cartoon.py --dataset DIR/photos --output TRIAL --runs bilateral --held-out 80 --epochs 30 \
        --severities 3 --features DIR/efficientnet_lite0/model.safetensors --lambda-l1 100 --dropout 0.5

the average of the weights was taken untried. At the paper's weight of the L1 loss, 100, the discriminator's loss falls
below 0.2 on so few photographs, and the outputs carry a grid.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from pix2pix_cartoon_report import report
from pix2pix_train_data import load_rows, split_rows
from transformers import TrainerCallback, set_seed

from hf_efficient import Pix2PixConfig, Pix2PixDiscriminator, Pix2PixModel, Pix2PixTrainer, Pix2PixTrainingArguments
from hf_efficient.cli import describe
from hf_efficient.pix2pix.configuration_pix2pix import NORMS
from hf_efficient.pix2pix.pairs_pix2pix import ImagePairs
from hf_efficient.pix2pix.robustness_pix2pix import check_grid
from hf_efficient.results import write_whole


# run -> (cartoonizer, with the adversarial loss, batch size); the first is the checkpoint of the card
RUNS = {
    "bilateral": ("bilateral", True, 1),
    "palette": ("palette", True, 1),
    "mean_shift": ("mean_shift", True, 1),
    "l1": ("bilateral", False, 1),
    "batch-8": ("bilateral", True, 8),
    "batch-64": ("bilateral", True, 64),
}
# what the package calls a setting -> what is typed here
TYPED = {"base_channels": "--channels", "target_column": "--column", "image_column": "--column"}
# one allocation after the other of the same few sizes: keep the memory instead of handing it back to the system
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_ARENA_MAX": "1"}


class Clock(TrainerCallback):
    """CPU time of the training, kept in the trainer's log so that it survives a restart."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock behind set-up and resuming, from what earlier parts of the run took."""
        self.before = next((e["cpu_seconds"] for e in reversed(state.log_history) if "cpu_seconds" in e), 0.0)
        self.began = time.process_time()

    def on_epoch_end(self, args, state, control, **kwargs):
        """Note the time with each epoch."""
        spent = self.before + time.process_time() - self.began
        state.log_history.append({"epoch": state.epoch, "step": state.global_step, "cpu_seconds": spent})


def prepare(args: argparse.Namespace, name: str, gpu: bool = False) -> Pix2PixTrainer:
    """Networks, data and settings of one run: whatever is wrong with the arguments shows here."""
    method, adversarial, batch_size = RUNS[name]
    set_seed(args.seed)
    levels = args.size.bit_length() - 1
    config = Pix2PixConfig(
        num_levels=levels, base_channels=args.channels, norm=args.norm, dropout=args.dropout, image_size=args.size
    )
    model = Pix2PixModel(config)
    discriminator = Pix2PixDiscriminator(
        args.receptive_field, base_channels=args.channels, norm=args.discriminator_norm or args.norm
    )
    rows = split_rows(args.dataset, args.held_out)[0]
    settings = {"size": args.size, "jitter": args.size // 9, "flip": True, "seed": args.seed}
    pairs = ImagePairs(rows, args.column, method=method, strength=args.strength, **settings)
    batch_size = min(batch_size, len(pairs))
    training = Pix2PixTrainingArguments(
        output_dir=str(args.output / name),
        seed=args.seed,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=batch_size,
        gan_loss=args.gan_loss if adversarial else "none",
        lambda_l1=args.lambda_l1,
        discriminator_learning_rate=args.discriminator_learning_rate,
        ema_decay=args.ema_decay**batch_size,  # as many images behind the average at any batch size
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=max(1, args.logging_images // batch_size),
        preview_steps=max(1, args.preview_images // batch_size),
        report_to="none",
        use_cpu=not gpu,
        disable_tqdm=True,
    )
    return Pix2PixTrainer(model, training, discriminator, train_dataset=pairs, callbacks=[Clock()])


def train(args: argparse.Namespace, name: str) -> None:
    """One run; writes `run.json` when it has ended."""
    folder = args.output / name
    if (folder / "run.json").exists():
        return
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    trainer = prepare(args, name, args.gpu)
    pairs, training = trainer.train_dataset, trainer.args
    batch_size = training.per_device_train_batch_size
    trainer.train(resume_from_checkpoint=True if list(folder.glob("checkpoint-*")) else None)
    trainer.save_model(str(folder / "model"))
    log = trainer.state.log_history
    run = {"run": name, "cartoonizer": pairs.method, "strength": args.strength}
    run |= {"gan_loss": training.gan_loss, "seed": args.seed}
    run |= {"lambda_l1": args.lambda_l1, "ema_decay": training.ema_decay, "dropout": args.dropout}
    run |= {"norm": args.norm, "discriminator_norm": args.discriminator_norm or args.norm}
    run |= {
        "receptive_field": args.receptive_field,
        "discriminator_learning_rate": training.discriminator_learning_rate,
    }
    run |= {"batch_size": batch_size, "epochs": args.epochs, "images_seen": round(args.epochs * len(pairs))}
    run |= {"steps": trainer.state.global_step}
    run |= {"cpu_seconds": next(e["cpu_seconds"] for e in reversed(log) if "cpu_seconds" in e)}
    run |= {"history": [entry for entry in log if "loss_l1" in entry]}
    write_whole(folder / "run.json", json.dumps(run, indent=2) + "\n")


def train_all(args: argparse.Namespace, names: list[str]) -> int:
    """Start a process for each run, at most `--processes` at a time; return the largest of their exit codes."""
    waiting, running, worst = [name for name in names if not (args.output / name / "run.json").exists()], [], 0
    for name in waiting:
        prepare(args, name)
    while waiting or running:
        while waiting and len(running) < args.processes:
            name = waiting.pop(0)
            command = [sys.executable, *sys.argv, "--run", name]
            running.append((name, subprocess.Popen(command, env=os.environ | MEMORY | {"OMP_NUM_THREADS": "1"})))
        name, process = running.pop(0)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            running.append((name, process))
        else:
            worst = max(worst, process.returncode)
            print(f"{name}: {'done' if process.returncode == 0 else 'failed'}", flush=True)
    return worst


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="skimage", help="photographs: folder of parquet files, Hub name, skimage")
    parser.add_argument("--column", default="image", help="column of the photographs")
    parser.add_argument("--output", type=Path, default=Path("runs/pix2pix_cartoon"))
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), metavar="RUN", help=f"some of {', '.join(RUNS)}")
    parser.add_argument("--ablation", action="store_true", help="batch sizes 8 and 64 as well, at equal images seen")
    parser.add_argument("--final", action="store_true", help="measure on the test split")
    parser.add_argument("--features", type=Path, help="weights of tf_efficientnet_lite0, for KID and feature cosine")
    parser.add_argument("--card", type=Path, metavar="DIR", help="write the first model with its card there")
    parser.add_argument("--repeats", type=Path, nargs="+", default=[], metavar="DIR", help="other seeds for the card")
    parser.add_argument("--choices", type=Path, nargs="+", default=[], metavar="DIR", help="trials for the card")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--size", type=int, default=128, help="pixels, a power of two")
    parser.add_argument("--channels", type=int, default=16, help="base channels of both networks")
    parser.add_argument("--norm", default="instance", choices=NORMS, help="of both networks")
    parser.add_argument("--discriminator-norm", choices=NORMS, help="where it differs from --norm")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the generator while it trains")
    parser.add_argument("--receptive-field", type=int, default=70, help="of the discriminator, pixels")
    parser.add_argument("--gan-loss", default="vanilla", help="vanilla, lsgan or hinge")
    parser.add_argument("--lambda-l1", type=float, default=1000.0, help="weight of the L1 loss (the paper: 100)")
    parser.add_argument("--discriminator-learning-rate", type=float, help="default: the generator's, 2e-4")
    parser.add_argument("--ema-decay", type=float, default=0.999, help="of the averaged weights, per image; 0: off")
    parser.add_argument("--held-out", type=int, default=0, help="measure on so many of the training photographs")
    parser.add_argument("--strength", type=int, default=3, help="of the training cartoons, 1 to 5")
    parser.add_argument("--severities", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--limit", type=int, help="test photographs (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logging-images", type=int, default=400)
    parser.add_argument("--preview-images", type=int, default=4000)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time (default: one per core)")
    parser.add_argument("--gpu", action="store_true", help="use the GPU; set --processes 1")
    parser.add_argument("--smoke", action="store_true", help="three photographs, tiny networks, two minutes")
    parser.add_argument("--run", choices=list(RUNS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.size & (args.size - 1) or args.size < 16:
        parser.error(f"--size must be a power of two from 16 on, got {args.size}")
    numbers = {"held_out": 0, "epochs": 1, "processes": 1, "limit": 1, "logging_images": 1, "preview_images": 1}
    for name, least in numbers.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if args.features and not args.features.is_file():
        parser.error(f"--features {args.features} is no file; name the weights of tf_efficientnet_lite0")
    for option, folder in [("repeats", path) for path in args.repeats] + [("choices", path) for path in args.choices]:
        if not (folder / "results.json").is_file():
            parser.error(f"--{option} {folder} holds no results.json; name the --output of a run that has ended")
    if args.held_out and (args.final or args.card):
        parser.error("--held-out is for choices of recipe; leave it out with --final and --card")
    if args.smoke:
        small = {"size": 32, "channels": 4, "epochs": 2, "receptive_field": 16, "severities": [0, 3]}
        small |= {"logging_images": 3, "preview_images": 3, "ablation": True, "final": True}
        vars(args).update(small, dataset="skimage", column="image")
    return args


def work(args: argparse.Namespace) -> int:
    if args.run:
        train(args, args.run)
        return 0
    check_grid(severities=args.severities)
    names = args.runs or [name for name in RUNS if args.ablation or not name.startswith("batch-")]
    worst = train_all(args, names)
    missing = [name for name in names if not (args.output / name / "run.json").exists()]
    if missing:
        end = "met wrong input, named above." if worst == 2 else "did not end; start the same command again to go on."
        sys.stderr.write(f"{', '.join(missing)} {end}\n")
        return 2 if worst == 2 else 1
    if args.final or args.card or args.held_out:
        runs = [json.loads((args.output / name / "run.json").read_text()) for name in names]
        held_out = split_rows(args.dataset, args.held_out)[1]
        report(args, runs, held_out if args.held_out else load_rows(args.dataset, "test", "photographs"))
    return 0


def main() -> int:
    args = parse()
    try:
        return work(args)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("HF_EFFICIENT_TRACEBACK"):
            raise
        typed = {name: f"--{name.replace('_', '-')}" for name in vars(args)} | TYPED
        sys.stderr.write(f"pix2pix_cartoon.py: error: {describe(error, typed)}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
