"""Prune CIFAR-10 ResNets with KDFS beside Torch-Pruning, random masks and the network trained on as it is.

    python examples/kdfs_prune_cifar.py --data cifar10 --weights cifar10_resnet --arm kdfs --seed 0
    python examples/kdfs_prune_cifar.py --data cifar10 --weights cifar10_resnet --final --worker 1/2
    python examples/kdfs_prune_cifar.py --smoke

DATA holds train.parquet and test.parquet (columns `image`, `label`), WEIGHTS the trained networks
`resnet20_jpeg.safetensors` (87.9 % on the test images) and `resnet56_jpeg.safetensors` (89.1 %) in the layout of
pytorch_resnet_cifar10. Every run has 20 epochs in all (ResNet-56: 10), about one hour on one core each; start one
process per core with OMP_NUM_THREADS=1 and `--worker I/N`. Without `--final` a run trains on the first 45,000 rows
and is judged on the last 5,000 (which the given weights have seen: good for choosing recipes, not for quoting). With
it, it trains on all rows and is judged on the 10,000 test images. Runs go on from their last checkpoint, finished
ones are not repeated, and `results.json` in OUTPUT is written anew after every run.
Expected with `--final`: ResNet-20 at -50 % within 1.0 point of the dense network trained for the same epochs.
"""

import argparse
import json
import tempfile
from pathlib import Path

from kdfs_prune_cifar_arms import ARMS, load_teacher, run_arm
from kdfs_prune_cifar_card import summarise, write_checkpoint
from kdfs_prune_cifar_data import load_data
from transformers.utils import logging

from hf_efficient.results import run_meta, write_whole


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--weights", type=Path, help="folder with resnet20_jpeg.safetensors and resnet56_jpeg")
    parser.add_argument("--output", type=Path, default=Path("runs/kdfs_cifar"), help="default: runs/kdfs_cifar")
    parser.add_argument("--arm", choices=list(ARMS), nargs="+", help="default: all")
    parser.add_argument("--seed", type=int, nargs="+", help="default: as many as the arm has, from 0")
    parser.add_argument("--worker", default="1/1", metavar="I/N", help="do every N-th run, starting at the I-th")
    parser.add_argument("--final", action="store_true", help="train on all rows, judge on the test images")
    parser.add_argument("--card", type=Path, metavar="DIR", help="write the pruned checkpoint with its card there")
    parser.add_argument("--smoke", action="store_true", help="toy data and a toy network, under a minute")
    parser.add_argument("--epochs", type=float, help="in all (default: 20, ResNet-56: 10)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--fine-tune-share", type=float, default=0.5)
    parser.add_argument("--mask-learning-rate", type=float, default=2e-2)
    parser.add_argument("--keep-margin", type=float, default=2.0)
    parser.add_argument("--importance-spread", type=float, default=1.0)
    parser.add_argument("--reconstruction-weight", type=float, default=1000.0)
    parser.add_argument("--flops-weight", type=float, default=10000.0)
    parser.add_argument("--gpu", action="store_true", help="use a GPU where there is one")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    if not options.smoke and (options.data is None or options.weights is None):
        parser.error("--data and --weights are needed (or --smoke)")
    options.cpu = not options.gpu
    return options


def plan(options: argparse.Namespace) -> list[tuple[str, int]]:
    """(arm, seed) of this process; a network from scratch comes after the run whose shape it takes."""
    runs = [
        (name, seed)
        for name in options.arm or ARMS
        for seed in (range(ARMS[name].seeds) if options.seed is None else options.seed)
    ]
    first, count = (int(part) for part in options.worker.split("/"))
    runs.sort(key=lambda run: (ARMS[run[0]].kind == "scratch", run[1] if ARMS[run[0]].depth == 20 else 0))
    return runs[first - 1 :: count]


def collect(output: Path, meta: dict, final: bool) -> dict:
    """`results.json` of all finished runs, also those of other processes."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(output.glob("*/result.json"))]
    judged = "10,000 test images" if final else "last 5,000 training rows"
    results = {"judged_on": judged, "summary": summarise(runs), "runs": runs, "meta": meta}
    write_whole(output / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def main() -> None:
    options = parse()
    if options.smoke:
        options.output = Path(tempfile.mkdtemp(prefix="kdfs_cifar_"))
        options.batch_size, options.epochs, options.final = 32, 1.0, True
        options.arm = options.arm or ["dense", "kdfs", "torch_pruning_kd", "random", "scratch", "kdfs_no_kd"]
        options.seed = [0]
    meta = run_meta()
    logging.set_verbosity_warning()
    output = options.output / ("final" if options.final else "chosen")
    train, held_out = load_data(options.data, options.final, options.smoke)
    chosen_epochs = options.epochs
    for name, seed in plan(options):
        depth = ARMS[name].depth
        options.epochs = chosen_epochs or (20.0 if depth == 20 else 10.0)
        teacher = load_teacher(options.weights, depth, options.smoke)
        result = run_arm(name, seed, teacher, train, held_out, output, options)
        print(
            f"{name} seed {seed}: accuracy {result['accuracy']:.4f}, "
            f"{result['flops_reduction']:.1%} fewer multiply-adds, {result['seconds']:.0f} s",
            flush=True,
        )
        results = collect(output, meta, options.final)
    results = collect(output, meta, options.final)
    for row in results["summary"]:
        print("{title}: {accuracy:.4f} (spread {spread:.4f}, {seeds} seeds), {macs:,} multiply-adds".format(**row))
    if options.smoke:
        options.card = options.card or options.output / "card" / "resnet20-kdfs-cifar10"
    if options.card:
        teacher = load_teacher(options.weights, 20, options.smoke)
        print("wrote", write_checkpoint(options.card, output / "kdfs-0" / "model", teacher, results))


if __name__ == "__main__":
    main()
