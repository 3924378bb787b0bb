"""Where ToE sits in a model: find the encoder, count prefix and suffix rows, hook in and out. No equation in here."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .configuration_toe import ToEConfig
from .expansion_toe import TokenExpansion


logger = logging.get_logger(__name__)

# vision encoders that a shorter token set passes through: no layer of theirs knows where a token stood
SUPPORTED = (
    "vit",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "clip",
    "clip_vision_model",
    "siglip",
    "siglip_vision_model",
    "yolos",
    "beit",
    "vit_msn",
    "ijepa",
    "timm_wrapper",
)

_REFUSED = {
    "vit_mae": "it already drops tokens at random and its decoder must put every patch back in place",
    "swin": "its layers attend within windows of a full grid of tokens",
    "swinv2": "its layers attend within windows of a full grid of tokens",
    "dinov3_vit": "every layer rotates queries and keys by the place of all patches (rope)",
    "videomae": "its video tokens come in tubes whose number its heads fix",
}

# parameters of an embedding module that stand before the patches, one row each or as many as they have rows
_PREFIX = ("cls_token", "class_embedding", "distillation_token", "register_tokens")


@dataclass(frozen=True)
class EncoderSite:
    """The place in a model where tokens can be taken out.

    Args:
        name (`str`): Class of the model, for messages.
        layers (`Sequence[nn.Module]`): Encoder layers in order.
        embeddings (`nn.Module`): What makes the tokens, with the patch projection in it.
        num_prefix_tokens (`int`): Rows before the patches (class, distillation and register tokens).
        num_suffix_tokens (`int`): Rows behind the patches (detection tokens).
        middle_positions (`nn.Module`, *optional*): YOLOS: gives the position rows that are added behind each layer.
        timm_wrapper (`nn.Module`, *optional*): timm: the model of transformers around it.
    """

    name: str
    layers: Sequence[nn.Module]
    embeddings: nn.Module
    num_prefix_tokens: int
    num_suffix_tokens: int = 0
    middle_positions: nn.Module | None = None
    timm_wrapper: nn.Module | None = None


def find_encoder(model: nn.Module) -> EncoderSite:
    """Find the vision encoder of a model, also inside PEFT, DDP or a compiled module.

    Args:
        model (`nn.Module`): Any module that holds exactly one supported model; text encoders and the like beside it
            do not count.

    Returns:
        `EncoderSite`

    Raises:
        ValueError: If there is no encoder, more than one, or one that cannot lose tokens; the message says why.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` must be a torch module, got {model!r}; load the model first.")
    hosts = list(dict.fromkeys(_outermost_hosts(model)))  # each once, also one that several parts share
    if not hosts:
        raise ValueError(
            f"`model` must hold a vision transformer, but {type(model).__name__} has no encoder layers ToE knows; "
            f"supported are {', '.join(SUPPORTED)}."
        )
    host = hosts[0] if len(hosts) == 1 else _only_tower(hosts)
    if not isinstance(host, PreTrainedModel):
        return _timm_site(host, type(host).__name__)
    _refuse_unfit(host)
    if host.config.model_type == "timm_wrapper":
        return _timm_site(host.timm_model, type(host).__name__, wrapper=host)
    return _transformers_site(host)


def _only_tower(hosts: list[nn.Module]) -> nn.Module:
    """The vision transformer among several models; of those that are none, one that can be refused with a reason."""
    towers = [host for host in hosts if any(_is_tower(module) for module in host.modules())]
    if len(towers) > 1:
        names = ", ".join(type(tower).__name__ for tower in towers)
        raise ValueError(
            f"`model` must hold one vision transformer, but has {len(towers)} ({names}); pass one of them."
        )
    if not towers:
        towers = [host for host in hosts if isinstance(host, PreTrainedModel) and host.config.model_type in _REFUSED]
    if not towers:
        names = ", ".join(type(host).__name__ for host in hosts)
        raise ValueError(
            f"`model` must hold a vision transformer, but has none among {names}; supported are "
            f"{', '.join(SUPPORTED)}."
        )
    return towers[0]


def _is_tower(module: nn.Module) -> bool:
    if not isinstance(module, PreTrainedModel) or module.config.model_type == "timm_wrapper":
        return _is_timm_vit(module)  # of a wrapper, the timm model in it
    return module.config.model_type in SUPPORTED


def _outermost_hosts(model: nn.Module) -> Iterator[nn.Module]:
    if isinstance(model, PreTrainedModel) or _is_timm_vit(model):
        yield model
        return
    for child in model.children():
        yield from _outermost_hosts(child)


def _is_timm_vit(module: nn.Module) -> bool:
    # by name: timm is an optional package and must not be imported to find out that it is absent
    return any(
        base.__name__ == "VisionTransformer" and base.__module__.startswith("timm.") for base in type(module).__mro__
    )


def _refuse_unfit(host: PreTrainedModel) -> None:
    name, model_type = type(host).__name__, host.config.model_type
    if model_type in _REFUSED:
        raise ValueError(f"ToE cannot train {name}: {_REFUSED[model_type]}; use a plain vision transformer.")
    heads = "MaskedImageModeling", "SemanticSegmentation", "DepthEstimation"
    hosts = [base.__name__ for base in type(host).__mro__ if base.__module__.startswith("transformers.")]
    backbone = any("Backbone" in base for base in hosts)  # in the name of a class of one's own it says little
    if backbone or any(head in base for head in heads for base in (name, *hosts)):
        raise ValueError(
            f"ToE cannot train {name}: its head reads every patch, and merged ones have no row any more; train with a "
            "classification or detection head, or call `TokenExpansion` and `restore_tokens` yourself."
        )
    if model_type not in SUPPORTED:
        raise ValueError(
            f"`model` must be one of the vision transformers ToE knows ({', '.join(SUPPORTED)}), got {name} of type "
            f"{model_type!r}{_name_tower(host)}."
        )
    shared, own = "use_shared_relative_position_bias", "use_relative_position_bias"
    if getattr(host.config, shared, False) or getattr(host.config, own, False):
        raise ValueError(
            f"ToE cannot train {name} with a relative position bias: every layer adds a bias for all pairs of "
            "patches, which a hook cannot shrink; use a config with `use_absolute_position_embeddings=True`, without "
            f"`{own}` and `{shared}`."
        )


def _name_tower(host: PreTrainedModel) -> str:
    """Where a model that is refused as a whole has a vision transformer that is not, for the message."""
    for place, module in host.named_modules():
        if place and isinstance(module, PreTrainedModel) and module.config.model_type in SUPPORTED:
            return f"; ToE can train its `{place}` by itself, a {type(module).__name__}"
    return ""


def _transformers_site(host: PreTrainedModel) -> EncoderSite:
    for module in host.modules():
        embeddings = getattr(module, "embeddings", None)
        # text towers have embeddings and layers too, but no patches
        if not any(hasattr(embeddings, patches) for patches in ("patch_embeddings", "patch_embedding")):
            continue
        encoder = getattr(module, "encoder", module)
        layers = next((getattr(encoder, name) for name in ("layers", "layer") if hasattr(encoder, name)), None)
        if layers is None:
            continue
        parameters = {name: value for name in _PREFIX if (value := getattr(embeddings, name, None)) is not None}
        suffix = getattr(embeddings, "detection_tokens", None)
        return EncoderSite(
            name=type(host).__name__,
            layers=layers,
            embeddings=embeddings,
            num_prefix_tokens=sum(1 if value.dim() == 1 else value.shape[-2] for value in parameters.values()),
            num_suffix_tokens=0 if suffix is None else suffix.shape[-2],
            middle_positions=getattr(encoder, "interpolation", None),
        )
    raise ValueError(
        f"`model` must have patch embeddings and encoder layers, but none were found in {type(host).__name__}."
    )


def _timm_site(vit: nn.Module, name: str, wrapper: nn.Module | None = None) -> EncoderSite:
    if not _is_timm_vit(vit):
        raise ValueError(
            f"ToE trains timm's `VisionTransformer` family only, because other timm models tie their layers to a full "
            f"grid of tokens; got {type(vit).__name__} in {name}."
        )
    return EncoderSite(
        name=name,
        layers=vit.blocks,
        embeddings=vit.patch_embed,
        num_prefix_tokens=vit.num_prefix_tokens,
        timm_wrapper=wrapper,
    )


class _Hook:
    """A method of an attachment as a hook of a module; copied or pickled with that module, it does nothing any more.

    Args:
        method (`Callable`, *optional*): The bound method; none for a copy.
    """

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self.method = method
        self.__self__ = getattr(method, "__self__", None)  # the attachment, as of a bound method

    def __call__(self, *args: Any) -> Any:
        return None if self.method is None else self.method(*args)

    def __reduce__(self) -> tuple:
        return _Hook, ()


class ToEAttachment:
    """One ToE in one model: hooks, the stage they apply, and whether they apply at all.

    Args:
        model (`nn.Module`): The model to train.
        expansion (`TokenExpansion`): The operation.

    Raises:
        ValueError: If the model is refused or has too few layers for `after_layer`.
    """

    def __init__(self, model: nn.Module, expansion: TokenExpansion) -> None:
        self.site = find_encoder(model)
        self.expansion = expansion
        after, depth = expansion.config.after_layer, len(self.site.layers)
        if depth < 2:
            raise ValueError(
                f"ToE needs a model with at least two encoder layers, one before and one behind the expansion, but "
                f"{self.site.name} has {depth}."
            )
        if after >= depth:
            raise ValueError(
                f"`after_layer` must be below the number of encoder layers, got {after} for the {depth} layers of "
                f"{self.site.name}; lower it to {depth - 1} or less."
            )
        self.stage = 0
        self.armed = False
        self.last_shape: tuple[int, int, int] | None = None
        self.index: Tensor | None = None
        self.passed_over = False
        self._warned = False
        self._keep_armed = False
        self._last_stage: int | None = None
        self._model = model
        self._handles: list[Any] = []

    def attach(self) -> "ToEAttachment":
        """Register the hooks, after removing whatever an interrupted training left.

        Returns:
            `ToEAttachment`: itself.
        """
        detach(self._model)
        site = self.site
        layer = site.layers[self.expansion.config.after_layer]
        self._handles += [
            layer.register_forward_pre_hook(_Hook(self.before_layer), with_kwargs=True),
            self._model.register_forward_hook(_Hook(self.after_model), always_call=True),
        ]
        if site.middle_positions is not None:
            self._handles.append(site.middle_positions.register_forward_hook(_Hook(self.after_middle_positions)))
        if site.timm_wrapper is not None:
            hook = _Hook(self.before_timm_wrapper)
            self._handles.append(site.timm_wrapper.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    @property
    def in_place(self) -> bool:
        """`bool`: Whether the hook before the layer is there; another attachment to the same model removes it."""
        layer = self.site.layers[self.expansion.config.after_layer]
        return any(_owner(hook) is self for hook in layer._forward_pre_hooks.values())

    def detach(self) -> None:
        """Remove the hooks; a second call does nothing."""
        self.armed = False
        if self._handles:
            detach(self._model)
            self._handles.clear()

    def arm(self, stage: int, *, keep: bool = False) -> None:
        """Let the hook act.

        Args:
            stage (`int`): Stage to apply.
            keep (`bool`): Whether to stay armed until told otherwise; else the next training forward disarms.
        """
        self.stage, self.armed, self._keep_armed = stage, True, keep
        self.passed_over = False  # whether a pass with gradients came after the one that disarmed

    def before_layer(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Hook before encoder layer `after_layer`: hand on fewer rows while training.

        Args:
            layer (`nn.Module`): The layer about to run.
            args (`tuple`): Its positional arguments; the first is the rows if not named `hidden_states`.
            kwargs (`dict`): Its named arguments.

        Returns:
            `tuple` or `None`: New arguments; `None` leaves the call as it is.

        Raises:
            ValueError: If an attention mask comes along.
        """
        hidden = args[0] if args else kwargs["hidden_states"]
        if not layer.training:
            self._notice_evaluation(hidden)
            return None
        stage = self._take_stage(layer)
        if stage is None:
            return None
        site = self.site
        self._refuse_mask(args, kwargs)
        tokens, index = self.expansion(hidden, stage, site.num_prefix_tokens, site.num_suffix_tokens)
        self.last_shape = (hidden.shape[0], hidden.shape[1], tokens.shape[1])
        if tokens is hidden:
            self.index = None
            return None
        if site.middle_positions is not None or not torch.compiler.is_compiling():
            self.index = index  # a compiled graph would have to return it
        if args:
            return (tokens, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": tokens}

    def _take_stage(self, layer: nn.Module) -> int | None:
        """Stage to apply now, or `None`; disarms, so that a model whose training broke off is plain again."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            # within a backward pass: timm checkpoints whole blocks with their hooks, and the recomputation must do
            # what the forward did
            return self._last_stage
        self._last_stage = self.stage if self.armed else None
        if not self.armed and torch.is_grad_enabled():
            self.passed_over = True
        # replicas of DataParallel share this object between threads; the callback disarms behind them
        if not (self._keep_armed or getattr(layer, "_is_replica", False)):
            self.armed = False
        return self._last_stage

    def _notice_evaluation(self, hidden: Tensor) -> None:
        """Say once that a training step sees all tokens because the encoder is in evaluation mode."""
        if self._warned or not self.armed or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if hidden.requires_grad:  # may be an evaluation without `no_grad`; a gradient that comes back tells
            hidden.register_hook(self._warn_of_evaluation)
        else:  # a frozen encoder never gets one
            self._warn_of_evaluation()

    def _warn_of_evaluation(self, gradient: Tensor | None = None) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s ran with gradients on all tokens, without ToE, because its encoder is in evaluation mode, as "
                "`from_pretrained` returns it; call `.train()` on the model and its encoder before training steps, "
                "and evaluate under `torch.no_grad()`.",
                self.site.name,
            )

    def _refuse_mask(self, args: tuple, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask", kwargs.get("attn_mask", args[1] if len(args) > 1 else None))
        if mask is not None:
            raise ValueError(
                f"ToE cannot train {self.site.name} with an `attention_mask`: every layer gets the full mask again, "
                "which no longer fits the kept tokens; leave it out."
            )

    def after_model(self, model: nn.Module, args: tuple, output: Any) -> None:
        """Hook behind the model, also called when it breaks off: what the layer had no chance to do is forgotten.

        Args:
            model (`nn.Module`): The model.
            args (`tuple`): Its arguments.
            output (`Any`): What it returns; `None` after an exception.
        """
        if output is None and not self._keep_armed:
            self.armed = False

    def before_timm_wrapper(self, wrapper: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook before transformers' wrapper of a timm model, which lays hidden states out as the whole grid.

        Args:
            wrapper (`nn.Module`): The wrapper about to run.
            args (`tuple`): Its positional arguments.
            kwargs (`dict`): Its named arguments.

        Raises:
            ValueError: If hidden states are asked for in training.
        """
        wanted = kwargs.get("output_hidden_states")
        wanted = wrapper.config.output_hidden_states if wanted is None else wanted
        if wanted and self.armed and wrapper.timm_model.training and kwargs.get("output_fmt") != "NLC":
            raise ValueError(
                f"ToE cannot train {self.site.name} with `output_hidden_states`: timm lays them out as the whole grid "
                'of patches, of which ToE keeps a part; leave it out, or pass `output_fmt="NLC"` for rows of tokens.'
            )

    def after_middle_positions(self, module: nn.Module, args: tuple, rows: Tensor) -> "_FollowingRows | None":
        """Hook behind YOLOS' middle position rows: from the expansion on they follow the index.

        Args:
            module (`nn.Module`): The interpolation.
            args (`tuple`): Its arguments.
            rows (`torch.FloatTensor` of shape `(layers - 1, 1, n_in, dim)`): Rows added behind each layer.

        Returns:
            `Sequence` or `None`: What the encoder takes its rows from.
        """
        self.index = None
        return _FollowingRows(rows, self) if module.training and self.armed else None


class _FollowingRows:
    """Position rows behind layer i, taken at the moment they are added: by then the index of the batch is known."""

    def __init__(self, rows: Tensor, attachment: ToEAttachment) -> None:
        self.rows = rows
        self.attachment = attachment

    def __getitem__(self, layer: int) -> Tensor:
        rows, index = self.rows[layer], self.attachment.index  # (1, n_in, dim)
        if index is None or layer < self.attachment.expansion.config.after_layer:
            return rows
        return rows[0][index]  # (batch, n_out, dim)


def detach(model: nn.Module) -> int:
    """Remove every ToE hook of a model, also those that an interrupted training left behind.

    Args:
        model (`nn.Module`): The model, wrapped or not.

    Returns:
        `int`: Number of hooks removed.
    """
    removed = 0
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
                owner = _owner(hooks.pop(key))
                if owner is not None:  # that of a copy has none
                    owner.armed = False
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
                removed += 1
    return removed


def _owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)


def reset_compiler() -> None:
    """Drop compiled graphs: they do not notice that a hook came or went, and would run on with the old ones."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class ExpandedTraining:
    """Handle of `token_expansion`.

    Args:
        attachment (`ToEAttachment`): The hooks in the model.
    """

    def __init__(self, attachment: ToEAttachment) -> None:
        self._attachment = attachment
        self.set_progress(0)
        self._told = False

    def set_progress(self, progress: float) -> None:
        """Tell how far the training is; the stage follows.

        Args:
            progress (`float`): Share of the training done, in `[0, 1]`, or epochs done, in the unit of the config's
                `stage_starts`.

        Raises:
            RuntimeError: If the hook is gone: after the `with` block, or where another ToE has taken the model over.
            ValueError: If it is no number, negative, or a share above 1.
        """
        if not self._attachment.in_place:
            raise RuntimeError(
                "`set_progress` must be called inside the `with` block and with one ToE in a model, but its hook is "
                "gone, so all tokens would be trained on; open one `token_expansion` around the whole training."
            )
        config = self._attachment.expansion.config
        number = isinstance(progress, Real) and progress >= 0  # NaN is not
        if not number or (progress > 1 and not config.counts_epochs):
            unit = "epochs of at least 0" if config.counts_epochs else "a share of the training in [0, 1]"
            raise ValueError(f"`progress` must be {unit}, the unit of `stage_starts`, got {progress!r}.")
        self._attachment.arm(config.stage_at(progress), keep=True)
        self._told = True

    @property
    def stage(self) -> int:
        """`int`: Stage that the next forward in training mode applies; 0 is all tokens."""
        return self._attachment.stage

    @property
    def index(self) -> Tensor | None:
        """`torch.LongTensor` of shape `(batch, n_out)`: Rows kept in the last uncompiled forward; `None` if all."""
        return self._attachment.index


@contextmanager
def token_expansion(model: nn.Module, config: ToEConfig | None = None) -> Iterator[ExpandedTraining]:
    """Train with ToE in a loop of your own; the model is plain again on leaving, also after an exception.

    Args:
        model (`nn.Module`): The model, also wrapped by PEFT, DDP or `torch.compile`.
        config (`ToEConfig`, *optional*): The schedule.

    Yields:
        `ExpandedTraining`: Call its `set_progress` before each step.

    Raises:
        ValueError: If the model is refused or too shallow.

    Example:
        >>> with token_expansion(model, ToEConfig()) as expansion:
        ...     for step, batch in enumerate(loader):
        ...         expansion.set_progress(step / len(loader))
        ...         model(**batch).loss.backward()
    """
    attachment = ToEAttachment(model, TokenExpansion(config)).attach()
    reset_compiler()
    handle = ExpandedTraining(attachment)
    try:
        yield handle
        if not handle._told and attachment.last_shape is not None:
            logger.warning(
                "`token_expansion` never heard of the progress, so %s trained on the tokens of the first stage "
                "throughout, never on all; call `set_progress` before each step.",
                attachment.site.name,
            )
    finally:
        attachment.detach()
        reset_compiler()
