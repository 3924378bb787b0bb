"""Names of weights when a training resumes.

`save_pretrained` writes ViT, DeiT and DINOv2 under the names of older releases, and `from_pretrained` translates them.
The Trainer of transformers 5.23 and 5.24 does not: on resuming it hands the names of the file to `load_state_dict`,
which skips those it does not know with a warning, so that a resumed run would start from new weights.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)


def translate_names(model: nn.Module) -> Any:
    """Let `load_state_dict` of a model read a checkpoint's names, as `from_pretrained` does.

    Args:
        model (`nn.Module`): The model of a trainer; other modules than `PreTrainedModel` save under their own names.

    Returns:
        `RemovableHandle` or `None`: What takes the translation away again.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    return model.register_load_state_dict_pre_hook(_translate)


def _translate(model: PreTrainedModel, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    own = model.state_dict().keys()
    if prefix or state_dict.keys() <= own:
        return
    loaded, info = type(model).from_pretrained(
        None, config=model.config, state_dict=dict(state_dict), output_loading_info=True
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        logger.warning("The checkpoint does not hold all weights of %s; it is read as it is.", type(model).__name__)
        return
    translated = loaded.state_dict()
    state_dict.clear()
    state_dict.update({name: translated[name] for name in own})
