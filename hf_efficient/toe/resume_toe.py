"""Names of weights when a training resumes.

`save_pretrained` writes ViT, DeiT and DINOv2 under the names of older releases, and `from_pretrained` translates them.
On resuming, the Trainer hands the names of the file to `load_state_dict`, which skips those it does not know with a
warning: the run would go on from new weights.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging


logger = logging.get_logger(__name__)


def translate_names(model: nn.Module) -> None:
    """Let `load_state_dict` of a model read a checkpoint's names, as `from_pretrained` does.

    Args:
        model (`nn.Module`): The model of a trainer; other modules than `PreTrainedModel` save under their own names.
    """
    if isinstance(model, PreTrainedModel) and not reads_saved_names(model):
        model.register_load_state_dict_pre_hook(_Translation())


def reads_saved_names(model: nn.Module) -> bool:
    """Whether `translate_names` is in effect.

    Args:
        model (`nn.Module`): The model.

    Returns:
        `bool`
    """
    return any(model._load_state_dict_pre_hooks[key].hook.active for key in _hooks(model))


def renames_on_saving(model: nn.Module) -> bool:
    """Whether `save_pretrained` gives the weights of a model other names than `state_dict` does.

    Args:
        model (`nn.Module`): The model.

    Returns:
        `bool`: `False` for other modules than `PreTrainedModel`, which a trainer saves as they are.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    return _saved_names(model).keys() != model.state_dict().keys()


def _saved_names(model: PreTrainedModel) -> dict[str, str | None]:
    """Name in `state_dict` of every weight that `save_pretrained` writes; `None` for one that is put together."""
    own = {name: torch.empty(value.shape, device="meta") for name, value in model.state_dict().items()}
    names = {id(value): name for name, value in own.items()}
    return {saved: names.get(id(value)) for saved, value in revert_weight_conversion(model, own).items()}


def forget_names(model: nn.Module) -> int:
    """Take the translation away again.

    Args:
        model (`nn.Module`): The model.

    Returns:
        `int`: Number of hooks removed.
    """
    keys = _hooks(model)
    for key in keys:
        del model._load_state_dict_pre_hooks[key]
    return len(keys)


def _hooks(model: nn.Module) -> list[int]:
    hooks = model._load_state_dict_pre_hooks
    return [key for key, wrapped in hooks.items() if isinstance(getattr(wrapped, "hook", None), _Translation)]


class _Translation:
    """Hook before `load_state_dict`; copied or pickled with its model, it does nothing any more.

    Args:
        active (`bool`): Whether it translates.
    """

    def __init__(self, active: bool = True) -> None:
        self.active = active

    def __call__(self, model: PreTrainedModel, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        if self.active and not prefix:
            _translate(model, state_dict)

    def __reduce__(self) -> tuple:
        return _Translation, (False,)


def _translate(model: PreTrainedModel, state_dict: dict[str, Tensor]) -> None:
    own = model.state_dict().keys()
    if state_dict.keys() <= own:
        return
    names = _saved_names(model)
    if names.keys() == state_dict.keys() and None not in names.values():
        translated = {own_name: state_dict[saved] for saved, own_name in names.items()}
    else:
        translated = _load_as_host(model, state_dict)
    if translated is None:
        logger.warning(
            "The checkpoint does not hold all weights of %s under names that can be translated; it is read as it is.",
            type(model).__name__,
        )
        return
    state_dict.clear()
    state_dict.update({name: translated[name] for name in own})


def _load_as_host(model: PreTrainedModel, state_dict: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Weights under the names of a model from a file of other names than it saves; `None` if some are not there."""
    try:
        inspect.signature(type(model)).bind(model.config)
    except TypeError:  # a class of one's own that takes more than a config
        return None
    # the dtype of the file, whatever the configuration says: it may be that of the weights a training began with
    dtypes = {value.dtype for value in state_dict.values() if value.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    loaded, info = type(model).from_pretrained(
        None, config=copy.deepcopy(model.config), state_dict=dict(state_dict), dtype=dtype, output_loading_info=True
    )
    return None if info["missing_keys"] or info["mismatched_keys"] else loaded.state_dict()
