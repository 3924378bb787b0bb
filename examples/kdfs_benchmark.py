"""What a KDFS sampling step costs, and how much faster the sliced network runs.

    python examples/kdfs_benchmark.py --json kdfs_benchmark.json
    python examples/kdfs_benchmark.py --preset small
    python examples/kdfs_benchmark.py --gpu

`sampling_step_ratio`: one KDFS step (masks, decoders, three losses) over one plain distillation step (teacher forward,
student forward and backward), in turns, CPU time; expected at most 1.25. `latency_speedup`: dense over sliced, in
torch (both memory formats) and onnxruntime, at batch 1 and 64, for widths rounded to 1 and to 8. Of
`latency_saving_share`, `(1 - t_sliced / t_dense) / flops_reduction`, at least 0.8 is expected at `round_to=8`; CPU
time with one thread, wall time with more. `scatter_share` is the part of the sliced network's time that goes into
putting residual branches back to full width. Weights are random. The medium preset has ResNet-50 shapes at 224 pixels
(3 to 10 minutes on one core), the small one ResNet-18 shapes at 64 pixels, batch 1 and 8. `--gpu` measures torch on a
GPU, in wall time. On Linux the script starts itself again with glibc told to keep freed memory: else fetching pages
for every layer anew is half of the time at batch 64, dense or sliced.
"""

import argparse
import copy
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from kdfs_prune_cifar_memory import KEEP_MEMORY, keep_memory
from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments, set_seed
from transformers.utils import logging

from hf_efficient import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    KDFSConfig,
    KDFSTrainer,
    count_flops,
)
from hf_efficient.kdfs.masking_kdfs import KDFSMaskedModel
from hf_efficient.kdfs.modeling_kdfs_pruned import export_onnx, scatter_channels
from hf_efficient.kdfs.slicing_kdfs import slice_network
from hf_efficient.kdfs.structure_kdfs import read_structure
from hf_efficient.kdfs.trainer_kdfs import DistillationTrainer
from hf_efficient.results import run_meta, write_whole


PRESETS = {
    "medium": {
        "network": {"layer_type": "bottleneck", "depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]},
        "size": 224,
        "batches": (1, 64),
        "repeats": {1: 15, 64: 7},
        "step": {"depth": 20, "batch": 128, "repeats": 9},
    },
    "small": {
        "network": {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
        "size": 64,
        "batches": (1, 8),
        "repeats": {1: 9, 8: 5},
        "step": {"depth": 8, "batch": 32, "repeats": 7},
    },
}
REDUCTION = 0.5


def take_turns(tasks: dict, repeats: int, clock=time.perf_counter) -> dict[str, float]:
    """Median seconds of every task; they take turns, so a busy neighbour hits all alike."""
    times = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(repeats):
        for name, task in tasks.items():
            start = clock()
            task()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def clock_of(device: str, cpu_time: bool = True):
    """A function that reads seconds: of the process on a CPU, or of the wall once a GPU has nothing left to do."""
    if device == "cpu":
        return time.process_time if cpu_time else time.perf_counter

    def read() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return read


def sampling_step_ratio(depth: int, batch: int, repeats: int, device: str = "cpu") -> dict[str, float]:
    """Seconds (on a CPU: of the process) of a KDFS step and of a plain distillation step on a CIFAR ResNet."""
    set_seed(0)
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=depth))
    inputs = {"pixel_values": torch.randn(batch, 3, 32, 32), "labels": torch.randint(0, 10, (batch,))}
    rows = [{"pixel_values": inputs["pixel_values"][0], "labels": 0}]
    args = TrainingArguments(
        output_dir="runs/kdfs_benchmark", use_cpu=device == "cpu", report_to="none", disable_tqdm=True
    )
    plain = DistillationTrainer(copy.deepcopy(model), args, teacher=copy.deepcopy(model), train_dataset=rows)
    config = KDFSConfig(target_flops_reduction=REDUCTION)
    sampler = KDFSTrainer(copy.deepcopy(model), args, config, copy.deepcopy(model), train_dataset=rows)

    def step(trainer):
        def run():
            trainer.training_step(trainer.model, dict(inputs))
            trainer.model.zero_grad(set_to_none=True)

        return run

    for trainer in (plain, sampler):
        trainer.current_gradient_accumulation_steps = 1
    seconds = take_turns({"plain": step(plain), "sampling": step(sampler)}, repeats, clock_of(device))
    return {**seconds, "ratio": seconds["sampling"] / seconds["plain"]}


def slice_randomly(model: torch.nn.Module, shape: tuple, round_to: int) -> torch.nn.Module:
    """The network without randomly chosen filters."""
    config = KDFSConfig(target_flops_reduction=REDUCTION, round_to=round_to, reconstruction_weight=0.0)
    masked = KDFSMaskedModel(copy.deepcopy(model), read_structure(model, shape), config)
    with torch.no_grad():
        for logits in masked.mask_logits:
            logits.copy_(torch.randn_like(logits))
    masked.freeze_masks()
    return slice_network(masked, model)


def scatter_seconds(model: torch.nn.Module, images: torch.Tensor, repeats: int, clock) -> float:
    """Seconds of all scatters of one forward pass, run on their own."""
    calls = []

    def keep(module, args, output):
        calls.append((output.shape, module.filter_index))

    scattered = [module for module in model.modules() if hasattr(module, "filter_index")]
    handles = [module.register_forward_hook(keep, prepend=True) for module in scattered]
    with torch.no_grad():
        model(images)
        for handle in handles:
            handle.remove()
        work = [(torch.zeros(shape, device=images.device), index) for shape, index in calls]
        return take_turns({"scatter": lambda: [scatter_channels(*item) for item in work]}, repeats, clock)["scatter"]


def open_sessions(networks: dict, shape: tuple) -> dict:
    """The networks as ONNX in onnxruntime, with as many threads as torch has."""
    import onnxruntime

    folder = Path("runs/kdfs_benchmark")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    sessions = {}
    for name, network in networks.items():
        file = export_onnx(network, folder, shape, f"{name}.onnx")
        sessions[name] = onnxruntime.InferenceSession(str(file), options)
        file.unlink()
    return sessions


def measure_latency(preset: dict, device: str = "cpu") -> dict:
    """Dense against sliced, torch and (on a CPU) onnxruntime, every batch size; CPU time where there is one thread."""
    clock, shape = clock_of(device, torch.get_num_threads() == 1), (3, preset["size"], preset["size"])
    set_seed(0)
    dense = ResNetForImageClassification(ResNetConfig(num_labels=1000, **preset["network"])).eval()
    networks = {"dense": dense, **{f"round_to_{n}": slice_randomly(dense, shape, n) for n in (1, 8)}}
    sessions = open_sessions(networks, shape) if device == "cpu" else {}
    macs = {name: count_flops(network, shape) for name, network in networks.items()}
    reduction = {name: 1 - macs[name] / macs["dense"] for name in networks if name != "dense"}
    networks = {name: network.to(device) for name, network in networks.items()}
    turned = {name: copy.deepcopy(item).to(memory_format=torch.channels_last) for name, item in networks.items()}
    found = {name: {} for name in ("torch", "torch_channels_last", "onnxruntime")[: 3 if sessions else 2]}
    scatter, agreement = {}, 0.0
    for batch in preset["batches"]:
        images = torch.randn(batch, *shape).to(device)
        repeats = preset["repeats"][batch]
        with torch.no_grad():
            runs = {"torch": {name: partial(network, images) for name, network in networks.items()}}
            pixels = images.to(memory_format=torch.channels_last)
            runs["torch_channels_last"] = {name: partial(item, pixels) for name, item in turned.items()}
            if sessions:
                rows = {"pixel_values": images.numpy()}
                runs["onnxruntime"] = {name: partial(session.run, None, rows) for name, session in sessions.items()}
            for engine, tasks in runs.items():
                found[engine][batch] = take_turns(tasks, repeats, clock)
            for name in sessions:
                difference = torch.from_numpy(runs["onnxruntime"][name]()[0]) - networks[name](images).logits
                agreement = max(agreement, difference.abs().max().item())
        times = found["torch"][batch]
        scatter[str(batch)] = {
            name: scatter_seconds(networks[name], images, repeats, clock) / times[name] for name in reduction
        }

    def per_network(value):
        return {
            engine: {name: {str(b): value(times[b], name) for b in times} for name in reduction}
            for engine, times in found.items()
        }

    return {
        "flops_reduction": reduction,
        "latency_speedup": per_network(lambda times, name: times["dense"] / times[name]),
        "latency_saving_share": per_network(lambda times, name: (1 - times[name] / times["dense"]) / reduction[name]),
        "latency_seconds": {e: {str(b): times for b, times in t.items()} for e, t in found.items()},
        "scatter_share": {name: {batch: shares[name] for batch, shares in scatter.items()} for name in reduction},
        **({"onnx_largest_difference": agreement} if sessions else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="medium", help="default: medium")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there")
    parser.add_argument("--threads", type=int, default=1, help="of torch and onnxruntime (default: 1)")
    parser.add_argument("--gpu", action="store_true", help="measure torch on a GPU, ten times as many repeats")
    options = parser.parse_args()
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch sees no GPU here; leave it out to measure the CPU.")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, but is {options.threads}; name a number of cores.")
    torch.set_num_threads(options.threads)
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: the folder does not exist; create it first.")
    meta = run_meta()
    logging.set_verbosity_error()
    preset, device = copy.deepcopy(PRESETS[options.preset]), "cuda" if options.gpu else "cpu"
    if options.gpu:
        preset["step"]["repeats"] *= 10
        preset["repeats"] = {batch: 10 * repeats for batch, repeats in preset["repeats"].items()}
    step = sampling_step_ratio(**preset["step"], device=device)
    print(f"sampling step: {step['ratio']:.3f} of a plain distillation step")
    numbers = {"sampling_step_ratio": step["ratio"], "step_seconds": step, **measure_latency(preset, device)}
    for engine, networks in numbers["latency_speedup"].items():
        for name, batches in networks.items():
            for batch, speedup in batches.items():
                share = numbers["latency_saving_share"][engine][name][batch]
                print(
                    f"{engine}, {name}, batch {batch}: {speedup:.2f}x as fast with "
                    f"{numbers['flops_reduction'][name]:.1%} fewer multiply-adds ({share:.2f} of the reduction)"
                )
    for name, shares in numbers["scatter_share"].items():
        print(f"scatter, {name}:", ", ".join(f"{share:.1%} at batch {batch}" for batch, share in shares.items()))
    if options.json:
        setting = {"preset": options.preset, "device": device, "threads": options.threads}
        document = {**numbers, **setting, "keeps_memory": KEEP_MEMORY.items() <= os.environ.items(), "meta": meta}
        write_whole(options.json, json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    keep_memory()
    main()
