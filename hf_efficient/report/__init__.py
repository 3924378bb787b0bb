"""`efficiency_report` and `hf-efficient report`: what a model costs and what a method saves, measured.

Reading order: `model_report` (the report of any model), `measure_report` (multiply-adds, clocks, memory),
`llava_report` and `toe_report` (what is measured of these two), `figures_report` (the picture), `commands_report`.
"""

from importlib import import_module


_EXPORTS = {"EfficiencyReport": "model_report", "efficiency_report": "model_report"}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
