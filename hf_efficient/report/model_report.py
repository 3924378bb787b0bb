"""`efficiency_report`: what a model costs, phase by phase, beside what it is compared with, and a plain verdict."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_efficient.quickstart import format_table
from hf_efficient.results import run_meta
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
        """Everything, ready for JSON; seconds, bytes, multiply-adds and FLOPs in full.

        Returns:
            `dict`
        """
        values = {name: value for name, value in vars(self).items() if name != "phases"}
        lists = {name: list(values[name]) for name in ("notes", "gains")}
        phases = [phase.to_dict() for phase in self.phases]
        return {**values, **lists, "flops_convention": CONVENTION, "phases": phases}

    def phase(self, name: str) -> Phase:
        """Find a phase by its name.

        Args:
            name (`str`): Such as `"prefill"`.

        Raises:
            ValueError: If there is none of that name.
        """
        found = [phase for phase in self.phases if phase.name == name]
        if not found:
            names = ", ".join(phase.name for phase in self.phases)
            raise ValueError(f"`name` must be one of {names}, got {name!r}.")
        return found[0]

    def __str__(self) -> str:
        settings = self.settings
        threads = f", {settings['threads']} thread{'s' if settings['threads'] != 1 else ''}"
        where = f"{settings['device']}, {settings['dtype']}{threads}; {self.meta['cpu']}; {self.meta['date']}"
        lines = [f"{self.name}, {self.parameters['model']:,} parameters"]
        if self.baseline:
            lines.append(f"baseline: {self.baseline}, {self.parameters['baseline']:,} parameters")
        lines += ["inputs: " + ", ".join(f"{name} {shape}" for name, shape in self.inputs.items()), where, ""]
        lines += [format_table(*self._table()), ""]
        lines += [f"kept {text}" for text in describe_kept(self.kept)]
        lines += [CONVENTION]
        lines += [_PAPER] if any(phase.model.paper_flops for phase in self.phases) else []
        lines += [_SPEED.format(rounds=settings["rounds"])]
        lines += [_PEAKS[kind] for kind in _PEAKS if settings["device"].startswith(kind)]
        return "\n".join([*lines, *self.notes, "", f"Verdict: {self.verdict}"])

    def _table(self) -> tuple[list[str], list[list[str]]]:
        columns = ["phase", "per", "arm", "MACs", "FLOPs", "paper FLOPs", "wall ms", "CPU ms", "speed-up, wall"]
        columns += ["speed-up, CPU", "peak MB", "cache kB"]
        rows = []
        for phase in self.phases:
            arms = {"baseline": phase.baseline, "model": phase.model}
            for name, cost in ((name, cost) for name, cost in arms.items() if cost is not None):
                first = name == "baseline" or phase.baseline is None
                shared = phase.baseline is None and any(other.baseline for other in self.phases)
                row = [phase.name if first else "", phase.unit if first else "", "both" if shared else name]
                row += [with_prefix(cost.macs), with_prefix(cost.flops), with_prefix(cost.paper_flops)]
                row += [f"{1e3 * cost.wall_seconds:.4g}", f"{1e3 * cost.cpu_seconds:.4g}"]
                row += [_speedup(phase, clock) if name == "model" else "" for clock in ("wall", "cpu")]
                row += ["" if cost.peak_bytes is None else f"{cost.peak_bytes / 1e6:.1f}"]
                row += ["" if cost.cache_bytes is None else f"{cost.cache_bytes / 1e3:,.1f}"]
                rows.append(row)
        used = [index for index in range(len(columns)) if any(row[index] for row in rows)]
        return [columns[index] for index in used], [[row[index] for index in used] for row in rows]

    def figure(self) -> "Figure":
        """Draw every phase beside its baseline.

        Returns:
            `matplotlib.figure.Figure`: Not known to pyplot; a notebook shows it.

        Raises:
            ImportError: If matplotlib is missing.
        """
        from .figures_report import draw_report

        return draw_report(self)

    def plot(self, file: str | os.PathLike) -> Path:
        """Write [`figure`] to a file, whole or not at all.

        Args:
            file (`str` or `os.PathLike`): Ending in .png, .svg or .pdf; the folder must exist.

        Returns:
            `Path`: `file`.

        Raises:
            ValueError: If the ending is another one.
            ImportError: If matplotlib is missing.
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
        inputs = {name: move(value, device) for name, value in inputs.items()}
        kind, config = _choose_kind(model, baseline, inputs, toe)
        compared = {"llava": "the same model with sparsity off", "toe": "the same model on all tokens"}.get(kind)
        if baseline is not None:
            compared = type(baseline).__name__ + (", all tokens" if kind == "toe" else "")
        elif kind == "llava" and not is_sparse(model):
            compared = None
        models = [model] if baseline is None or baseline is model else [model, baseline]
        with untouched(*models):
            try:
                if kind == "llava":
                    found = measure_llava(_eval(model), _eval(baseline), inputs, repeats, new_tokens, device)
                elif kind == "toe":
                    found = measure_toe(model, baseline, inputs, config, repeats, device)
                else:
                    found = _measure_pass(_eval(model), _eval(baseline), inputs, repeats, device)
            except (RuntimeError, TypeError, IndexError) as error:
                _refuse_misfit(error, model, shown)
    phases, kept, notes = found
    parameters = {"model": _count(model)}
    if compared is not None:
        parameters["baseline"] = _count(baseline or model)
    if toe is None and kind == "model" and can_train_with_toe(model):
        notes.append("ToE saves while training: with `labels` in the inputs its stages are measured.")
    if getattr(getattr(model, "config", None), "_attn_implementation", "eager") not in ("eager", "sdpa"):
        notes.append("MACs lack attention where it runs in a kernel that torch does not know.")
    verdict, gains = judge(phases, parameters)
    first = next(iter(model.parameters()), None)
    return EfficiencyReport(
        kind=kind,
        name=type(model).__name__,
        baseline=compared,
        inputs=shown,
        parameters=parameters,
        phases=tuple(phases),
        kept=kept,
        settings={
            "rounds": repeats,
            "device": str(device),
            "dtype": "no weights" if first is None else str(first.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        },
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
    def work(net: nn.Module) -> Work:
        def run(_: Any) -> None:
            net(**inputs)

        return Work(run)

    works = {"model": work(model)} | ({} if baseline is None else {"baseline": work(baseline)})
    phases = [compare("forward pass", "pass", measure(works, rounds, device, "forward pass"), device)]
    filters = {
        name: sum(module.out_channels for module in net.modules() if isinstance(module, nn.Conv2d))
        for name, net in (("before", baseline), ("after", model))
        if net is not None
    }
    kept = {"filters": list(filters.values())} if all(filters.get(name) for name in ("before", "after")) else {}
    return phases, kept, []


def _eval(model: nn.Module | None) -> nn.Module | None:
    return None if model is None else model.eval()


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


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
    """What was kept, in words, one line each.

    Args:
        kept (`dict`): `EfficiencyReport.kept`.

    Returns:
        `list[str]`
    """
    lines = []
    for name in ("image_tokens", "answer_tokens", "filters"):
        if kept.get(name) and kept[name][0]:
            before, after = kept[name]
            lines.append(f"{name.replace('_', ' ')}: {after:,} of {before:,}")
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
    interval around it above 1; the smaller of the two is quoted.

    Args:
        phases (`list[Phase]`): What was measured.
        parameters (`dict[str, int]`): Of model and baseline.

    Returns:
        `tuple[str, tuple[str, ...]]`: The verdict, and names of what is gained.
    """
    compared = [phase for phase in phases if phase.baseline is not None]
    if not compared:
        return "Nothing was compared: pass `baseline`, or a model whose method is on.", ()
    faster = [phase for phase in compared if phase.faster]
    parts = [f"{_words(phase)} as fast in {phase.name}" for phase in faster]
    gains = [phase.name for phase in faster]
    sizes = [("parameters", "", parameters["model"] / max(parameters["baseline"], 1))]
    for name, field in (("cache bytes", "cache_bytes"), ("peak memory", "peak_bytes")):
        for phase in compared:
            own, base = getattr(phase.model, field), getattr(phase.baseline, field)
            # resident memory of a process is too rough for a verdict
            if own is not None and base and (name == "cache bytes" or "cpu" not in phase.clocks):
                sizes.append((name, f" in {phase.name}", own / base))
    smaller = [(name, where, ratio) for name, where, ratio in sizes if ratio < 1 - MARGIN]
    parts += [f"{ratio:.2f} of the {name}{where}" for name, where, ratio in smaller]
    gains += dict.fromkeys(name for name, _, _ in smaller)
    verdict = "Gain: " + ", ".join(parts) + "." if parts else ""
    unjudged = [phase for phase in compared if not phase.judged]
    if unjudged:
        verdict += f" Not judged: time, with fewer than {MIN_ROUNDS} rounds."
    slower = [phase for phase in compared if phase.slower]
    rest = [phase for phase in compared if phase.judged and not phase.faster and not phase.slower]
    if slower:
        verdict += " Slower: " + ", ".join(f"{phase.name} ({_words(phase)})" for phase in slower) + "."
    if rest:
        verdict += " No gain in time, within noise: " + ", ".join(f"{p.name} ({_words(p)})" for p in rest) + "."
    verdict = verdict.strip()
    if not parts and not unjudged:
        verdict = f"No gain. {verdict}"
    return verdict, tuple(gains)


def _words(phase: Phase) -> str:
    """The careful speed-up, both where the clocks disagree, and the multiply-adds where they promised more."""
    words = f"{phase.careful_speedup():.2f}x"
    if not phase.slower and len({phase.says_faster(clock) for clock in phase.clocks}) > 1:
        words = (
            f"{phase.speedup('wall').median:.2f}x by the wall clock, {phase.speedup('cpu').median:.2f}x by CPU time"
        )
    share = phase.model.macs / max(phase.baseline.macs, 1)
    return words if phase.faster or share > 1 - MARGIN else f"{words} with {share:.2f} of the multiply-adds"


__all__ = ["EfficiencyReport", "efficiency_report"]
