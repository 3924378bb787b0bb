"""Train Pix2Pix on any pairs of images (arXiv 1611.07004), such as the label maps of facades to photographs.

Three kinds of data: two image columns; photographs and a cartoonizer (an image column, or a folder of pictures); or a
folder of A|B pictures. Of a folder without `train` and `test` every tenth picture is kept for the test. An interrupted
training goes on at its last checkpoint; `--minutes` ends it in time, and the same command goes on later. Exit code 2
means wrong input, with one sentence that says what to change.

    python examples/pix2pix_train.py --dataset DIR/facades --source labels --target photo --minutes 60
    python examples/pix2pix_train.py --dataset DIR/photos --cartoonizer palette --strength 4
    python examples/pix2pix_train.py --dataset DIR/my_ab_pictures

Writes previews while it trains, then `model/`, `results.json` (PSNR and SSIM on the test pairs) and `samples.png`. To
expect on facades (with `--channels 32 --epochs 100`, an hour on one core): windows, doors, balconies and roofs where
the labels have them, in colours of its own; 12.9 dB (examples/results/pix2pix_facades.json, AMD EPYC, 2026-11-25).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from pix2pix_train_data import load_rows
from transformers import TrainerCallback, set_seed

from hf_efficient import (
    ImageToImagePipeline,
    Pix2PixConfig,
    Pix2PixDiscriminator,
    Pix2PixImageProcessor,
    Pix2PixModel,
    Pix2PixTrainer,
    Pix2PixTrainingArguments,
)
from hf_efficient.cli import describe
from hf_efficient.pix2pix.cartoonize_pix2pix import METHODS
from hf_efficient.pix2pix.configuration_pix2pix import GENERATORS, NORMS
from hf_efficient.pix2pix.figures_pix2pix import sample_sheet, save_picture
from hf_efficient.pix2pix.losses_pix2pix import GAN_LOSSES
from hf_efficient.pix2pix.pairs_pix2pix import ImagePairs, SideBySideFolder
from hf_efficient.results import run_meta, write_whole


TARGET = "image"  # column of the wanted images, where none is named
# what the package calls a setting -> what is typed here
TYPED = {
    "method": "--cartoonizer",
    "source_column": "--source",
    "target_column": "--target",
    "any_shape": "--direction",
    "base_channels": "--channels",
    "image_size": "--size",
    "num_train_epochs": "--epochs",
    "per_device_train_batch_size": "--batch-size",
    "output_dir": "--output",
}


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description and names each default that there is."""

    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = action.default is not None and action.default is not False  # 0 is one
        return super()._get_help_string(action) if has_default else action.help


class Deadline(TrainerCallback):
    """Ends the training after some minutes, with a checkpoint to go on from."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop when the time is over."""
        if time.monotonic() > self.end:
            control.should_save = control.should_training_stop = True


def make_pairs(args: argparse.Namespace, split: str, augment: bool) -> ImagePairs:
    pictures = "photographs" if args.cartoonizer else "pairs" if args.direction else None
    rows = load_rows(args.dataset, split, pictures)
    source, target = args.source, args.target
    if isinstance(rows, SideBySideFolder):
        source, target = ("target", "source") if args.direction == "BtoA" else ("source", "target")
    elif args.direction:
        raise ValueError(
            f"--direction is for a folder of A|B pictures, --dataset {args.dataset} is none: leave it out."
        )
    elif target == TARGET and TARGET not in (names := getattr(rows, "column_names", (TARGET,))):
        raise ValueError(
            f"--target must be one of the columns {', '.join(names)}, got {TARGET!r}, its default: give --target."
        )
    settings = {"size": args.size, "method": args.cartoonizer, "strength": args.strength, "seed": args.seed}
    if augment:
        settings |= {"jitter": args.size // 9, "flip": True}
    return ImagePairs(rows, target, source, **settings)


def train(args: argparse.Namespace) -> Pix2PixTrainer:
    set_seed(args.seed)
    levels = args.size.bit_length() - 1
    config = Pix2PixConfig(
        generator=args.generator, num_levels=levels, base_channels=args.channels, norm=args.norm, image_size=args.size
    )
    discriminator = Pix2PixDiscriminator(args.receptive_field, base_channels=args.channels, norm=args.norm)
    training = Pix2PixTrainingArguments(
        output_dir=str(args.output),
        seed=args.seed,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        gan_loss=args.gan_loss,
        lambda_l1=args.lambda_l1,
        ema_decay=args.ema_decay,
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=args.logging_steps,
        preview_steps=args.preview_steps,
        report_to="none",
        use_cpu=not args.gpu,
        bf16=args.bf16,
    )
    test = make_pairs(args, args.test_split, augment=False)
    trainer = Pix2PixTrainer(
        Pix2PixModel(config),
        training,
        discriminator,
        train_dataset=make_pairs(args, "train", augment=True),
        eval_dataset=test,
        callbacks=[Deadline(args.minutes)] if args.minutes else [],
    )
    trainer.train(resume_from_checkpoint=True if list(args.output.glob("checkpoint-*")) else None)
    return trainer


def report(args: argparse.Namespace, trainer: Pix2PixTrainer, meta: dict) -> None:
    """Measure the test pairs, save the model and draw some of them as the pipeline translates them."""
    scores = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items() if "runtime" not in name}
    trainer.save_model(str(args.output / "model"))
    processor = Pix2PixImageProcessor.for_model(trainer.model.config)
    processor.save_pretrained(args.output / "model")
    translate = ImageToImagePipeline(model=trainer.model.eval(), image_processor=processor, device=trainer.args.device)
    pairs = [trainer.eval_dataset.images(row) for row in range(min(6, len(trainer.eval_dataset)))]
    size = (args.size, args.size)
    rows = [[source.resize(size), translate(source.resize(size)), target.resize(size)] for source, target in pairs]
    save_picture(sample_sheet(rows, ["source", "output", "target"]), args.output / "samples.png")
    data = trainer.train_dataset
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    settings |= {"source": data.source_column, "target": data.target_column, "cartoonizer": data.method}
    if data.method is None:  # the sources were read, not drawn
        del settings["cartoonizer"], settings["strength"]
    log = [entry for entry in trainer.state.log_history if "loss_l1" in entry]
    steps = {"steps": trainer.state.global_step, "max_steps": trainer.state.max_steps, "epoch": trainer.state.epoch}
    results = {"test": scores, **steps, "settings": settings, "history": log, "meta": meta}
    write_whole(args.output / "results.json", json.dumps(results, indent=2) + "\n")
    print(f"PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.3f} on {len(trainer.eval_dataset)} test pairs")
    print(f"step {steps['steps']} of {steps['max_steps']}; {args.output / 'samples.png'}: what it learned")


def _one_of(names: Iterable[str]) -> str:
    """Write choices as argparse does; the package refuses others, in one sentence."""
    return "{" + ",".join(names) + "}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--dataset", default="skimage", help="folder of parquet files or pictures, or a Hub name")
    parser.add_argument("--source", help="column of the source images; left out, the target is cartoonized")
    parser.add_argument("--target", default=TARGET, help="column of the wanted images")
    parser.add_argument("--direction", choices=("AtoB", "BtoA"), help="of A|B pictures (AtoB); any shape, when given")
    parser.add_argument("--cartoonizer", metavar=_one_of(METHODS), help="bilateral, where no source is named")
    parser.add_argument("--strength", type=int, default=3, help="of the cartoons, 0 to 5")
    parser.add_argument("--test-split", default="test", help="split to measure on")
    parser.add_argument("--output", type=Path, default=Path("runs/pix2pix_train"), help="folder to write")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    parser.add_argument("--epochs", type=float, default=200, help="passes over the data")
    parser.add_argument("--batch-size", type=int, default=1, help="pairs a step")
    parser.add_argument("--size", type=int, default=128, help="pixels, a power of two")
    parser.add_argument("--channels", type=int, default=16, help="base channels of both networks (the paper: 64)")
    parser.add_argument("--generator", default="unet", metavar=_one_of(GENERATORS), help="kind of generator")
    parser.add_argument("--norm", default="instance", metavar=_one_of(NORMS), help="of both networks")
    parser.add_argument("--receptive-field", type=int, default=70, help="1, 16, 34, 70, 142 or 286 pixels")
    parser.add_argument("--gan-loss", default="vanilla", metavar=_one_of(GAN_LOSSES), help="of both networks")
    parser.add_argument("--lambda-l1", type=float, default=100.0, help="weight of the L1 loss")
    parser.add_argument("--ema-decay", type=float, default=0.0, help="decay of the averaged weights, 0 = off")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    parser.add_argument("--logging-steps", type=int, default=200, help="steps between two lines of losses")
    parser.add_argument("--preview-steps", type=int, default=1000, help="steps between two previews, 0 = none")
    parser.add_argument("--gpu", action="store_true", help="train on the accelerator")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--smoke", action="store_true", help="three photographs, tiny networks, under a minute")
    args = parser.parse_args()
    if args.size & (args.size - 1) or args.size < 2:
        parser.error(f"--size must be a power of two, got {args.size}")
    if args.cartoonizer and (args.direction or args.source):
        other = "--direction" if args.direction else "--source"
        parser.error(f"--cartoonizer draws the source images and {other} names them; leave one of them out")
    if args.smoke:
        small = {"size": 32, "channels": 4, "epochs": 2, "receptive_field": 16, "logging_steps": 2, "preview_steps": 3}
        vars(args).update(small, dataset="skimage", source=None, target=TARGET, direction=None)
    return args


def main() -> int:
    args = parse()
    meta = run_meta()
    torch.set_flush_denormal(True)
    try:
        report(args, train(args), meta)
    except FloatingPointError as error:
        sys.stderr.write(f"pix2pix_train.py: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on at the last checkpoint\n")
        return 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("HF_EFFICIENT_TRACEBACK"):
            raise
        typed = {name: f"--{name.replace('_', '-')}" for name in vars(args)} | TYPED
        sys.stderr.write(f"pix2pix_train.py: error: {describe(error, typed)}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
