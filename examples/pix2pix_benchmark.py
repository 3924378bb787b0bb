"""What a Pix2Pix training step, the generator and the pipeline cost beside plain PyTorch.

    python examples/pix2pix_benchmark.py --json pix2pix_benchmark.json   # U-Net-256, 70x70 PatchGAN, 256 pixels
    python examples/pix2pix_benchmark.py --preset small                  # 16 base channels, under a minute

The plain step is the usual loop: default Adam, contiguous tensors, torch's own convolutions, one discriminator pass
for real and one for generated pairs, discriminator frozen in the generator's step. Ours makes two changes, both exact:
fused Adam, and matrix products for the deepest levels, for the picture and for the scores. A third one, real and
generated pairs in one pass, is made on GPUs alone (where the norm treats each image alone); here it is measured on top
of the others and not counted. The arms take turns in every round; figures are medians over the rounds of ratios within
a round.

* `train_step_speedup` by batch size (target: at least 1.15), and `train_step_share`: each change added after the other
* `inference_speedup` of the generator over the plain module, `images_per_second` of the pipeline by batch size
* `pipeline_overhead`: time of the pipeline over that of the bare model on ready tensors, minus 1 (target: 0.10)
* `peak_bytes`: largest resident memory of the process

Times are process CPU time with one thread; names that end in `_wall` and `images_per_second` are wall-clock time.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from hf_efficient import ImageToImagePipeline, Pix2PixConfig, Pix2PixDiscriminator, Pix2PixModel
from hf_efficient.pix2pix.configuration_pix2pix import NORMS
from hf_efficient.pix2pix.losses_pix2pix import discriminator_loss, generator_loss, score_pairs
from hf_efficient.pix2pix.modeling_pix2pix import Pix2PixScore, Pix2PixUpConv
from hf_efficient.results import run_meta, write_whole


PRESETS = {"small": {"channels": 16, "rounds": 3}, "medium": {"channels": 64, "rounds": 7}}
CHANGES = ("fused_adam", "matrix_products", "one_pass")  # added in this order; the trainer makes the first two


def make_networks(channels: int, norm: str) -> tuple[Pix2PixModel, Pix2PixDiscriminator]:
    torch.manual_seed(0)
    generator = Pix2PixModel(Pix2PixConfig(base_channels=channels, norm=norm))
    return generator, Pix2PixDiscriminator(70, base_channels=channels, norm=norm)


def plain_layers(model: nn.Module) -> nn.Module:
    """A copy whose convolutions are torch's own, with the same weights."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, Pix2PixUpConv):
                layer = nn.ConvTranspose2d(child.in_channels, child.out_channels, 4, 2, 1, bias=child.bias is not None)
            elif isinstance(child, Pix2PixScore):
                layer = nn.Conv2d(child.in_channels, 1, 4, 1, 1)
            else:
                continue
            layer.load_state_dict(child.state_dict())
            setattr(module, name, layer)
    return model


class Step:
    """One adversarial step with some of the changes."""

    def __init__(self, channels: int, norm: str, changes: tuple[str, ...]) -> None:
        self.generator, self.discriminator = make_networks(channels, norm)
        if "matrix_products" not in changes:
            self.generator, self.discriminator = plain_layers(self.generator), plain_layers(self.discriminator)
        self.generator.train()
        self.one_pass = "one_pass" in changes
        adam = {"lr": 2e-4, "betas": (0.5, 0.999)} | ({"fused": True} if "fused_adam" in changes else {})
        self.optimizers = [torch.optim.Adam(net.parameters(), **adam) for net in (self.generator, self.discriminator)]

    def __call__(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Update the discriminator, then the generator against it."""
        fake = self.generator(source).reconstruction
        self.optimizers[1].zero_grad()
        scores = score_pairs(self.discriminator, source, target, (source, fake.detach()), one_pass=self.one_pass)
        discriminator_loss(*scores, "vanilla").backward()
        self.optimizers[1].step()
        self.discriminator.requires_grad_(False)
        self.optimizers[0].zero_grad()
        adversarial = generator_loss(self.discriminator(source, fake), "vanilla")
        (adversarial + 100 * F.l1_loss(fake, target)).backward()
        self.discriminator.requires_grad_(True)
        self.optimizers[0].step()


def clock(work: Callable[[], None]) -> tuple[float, float]:
    """CPU and wall seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def take_turns(arms: dict[str, Callable[[], None]], rounds: int) -> list[dict[str, tuple[float, float]]]:
    for work in arms.values():
        work()
    return [{name: clock(work) for name, work in arms.items()} for _ in range(rounds)]


def ratio(turns: list[dict], above: str, below: str, kind: int = 0) -> float:
    return statistics.median(turn[above][kind] / turn[below][kind] for turn in turns)


def measure_steps(channels: int, rounds: int, norm: str, size: int) -> dict:
    names = ["plain", *CHANGES]
    results: dict = {"train_step_speedup": {}, "train_step_speedup_wall": {}, "train_step_share": {}}
    for batch in (1, 4):
        source, target = (torch.rand(batch, 3, size, size) * 2 - 1 for _ in range(2))
        steps = {name: Step(channels, norm, CHANGES[:number]) for number, name in enumerate(names)}
        turns = take_turns({name: partial(step, source, target) for name, step in steps.items()}, rounds)
        key = str(batch)
        results["train_step_speedup"][key] = ratio(turns, "plain", names[-2])
        results["train_step_speedup_wall"][key] = ratio(turns, "plain", names[-2], 1)
        shares = {name: ratio(turns, before, name) for before, name in pairwise(names)}
        results["train_step_share"][key] = shares
    return results


def measure_inference(channels: int, rounds: int, norm: str, size: int) -> dict:
    generator = make_networks(channels, norm)[0].eval()
    plain = plain_layers(generator)
    pipe = ImageToImagePipeline(model=generator, device="cpu")
    noise = np.random.default_rng(0)
    pictures = [Image.fromarray(noise.integers(0, 256, (size, size, 3), np.uint8)) for _ in range(4)]
    pixels = pipe.image_processor(pictures, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def run(model: nn.Module, batch: int) -> None:
        for start in range(0, len(pixels), batch):
            model(pixels[start : start + batch])

    arms = {"plain": lambda: run(plain, 1), "ours": lambda: run(generator, 1), "batch": lambda: run(generator, 4)}
    arms |= {"pipe_1": lambda: pipe(pictures), "pipe_4": lambda: pipe(pictures, batch_size=4)}
    turns = take_turns(arms, rounds)
    rate = {
        batch: statistics.median(len(pictures) / turn[f"pipe_{batch}"][1] for turn in turns) for batch in ("1", "4")
    }
    return {
        "inference_speedup": ratio(turns, "plain", "ours"),
        "images_per_second": rate,
        "pipeline_overhead": max(ratio(turns, "pipe_1", "ours"), ratio(turns, "pipe_4", "batch")) - 1,
    }


def peak_bytes() -> int | None:
    """Largest resident memory of this process; Windows has no count of it here."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="medium")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, help="how often the arms take turns (default: by preset)")
    parser.add_argument("--norm", default="instance", choices=NORMS)
    parser.add_argument("--size", type=int, default=256, help="pixels, a multiple of 256")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: the folder does not exist; create it first.")
    if args.size < 256 or args.size % 256:
        parser.error(f"--size must be a multiple of 256, got {args.size}")
    for option, value in (("--rounds", args.rounds), ("--threads", args.threads)):
        if value is not None and value < 1:
            parser.error(f"{option} must be at least 1, got {value}")
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    settings = {**PRESETS[args.preset], "norm": args.norm, "size": args.size}
    if args.rounds:
        settings["rounds"] = args.rounds
    meta = run_meta()
    results = {"meta": meta, "preset": args.preset, **measure_steps(**settings), **measure_inference(**settings)}
    results["peak_bytes"] = peak_bytes()
    for name, value in results.items():
        if name not in ("meta", "preset"):
            print(f"{name}: {json.dumps(value)}")
    if args.json:
        write_whole(args.json, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
