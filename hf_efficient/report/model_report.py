"""`efficiency_report`: what a model costs, phase by phase, beside what it is compared with, and a plain verdict."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_efficient.results import format_table, run_meta
from hf_efficient.toe.configuration_toe import ToEConfig

from .llava_report import check_llava_inputs, is_llava, is_sparse, measure_llava
from .measure_report import MARGIN, MIN_ROUNDS, Phase, Work, compare, find_device, measure, move, untouched
from .toe_report import can_train_with_toe, check_toe_model, measure_toe


if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONVENTION = (
    "One multiply-add (MAC) = 2 FLOPs. MACs: matrix products and convolutions, counted while the model runs; "
    "attention counts all pairs of tokens."
)
_PAPER = "Paper FLOPs: image tokens alone, 32 N C^2 + 4 N^2 C a decoder layer (Dynamic-LLaVA, Sec. 4)."
_SPEED = (
    "Times: medians; rounds in which model and baseline took turns: {rounds}. Speed-up: baseline / model, with five "
    "rounds or more in brackets where its true median lies (about 95 %)."
)
_COLUMNS = ["phase", "per", "arm", "MACs", "FLOPs", "paper FLOPs", "wall ms", "CPU ms", "speed-up, wall"]
_COLUMNS += ["speed-up, CPU", "peak MB", "cache kB"]
_PEAKS = {
    "cpu": "Peak: growth of the resident memory of the process (VmHWM) during one run.",
    "cuda": "Peak: torch.cuda.max_memory_allocated during one run, less what was allocated before.",
}


@dataclass(frozen=True)
class EfficiencyReport:
    """What [`efficiency_report`] measured; `str()` is a table, `.plot(file)` a picture, `.to_dict()` ready for JSON.

    Args:
        kind (`str`): `"llava"`, `"toe"`, `"kdfs"`, `"pix2pix"` or `"model"`.
        name (`str`): Class of the model.
        baseline (`str`, *optional*): What it is compared with, in words.
        inputs (`dict[str, str]`): Names and shapes.
        parameters (`dict[str, int]`): Of `"model"` and `"baseline"`.
        phases (`tuple[Phase, ...]`): Costs by phase, see [`hf_efficient.report.measure_report.Phase`].
        kept (`dict`): Tokens or filters, before and after.
        settings (`dict`): `rounds`, `device`, `dtype`, `threads`.
        notes (`tuple[str, ...]`): What a reader must know.
        verdict (`str`): In plain words; starts with "Gain", "No gain", "Not judged" or "Nothing was compared".
        gains (`tuple[str, ...]`): Where something is gained: names of phases, `"cache bytes"`, `"parameters"`,
            `"peak memory"`.
        meta (`dict`): Command, commit, date, hardware and versions.
    """

    kind: str
    name: str
    baseline: str | None
    inputs: dict[str, str]
    parameters: dict[str, int]
    phases: tuple[Phase, ...]
    kept: dict[str, Any]
    settings: dict[str, Any]
    notes: tuple[str, ...]
    verdict: str
    gains: tuple[str, ...]
    meta: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; seconds, bytes, multiply-adds and FLOPs in full."""
        phases = [phase.to_dict() for phase in self.phases]
        lists = {"notes": list(self.notes), "gains": list(self.gains), "phases": phases}
        return {**vars(self), **lists, "flops_convention": CONVENTION}

    def phase(self, name: str) -> Phase:
        """Find a phase by its name, such as `"prefill"`; a `ValueError` tells the names if there is none."""
        found = {phase.name: phase for phase in self.phases}
        if name not in found:
            raise ValueError(f"`name` must be one of {', '.join(found)}, got {name!r}.")
        return found[name]

    def __str__(self) -> str:
        device, dtype, threads = (self.settings[name] for name in ("device", "dtype", "threads"))
        where = f"{device}, {dtype}, {threads} thread{'s' if threads != 1 else ''}"
        lines = [f"{self.name}, {self.parameters['model']:,} parameters"]
        if self.baseline:
            lines.append(f"baseline: {self.baseline}, {self.parameters['baseline']:,} parameters")
        lines += ["inputs: " + ", ".join(f"{name} {shape}" for name, shape in self.inputs.items())]
        lines += [f"{where}; {self.meta['cpu']}; {self.meta['date']}", "", format_table(*self._table()), ""]
        lines += [f"kept {text}" for text in describe_kept(self.kept)]
        lines += [CONVENTION]
        lines += [_PAPER] if any(phase.model.paper_flops for phase in self.phases) else []
        lines += [_SPEED.format(rounds=self.settings["rounds"])]
        lines += [_PEAKS[kind] for kind in _PEAKS if device.startswith(kind)]
        return "\n".join([*lines, *self.notes, "", f"Verdict: {self.verdict}"])

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows, a row for each arm of a phase; columns without a figure are left out."""
        compared, rows = any(phase.baseline for phase in self.phases), []
        for phase in self.phases:
            head, arms = [phase.name, phase.unit], {"baseline": phase.baseline, "model": phase.model}
            for name, cost in arms.items():
                if cost is None:
                    continue
                arm = "both" if phase.baseline is None and compared else name
                speedups = [_speedup(phase, clock) if name == "model" else "" for clock in ("wall", "cpu")]
                cells = [*head, arm, *map(with_prefix, (cost.macs, cost.flops, cost.paper_flops))]
                cells += [f"{1e3 * cost.wall_seconds:.4g}", f"{1e3 * cost.cpu_seconds:.4g}", *speedups]
                cells += ["" if cost.peak_bytes is None else f"{cost.peak_bytes / 1e6:.1f}"]
                cells += ["" if cost.cache_bytes is None else f"{cost.cache_bytes / 1e3:,.1f}"]
                rows.append(cells)
                head = ["", ""]
        used = [index for index in range(len(_COLUMNS)) if any(row[index] for row in rows)]
        return [_COLUMNS[index] for index in used], [[row[index] for index in used] for row in rows]

    def figure(self) -> "Figure":
        """Draw every phase beside its baseline: a figure that pyplot does not know. matplotlib must be there."""
        from .figures_report import draw_report

        return draw_report(self)

    def plot(self, file: str | os.PathLike) -> Path:
        """Write [`figure`] to a file, whole or not at all.

        Args:
            file (`str` or `os.PathLike`): Ending in .png, .svg or .pdf, else a `ValueError`; its folder must exist.
        """
        from .figures_report import save_figure

        return save_figure(self.figure(), file)


def efficiency_report(
    model: nn.Module,
    inputs: Mapping[str, Any],
    baseline: nn.Module | None = None,
    *,
    repeats: int = 9,
    new_tokens: int = 32,
    toe: ToEConfig | bool | None = None,
) -> EfficiencyReport:
    """Measure what a model costs on one input, and what a method saves.

    * A LLaVA, stock or sparse: image encoder, prefill, decoding with a cache and without one. A sparse one is compared
      with itself with sparsity off.
    * A vision transformer whose `inputs` hold `labels`: a training step in every stage of ToE, compared with a step on
      all tokens.
    * Any other model, a pruned CNN or a Pix2Pix generator among them: the forward pass, compared with `baseline`.

    Model and baseline take turns in the same call. The model is left as it was: mode, hooks, gradients, buffers,
    configuration and random number generators, also after an exception.

    Args:
        model (`nn.Module`): The model, on its device.
        inputs (`Mapping[str, Tensor]`): Keyword arguments of its forward pass, as a processor returns them.
        baseline (`nn.Module`, *optional*): Another model that takes the same inputs.
        repeats (`int`, defaults to 9): Timed rounds, at least 1; below 5 no gain in time is claimed.
        new_tokens (`int`, defaults to 32): LLaVA: tokens of the answer, at least 2.
        toe ([`ToEConfig`] or `bool`, *optional*): The schedule of ToE; True takes the default one and False measures
            the forward pass. None decides by the model and the labels.

    Returns:
        [`EfficiencyReport`].

    Raises:
        ValueError: If an argument breaks its rule or the inputs do not fit the model.

    Example:
    ```python
    >>> from hf_efficient import CifarResNetConfig, CifarResNetForImageClassification, efficiency_report

    >>> model = CifarResNetForImageClassification(CifarResNetConfig(depth=8))
    >>> report = efficiency_report(model, {"pixel_values": torch.randn(1, 3, 32, 32)})
    >>> print(report)  # doctest: +SKIP
    >>> report.phase("forward pass").model.macs
    12239488
    ```
    """
    _check_arguments(model, inputs, baseline, repeats, new_tokens, toe)
    device = find_device(model)
    shown = {name: _describe(value) for name, value in inputs.items()}
    with torch.inference_mode(False):
        inputs = move(dict(inputs), device)
        kind, config = _choose_kind(model, baseline, inputs, toe)
        compared = {"toe": "the same model on all tokens"}.get(kind)
        if kind == "llava" and is_sparse(model):
            compared = "the same model with sparsity off"
        if baseline is not None:
            compared = type(baseline).__name__ + (", all tokens" if kind == "toe" else "")
        models = [model] if baseline is None or baseline is model else [model, baseline]
        with untouched(*models):
            try:
                if kind == "toe":
                    phases, kept, notes = measure_toe(model, baseline, inputs, config, repeats, device)
                else:
                    for net in models:
                        net.eval()
                    if kind == "llava":
                        phases, kept, notes = measure_llava(model, baseline, inputs, repeats, new_tokens, device)
                    else:
                        phases, kept, notes = _measure_pass(model, baseline, inputs, repeats, device)
            except (RuntimeError, TypeError, IndexError) as error:
                _refuse_misfit(error, model, shown)
    arms = {"model": model} | ({} if compared is None else {"baseline": model if baseline is None else baseline})
    parameters = {name: sum(p.numel() for p in net.parameters()) for name, net in arms.items()}
    if toe is None and kind == "model" and can_train_with_toe(model):
        notes.append("ToE saves while training: with `labels` in the inputs its stages are measured.")
    if getattr(getattr(model, "config", None), "_attn_implementation", "eager") not in ("eager", "sdpa"):
        notes.append("MACs lack attention where it runs in a kernel that torch does not know.")
    verdict, gains = judge(phases, parameters)
    first = next(iter(model.parameters()), None)
    dtype = "no weights" if first is None else str(first.dtype).removeprefix("torch.")
    return EfficiencyReport(
        kind=kind,
        name=type(model).__name__,
        baseline=compared,
        inputs=shown,
        parameters=parameters,
        phases=tuple(phases),
        kept=kept,
        settings={"rounds": repeats, "device": str(device), "dtype": dtype, "threads": torch.get_num_threads()},
        notes=(*notes, "Costs alone: how good the answers are is measured elsewhere."),
        verdict=verdict,
        gains=gains,
        meta=run_meta(),
    )


def _check_arguments(model: Any, inputs: Any, baseline: Any, repeats: Any, new_tokens: Any, toe: Any) -> None:
    for name, value in (("model", model), ("baseline", baseline)):
        if not isinstance(value, nn.Module) and not (name == "baseline" and value is None):
            raise ValueError(f"`{name}` must be a torch module, got {type(value).__name__}: load the model first.")
    if not isinstance(inputs, Mapping) or not inputs or not all(isinstance(name, str) for name in inputs):
        found = "an empty one" if isinstance(inputs, Mapping) and not inputs else type(inputs).__name__
        raise ValueError(
            f"`inputs` must be a dict of tensors by name, got {found}: pass what the model's processor returns."
        )
    for name, value, least in (("repeats", repeats, 1), ("new_tokens", new_tokens, 2)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
    if not (toe is None or isinstance(toe, bool | ToEConfig)):
        raise ValueError(f"`toe` must be a ToEConfig, True, False or None, got {toe!r}.")
    if baseline is not None and find_device(baseline) != find_device(model):
        raise ValueError(
            f"`baseline` must be on the device of the model, got {find_device(baseline)} and {find_device(model)}."
        )


def _choose_kind(
    model: nn.Module, baseline: nn.Module | None, inputs: dict[str, Any], toe: ToEConfig | bool | None
) -> tuple[str, ToEConfig]:
    config = toe if isinstance(toe, ToEConfig) else ToEConfig()
    if is_llava(model) and not toe:
        check_llava_inputs(inputs)
        if baseline is not None and not is_llava(baseline):
            raise ValueError(f"`baseline` of a LLaVA must be a LLaVA with its head, got {type(baseline).__name__}.")
        return "llava", config
    if toe is not False:
        check_toe_model(model)
    if toe and "labels" not in inputs:
        raise ValueError(f"`inputs` must hold `labels` to measure training with ToE, got {', '.join(inputs)}.")
    if toe or (toe is None and "labels" in inputs and can_train_with_toe(model)):
        return "toe", config
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return {"kdfs_pruned": "kdfs", "pix2pix": "pix2pix"}.get(kind, "model"), config


@torch.no_grad()
def _measure_pass(
    model: nn.Module, baseline: nn.Module | None, inputs: dict[str, Any], rounds: int, device: torch.device
) -> tuple[list[Phase], dict[str, Any], list[str]]:
    nets = {"baseline": baseline, "model": model} if baseline is not None else {"model": model}

    def run(net: nn.Module, _: Any) -> None:
        net(**inputs)

    works = {name: Work(partial(run, net)) for name, net in nets.items()}
    phases = [compare("forward pass", "pass", measure(works, rounds, device, "forward pass"), device)]
    convolutions = [[m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in nets.values()]
    filters = [sum(layer.out_channels for layer in layers) for layers in convolutions]
    return phases, {"filters": filters} if len(filters) == 2 and 0 < filters[1] <= filters[0] else {}, []


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def _refuse_misfit(error: Exception, model: nn.Module, shown: dict[str, str]) -> None:
    """Say in one sentence that the model does not take the inputs; memory and accelerator errors go through."""
    if isinstance(error, torch.OutOfMemoryError | getattr(torch, "AcceleratorError", torch.OutOfMemoryError)):
        raise error
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    given = ", ".join(f"{name} {shape}" for name, shape in shown.items())
    raise ValueError(f"`inputs` must fit the forward pass of {type(model).__name__}, got {given}: {reason}") from error


def _speedup(phase: Phase, clock: str) -> str:
    ratio = phase.speedup(clock)
    if ratio is None:
        return ""
    return f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if phase.judged else f"{ratio.median:.2f}"


def describe_kept(kept: dict[str, Any]) -> list[str]:
    """What `EfficiencyReport.kept` holds, in words, one line each."""
    pairs = [(name, kept[name]) for name in ("image_tokens", "answer_tokens", "filters") if kept.get(name)]
    lines = [f"{name.replace('_', ' ')}: {after:,} of {before:,}" for name, (before, after) in pairs if before]
    if kept.get("cached_tokens_of_layers"):
        lines.append(f"in the caches of the layers: {', '.join(map(str, kept['cached_tokens_of_layers']))}")
    if "patch_tokens" in kept:
        stages = ", ".join(map(str, kept["kept_in_stages"].values()))
        lines.append(f"patch tokens in the stages: {stages} of {kept['patch_tokens']:,}")
    return lines


def with_prefix(value: float | None) -> str:
    """A number with a decimal prefix, such as `1.234 G`; empty for None."""
    if value is None:
        return ""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3f} {prefix}"
    return f"{value:g}"


def judge(phases: list[Phase], parameters: dict[str, int]) -> tuple[str, tuple[str, ...]]:
    """Say where something is gained, and where not.

    A phase is faster where, by the wall clock and (on the CPU) by CPU time, the median speed-up is above 1.03 and the
    interval around it above 1; the smaller of the two is quoted. Returns the verdict, and names of what is gained.
    """
    compared = [phase for phase in phases if phase.baseline is not None]
    if not compared:
        return "Nothing was compared: pass `baseline`, or a model whose method is on.", ()
    judged = [phase for phase in compared if phase.judged]
    faster = [phase for phase in judged if phase.faster]
    slower = [phase for phase in judged if phase.slower]
    rest = [phase for phase in judged if not phase.faster and not phase.slower]
    sizes = [("parameters", "", parameters["model"] / max(parameters["baseline"], 1))]
    for name, field in (("cache bytes", "cache_bytes"), ("peak memory", "peak_bytes")):
        for phase in compared:
            own, base = getattr(phase.model, field), getattr(phase.baseline, field)
            # resident memory of a process is too rough for a verdict
            if own is not None and base and (name == "cache bytes" or "cpu" not in phase.clocks):
                sizes.append((name, f" in {phase.name}", own / base))
    smaller = [size for size in sizes if size[2] < 1 - MARGIN]
    gained = [f"{_words(phase)} as fast in {phase.name}" for phase in faster]
    gained += [f"{ratio:.2f} of the {name}{where}" for name, where, ratio in smaller]
    parts = [f"Gain: {', '.join(gained)}."] if gained else []
    if len(judged) < len(compared):
        parts.append(f"Not judged: time, with fewer than {MIN_ROUNDS} rounds.")
    elif not gained:
        parts.append("No gain.")
    for title, found in (("Slower", slower), ("No gain in time, within noise", rest)):
        parts += [f"{title}: {', '.join(f'{p.name} ({_words(p)})' for p in found)}."] if found else []
    return " ".join(parts), tuple(dict.fromkeys([phase.name for phase in faster] + [name for name, *_ in smaller]))


def _words(phase: Phase) -> str:
    """The careful speed-up, both where the clocks disagree, and the multiply-adds where they promised more."""
    words = f"{phase.careful_speedup():.2f}x"
    if not phase.slower and len({phase.verdict(clock) for clock in phase.clocks}) > 1:
        medians = [phase.speedup(clock).median for clock in ("wall", "cpu")]
        words = "{:.2f}x by the wall clock, {:.2f}x by CPU time".format(*medians)
    share = phase.model.macs / max(phase.baseline.macs, 1)
    return words if phase.faster or share > 1 - MARGIN else f"{words} with {share:.2f} of the multiply-adds"


__all__ = ["EfficiencyReport", "efficiency_report"]
