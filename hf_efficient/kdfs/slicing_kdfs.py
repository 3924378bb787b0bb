"""Cut the masked network down to what the masks keep, and write the smaller network's weights back."""

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor, nn
from transformers import PreTrainedModel

from .configuration_kdfs_pruned import KDFSPrunedConfig
from .masking_kdfs import KDFSMaskedModel
from .modeling_kdfs_pruned import KDFSPrunedModelForImageClassification
from .sampling_kdfs import fit_masks
from .structure_kdfs import Layer


def host_network(model: nn.Module) -> nn.Module:
    """The network of transformers or timm inside a pruned one, or the model itself.

    Args:
        model (`nn.Module`): Any image classifier.

    Returns:
        `nn.Module`: Structure, masks and widths are named relative to it.
    """
    config = getattr(model, "config", None)
    return model.network if getattr(config, "model_type", None) == KDFSPrunedConfig.model_type else model


@torch.no_grad()
def _kept(masked: KDFSMaskedModel) -> Tensor:
    masks = masked.frozen_masks
    return torch.cat([masks.new_ones(1), masks]) > 0  # (slots,)


def _indices(layer: Layer, kept: Tensor) -> tuple[Tensor, Tensor]:
    inputs = torch.as_tensor(layer.inputs, device=kept.device)
    outputs = torch.as_tensor(layer.outputs, device=kept.device)
    return kept[inputs].nonzero().flatten(), kept[outputs].nonzero().flatten()


def _views(module: nn.Module, layer: Layer, inputs: Tensor, outputs: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """For every tensor of the module the indices that stay, one per leading axis."""
    if layer.kind in ("conv", "linear"):
        views = {"weight": (outputs, inputs), "bias": (outputs,)}
    elif layer.kind == "depthwise":
        views = {"weight": (outputs,), "bias": (outputs,)}
    else:
        views = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (outputs,))
    return {name: view for name, view in views.items() if getattr(module, name, None) is not None}


def _take(tensor: Tensor, view: tuple[Tensor, ...]) -> Tensor:
    for axis, index in enumerate(view):
        tensor = tensor.index_select(axis, index)
    return tensor


def _compose(old: Tensor | None, channels: int, outputs: Tensor) -> Tensor:
    """Where every channel of the full width comes from after keeping `outputs`; `len(outputs)` means zeros."""
    place = torch.full((channels + 1,), len(outputs), dtype=torch.int64, device=outputs.device)
    place[outputs] = torch.arange(len(outputs), device=outputs.device)
    return place[:channels] if old is None else place[old.to(outputs.device)]


def base_model_of(model: PreTrainedModel) -> str | None:
    """The Hub id that the card of a pruned network names as its base.

    Args:
        model (`PreTrainedModel`): The network before pruning.

    Returns:
        `str` or `None`: The id that it was loaded from. Of a local folder the base that the folder's own card names,
        of a pruned network the one it came from.
    """
    source = getattr(model, "name_or_path", "") or ""
    if source and not Path(source).exists() and _is_hub_id(source):
        return source
    named = getattr(model.config, "base_model_name_or_path", None)
    return _base_in_card(Path(source) / "README.md") or named if source else named


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:  # a path, of a folder that is gone
        return False
    return True


def _base_in_card(card: Path) -> str | None:
    from yaml import YAMLError

    try:
        named = (metadata_load(card) or {}).get("base_model")
    except (OSError, ValueError, YAMLError):  # none, or none that can be read
        return None
    named = named[0] if isinstance(named, list) and named else named
    return named if isinstance(named, str) else None


def _pruned_config(masked: KDFSMaskedModel, model: PreTrainedModel) -> KDFSPrunedConfig:
    kept = _kept(masked)
    network = masked.network
    again = getattr(model.config, "model_type", None) == KDFSPrunedConfig.model_type
    widths: dict[str, Any] = dict(model.config.widths) if again else {}
    scattered: dict[str, int] = dict(model.config.scattered) if again else {}
    for name, layer in masked.structure.layers.items():
        inputs, outputs = _indices(layer, kept)
        if len(inputs) < len(layer.inputs) or len(outputs) < len(layer.outputs):
            widths[name] = [len(inputs), len(outputs)]
            if layer.scattered:
                old = getattr(network.get_submodule(name), "filter_index", None)
                scattered[name] = len(layer.outputs) if old is None else len(old)
    base_config = copy.deepcopy(model.config.base_config if again else model.config)
    config = KDFSPrunedConfig(
        base_config=base_config,
        widths=widths,
        scattered=scattered,
        input_shape=list(masked.structure.input_shape),
        id2label=dict(model.config.id2label),
        label2id=dict(model.config.label2id or {}),
    )
    for name in ("pretrained_cfg", "image_processor_type"):  # what timm's image processor reads from config.json
        if getattr(base_config, name, None) is not None:
            setattr(config, name, getattr(base_config, name))
    if base_config.model_type == "timm_wrapper" and getattr(config, "pretrained_cfg", None) is not None:
        config.image_processor_type = "TimmWrapperImageProcessor"
    config.base_model_name_or_path = base_model_of(model)  # as adapters write it; the card is made of it
    config.auto_map = {
        "AutoConfig": "configuration_kdfs_pruned.KDFSPrunedConfig",
        "AutoModel": "modeling_kdfs_pruned.KDFSPrunedModel",
        "AutoModelForImageClassification": "modeling_kdfs_pruned.KDFSPrunedModelForImageClassification",
    }
    return config


@torch.no_grad()
def slice_network(masked: KDFSMaskedModel, model: PreTrainedModel) -> KDFSPrunedModelForImageClassification:
    """Build the smaller network that computes what the masked one computes.

    Args:
        masked ([`KDFSMaskedModel`]): With frozen masks.
        model (`PreTrainedModel`): The model before masking; gives configuration and labels.

    Returns:
        [`KDFSPrunedModelForImageClassification`]: On the same device, in evaluation mode.

    Raises:
        ValueError: If the masks are not frozen.
    """
    if not masked.masks_frozen:
        raise ValueError("`masked` must have frozen masks, but they still change; call `freeze_masks()` first.")
    config = _pruned_config(masked, model)
    pruned = KDFSPrunedModelForImageClassification(config)
    kept = _kept(masked)
    source = masked.network
    state = {name: value for name, value in source.state_dict().items() if not name.endswith("filter_index")}
    for name, layer in masked.structure.layers.items():
        module = source.get_submodule(name)
        inputs, outputs = _indices(layer, kept)
        for key, view in _views(module, layer, inputs, outputs).items():
            state[f"{name}.{key}"] = _take(getattr(module, key), view)
    for name in config.scattered:
        old = getattr(source.get_submodule(name), "filter_index", None)
        layer = masked.structure.layers[name]
        if layer.scattered:
            state[f"{name}.filter_index"] = _compose(old, len(layer.outputs), _indices(layer, kept)[1])
        else:
            state[f"{name}.filter_index"] = old
    pruned.to(kept.device, next(source.parameters()).dtype)  # before loading: no weight passes through a coarser type
    pruned.network.load_state_dict(state)
    for name, parameter in source.named_parameters():  # what was frozen stays frozen
        pruned.network.get_parameter(name).requires_grad_(parameter.requires_grad)
    return pruned.eval()


def _check_kind(network: nn.Module, model: nn.Module) -> None:
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`model` must be an image classifier of transformers, but has the class {kind}; a network of timm "
            "becomes one through TimmWrapperForImageClassification, a compiled one is handed in as it was before."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "`model` must have weights that train, but all are frozen (a teacher's stay so); call "
            "`model.requires_grad_(True)`."
        )
    problem = getattr(model.config, "problem_type", None)
    if problem not in (None, "single_label_classification"):
        raise ValueError(
            f"`model` must choose one class per image, but its `problem_type` is {problem!r}; KDFS trains with the "
            "cross entropy alone."
        )
    if model.config.num_labels < 2:
        raise ValueError(
            f"`model` must choose among two labels or more, but has {model.config.num_labels}, of which there is "
            "nothing to learn; give it a label for what is none of it."
        )
    names: dict[tuple, str] = {}
    for name, value in network.state_dict().items():
        twin = names.setdefault((value.data_ptr(), value.shape), name) if value.numel() else name
        if twin != name:
            raise ValueError(
                f"`model` must hold every tensor under one name, but {twin} and {name} are the same, which "
                "checkpoints cannot hold; give both modules weights of their own, or call one module twice."
            )


def _check_loss(network: nn.Module, labels: int, image: Tensor) -> None:
    """Refuse a network whose own loss is not the one that KDFS trains with, such as with weights for classes."""
    targets = torch.linspace(0, labels - 1, min(labels, 8), device=image.device).round().long()
    images = torch.randn(len(targets), *image.shape).to(image)
    try:
        output = network(pixel_values=images, labels=targets)
    except TypeError:  # takes no labels
        return
    loss = getattr(output, "loss", None)
    if loss is None:
        return
    expected = nn.functional.cross_entropy(output.logits.float(), targets)
    if (loss.float() - expected).abs() > 0.05 * expected + 0.01:
        raise ValueError(
            f"`model` must have the plain cross entropy as its loss, with which KDFS trains, but the loss of "
            f"{type(network).__name__} is {float(loss):.3g} instead of {float(expected):.3g}, as with class weights; "
            "show rare classes more often in `train_dataset`, and use the class of transformers as it is."
        )


@torch.no_grad()
def check_model(masked: KDFSMaskedModel, model: PreTrainedModel) -> None:
    """Refuse a network that cannot be sliced, before it is trained: cut one at random masks and compare the answers.

    A head that the configuration does not know of, or a `forward` with numbers of channels in it, would else show
    when the masks are learned. Neither network changes, nor does the state of the random numbers.

    Args:
        masked ([`KDFSMaskedModel`]): With any masks.
        model (`PreTrainedModel`): The model before masking.

    Raises:
        ValueError: If the model is none of transformers', is frozen, chooses no single class, trains with another
            loss, holds a tensor twice, gives no finite logits, is not what its configuration builds, or the smaller
            network does not compute what the masked one does.
    """
    _check_kind(masked.network, model)
    kind, config = type(model).__name__, masked.pruning_config
    trial = copy.deepcopy(masked).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits = [torch.randn(size, 2) for size in masked.sizes]
        masks = fit_masks(logits, masked.cost, config.keep_share, config.min_filters, config.round_to)
        trial.frozen_masks.copy_(torch.cat(masks))
        trial.masks_frozen.fill_(True)
        reference = next(trial.network.parameters())
        images = torch.randn(2, *masked.structure.input_shape).to(reference.device, reference.dtype)
        expected = trial(images).logits.float()
        if not expected.isfinite().all():
            raise ValueError(f"`model` must answer with finite logits, but {kind} does not; load other weights.")
        _check_loss(trial.network, model.config.num_labels, images[0])
        try:
            got = slice_network(trial, model)(images).logits.float()
        except (RuntimeError, ValueError, AttributeError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"`model` must be what its configuration builds, with a `forward` that takes any number of channels, "
                f"but a smaller {kind} fails ({reason}); leave such layers whole with `exclude_layers`, or use the "
                "class of transformers as it is."
            ) from error
    tolerance = 0.02 if reference.element_size() > 2 else 0.2  # rounding is far below, also that of TF32
    if got.shape != expected.shape or (got - expected).abs().max() > tolerance * expected.abs().max() + 1e-6:
        raise ValueError(
            f"`model` must compute the same without the filters that a mask sets to zero, but a smaller {kind} gives "
            "other answers; leave the layers that differ whole with `exclude_layers`."
        )


@torch.no_grad()
def write_back(masked: KDFSMaskedModel, pruned: KDFSPrunedModelForImageClassification) -> None:
    """Copy the smaller network's weights into the kept places of the masked one.

    What stands in the dropped places changes no output.

    Args:
        masked ([`KDFSMaskedModel`]): The network `pruned` was sliced from.
        pruned ([`KDFSPrunedModelForImageClassification`]): The smaller network, trained further.
    """
    kept = _kept(masked)
    target = masked.network.state_dict()
    sliced = set()
    for name, layer in masked.structure.layers.items():
        module = pruned.network.get_submodule(name)
        inputs, outputs = _indices(layer, kept)
        for key, view in _views(module, layer, inputs, outputs).items():
            full, small = target[f"{name}.{key}"], getattr(module, key).to(kept.device)
            if len(view) == 2:
                full[view[0][:, None], view[1][None, :]] = small.to(full.dtype)
            else:
                full[view[0]] = small.to(full.dtype)
            sliced.add(f"{name}.{key}")
    for key, value in pruned.network.state_dict().items():
        if key not in sliced and not key.endswith("filter_index"):
            target[key].copy_(value.to(target[key].device))
