"""What Dynamic-LLaVA saves and costs: stock LLaVA, sparse LLaVA, and the sparse code with everything kept.

    python examples/dynamic_llava_benchmark.py --json dynamic_llava_benchmark.json      # medium, some 20 minutes
    python examples/dynamic_llava_benchmark.py --preset small                           # under a minute

All three work on the same random weights in one process and take turns; figures are ratios of medians over the rounds.
The decoder alone is timed: image features are given. The predictors run and are timed; only the text decision is
replaced by keeping and dropping in turn. `kept` is the sparse model told to keep every token. Targets of the medium
preset (8 layers, 1,024 wide, 576 image and 64 text tokens):

* `prefill_speedup`: at least 0.95 of `prefill_mac_ratio`, which is 1.92 (head on the last position)
* `cached_decode_time_ratio`: mean over a run of 64 generated tokens at most 0.95, of 1,000 at most 0.9
* `kv_bytes_ratio`: allocated bytes of the caches; `kv_bytes_over_exact`: at most 1.05 of what the kept tokens need
* `uncached_decode_speedup`: at least 0.93 of `uncached_mac_ratio`, which is 1.91
* `train_step_ratio`: forward and backward pass of prompt and 64 answer tokens, at most 1.15
* `flops_...`: the paper's formula for the prefill of 576 image tokens, in units of 1e12

Speedups are dense / sparse, other ratios sparse / dense. Multiply-adds are counted by torch on the running model.
Names that end in `_cpu` are process CPU time, the others wall clock; `..._kept` compares dense with `kept`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from dynamic_llava_benchmark_arms import ANSWER, ARMS, LONG, PRESETS, UNCACHED_STEPS, Bench
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import LlamaConfig

from hf_efficient.dynamic_llava.decoder_dynamic_llava import CACHE
from hf_efficient.dynamic_llava.sparsity_dynamic_llava import count_kept_tokens, prefill_flops
from hf_efficient.results import run_meta, write_whole


PAPER_CONFIGS = {  # language models of LLaVA-1.5
    "7b": LlamaConfig(hidden_size=4096, num_hidden_layers=32),
    "13b": LlamaConfig(hidden_size=5120, num_hidden_layers=40),
}
PAPER_TOKENS = 576

Clock = tuple[float, float]  # wall and CPU seconds


def clock(work: Callable[[], object]) -> Clock:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def turns(number: int, arms: tuple[str, ...] = ARMS) -> tuple[str, ...]:
    """The arms in another order every round."""
    return arms[number % len(arms) :] + arms[: number % len(arms)]


def medians(rounds: list[dict[str, Clock]]) -> dict[str, Clock]:
    return {arm: tuple(map(statistics.median, zip(*(times[arm] for times in rounds)))) for arm in rounds[0]}


def measure(work: Callable[[str], object], rounds: int, arms: tuple[str, ...] = ARMS) -> dict[str, Clock]:
    for arm in arms:
        work(arm)  # warm up
    return medians([{arm: clock(lambda: work(arm)) for arm in turns(i, arms)} for i in range(rounds)])  # noqa: B023


def dense_bytes(cache) -> int:
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def run_steps(work: Callable[[str, int], object], steps: range, number: int) -> Iterator[tuple[int, dict[str, Clock]]]:
    """Do steps, the arms taking turns at every one; yield the seconds so far after each."""
    sums = dict.fromkeys(ARMS, (0.0, 0.0))
    for step in steps:
        for arm in turns(number + step):
            spent = clock(lambda: work(arm, step))  # noqa: B023
            sums[arm] = (sums[arm][0] + spent[0], sums[arm][1] + spent[1])
        yield step, dict(sums)


def measure_decoding(bench: Bench, rounds: int) -> tuple[dict[str, dict[str, Clock]], dict[str, dict[str, int]]]:
    """Mean seconds a token with caches, and bytes of the caches, after 64 and after 1,000 generated tokens."""
    found: dict[str, list[dict[str, Clock]]] = {str(ANSWER): [], str(LONG): []}
    held: dict[str, dict[str, int]] = {}
    for number in range(rounds):
        caches = bench.caches = {arm: bench.prefill(arm)[CACHE] for arm in ARMS}
        for done, sums in run_steps(bench.cached_step, range(1, LONG + 1), number):
            if done in (ANSWER, LONG):
                found[str(done)].append({arm: tuple(seconds / done for seconds in sums[arm]) for arm in ARMS})
                config = bench.dense.config.text_config
                kept = sum(caches["sparse"].get_seq_length(layer) for layer in range(config.num_hidden_layers))
                exact = kept * 2 * config.hidden_size * bench.features.element_size()
                own = {arm: caches[arm].allocated_bytes() for arm in ("sparse", "kept")}
                held[str(done)] = {"dense": dense_bytes(caches["dense"]), "exact": exact, **own}
    return {key: medians(rows) for key, rows in found.items()}, held


def measure_uncached(bench: Bench, rounds: int) -> dict[str, Clock]:
    """Every eighth step of an answer of 64 tokens without a cache."""
    rows = []
    for number in range(rounds):
        *_, (_, sums) = run_steps(bench.uncached_step, UNCACHED_STEPS, number)
        rows.append(sums)
    return medians(rows)


def attention_flops(query, key, value, dropout_p: float = 0.0, is_causal: bool = False, *args, **kwargs) -> int:
    """FLOPs of attention from the three shapes; causal attention looks at half of the pairs, and the diagonal."""
    flops, length = sdpa_flop_count(query, key, value), query[-2]
    return flops * (length + 1) // (2 * length) if is_causal else flops


def count_macs(work: Callable[[], object]) -> int:
    """Multiply-adds; the counter does not know the attention kernel of CPUs by itself."""
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        work()
    return counter.get_total_flops() // 2


def paper_flops() -> dict[str, float]:
    """The paper's FLOPs of all image tokens, and of the kept ones from the sparse layer on."""
    figures, sparse_layer = {}, 2
    kept = count_kept_tokens(PAPER_TOKENS, 0.2)
    for name, config in PAPER_CONFIGS.items():
        width, layers = config.hidden_size, config.num_hidden_layers
        below = prefill_flops(PAPER_TOKENS, width, sparse_layer)
        figures[f"flops_{name}_dense_T"] = prefill_flops(PAPER_TOKENS, width, layers) / 1e12
        figures[f"flops_{name}_sparse_T"] = (below + prefill_flops(kept, width, layers - sparse_layer)) / 1e12
    return figures


def run(preset: dict) -> tuple[dict, dict]:
    """All figures, and the seconds behind them."""
    bench, rounds = Bench(preset), preset["rounds"]
    with torch.no_grad():
        macs = {arm: count_macs(lambda: bench.prefill(arm)) for arm in ARMS}  # noqa: B023
        uncached_macs = {
            arm: sum(count_macs(lambda: bench.uncached_step(arm, step)) for step in UNCACHED_STEPS)  # noqa: B023
            for arm in ("dense", "sparse")
        }
        prefill = measure(bench.prefill, rounds["prefill"])
        uncached = measure_uncached(bench, rounds["uncached"])
        decoding, held = measure_decoding(bench, rounds["decode"])
    training = measure(bench.train_step, rounds["train"], ("dense", "sparse"))

    figures = {
        "prefill_mac_ratio": macs["dense"] / macs["sparse"],
        "prefill_macs": macs,
        "prefill_flops": {arm: 2 * count for arm, count in macs.items()},
        "uncached_mac_ratio": uncached_macs["dense"] / uncached_macs["sparse"],
        "kv_bytes_ratio": {key: held[key]["sparse"] / held[key]["dense"] for key in held},
        "kv_bytes_over_exact": {key: held[key]["sparse"] / held[key]["exact"] for key in held},
        "kv_bytes": held,
    }
    for index, ending in enumerate(("", "_cpu")):
        figures[f"prefill_speedup{ending}"] = prefill["dense"][index] / prefill["sparse"][index]
        figures[f"uncached_decode_speedup{ending}"] = uncached["dense"][index] / uncached["sparse"][index]
        figures[f"train_step_ratio{ending}"] = training["sparse"][index] / training["dense"][index]
        for arm, word in (("sparse", ""), ("kept", "_kept")):
            figures[f"cached_decode_time_ratio{word}{ending}"] = {
                key: times[arm][index] / times["dense"][index] for key, times in decoding.items()
            }
    return figures | paper_flops(), {"prefill": prefill, "uncached": uncached, "decode": decoding, "train": training}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="medium")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: the folder does not exist; create it first.")
    torch.set_flush_denormal(True)
    meta = run_meta()
    figures, seconds = run(PRESETS[args.preset])
    for name, value in figures.items():
        print(f"{name:34} {json.dumps(value) if isinstance(value, dict) else f'{value:.4f}'}")
    if args.json:
        settings = {"preset": args.preset, "rounds": PRESETS[args.preset]["rounds"]}
        meta |= {**settings, "median_wall_and_cpu_seconds": seconds}
        write_whole(args.json, json.dumps(figures | {"meta": meta}, indent=2) + "\n")


if __name__ == "__main__":
    main()
