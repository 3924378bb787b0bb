"""Prune CIFAR-10 ResNets with KDFS beside Torch-Pruning, random masks and the network trained on as it is.

    python examples/kdfs_prune_cifar.py --data cifar10 --weights cifar10_resnet --arm kdfs --seed 0
    python examples/kdfs_prune_cifar.py --data cifar10 --weights cifar10_resnet --final --results examples/results/kdfs_cifar10
    python examples/kdfs_prune_cifar.py --data cifar10 --weights cifar10_resnet --final --results ... --status
    python examples/kdfs_prune_cifar.py --smoke

DATA holds train.parquet and test.parquet (columns `image`, `label`), WEIGHTS the trained networks
`resnet20_jpeg.safetensors` (87.9 % on the test images) and `resnet56_jpeg.safetensors` (89.1 %): the networks of
pytorch_resnet_cifar10 after two more epochs on these images, which are JPEG-compressed, or others in that layout. Every run has 20 epochs in all (ResNet-56: 10) and takes 0.5 to 1.2 hours on a core with
AVX-512, four times as long on a slow one without, a third less with `--bf16` where the CPU multiplies bfloat16; all of
them are 15 core-hours there (11), which `--estimate` measures on the machine at hand in a minute. Start the same command once per core: a process takes the next run that no other has.
Without `--final` a run trains on the first 45,000 rows and is judged on the last 5,000 (which the given weights have
seen: good for choosing recipes, not for quoting). With it, it trains on all rows and is judged on the 10,000 test
images.

A run that was cut off goes on from its last checkpoint in OUTPUT (one per epoch). A finished one is a file of a few kB
in RESULTS, with the weights that other runs and the card need; that folder can be moved to another machine, and what
it holds is not repeated. `--status` lists what is done, half done and missing, with core-hours. Trials of other
recipes, made without `--final` and copied to RESULTS/choices/NAME/, get into the card.
Expected with `--final`: ResNet-20 at -50 % within 1.0 point of the dense network trained for the same epochs.
"""  # noqa: E501 - commands to copy

import argparse
import faulthandler
import json
import signal
import sys
import tempfile
from pathlib import Path

import torch
from kdfs_prune_cifar_arms import ARMS, run_arm
from kdfs_prune_cifar_card import summarise
from kdfs_prune_cifar_data import Images, load_data
from kdfs_prune_cifar_estimate import estimate
from kdfs_prune_cifar_memory import keep_memory
from kdfs_prune_cifar_networks import load_teacher
from kdfs_prune_cifar_publish import DENSE_NAME, write_dense, write_pruned
from kdfs_prune_cifar_runs import Results, check_recipe, claim, recipe, show_status
from transformers.utils import logging

from hf_efficient.results import run_meta, write_whole


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--weights", type=Path, help="folder with resnet20_jpeg.safetensors and resnet56_jpeg")
    parser.add_argument("--output", type=Path, default=Path("runs/kdfs_cifar"), help="default: runs/kdfs_cifar")
    parser.add_argument("--results", type=Path, help="folder to keep finished runs in (default: results in OUTPUT)")
    parser.add_argument("--status", action="store_true", help="list done, half done and missing runs, and end")
    parser.add_argument("--estimate", action="store_true", help="measure steps, print core-hours per arm, and end")
    parser.add_argument("--arm", choices=list(ARMS), nargs="+", help="default: all")
    parser.add_argument("--seed", type=int, nargs="+", help="default: as many as the arm has, from 0")
    parser.add_argument("--final", action="store_true", help="train on all rows, judge on the test images")
    parser.add_argument(
        "--card",
        type=Path,
        metavar="DIR",
        help=f"write the pruned checkpoint there, the given one to {DENSE_NAME} beside",
    )
    parser.add_argument("--smoke", action="store_true", help="toy data and a toy network, under a minute")
    parser.add_argument("--epochs", type=float, help="in all (default: 20, ResNet-56: 10)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--fine-tune-share", type=float, default=0.85)
    parser.add_argument("--mask-learning-rate", type=float, default=2e-2)
    parser.add_argument("--keep-margin", type=float, default=2.0)
    parser.add_argument("--importance-spread", type=float, default=4.0)
    parser.add_argument("--importance-images", type=int, default=1024)
    parser.add_argument("--reconstruction-weight", type=float, default=1000.0)
    parser.add_argument("--flops-weight", type=float, default=300.0)
    parser.add_argument("--kd-weight", type=float, default=4.0)
    parser.add_argument("--kd-temperature", type=float, default=4.0)
    parser.add_argument("--exclude-layers", default="", metavar="PATTERN", help="leave these convolutions whole")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1; more are slower at this size)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast; slow on CPUs without avx512_bf16")
    parser.add_argument("--gpu", action="store_true", help="use a GPU where there is one")
    parser.add_argument("--quiet", action="store_true", help="no progress bars; the losses of every epoch as lines")
    options = parser.parse_args()
    needed = not (options.smoke or options.status)
    if needed and (options.weights is None or (options.data is None and not options.estimate)):
        parser.error("--data and --weights are needed (or --smoke)")
    if options.epochs is not None and options.epochs <= 0:
        parser.error(f"--epochs must be above 0, but is {options.epochs:g}; leave it out for the default.")
    for card in (options.card, options.card.parent / DENSE_NAME) if options.card else ():
        if card.exists() and any(card.iterdir()) and not (card / "results.json").is_file():
            parser.error(f"--card: {card} holds other files, which would be deleted: name a new folder.")
    options.cpu = not (options.gpu and torch.cuda.is_available())
    return options


def plan(options: argparse.Namespace) -> list[tuple[str, int]]:
    """(arm, seed) in order; a network from scratch comes after the run whose shape it takes."""
    runs = [
        (name, seed)
        for name in options.arm or ARMS
        for seed in (range(ARMS[name].seeds) if options.seed is None else options.seed)
    ]
    return sorted(runs, key=lambda run: (ARMS[run[0]].depth, ARMS[run[0]].kind == "scratch" or run[1]))


def collect(results: Results, meta: dict, final: bool) -> dict:
    """`results.json` of all finished runs, also those of other processes."""
    runs = results.all()
    images = runs[0]["images"] if runs else 0
    kind = "toy images" if images < 1000 else "test images" if final else "training rows held out"
    judged = f"{images:,} {kind}"
    document = {"judged_on": judged, "summary": summarise(runs), "runs": runs, "meta": meta}
    results.folder.mkdir(parents=True, exist_ok=True)  # also where no run is done yet
    write_whole(results.folder / "results.json", json.dumps(document, indent=1) + "\n")
    return document


def work(options: argparse.Namespace, output: Path, results: Results, train: Images, held_out: Images) -> int:
    """Do every run that is neither done nor in the hands of another process; how many are left undone."""
    left = 0
    for name, seed in plan(options):
        arm, folder = ARMS[name], output / f"{name}-{seed}"
        with claim(folder) as mine:
            done = results.load(name, seed)
            if done is not None:
                check_recipe(done, recipe(options, arm), results.folder)
                continue
            if not mine or (arm.kind == "scratch" and not results.weights("kdfs", seed).is_dir()):
                print(f"{name} seed {seed}: " + ("needs kdfs seed 0 first" if mine else "another process is at it"))
                left += 1
                continue
            teacher = load_teacher(options.weights, arm.depth, options.smoke)
            result = run_arm(name, seed, teacher, train, held_out, folder, results, options)
        print(
            f"{name} seed {seed}: accuracy {result['accuracy']:.4f}, "
            f"{result['flops_reduction']:.1%} fewer multiply-adds, {result['core_hours']:.2f} core-hours",
            flush=True,
        )
        collect(results, options.meta, options.final)
    return left


def main() -> None:
    faulthandler.enable()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside (SIGTERM); started again, it goes on"))
    options = parse()
    torch.set_num_threads(options.threads)
    if options.smoke:
        options.output = Path(tempfile.mkdtemp(prefix="kdfs_cifar_"))
        options.batch_size, options.epochs, options.final = 32, 1.0, True
        options.arm = options.arm or ["dense", "kdfs", "torch_pruning_kd", "random", "scratch", "kdfs_no_kd"]
        options.seed = [0]
    mode = "final" if options.final else "chosen"
    output, results = options.output / mode, Results((options.results or options.output / "results") / mode)
    logging.set_verbosity_warning()
    if options.estimate:
        estimate(options)
        return
    if options.status:
        show_status(plan(options), ARMS, results, output)
        return
    if options.card and ("kdfs", 0) not in plan(options) and results.load("kdfs", 0) is None:
        raise SystemExit("--card needs the arm kdfs with seed 0: add them to --arm and --seed.")
    if options.card and options.weights and not (options.weights / "LICENSE").is_file():
        raise SystemExit(f"--card: {options.weights} holds no LICENSE, which goes with the networks: put it there.")
    if not options.smoke:
        networks = sorted({f"resnet{ARMS[name].depth}_jpeg.safetensors" for name in options.arm or ARMS})
        for folder, names in ((options.data, ["train.parquet", "test.parquet"]), (options.weights, networks)):
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise SystemExit(f"{folder} must hold {' and '.join(names)}, but {missing[0]} is not there.")
    options.meta = run_meta()
    if options.cpu:
        options.meta.pop("gpu", None)  # torch sees one, no run uses it
    train, held_out = load_data(options.data, options.final, options.smoke)
    left = work(options, output, results, train, held_out)
    document = collect(results, options.meta, options.final)
    for row in document["summary"]:
        print("{title}: {accuracy:.4f} (spread {spread:.4f}, {seeds} seeds), {macs:,} multiply-adds".format(**row))
    if options.smoke:
        options.card = options.card or options.output / "card" / "resnet20-kdfs-cifar10"
        show_status(plan(options), ARMS, results, output)
    if options.card and left:
        print(f"no card: {left} runs are left")
    elif options.card:
        licence = options.weights and options.weights / "LICENSE"
        choices, network = results.folder.parent / "choices", results.weights("kdfs", 0)
        teacher, dense = load_teacher(options.weights, 20, options.smoke), options.card.parent / DENSE_NAME
        print("wrote", write_pruned(options.card, network, teacher, document, choices, held_out, licence))
        print("wrote", write_dense(dense, teacher, document, held_out, licence))


if __name__ == "__main__":
    if "--card" in sys.argv:
        keep_memory()
    main()
