"""`evaluate` modules for the figures that examples and cards show; each loads by path, without network."""

from pathlib import Path

import evaluate


def load_metric(name: str, **kwargs: object) -> evaluate.EvaluationModule:
    """Load a metric of this package with `evaluate`.

    Example:
    ```python
    >>> from hf_efficient.metrics import load_metric
    >>> load_metric("accuracy").compute(predictions=["red", "circle"], references=["red", "ring"])
    {'accuracy': 0.5}
    ```

    Args:
        name (`str`): `accuracy`, `facts`, `psnr`, `ssim` or `kid`.
        **kwargs (`object`): As of `evaluate.load`; by default rows are kept in memory, so that no file is left behind.

    Returns:
        `evaluate.EvaluationModule`: The metric; several are put together by `evaluate.combine`.

    Raises:
        ValueError: If there is no such metric.
    """
    folder = Path(__file__).parent
    names = sorted(path.parent.name for path in folder.glob("*/*.py"))
    if name not in names:
        raise ValueError(f"`name` must be one of {', '.join(names)}, got {name!r}.")
    return evaluate.load(str(folder / name), **{"keep_in_memory": True, **kwargs})


__all__ = ["load_metric"]
