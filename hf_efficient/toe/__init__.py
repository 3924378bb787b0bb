"""ToE: vision transformers train on a token set that grows in stages (Huang et al., CVPR 2024, arXiv 2404.00672).

Reading order: `configuration_toe` (the schedule), `expansion_toe` (the method on tensors), `cost_toe` (what a schedule
can save), `attachment_toe` (where it sits in a model), `callback_toe` (the Trainer), `figures_toe` (pictures).
"""

from importlib import import_module


_EXPORTS = {
    "ToEConfig": "configuration_toe",
    "ExpandedTokens": "expansion_toe",
    "TokenExpansion": "expansion_toe",
    "restore_tokens": "expansion_toe",
    "speedup_bound": "cost_toe",
    "token_expansion": "attachment_toe",
    "ToECallback": "callback_toe",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
