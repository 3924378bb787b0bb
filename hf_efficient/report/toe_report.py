"""What `efficiency_report` measures of a vision transformer that trains with ToE: a step in every stage."""

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from hf_efficient.toe.attachment_toe import ToEAttachment, find_encoder, reset_compiler
from hf_efficient.toe.configuration_toe import ToEConfig
from hf_efficient.toe.expansion_toe import TokenExpansion

from .measure_report import Cost, Phase, Work, compare, measure


def can_train_with_toe(model: nn.Module) -> bool:
    """Whether ToE knows the model."""
    try:
        return len(find_encoder(model).layers) > 1
    except ValueError:
        return False


def check_toe_model(model: nn.Module) -> None:
    """Refuse a model that is in the middle of a ToE training with a `ValueError`."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    if any(isinstance(getattr(hook, "__self__", None), ToEAttachment) for hook in hooks):
        raise ValueError(
            f"`model` must be a plain vision transformer, but {type(model).__name__} is being trained with ToE: "
            "measure before or after."
        )


def measure_toe(
    model: nn.Module,
    baseline: nn.Module | None,
    inputs: dict[str, Any],
    config: ToEConfig,
    rounds: int,
    device: torch.device,
) -> tuple[list[Phase], dict[str, Any], list[str]]:
    """Measure a training step of every stage against one on all tokens, and put the schedule together.

    `inputs` is a batch with `labels`; `baseline` another model to train on all tokens, None takes the model itself.
    Returns phases, what was kept, and notes.
    """
    plain = model if baseline is None else baseline
    attachment = ToEAttachment(model, TokenExpansion(config))
    stages = range(1, config.num_stages + 1)
    shapes: dict[int, tuple[int, int, int]] = {}

    def step(net: nn.Module, stage: int | None) -> Work:
        def run(_: Any) -> None:
            attachment.armed = False
            if stage is not None:
                attachment.arm(stage)
            _loss(net, inputs).backward()
            for parameter in net.parameters():
                parameter.grad = None
            if stage is not None:
                shapes[stage] = attachment.last_shape

        return Work(run)

    works = {"baseline": step(plain, None), **{f"stage {s}": step(model, s) for s in stages}}
    compiled = any(hasattr(module, "_orig_mod") or module._compiled_call_impl for module in model.modules())
    model.train()
    plain.train()
    attachment.attach()
    try:
        if compiled:
            reset_compiler()
        with torch.enable_grad():
            costs = measure(works, rounds, device, "training steps")
    finally:
        attachment.detach()
        if compiled:
            reset_compiler()
    full = costs["baseline"]
    phases = [compare(f"stage {s}", "step", {"model": costs[f"stage {s}"], "baseline": full}, device) for s in stages]
    notes = ["A step is a forward and a backward pass, its gradients included, no optimizer; a plain model comes out."]
    if config.counts_epochs:
        notes.append("The stages start at epochs: a schedule in shares of the training gives the whole training too.")
    else:
        shares = [end - start for start, end in pairwise([0.0, *config.stage_starts, 1.0])]
        whole = _mix([full[0], *(costs[f"stage {s}"][0] for s in stages)], shares)
        phases.append(compare("whole training", "step", {"model": (whole, None), "baseline": full}, device))
        notes.append("Whole training: mean step over the schedule, computed from the steps of each round.")
    others = attachment.site.num_prefix_tokens + attachment.site.num_suffix_tokens
    kept = {str(stage): shape[2] - others for stage, shape in sorted(shapes.items())}
    return phases, {"patch_tokens": shapes[1][1] - others, "kept_in_stages": kept}, notes


def _loss(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    loss = getattr(model(**inputs), "loss", None)
    if loss is None:
        raise ValueError(
            f"`model` must compute a loss from `labels` to be measured in training, but {type(model).__name__} gave "
            "none: load it with its head, or pass `toe=False`."
        )
    return loss


def _mix(costs: list[Cost], shares: list[float]) -> Cost:
    """Mean cost of a step where each kind makes up its share; the peak is the highest."""

    def mean(values: list[float]) -> float:
        return sum(share * value for share, value in zip(shares, values))

    rounds = tuple(tuple(map(mean, zip(*pairs))) for pairs in zip(*(cost.rounds for cost in costs)))
    used = [cost.peak_bytes for cost, share in zip(costs, shares) if share]
    peak = None if None in used else max(used)
    return Cost(round(mean([cost.macs for cost in costs])), rounds, peak)
