"""How well a translation survives other cartoons: severity times cartoonizer, and trained-on against tested-on.

"cGANs for Cartoon to Real-life Images" (arXiv 2101.09793) trains Pix2Pix on cartoonized photographs and measures its
robustness on such data. Here every figure comes from torchmetrics; none is our own code.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging

from .cartoonize_pix2pix import MAX_STRENGTH, METHODS, cartoonize
from .figures_pix2pix import UNREADABLE, refuse_unreadable
from .image_processing_pix2pix import to_rgb
from .modeling_pix2pix import Pix2PixModel
from .pairs_pix2pix import PictureFolder
from .pipeline_pix2pix import ImageToImagePipeline


logger = logging.get_logger(__name__)
# figure -> (heading, whether higher is better)
FIGURES: dict[str, tuple[str, bool]] = {
    "psnr": ("PSNR (dB)", True),
    "ssim": ("SSIM", True),
    "pixel_dissimilarity": ("cosine dissimilarity of pixels", False),
    "kid": ("KID", False),
    "feature_cosine": ("feature cosine", True),
}
# mean cosine dissimilarity that the paper reports after training with batch size 1, 8 and 64
PAPER_PIXEL_DISSIMILARITY = {1: 0.00136, 8: 0.00622, 64: 0.01052}
IDENTITY = "the cartoon itself"
SMALLEST = 11  # pixels: the window of SSIM


@dataclass
class RobustnessReport:
    """Result of [`evaluate_robustness`].

    Args:
        rows (`list[dict]`): One for each model, cartoonizer and severity: `model`, `method`, `severity` and figures,
            `None` where one does not exist.
        images (`int`): Test images behind each row.
        feature_network (`str`, *optional*): Name of the network behind `kid` and `feature_cosine`.
        trained_on (`dict[str, str]`): Model -> cartoonizer it was trained on, where that is known.
        samples (`dict[str, PIL.Image.Image]`): Sample sheets by title.
    """

    rows: list[dict[str, Any]]
    images: int
    feature_network: str | None = None
    trained_on: dict[str, str] = field(default_factory=dict)
    samples: dict[str, Image.Image] = field(default_factory=dict, repr=False)

    @property
    def models(self) -> list[str]:
        """Names of the models, the cartoon itself first."""
        return list(dict.fromkeys(row["model"] for row in self.rows))

    @property
    def methods(self) -> list[str]:
        """Cartoonizers tested."""
        return list(dict.fromkeys(row["method"] for row in self.rows))

    @property
    def figures(self) -> list[str]:
        """Names of the figures in each row."""
        return [name for name in self.rows[0] if name not in ("model", "method", "severity")]

    def curve(self, model: str, method: str, figure: str) -> dict[int, float]:
        """Return one figure by severity, without those where it does not exist (PSNR of identical images).

        Args:
            model (`str`): Name of the model.
            method (`str`): Cartoonizer.
            figure (`str`): Name of the figure.

        Returns:
            `dict[int, float]`: Severity -> value.
        """
        wanted = [row for row in self.rows if (row["model"], row["method"]) == (model, method)]
        return {row["severity"]: row[figure] for row in wanted if row[figure] is not None}

    def cross_matrix(self, figure: str) -> dict[str, dict[str, float]]:
        """Average one figure over the severities above 0, for each model and cartoonizer.

        Args:
            figure (`str`): Name of the figure.

        Returns:
            `dict[str, dict[str, float]]`: Model -> tested cartoonizer -> mean.
        """
        matrix: dict[str, dict[str, float]] = {}
        for model in self.models:
            for method in self.methods:
                values = [value for severity, value in self.curve(model, method, figure).items() if severity > 0]
                if values:
                    matrix.setdefault(model, {})[method] = float(np.mean(values))
        return matrix

    def clean_gap(self, figure: str) -> dict[str, dict[str, float]]:
        """Subtract each model's figure on clean photographs from its mean on cartoons.

        Args:
            figure (`str`): Name of the figure.

        Returns:
            `dict[str, dict[str, float]]`: Model -> cartoonizer -> difference; empty where severity 0 was not tested.
        """
        gaps: dict[str, dict[str, float]] = {}
        for model, row in self.cross_matrix(figure).items():
            for method, value in row.items():
                clean = self.curve(model, method, figure).get(0)
                if clean is not None:
                    gaps.setdefault(model, {})[method] = value - clean
        return gaps

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pictures, ready for JSON."""
        return {
            "images": self.images,
            "feature_network": self.feature_network,
            "trained_on": self.trained_on,
            "rows": self.rows,
            "cross_matrix": {figure: self.cross_matrix(figure) for figure in self.figures},
            "clean_gap": {figure: self.clean_gap(figure) for figure in self.figures},
            "paper_pixel_dissimilarity": {str(size): value for size, value in PAPER_PIXEL_DISSIMILARITY.items()},
        }

    def metrics(self, dataset: str, split: str) -> list[dict[str, Any]]:
        """List the figures in the form of `results.json`, from which a card's `model-index` is made.

        Args:
            dataset (`str`): Id of the data set.
            split (`str`): Its split.

        Returns:
            `list[dict]`: One entry for each model, cartoonizer and figure, averaged over severities above 0.
        """
        entries = []
        for figure in self.figures:
            for model, row in self.cross_matrix(figure).items():
                for method, value in row.items():
                    name = f"{FIGURES.get(figure, (figure,))[0]}, {model}, {method} cartoons"
                    entries.append({"dataset": dataset, "split": split, "type": figure, "name": name, "value": value})
        return entries

    def __str__(self) -> str:
        """Return the table as text."""
        header = ["model", "cartoonizer", "severity", *(FIGURES.get(name, (name,))[0] for name in self.figures)]
        lines = [header]
        for row in self.rows:
            figures = [format_figure(name, row[name]) for name in self.figures]
            lines.append([row["model"], row["method"], str(row["severity"]), *figures])
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)

    def save(self, folder: str | os.PathLike, title: str = "Robustness on cartoonized photographs") -> Path:
        """Write `index.html` (opens from disk), `robustness.json`, `robustness.png` and the sample sheets.

        Args:
            folder (`str` or `os.PathLike`): Folder to write; made where it is missing.
            title (`str`): Heading of the page.

        Returns:
            `pathlib.Path`: The page.
        """
        return import_module(".report_pix2pix", __package__).write_report(self, Path(folder), title)


def format_figure(name: str, value: float | None) -> str:
    """Write a figure for a table.

    Args:
        name (`str`): Name of the figure.
        value (`float`, *optional*): None where it does not exist.

    Returns:
        `str`: Four significant digits; "identical" without a PSNR, "undefined" without another figure (black images
        have no angle).
    """
    if value is not None:
        return f"{value:.4g}"
    return "identical" if name == "psnr" else "undefined"


def evaluate_robustness(
    model: Any,
    dataset: Iterable[Any] | str | os.PathLike,
    *,
    methods: str | Sequence[str] = METHODS,
    severities: int | Sequence[int] = tuple(range(MAX_STRENGTH + 1)),
    image_column: str = "image",
    features: str | os.PathLike | nn.Module | None = None,
    extra_metrics: Mapping[str, Any] | None = None,
    trained_on: Mapping[str, str] | None = None,
    batch_size: int = 8,
    num_samples: int = 4,
    limit: int | None = None,
    seed: int = 0,
) -> RobustnessReport:
    """Cartoonize test photographs in every way and strength, translate them back and measure.

    Networks are measured in evaluation mode, on a CPU in float32 where they hold float16, and come back in the mode,
    format and place that they came in, also where the evaluation breaks off.

    Args:
        model ([`Pix2PixModel`], [`ImageToImagePipeline`], path, Hub id, or a dictionary of them): What translates.
            Several by name give the matrix trained-on against tested-on.
        dataset (`datasets.Dataset`, an iterable of rows or images, or the path of a folder): Test photographs; a
            folder is read by [`PictureFolder`].
        methods (`str` or `Sequence[str]`): Cartoonizers.
        severities (`int` or `Sequence[int]`): Strengths, 0 (the photograph itself) to 5.
        image_column (`str`, defaults to `"image"`): Column of the photographs, where rows are dictionaries.
        features (`str`, `os.PathLike` or `nn.Module`, *optional*): Network behind KID and feature cosine: the weights
            of `tf_efficientnet_lite0` (needs timm), or a module from images `(batch, 3, height, width)` in `[0, 1]` to
            `(batch, features)`. Left out, both figures are.
        extra_metrics (`Mapping[str, torchmetrics.Metric]`, *optional*): More figures where their weights are at hand,
            such as `LearnedPerceptualImagePatchSimilarity(normalize=True)` or
            `FrechetInceptionDistance(normalize=True)`. They get images in `[0, 1]`.
        trained_on (`Mapping[str, str]`, *optional*): Model -> cartoonizer it was trained on, for the report; the name
            of a single model is `"model"`.
        batch_size (`int`, defaults to 8): Images translated at a time.
        num_samples (`int`, defaults to 4): Photographs on each sample sheet.
        limit (`int`, *optional*): Use only the first photographs.
        seed (`int`, defaults to 0): Seed of KID's subsets.

    Returns:
        [`RobustnessReport`]: Figures of every model and of the cartoon itself, means over the photographs where a
        figure exists: identical images have no PSNR. A figure that is not finite is `None`, in JSON `null`.

    Raises:
        ValueError: If there is no photograph or one is too small or unreadable, a method, severity, column or name in
            `trained_on` is unknown, `limit` or `batch_size` is below 1, or a model changes the size of its input.
        FileNotFoundError: If `dataset` is the path of no folder, or of one without pictures.
        OSError: If a model that is named does not load.
        ImportError: If torchmetrics, or timm for `features` by file, is missing.
    """
    methods = list(dict.fromkeys((methods,) if isinstance(methods, str) else methods))
    severities = list(dict.fromkeys((severities,) if isinstance(severities, int) else severities))
    check_grid(methods, severities)
    severities = [int(severity) for severity in severities]  # numbers of numpy are not written as JSON
    for argument, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"`{argument}` must be at least 1, got {value}.")
    _check_trained_on(trained_on, model)
    with _given_back([*(model.values() if isinstance(model, Mapping) else [model]), features]):
        name, network = _feature_network(features)  # a wrong file shows before the photographs are read
        if isinstance(dataset, (str, os.PathLike)):
            dataset, image_column = PictureFolder(dataset), "image"
        photos = _read_photos(dataset, image_column, limit)
        pipes = _make_pipes(model)
        meter = _Meter(photos, network, dict(extra_metrics or {}), batch_size, seed)
        report = RobustnessReport([], len(photos), name, dict(trained_on or {}))
        grid = [(method, severity) for method in methods for severity in severities]
        columns: dict[str, list[list[Image.Image]]] = {}
        progress = logging.tqdm(total=len(grid) * (len(pipes) + 1), desc="Robustness")
        for method, severity in grid:
            cartoons = [cartoonize(photo, method=method, strength=severity) for photo in photos]
            outputs = {IDENTITY: cartoons}
            progress.update()
            for label, pipe in pipes.items():
                outputs[label] = pipe(cartoons, batch_size=batch_size)
                _check_sizes(label, outputs[label], photos)
                progress.update()
            for label, images in outputs.items():
                report.rows.append({"model": label, "method": method, "severity": severity, **meter(images)})
                columns.setdefault((method, label), []).append(images[:num_samples])
        progress.close()
        order = list(outputs)
        report.rows.sort(key=lambda row: order.index(row["model"]))
    report.samples = _sample_sheets(columns, photos[:num_samples], severities)
    return report


def check_grid(methods: Sequence[str] = METHODS, severities: Sequence[int] = (0,)) -> None:
    """Refuse cartoonizers and strengths that there are not.

    Args:
        methods (`Sequence[str]`): Cartoonizers.
        severities (`Sequence[int]`): Strengths.

    Raises:
        ValueError: If one is unknown, or there is none.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise ValueError(f"`methods` must name some of {', '.join(METHODS)}, got {list(methods)}.")
    if not severities or any(severity not in range(MAX_STRENGTH + 1) for severity in severities):
        raise ValueError(f"`severities` must be whole numbers from 0 to {MAX_STRENGTH}, got {list(severities)}.")


def _check_trained_on(trained_on: Any, model: Any) -> None:
    if trained_on is None:
        return
    if not isinstance(trained_on, Mapping):
        raise ValueError(f"`trained_on` must map names of models to cartoonizers, got {trained_on!r}.")
    names = list(model) if isinstance(model, Mapping) else ["model"]
    for name, method in trained_on.items():
        if name not in names:
            raise ValueError(f"`trained_on` must name models among {', '.join(map(str, names))}, got {name!r}.")
        if method not in METHODS:
            raise ValueError(f"`trained_on` must name cartoonizers among {', '.join(METHODS)}, got {method!r}.")


@contextlib.contextmanager
def _given_back(given: Iterable[Any]) -> Iterator[None]:
    """Give networks, also those of pipelines, back in the mode and with the very tensors that they came with."""
    networks = [one.model if isinstance(one, ImageToImagePipeline) else one for one in given]
    modules = [part for one in networks if isinstance(one, nn.Module) for part in one.modules()]
    parts = {module: (module.training, dict(module._buffers)) for module in modules}
    weights = [(parameter, parameter.data) for module in parts for parameter in module.parameters(recurse=False)]
    try:
        yield
    finally:
        for module, (training, buffers) in parts.items():
            module.training = training
            module._buffers.update(buffers)
        for parameter, data in weights:
            parameter.data = data


def _check_sizes(label: str, images: list[Image.Image], photos: list[Image.Image]) -> None:
    for image, photo in zip(images, photos):
        if image.size != photo.size:
            raise ValueError(
                f"`model` must keep the size of its input, but {label!r} turns {photo.width}x{photo.height} pixels "
                f"into {image.width}x{image.height}."
            )


def _read_photos(dataset: Iterable[Any], column: str, limit: int | None) -> list[Image.Image]:
    photos: list[Image.Image] = []
    rows = iter(dataset)
    while limit is None or len(photos) < limit:
        try:
            row = next(rows)
        except StopIteration:
            break
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # a folder names its file itself
            raise refuse_unreadable(f"Row {len(photos)} of `dataset`", error) from error
        if isinstance(row, dict) and column not in row:
            raise ValueError(f"`image_column` must be one of the columns {', '.join(row)}, got {column!r}.")
        image = row[column] if isinstance(row, dict) else row
        if not isinstance(image, (Image.Image, np.ndarray)):
            raise ValueError(f"`dataset` must hold images, got {type(image).__name__} in its row {len(photos)}.")
        try:
            photos.append(to_rgb(image))
        except UNREADABLE as error:
            raise refuse_unreadable(f"Row {len(photos)} of `dataset`", error) from error
        if min(photos[-1].size) < SMALLEST:
            size = f"{photos[-1].width}x{photos[-1].height}"
            raise ValueError(
                f"`dataset` must hold images of at least {SMALLEST} pixels, got {size} in its row {len(photos) - 1}."
            )
    if not photos:
        raise ValueError("`dataset` must hold at least one photograph, got none.")
    return photos


def _make_pipes(model: Any) -> dict[str, ImageToImagePipeline]:
    models = dict(model) if isinstance(model, Mapping) else {"model": model}
    pipes = {}
    for name, one in models.items():
        if name == IDENTITY:
            raise ValueError(f"`model` must not be named {IDENTITY!r}, which is the baseline; choose another name.")
        if isinstance(one, ImageToImagePipeline):
            one.model.eval()  # it may have been trained on since the pipeline was built
            pipes[name] = one
        elif isinstance(one, (str, os.PathLike)):
            try:
                pipes[name] = import_module("transformers").pipeline("image-to-image", model=str(one))
            except OSError as error:  # of transformers, which speaks of its server
                reason = str(error).strip().split("\n")[0].rstrip(".")
                raise OSError(
                    f"`model` must be a folder here or a Hub id that loads, got {str(one)!r} ({reason})."
                ) from error
        elif isinstance(one, Pix2PixModel):
            pipes[name] = ImageToImagePipeline(model=one.eval(), task="image-to-image", device=one.device)
        else:
            raise ValueError(f"`model` must be a Pix2PixModel, a pipeline or a path, got {type(one).__name__}.")
    return pipes


def _feature_network(features: str | os.PathLike | nn.Module | None) -> tuple[str | None, nn.Module | None]:
    if features is None:
        return None, None
    if isinstance(features, nn.Module):
        return getattr(features, "name", type(features).__name__), features.eval()
    return "efficientnet_lite0", EfficientNetLite0Features(features)


class EfficientNetLite0Features(nn.Module):
    """Pooled features of an ImageNet-trained `tf_efficientnet_lite0`.

    Args:
        weights (`str` or `os.PathLike`): Its weights in timm's key layout.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
        ImportError: If timm is missing.
    """

    name = "efficientnet_lite0"

    def __init__(self, weights: str | os.PathLike) -> None:
        super().__init__()
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f"`features` must be a file with the weights of tf_efficientnet_lite0, got {weights}."
            )
        try:
            timm = import_module("timm")
        except ImportError as error:
            raise ImportError('Feature figures need timm; run pip install "hf-efficient[vision]".') from error
        try:
            self.network = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(weights)).eval()
        except Exception as error:  # whatever a file of another kind raises
            raise ValueError(
                f"`features` must be a file with the weights of tf_efficientnet_lite0, got {weights}, which holds "
                "something else or is damaged."
            ) from error

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return features.

        Args:
            images (`torch.FloatTensor` of shape `(batch, 3, height, width)`): In `[0, 1]`.

        Returns:
            `torch.FloatTensor` of shape `(batch, 1280)`.
        """
        images = nn.functional.interpolate(images, (224, 224), mode="bicubic", antialias=True, align_corners=False)
        maps = self.network.forward_features(images.clamp(0, 1) * 2 - 1)
        return self.network.forward_head(maps, pre_logits=True)


class _Meter:
    """Compares images with the photographs they should be."""

    def __init__(
        self,
        photos: list[Image.Image],
        network: nn.Module | None,
        extra: dict[str, Any],
        batch_size: int,
        seed: int,
    ) -> None:
        try:
            self.library = import_module("torchmetrics")
        except ImportError as error:
            raise ImportError(
                'evaluate_robustness needs torchmetrics; run pip install "hf-efficient[pix2pix]".'
            ) from error
        self.photos, self.network, self.extra = [_to_tensor(photo) for photo in photos], network, extra
        self.batch_size, self.seed = batch_size, seed
        self.photo_features = self._features(self.photos)

    def __call__(self, images: list[Image.Image]) -> dict[str, float | None]:
        """Return every figure of one set of images."""
        outputs = [_to_tensor(image) for image in images]
        functional = self.library.functional
        values: dict[str, list[float]] = {"psnr": [], "ssim": [], "pixel_dissimilarity": []}
        for output, photo in zip(outputs, self.photos):
            pair = (output, photo)
            psnr = functional.image.peak_signal_noise_ratio(*pair, data_range=1.0)
            values["psnr"].append(float(psnr))
            values["ssim"].append(float(functional.image.structural_similarity_index_measure(*pair, data_range=1.0)))
            flat = (output.flatten()[None], photo.flatten()[None])
            cosine = functional.cosine_similarity(*(x.double() for x in flat), reduction="mean")
            distance = 1 - float(cosine)
            same = distance < 0 or (torch.equal(output, photo) and math.isfinite(distance))  # rounding: some 1e-8
            values["pixel_dissimilarity"].append(0.0 if same else distance)
        figures = {}
        for name, numbers in values.items():  # identical images have no PSNR, a black one has no angle
            finite = [number for number in numbers if math.isfinite(number)]
            figures[name] = float(np.mean(finite)) if finite else None
        if self.network is not None:
            figures |= self._feature_figures(self._features(outputs))
        for name, metric in self.extra.items():
            figures[name] = self._extra_figure(metric, outputs)
        return {name: value if value is None or math.isfinite(value) else None for name, value in figures.items()}

    @torch.no_grad()
    def _features(self, images: list[Tensor]) -> Tensor | None:
        if self.network is None:
            return None
        return torch.cat([self.network(image).float().cpu() for image in images])

    def _feature_figures(self, features: Tensor) -> dict[str, float]:
        """KID over the features themselves, so that the network runs once for both figures."""
        size = min(50, len(features))
        kid = import_module("torchmetrics.image.kid")
        figures = {}
        if size >= 2:
            metric = kid.KernelInceptionDistance(feature=nn.Identity(), subsets=50, subset_size=size)
            metric.update(self.photo_features, real=True)
            metric.update(features, real=False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                figures["kid"] = float(metric.compute()[0])
        cosine = self.library.functional.cosine_similarity(features, self.photo_features, reduction="mean")
        return {**figures, "feature_cosine": float(cosine)}

    @torch.no_grad()
    def _extra_figure(self, metric: Any, outputs: list[Tensor]) -> float:
        metric.reset()
        for output, photo in zip(outputs, self.photos):
            if hasattr(metric, "reset_real_features"):  # FID, KID: two sets of images
                metric.update(photo, real=True)
                metric.update(output, real=False)
            else:
                metric.update(output, photo)
        value = metric.compute()
        return float(value[0] if isinstance(value, tuple) else value)


def _to_tensor(image: Image.Image) -> Tensor:
    """Return `(1, 3, height, width)` in `[0, 1]`."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].contiguous() / 255


def _sample_sheets(
    columns: dict[tuple[str, str], list[list[Image.Image]]], photos: list[Image.Image], severities: Sequence[int]
) -> dict[str, Image.Image]:
    """Draw one sheet for each cartoonizer and model: the cartoons of each photograph, and what became of them below.

    Severities run from left to right, the photograph stands last.
    """
    if not photos:
        return {}
    sheet = import_module(".figures_pix2pix", __package__).sample_sheet
    titles = [*(f"severity {severity}" for severity in severities), "photograph"]
    sheets = {}
    for (method, label), by_severity in columns.items():
        if label == IDENTITY:
            continue
        pairs = zip(zip(*columns[method, IDENTITY]), zip(*by_severity), photos)
        rows = [[*images, photo] for cartoons, outputs, photo in pairs for images in (cartoons, outputs)]
        words = [f"{method} cartoon", f"translated by {label}"] * len(photos)
        sheets[f"{method}, {label}"] = sheet(rows, titles, row_titles=words)
    return sheets
