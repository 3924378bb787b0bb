"""Four published efficiency methods as first-class citizens of the Hugging Face ecosystem.

Importing the package registers its configurations and models with transformers' Auto classes and brings the
`image-to-image` pipeline task back; everything else loads when its name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING


__version__ = "0.1.0"

# public name -> module below this package that defines it
_EXPORTS: dict[str, str] = {
    # Dynamic-LLaVA
    "DynamicLlavaConfig": "dynamic_llava.configuration_dynamic_llava",
    "DynamicLlavaModel": "dynamic_llava.modeling_dynamic_llava",
    "DynamicLlavaForConditionalGeneration": "dynamic_llava.modeling_dynamic_llava",
    "SparseCache": "dynamic_llava.cache_dynamic_llava",
    "SparsityRecord": "dynamic_llava.cache_dynamic_llava",
    # ToE
    # KDFS
    # Pix2Pix
    # the whole house
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
