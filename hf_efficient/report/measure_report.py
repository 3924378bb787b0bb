"""How `efficiency_report` measures: multiply-adds, two clocks, peak memory, and a model left as it came."""

import ctypes
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from transformers.utils import logging


MARGIN = 0.03  # a difference below it is no gain, whatever the rounds say
MIN_ROUNDS = 5  # with fewer, chance alone makes all rounds agree too often


@dataclass(frozen=True)
class Cost:
    """What one unit of work (a pass, a token, a training step) costs.

    Args:
        macs (`int`): Multiply-adds, counted on the running model.
        rounds (`tuple` of `(float, float)`): Wall and process CPU seconds of every round.
        peak_bytes (`int`, *optional*): Memory that one whole run needed beyond what was there before it.
        cache_bytes (`int`, *optional*): Bytes of all keys and values when the run ended, each storage once.
        paper_flops (`int`, *optional*): FLOPs of the image tokens by the formula of the Dynamic-LLaVA paper.
    """

    macs: int
    rounds: tuple[tuple[float, float], ...]
    peak_bytes: int | None = None
    cache_bytes: int | None = None
    paper_flops: int | None = None

    @property
    def flops(self) -> int:
        """`int`: Two for every multiply-add."""
        return 2 * self.macs

    @property
    def wall_seconds(self) -> float:
        """`float`: Median over the rounds."""
        return statistics.median(wall for wall, _ in self.rounds)

    @property
    def cpu_seconds(self) -> float:
        """`float`: Median over the rounds, summed over threads."""
        return statistics.median(cpu for _, cpu in self.rounds)

    def to_dict(self) -> dict[str, Any]:
        """Fields and medians, ready for JSON."""
        names = ("macs", "flops", "paper_flops", "wall_seconds", "cpu_seconds", "peak_bytes", "cache_bytes")
        rounds = {"wall_and_cpu_seconds_of_rounds": [list(pair) for pair in self.rounds]}
        return {name: getattr(self, name) for name in names} | rounds


class Ratio(NamedTuple):
    """Time of a baseline over time of a model: above 1 is faster."""

    median: float  # over the rounds
    low: float  # lower end of the interval in which the true median lies with about 95 % confidence
    high: float  # upper end


@dataclass(frozen=True)
class Phase:
    """One phase of a model's work, with and without the method.

    Args:
        name (`str`): Such as `"prefill"`.
        unit (`str`): What the figures are for: `"pass"`, `"token"` or `"step"`.
        model ([`Cost`]): The model that was asked about.
        baseline ([`Cost`], *optional*): What it is compared with, in the same rounds.
        clocks (`tuple[str, ...]`): Clocks that must agree before a gain is claimed.
    """

    name: str
    unit: str
    model: Cost
    baseline: Cost | None = None
    clocks: tuple[str, ...] = ("wall", "cpu")

    def speedup(self, clock: str = "wall") -> Ratio | None:
        """Ratio of the times by a clock, `"wall"` or `"cpu"`; None without a baseline."""
        if self.baseline is None:
            return None
        which = ("wall", "cpu").index(clock)
        pairs = zip(self.baseline.rounds, self.model.rounds)
        ratios = sorted(base[which] / max(own[which], 1e-9) for base, own in pairs)
        skipped = outliers(len(ratios))
        return Ratio(statistics.median(ratios), ratios[skipped], ratios[-1 - skipped])

    @property
    def judged(self) -> bool:
        """`bool`: Whether there is a baseline and there are rounds enough to tell a gain from noise."""
        return self.baseline is not None and len(self.model.rounds) >= MIN_ROUNDS

    def verdict(self, clock: str) -> int:
        """What a clock says: 1 faster, -1 slower, 0 neither.

        The median must differ from 1 by more than the margin, and the whole interval lie on the same side.
        """
        ratio = self.speedup(clock)
        if self.judged and ratio.median > 1 + MARGIN and ratio.low > 1:
            return 1
        return -1 if self.judged and ratio.median < 1 / (1 + MARGIN) and ratio.high < 1 else 0

    @property
    def faster(self) -> bool:
        """`bool`: Whether every clock says so."""
        return all(self.verdict(clock) > 0 for clock in self.clocks)

    @property
    def slower(self) -> bool:
        """`bool`: Whether some clock says so."""
        return any(self.verdict(clock) < 0 for clock in self.clocks)

    def careful_speedup(self) -> float:
        """Median of the clock that sees least: of a slow-down, where there is one, else of a gain."""
        slower = [self.speedup(clock).median for clock in self.clocks if self.verdict(clock) < 0]
        return max(slower) if slower else min(self.speedup(clock).median for clock in self.clocks)

    def to_dict(self) -> dict[str, Any]:
        """Fields and ratios, ready for JSON."""
        values: dict[str, Any] = {"name": self.name, "unit": self.unit, "model": self.model.to_dict()}
        if self.baseline is None:
            return values | {"baseline": None}
        values["baseline"] = self.baseline.to_dict()
        values |= {f"speedup_{clock}": self.speedup(clock)._asdict() for clock in ("wall", "cpu")}
        for name in ("macs", "paper_flops", "cache_bytes", "peak_bytes"):
            own, base = getattr(self.model, name), getattr(self.baseline, name)
            values[f"{name}_ratio"] = own / base if own is not None and base else None
        return values | {"faster": self.faster, "slower": self.slower}


def outliers(rounds: int) -> int:
    """Rounds to leave out at either end, so that the rest spans the true median with about 95 % confidence.

    The number of rounds below the true median is binomial: the interval from the k-th smallest to the k-th largest
    misses it with probability `2 * sum(C(n, i) for i < k) / 2^n`, which may be 0.07 (5 rounds: all of them, 0.0625).
    """
    skipped, tail = 0, 1
    while 2 * (tail + math.comb(rounds, skipped + 1)) / 2**rounds <= 0.07:
        skipped += 1
        tail += math.comb(rounds, skipped)
    return skipped


@dataclass(frozen=True)
class Work:
    """What is measured in turn with others: figures are divided by `units`, but for memory."""

    run: Callable[[Any], Any]  # the timed part; takes what `prepare` gave
    prepare: Callable[[], Any] = lambda: None  # done before every run, not timed
    units: int = 1  # units of work in a run
    setting: Callable[[], AbstractContextManager] = nullcontext  # both run inside, such as the method switched off


def measure(works: dict[str, Work], rounds: int, device: torch.device, title: str) -> dict[str, tuple[Cost, Any]]:
    """Measure works that take turns: once to warm up, once each for multiply-adds and memory, then the rounds.

    The order turns around every round. Returns by name the cost, and what the counted run returned.
    """

    def call(work: Work, how: Callable[[Callable[[], Any]], Any]) -> Any:
        with work.setting():
            prepared = work.prepare()
            return how(lambda: work.run(prepared))

    counts, peaks, results, times = {}, {}, {}, {name: [] for name in works}
    with logging.tqdm(total=(rounds + 3) * len(works), desc=title, leave=False) as bar:
        for name, work in works.items():
            call(work, lambda run: run())
            counts[name], results[name] = call(work, count_macs)
            peaks[name] = call(work, lambda run: peak_bytes(run, device))
            bar.update(3)
        for turn in range(rounds):
            for name in list(works)[:: 1 if turn % 2 == 0 else -1]:
                wall, cpu = call(works[name], lambda run: read_clocks(run, device))
                times[name].append((wall / works[name].units, cpu / works[name].units))
                bar.update(1)
    return {
        name: (Cost(round(counts[name] / work.units), tuple(times[name]), peaks[name]), results[name])
        for name, work in works.items()
    }


def read_clocks(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Wall and process CPU seconds of a call; the accelerator has finished before either clock is read."""
    with _no_collection():
        _synchronize(device)
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        _synchronize(device)
        return time.perf_counter() - wall, time.process_time() - cpu


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector out: it takes time when it likes, and frees what others left."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _rnn_flops(inputs: torch.Tensor, weight: torch.Tensor, recurrent: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    """FLOPs of one layer and direction of an LSTM or GRU in the kernel of CPUs, which torch has no formula for."""
    return 2 * inputs.shape[0] * inputs.shape[1] * (weight.numel() + recurrent.numel())


_FORMULAS = {**flop_registry, torch.ops.aten.mkldnn_rnn_layer: _rnn_flops}


class _Counter(TorchDispatchMode):
    """Adds up FLOPs by torch's own formulas; `FlopCounterMode` also hooks into every module, which takes longest."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(getattr(func, "_overloadpacket", func))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def count_macs(run: Callable[[], Any]) -> tuple[int, Any]:
    """Multiply-adds of matrix products and convolutions, counted while a call runs, and what the call returned.

    Fused attention is switched off for this call: torch has no formula for the kernel of CPUs. So attention counts
    every pair of query and key, also those that a causal mask hides.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # encoder layers of torch in one kernel
    try:
        with sdpa_kernel(SDPBackend.MATH), _Counter() as counter:
            result = run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.flops // 2, result


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that a call needed at its peak beyond what was held before it.

    On a CUDA device: `torch.cuda.max_memory_allocated` less what was allocated before. On the CPU: peak resident
    memory of the process (VmHWM of Linux, reset before) less the resident memory before, after free memory went back
    to the system; exact to some pages, and None where the system cannot tell.
    """
    with _no_collection():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        before = _reset_resident_peak() if device.type == "cpu" else None
        run()
        return None if before is None else max(_resident_peak() - before, 0)


def _reset_resident_peak() -> int | None:
    try:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _resident_peak()
    except (OSError, TypeError):
        return None


def _resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Leave modules, buffers and random number generators as they were, also after an exception.

    Gradients are put aside meanwhile.
    """
    modules = {id(module): module for model in models for module in model.modules()}.values()
    tables = [vars(module) for module in modules]
    tables += [table for held in tables for table in held.values() if isinstance(table, dict)]  # hooks, buffers, ...
    saved = [(table, dict(table)) for table in tables]
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers(recurse=False)]
    parameters = {id(p): (p, p.grad) for model in models for p in model.parameters()}.values()
    python, numpy = random.getstate(), np.random.get_state()
    for parameter, _ in parameters:
        parameter.grad = None
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
            yield
    finally:
        for table, before in saved:
            table.clear()
            table.update(before)
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        for parameter, grad in parameters:
            parameter.grad = grad
        random.setstate(python)
        np.random.set_state(numpy)


def find_device(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer, the CPU for a model without any; the meta device is a `ValueError`."""
    first = next((tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors), None)
    device = torch.device("cpu") if first is None else first.device
    if device.type == "meta":
        raise ValueError(f"`model` must hold its weights, but {type(model).__name__} is on the meta device: load it.")
    return device


def move(values: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move tensors, however deep inside, to a device; tensors of an inference mode become plain ones."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(device)
        return tensor.clone() if tensor.is_inference() else tensor

    return tree_map_only(torch.Tensor, one, values)


def compare(name: str, unit: str, costs: dict[str, tuple[Cost, Any]], device: torch.device, **extra: Any) -> Phase:
    """Make a phase of what [`measure`] returned for `"model"` and, where there is one, `"baseline"`.

    `extra` holds further fields of [`Cost`] by arm: `cache_bytes={"model": ..., "baseline": ...}`. On an accelerator
    only the wall clock counts.
    """
    arms = {
        arm: replace(costs[arm][0], **{field: values.get(arm) for field, values in extra.items()})
        for arm in ("model", "baseline")
        if arm in costs
    }
    clocks = ("wall", "cpu") if device.type == "cpu" else ("wall",)
    return Phase(name, unit, arms["model"], arms.get("baseline"), clocks)
