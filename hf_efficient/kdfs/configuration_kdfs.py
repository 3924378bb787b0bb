"""Settings of a KDFS run: every number of the paper as one checked field."""

import math
import re
from collections.abc import Callable

from optimum.configuration_utils import BaseConfig


Rule = tuple[str, Callable[[object], bool]]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_texts(value: object) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value))


def _check_patterns(name: str, patterns: list[str] | None) -> None:
    for pattern in patterns or ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`{name}` must be regular expressions, but {pattern!r} is none ({error}); correct it, or put a "
                "backslash before signs that stand for themselves."
            ) from error


def _can_be_set(kind: type, name: str) -> bool:
    """Whether a class has an attribute of this name that is neither a method nor read-only."""
    found = getattr(kind, name, len)  # a function stands for none
    return not callable(found) and not (isinstance(found, property) and found.fset is None)


OPEN_SHARE: Rule = ("a number in (0, 1)", lambda value: _is_number(value) and 0 < value < 1)
SHARE: Rule = ("a number in [0, 1)", lambda value: _is_number(value) and 0 <= value < 1)
POSITIVE: Rule = ("a number above 0", lambda value: _is_number(value) and value > 0)
WEIGHT: Rule = ("a number of at least 0", lambda value: _is_number(value) and value >= 0)
NUMBER: Rule = ("a number", _is_number)
COUNT: Rule = ("an integer of at least 1", _is_count)
COUNT_OR_NONE: Rule = ("an integer of at least 0", lambda value: value == 0 or _is_count(value))
PATTERNS: Rule = ("None or a list of regular expressions", _is_texts)

RULES: dict[str, Rule] = {
    "target_flops_reduction": OPEN_SHARE,
    "fine_tune_share": SHARE,
    "mask_learning_rate": POSITIVE,
    "initial_keep_margin": NUMBER,
    "initial_importance_spread": WEIGHT,
    "importance_images": COUNT_OR_NONE,
    "kd_temperature": POSITIVE,
    "kd_weight": WEIGHT,
    "fine_tune_kd_weight": ("None or a number of at least 0", lambda value: value is None or WEIGHT[1](value)),
    "reconstruction_weight": WEIGHT,
    "flops_weight": WEIGHT,
    "gumbel_start_temperature": POSITIVE,
    "gumbel_end_temperature": POSITIVE,
    "min_filters": COUNT,
    "round_to": COUNT,
    "include_layers": PATTERNS,
    "exclude_layers": PATTERNS,
}


class KDFSConfig(BaseConfig):
    """Settings of one pruning run, saved as `kdfs_config.json` (KDFS, arXiv 2307.00198).

    Where we differ from the authors' recipe: the target is a reduction of the true multiply-adds (theirs mixes three
    counts), the logits start with a margin towards keeping and from what each filter does to the loss (theirs are
    N(0, 1), which drops half of the teacher in the first step), and the student starts from the teacher's weights.

    Args:
        target_flops_reduction (`float`, *optional*, defaults to 0.55):
            Share of the multiply-adds to remove, in (0, 1). Reached within one percentage point, or a warning tells
            what is.
        fine_tune_share (`float`, *optional*, defaults to 0.5):
            Share of all steps spent on fine-tuning the smaller network, in [0, 1).
        mask_learning_rate (`float`, *optional*, defaults to 1e-2):
            Learning rate of the keep/drop logits; follows the same schedule as the weights' rate.
        initial_keep_margin (`float`, *optional*, defaults to 2.0):
            Keep logit minus drop logit of an average filter at the start.
        initial_importance_spread (`float`, *optional*, defaults to 1.0):
            Logits added per standard deviation of a filter's importance; 0 starts all filters alike.
        importance_images (`int`, *optional*, defaults to 1024):
            Training images on which the importance is measured before the first step, at most as many as the sampling
            phase sees: the logarithm of the first-order change of the cross entropy per multiply-add that goes with
            the filter, compared over all layers. 0 measures nothing and takes `|gamma|` of the normalisation that
            follows, else the filter's norm, compared within a layer.
        kd_temperature (`float`, *optional*, defaults to 3.0):
            Temperature `T` of the distillation, above 0.
        kd_weight (`float`, *optional*, defaults to 0.05):
            Weight of the distillation loss `T^2 KL(teacher || student)` in the sampling phase.
        fine_tune_kd_weight (`float`, *optional*):
            Its weight while fine-tuning; `None` takes `kd_weight`. The authors fine-tune without a teacher (0).
        reconstruction_weight (`float`, *optional*, defaults to 1000.0):
            Weight of the masked filter modelling loss; 0 builds no decoders.
        flops_weight (`float`, *optional*, defaults to 10000.0):
            Weight of `(kept share of the multiply-adds - (1 - target))^2`.
        gumbel_start_temperature (`float`, *optional*, defaults to 1.0):
            Gumbel-softmax temperature before the first epoch.
        gumbel_end_temperature (`float`, *optional*, defaults to 0.1):
            Gumbel-softmax temperature of the last sampling epoch.
        min_filters (`int`, *optional*, defaults to 1):
            Filters that remain in every layer, at least 1.
        round_to (`int`, *optional*, defaults to 1):
            Kept counts are multiples of this number, or the whole layer; in layers of at least eight times as many
            filters mostly even multiples. 8 suits vector units.
        include_layers (`list[str]`, *optional*):
            Regular expressions; only convolutions whose name contains a match are pruned. `None`: all. Depthwise ones
            follow those that they read.
        exclude_layers (`list[str]`, *optional*):
            Regular expressions; convolutions whose name contains a match are left whole, and with a depthwise one
            those that it reads.

    Raises:
        ValueError: If a field is outside its range or its name is unknown.

    Example:
    ```python
    >>> from hf_efficient import KDFSConfig

    >>> KDFSConfig(target_flops_reduction=0.5, round_to=8).round_to
    8
    ```
    """

    CONFIG_NAME = "kdfs_config.json"
    FULL_CONFIGURATION_FILE = "kdfs_config.json"
    model_type = "kdfs"

    target_flops_reduction: float = 0.55
    fine_tune_share: float = 0.5
    mask_learning_rate: float = 1e-2
    initial_keep_margin: float = 2.0
    initial_importance_spread: float = 1.0
    importance_images: int = 1024
    kd_temperature: float = 3.0
    kd_weight: float = 0.05
    fine_tune_kd_weight: float | None = None
    reconstruction_weight: float = 1000.0
    flops_weight: float = 10000.0
    gumbel_start_temperature: float = 1.0
    gumbel_end_temperature: float = 0.1
    min_filters: int = 1
    round_to: int = 1
    include_layers: list[str] | None = None
    exclude_layers: list[str] | None = None

    def __post_init__(self, **kwargs: object):
        known = {"_name_or_path", "optimum_version", "transformers_version"}
        unknown = [name for name in kwargs if name not in known and not _can_be_set(type(self), name)]
        if unknown:
            raise ValueError(f"`{unknown[0]}` is not a setting of KDFSConfig; the settings are {', '.join(RULES)}.")
        super().__post_init__(**kwargs)
        for name, (rule, holds) in RULES.items():
            value = getattr(self, name)
            if not holds(value):
                raise ValueError(f"`{name}` must be {rule}, but is {value!r}; give another value.")
        for name in ("include_layers", "exclude_layers"):
            _check_patterns(name, getattr(self, name))
            if getattr(self, name) is not None:  # as a file gives it back
                setattr(self, name, list(getattr(self, name)))

    @property
    def keep_share(self) -> float:
        """Share of the multiply-adds to keep, `1 - target_flops_reduction`."""
        return 1.0 - self.target_flops_reduction
