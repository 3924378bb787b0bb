"""How `efficiency_report` measures: multiply-adds, two clocks, peak memory, and a model left as it came."""

import ctypes
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
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
        values = {"macs": self.macs, "flops": self.flops, "paper_flops": self.paper_flops}
        values |= {"wall_seconds": self.wall_seconds, "cpu_seconds": self.cpu_seconds}
        values |= {"peak_bytes": self.peak_bytes, "cache_bytes": self.cache_bytes}
        return values | {"wall_and_cpu_seconds_of_rounds": [list(pair) for pair in self.rounds]}


@dataclass(frozen=True)
class Ratio:
    """A ratio of two times over the rounds.

    Args:
        median (`float`): Baseline over model: above 1 is faster.
        low (`float`): Lower end of the interval in which the true median lies with about 95 % confidence.
        high (`float`): Upper end.
    """

    median: float
    low: float
    high: float


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
        """Time of the baseline over time of the model; None without a baseline.

        Args:
            clock (`str`, defaults to `"wall"`): `"wall"` or `"cpu"`.
        """
        if self.baseline is None:
            return None
        which = ("wall", "cpu").index(clock)
        pairs = zip(self.baseline.rounds, self.model.rounds)
        ratios = sorted(base[which] / max(own[which], 1e-9) for base, own in pairs)
        skipped = outliers(len(ratios))
        return Ratio(statistics.median(ratios), ratios[skipped], ratios[-1 - skipped])

    def careful_speedup(self) -> float:
        """Median of the clock that sees least: of a slow-down, where there is one, else of a gain."""
        slower = [self.speedup(clock).median for clock in self.clocks if self.says_slower(clock)]
        return max(slower) if slower else min(self.speedup(clock).median for clock in self.clocks)

    @property
    def judged(self) -> bool:
        """`bool`: Whether there is a baseline and there are rounds enough to tell a gain from noise."""
        return self.baseline is not None and len(self.model.rounds) >= MIN_ROUNDS

    @property
    def faster(self) -> bool:
        """`bool`: Whether every clock says so."""
        return all(self.says_faster(clock) for clock in self.clocks)

    def says_faster(self, clock: str) -> bool:
        """Whether the median is above 1 by more than the margin, and the whole interval is above 1.

        Args:
            clock (`str`): `"wall"` or `"cpu"`.
        """
        ratio = self.speedup(clock)
        return self.judged and ratio.median > 1 + MARGIN and ratio.low > 1

    @property
    def slower(self) -> bool:
        """`bool`: Whether some clock says so."""
        return any(self.says_slower(clock) for clock in self.clocks)

    def says_slower(self, clock: str) -> bool:
        """Whether the median is below 1 by more than the margin, and the whole interval is below 1.

        Args:
            clock (`str`): `"wall"` or `"cpu"`.
        """
        ratio = self.speedup(clock)
        return self.judged and ratio.median < 1 / (1 + MARGIN) and ratio.high < 1

    def to_dict(self) -> dict[str, Any]:
        """Fields and ratios, ready for JSON."""
        values: dict[str, Any] = {"name": self.name, "unit": self.unit, "model": self.model.to_dict()}
        values["baseline"] = None if self.baseline is None else self.baseline.to_dict()
        if self.baseline is not None:
            values["speedup_wall"], values["speedup_cpu"] = (asdict(self.speedup(c)) for c in ("wall", "cpu"))
            for name in ("macs", "paper_flops", "cache_bytes", "peak_bytes"):
                own, base = getattr(self.model, name), getattr(self.baseline, name)
                values[f"{name}_ratio"] = own / base if own is not None and base else None
            values |= {"faster": self.faster, "slower": self.slower}
        return values


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
    """What is measured in turn with others.

    Args:
        run (`Callable`): The timed part; takes what `prepare` gave.
        prepare (`Callable`, *optional*): Done before every run, not timed.
        units (`int`): Units of work in a run; all figures but memory are divided by it.
        setting (`Callable`): Makes the context in which both run, such as the method switched off.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    units: int = 1
    setting: Callable[[], AbstractContextManager] = nullcontext


def measure(works: dict[str, Work], rounds: int, device: torch.device, title: str) -> dict[str, tuple[Cost, Any]]:
    """Measure works that take turns: once to warm up, once each for multiply-adds and memory, then the rounds.

    Args:
        works (`dict[str, Work]`): By name.
        rounds (`int`): Timed runs of each; the order turns around every round.
        device (`torch.device`): Where the models are.
        title (`str`): Words of the progress bar.

    Returns:
        `dict[str, tuple[Cost, object]]`: Costs, and what the counted run returned.
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
    """Adds up FLOPs by torch's own formulas.

    `FlopCounterMode` also books them on modules, which takes longer than everything else and hooks into every one.
    """

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


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values of a cache, each storage once, slack included."""
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    storages = [tensor.untyped_storage() for layer in layers for tensor in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Leave modules, gradients, buffers and random number generators as they were, also after an exception.

    Args:
        *models (`nn.Module`): Gradients are put aside meanwhile.
    """
    modules = {id(module): module for model in models for module in model.modules()}.values()
    attributes = [(module, dict(vars(module))) for module in modules]
    tables = [
        (table, dict(table)) for _, saved in attributes for table in saved.values() if isinstance(table, dict)
    ]  # hooks and buffers among them
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers(recurse=False)]
    parameters = {id(p): (p, p.grad) for model in models for p in model.parameters()}.values()
    on_gpu = torch.cuda.is_initialized()
    generators = (torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_gpu else None)
    python, numpy = random.getstate(), np.random.get_state()
    for parameter, _ in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for table, saved in tables:
            table.clear()
            table.update(saved)
        for module, saved in attributes:
            vars(module).clear()
            vars(module).update(saved)
        with torch.no_grad():
            for buffer, saved in buffers:
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)
        for parameter, grad in parameters:
            parameter.grad = grad
        torch.set_rng_state(generators[0])
        if on_gpu:
            torch.cuda.set_rng_state_all(generators[1])
        random.setstate(python)
        np.random.set_state(numpy)


def find_device(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer, the CPU for a model without any.

    Raises:
        ValueError: If the weights are on the meta device.
    """
    first = next((tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors), None)
    device = torch.device("cpu") if first is None else first.device
    if device.type == "meta":
        raise ValueError(f"`model` must hold its weights, but {type(model).__name__} is on the meta device: load it.")
    return device


def move(value: Any, device: torch.device) -> Any:
    """Move tensors, also inside lists and dicts, to a device; tensors of an inference mode become plain ones."""
    if isinstance(value, torch.Tensor):
        value = value.to(device)
        return value.clone() if value.is_inference() else value
    if isinstance(value, Mapping):
        return {name: move(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(move(item, device) for item in value)
    return value


def compare(name: str, unit: str, costs: dict[str, tuple[Cost, Any]], device: torch.device, **extra: Any) -> Phase:
    """Make a phase of the costs of `"model"` and, where there is one, `"baseline"`.

    Args:
        name (`str`): Of the phase.
        unit (`str`): Of the figures.
        costs (`dict`): As [`measure`] returns them.
        device (`torch.device`): On an accelerator only the wall clock counts.
        **extra: Per arm further fields of [`Cost`]: `cache_bytes={"model": ..., "baseline": ...}`.
    """
    arms = {
        arm: replace(costs[arm][0], **{field: values.get(arm) for field, values in extra.items()})
        for arm in ("model", "baseline")
        if arm in costs
    }
    clocks = ("wall", "cpu") if device.type == "cpu" else ("wall",)
    return Phase(name, unit, arms["model"], arms.get("baseline"), clocks)
