"""Pictures of ToE: which patches a stage keeps, and accuracy over training time."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .attachment_toe import find_encoder
from .configuration_toe import ToEConfig
from .expansion_toe import TokenExpansion


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# what black and white become where a patch is not kept: of a middle brightness and blue, which no grey picture is
_BLACK, _WHITE, _STROKE = (0.24, 0.38, 0.62), (0.54, 0.69, 0.90), "white"
_COLOURS = {"full": "#444444", "toe": "#1b7837", "random": "#b35806", "fast": "#2166ac", "short": "#999999"}


def _make_figure(**settings: Any) -> "Figure":
    """Make a figure that pyplot does not know: it is gone with its last name, and any thread may draw it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib; run pip install "hf-efficient[quickstart]".') from error
    figure = Figure(**settings)
    FigureCanvasAgg(figure)
    return figure


@torch.no_grad()
def choose_patches(model: nn.Module, pixel_values: Tensor, stage: int, config: ToEConfig | None = None) -> Tensor:
    """Patches that a stage keeps of each image, by the rows a model hands to layer `after_layer`.

    Args:
        model (`nn.Module`): A supported model.
        pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Images as the model takes them.
        stage (`int`): Stage from 1.
        config (`ToEConfig`, *optional*): The schedule.

    Returns:
        `torch.BoolTensor` of shape `(batch, N)`: True = kept.

    Raises:
        ValueError: If the model is refused or the stage does not exist.
    """
    site, expansion, rows = find_encoder(model), TokenExpansion(config), []

    def note(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        rows.append(args[0] if args else kwargs["hidden_states"])

    handle = site.layers[expansion.config.after_layer].register_forward_pre_hook(note, with_kwargs=True)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()(pixel_values=pixel_values)
    finally:
        handle.remove()
        for module, training in modes.items():
            module.training = training
    tokens = rows[0]
    index = expansion.select(tokens, stage, site.num_prefix_tokens, site.num_suffix_tokens).index
    kept = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device).scatter_(1, index, True)
    return kept[:, site.num_prefix_tokens : tokens.shape[1] - site.num_suffix_tokens]


def plot_expansion(
    model: nn.Module,
    pixel_values: Tensor,
    pictures: Sequence[Any] | None = None,
    config: ToEConfig | None = None,
) -> "Figure":
    """Draw what each stage keeps: one row an image, first the image itself, then one column a stage.

    Patches that a stage keeps are as in the image, with a thin line around them; those merged into others are blue and
    struck through, which can be told apart on white, on black and on photographs.

    Args:
        model (`nn.Module`): A supported model on square images.
        pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Images as the model takes them.
        pictures (`Sequence`, *optional*): The same images for the eye, PIL images or arrays `(height, width)` or
            `(height, width, channels)` of bytes or of values in `[0, 1]`; default: `pixel_values` stretched to the
            range of colours.
        config (`ToEConfig`, *optional*): The schedule.

    Returns:
        `matplotlib.figure.Figure`: Not known to pyplot; `figure.savefig(path)` writes it, a notebook shows it.

    Raises:
        ValueError: If the patches do not form a square, or the model is refused.
        ImportError: If matplotlib is missing.
    """
    config = ToEConfig() if config is None else config
    masks = [choose_patches(model, pixel_values, stage, config).cpu() for stage in range(1, config.num_stages + 1)]
    side = round(masks[0].shape[1] ** 0.5)
    if side**2 != masks[0].shape[1]:
        raise ValueError(f"`pixel_values` must give a square of patches, got {masks[0].shape[1]} patches.")
    if pictures is None:
        low, high = pixel_values.amin(), pixel_values.amax()
        pictures = list(((pixel_values - low) / (high - low).clamp_min(1e-6)).permute(0, 2, 3, 1).cpu().numpy())
    size = (2.3 * (len(masks) + 1), 2.3 * len(pictures) + 0.4)
    figure = _make_figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(pictures), len(masks) + 1, squeeze=False)
    place = {"extent": (0, side, side, 0), "interpolation": "nearest"}
    for row, picture in enumerate(map(_as_colours, pictures)):
        axes[row, 0].imshow(picture, **place)
        for axis, mask in zip(axes[row, 1:], masks):
            kept = mask[row].view(side, side).numpy()
            axis.imshow(_tint(picture, kept), **place)
            _outline(axis, kept)
            _strike(axis, ~kept)
    titles = [
        f"stage {stage}: {int(mask[0].sum())} of {mask.shape[1]} tokens\nfrom layer {config.after_layer + 1} on"
        for stage, mask in enumerate(masks, 1)
    ]
    for axis, title in zip(axes[0], ["image", *titles]):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure


def _as_colours(picture: Any) -> np.ndarray:
    """Any picture as an array `(height, width, 3)` of values in `[0, 1]`."""
    picture = np.asarray(picture)
    picture = picture / 255 if picture.dtype == np.uint8 else picture.astype(float)
    picture = picture[..., None] if picture.ndim == 2 else picture
    return np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture[..., :3]


def _tint(picture: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Blue where a patch is not kept, its contrast reduced, so that white and black beside it both stand out."""
    height, width = picture.shape[:2]
    rows, columns = (np.arange(length) * len(kept) // length for length in (height, width))
    luma = picture @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    blue = np.array(_BLACK) + np.subtract(_WHITE, _BLACK) * luma[..., None]
    return np.where(kept[rows][:, columns][..., None], picture, blue)


def _strike(axis: Any, dropped: np.ndarray) -> None:
    """A thin diagonal across every dropped patch; neighbours along it make one line."""
    from matplotlib import collections

    lines = [((x, y + 1), (x + 1, y)) for y, x in zip(*dropped.nonzero())]
    axis.add_collection(collections.LineCollection(lines, colors=_STROKE, linewidths=0.8, alpha=0.7))


def _outline(axis: Any, kept: np.ndarray) -> None:
    """Thin lines between kept patches and others, and around the picture where a kept patch meets its edge."""
    from matplotlib import collections

    inside = np.pad(kept, 1)
    across = zip(*(inside[1:, 1:-1] != inside[:-1, 1:-1]).nonzero())  # (line, column)
    along = zip(*(inside[1:-1, 1:] != inside[1:-1, :-1]).nonzero())  # (row, line)
    lines = [((x, y), (x + 1, y)) for y, x in across] + [((x, y), (x, y + 1)) for y, x in along]
    axis.add_collection(
        collections.LineCollection(lines, colors="black", linewidths=0.8, capstyle="projecting", clip_on=False)
    )


def plot_accuracy(runs: Sequence[dict[str, Any]], target: float | None = None) -> "Figure":
    """Draw accuracy over training time, one line a run, one colour an arm.

    Args:
        runs (`Sequence` of `dict`): With `arm` and `history`, a list of dicts with `cpu_seconds` and `accuracy`; in
            the legend an arm is called by its `title`, where there is one.
        target (`float`, *optional*): Accuracy to draw a level line at, in `[0, 1]`.

    Returns:
        `matplotlib.figure.Figure`: Not known to pyplot, as that of [`plot_expansion`].

    Raises:
        ImportError: If matplotlib is missing.
    """
    figure = _make_figure(figsize=(6, 4))
    axis = figure.subplots()
    named = set()
    for run in runs:
        minutes = [point["cpu_seconds"] / 60 for point in run["history"]]
        accuracy = [100 * point["accuracy"] for point in run["history"]]
        label = None if run["arm"] in named else run.get("title", run["arm"])
        axis.plot(minutes, accuracy, color=_COLOURS.get(run["arm"], "#762a83"), label=label, linewidth=1.2)
        named.add(run["arm"])
    if target is not None:
        axis.axhline(100 * target, color="#999999", linewidth=0.8, linestyle=":")
    axis.set_xlabel("training time, CPU minutes")
    axis.set_ylabel("accuracy, %")
    axis.legend(frameon=False)
    figure.tight_layout()
    return figure
