"""The tab of KDFS in the demo: a network before and after pruning, its widths, cost, time and best guesses."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_efficient.kdfs.configuration_cifar_resnet import CifarResNetConfig
from hf_efficient.kdfs.configuration_kdfs import KDFSConfig
from hf_efficient.kdfs.flops_kdfs import count_flops
from hf_efficient.kdfs.modeling_cifar_resnet import CifarResNetForImageClassification
from hf_efficient.kdfs.modeling_kdfs_pruned import build_network
from hf_efficient.kdfs.pruner_kdfs import KDFSPruner, load_classifier, measure_latency
from hf_efficient.kdfs.quickstart_kdfs import load_digits_images

from .pictures_demo import block, crop_square, figure, paragraph, read_picture, table
from .serve_demo import CARDS


CARD = CARDS["kdfs"]
DIGIT_SIDE = 16  # pixels that the digit networks see
DENSE_EPOCHS, PRUNE_EPOCHS = 4, 8
BATCHES = (1, 64)


@dataclass
class Pair:
    """A network and its pruned form.

    Args:
        dense (`nn.Module`): Before pruning; only its shapes count where `dense_is_trained` is False.
        pruned (`nn.Module`): After it.
        input_shape (`tuple[int, int, int]`): Channels, height, width of its images.
        dense_is_trained (`bool`): Whether the dense network has its weights.
        about (`str`): What the two are, in a sentence or two.
        processor (`Any`, *optional*): Image processor; None for the digit networks.
    """

    dense: nn.Module
    pruned: nn.Module
    input_shape: tuple[int, int, int]
    dense_is_trained: bool
    about: str
    processor: Any = None


@dataclass
class KDFSDemo:
    """A pruned classifier beside the network it came from.

    Args:
        checkpoint (`str`, *optional*): Folder or Hub id of a pruned network; None trains and prunes on digits when
            asked to.
        dense (`str`, *optional*): The same of the network before pruning.
    """

    checkpoint: str | None = None
    dense: str | None = None
    pair: Pair | None = None
    _timing: dict[int, dict[str, float]] = field(default_factory=dict)

    def about(self) -> str:
        """Say what there is to look at.

        Returns:
            `str`: One or two sentences.
        """
        if self.checkpoint:
            return f"The pruned network is {_last(self.checkpoint)}."
        return (
            f"The checkpoint {CARD} is missing. Instead, the first button trains a ResNet-8 on scikit-learn's "
            "handwritten digits and prunes half of its multiply-adds, here and now; it knows digits only."
        )

    def load(self) -> Pair:
        """Load the checkpoint once.

        Returns:
            [`Pair`]

        Raises:
            ValueError: If there is no checkpoint and nothing was trained yet.
        """
        if self.pair is None and not self.checkpoint:
            raise ValueError("There is no pruned network yet: press the button that trains and prunes one on digits.")
        if self.pair is None:
            pruned = load_classifier(self.checkpoint).float().eval()
            about = self.about()
            if self.dense:
                dense = load_classifier(self.dense).float().eval()
                about += f" The dense one is {_last(self.dense)}."
            else:
                with torch.random.fork_rng(devices=[]):
                    dense = build_network(pruned.config.base_config).eval()
                about += (
                    " The weights of the dense network are not here (start with --kdfs-dense), so its guesses are "
                    "left out; widths, multiply-adds, parameters and time do not depend on them."
                )
            processor = AutoImageProcessor.from_pretrained(self.checkpoint)
            self.pair = Pair(dense, pruned, tuple(pruned.config.input_shape), bool(self.dense), about, processor)
        return self.pair

    def train_digits(self, progress: Callable[[float, str], None] | None = None) -> str:
        """Train a small network on digits and prune half of it, then show the two.

        Args:
            progress (`Callable`, *optional*): Called with the share done and what is going on.

        Returns:
            `str`: HTML of the result.

        Raises:
            ImportError: If scikit-learn is not installed.
        """
        set_seed(0)
        report = progress or (lambda share, text: None)
        train, (images, labels) = load_digits_images()
        config = CifarResNetConfig(
            depth=8, hidden_sizes=[16, 32, 64], image_size=DIGIT_SIDE, id2label=dict(enumerate("0123456789"))
        )
        model = CifarResNetForImageClassification(config)
        with tempfile.TemporaryDirectory() as folder:
            watch = _Watch(report, "training on digits", 0.0, 0.3)
            trainer = Trainer(model, _arguments(folder, DENSE_EPOCHS), train_dataset=train, callbacks=[watch])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            settings = KDFSConfig(target_flops_reduction=0.5, round_to=8, kd_weight=1.0, mask_learning_rate=5e-2)
            pruner = KDFSPruner.from_pretrained(model)
            pruner.prune(
                Path(folder) / "pruned",
                settings,
                train,
                args=_arguments(str(Path(folder) / "training"), PRUNE_EPOCHS),
                callbacks=[_Watch(report, "learning which filters to drop", 0.3, 1.0)],
            )
        dense, pruned = model.eval(), pruner.pruned_model.eval()
        right = [f"{100 * _accuracy(network, images, labels):.1f} %" for network in (dense, pruned)]
        about = (
            f"Not {CARD}, which is missing: a ResNet-8 trained just now on {len(train)} handwritten digits for "
            f"{DENSE_EPOCHS} epochs ({right[0]} of {len(labels)} others right), then pruned and trained on for "
            f"{PRUNE_EPOCHS} more ({right[1]}). It shows that pruning works, not that it helps."
        )
        self.pair, self._timing = Pair(dense, pruned, (3, DIGIT_SIDE, DIGIT_SIDE), True, about), {}
        return self.compare(None)

    def compare(self, path: str | None) -> str:
        """Show both networks, with their guesses if there is a picture.

        Args:
            path (`str`, *optional*): The picture.

        Returns:
            `str`: HTML of the result.

        Raises:
            ValueError: If the picture cannot be used or there is no network yet; the message says why.
        """
        picture = read_picture(path) if path else None
        pair = self.load()
        guesses = [] if picture is None else self._guess(pair, picture)
        if not self._timing:
            networks = {"dense": pair.dense, "pruned": pair.pruned}
            self._timing = {size: measure_latency(networks, pair.input_shape, size, repeats=15) for size in BATCHES}
        return block(
            *guesses,
            "<h3>What was cut</h3>",
            table(["", "dense", "pruned", "pruned / dense"], self._costs(pair)),
            paragraph(_explain_time(), "soft"),
            "<h3>Filters of every convolution</h3>",
            _show_widths(pair),
            paragraph(pair.about, "note"),
        )

    def _costs(self, pair: Pair) -> list[list[Any]]:
        both = (pair.dense, pair.pruned)
        rows = [
            ["multiply-adds, one image", *(count_flops(network, pair.input_shape) for network in both)],
            ["parameters", *(sum(p.numel() for p in network.parameters()) for network in both)],
        ]
        for size, seconds in self._timing.items():
            rows.append([f"ms, batch {size}", 1e3 * seconds["dense"], 1e3 * seconds["pruned"]])
        return [[*row, f"{row[2] / row[1]:.2f}"] for row in rows]

    def _guess(self, pair: Pair, picture: Image.Image) -> list[str]:
        """The five likeliest classes by each network."""
        seen = crop_square(picture, pair.input_shape[1])
        if pair.processor is None:
            pixels, seen = _read_digit(picture)
            caption = "what the networks see: the middle, grey, 8 x 8 pixels, bright on dark"
        else:
            pixels = pair.processor(seen, return_tensors="pt")["pixel_values"]
            caption = f"what the networks see: the middle, {seen.width} x {seen.height} pixels"
        networks = {"dense": pair.dense, "pruned": pair.pruned} if pair.dense_is_trained else {"pruned": pair.pruned}
        names = pair.pruned.config.id2label
        shown = seen.resize((256, 256), Image.Resampling.NEAREST)
        cards = [f"<div>{figure(shown, 'the picture as the networks see it', caption)}</div>"]
        for title, network in networks.items():
            with torch.no_grad():
                shares, index = network(pixels).logits[0].float().softmax(-1).topk(min(5, len(names)))
            rows = [[names[i], "", f"{100 * share:.1f} %"] for i, share in zip(index.tolist(), shares.tolist())]
            cards.append(
                f"<div><h3>{title}</h3>{table(['class', '', 'probability'], rows, {1: shares.tolist()})}</div>"
            )
        return [f'<div class="guesses" id="hfe-top5">{"".join(cards)}</div>']


class _Watch(TrainerCallback):
    """Report the share of a training that is done, as a part of a longer job."""

    def __init__(self, report: Callable[[float, str], None], text: str, start: float, end: float) -> None:
        self.report, self.text, self.start, self.end = report, text, start, end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell every fifth step."""
        if state.global_step % 5 == 0:
            share = state.global_step / max(1, state.max_steps)
            self.report(self.start + share * (self.end - self.start), self.text)


def _arguments(folder: str, epochs: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        max_grad_norm=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        seed=0,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model.eval()(images).logits.argmax(dim=1) == labels).float().mean())


def _read_digit(picture: Image.Image) -> tuple[Tensor, Image.Image]:
    """Pixels `(1, 3, 16, 16)` as those of the digits, and the picture for the eye."""
    grey = np.asarray(crop_square(picture, 8).convert("L"), dtype=np.float32)
    edge = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    if edge.mean() > 127:  # dark on bright
        grey = 255 - grey
    pixels = torch.from_numpy(grey)[None, None] / 127.5 - 1
    pixels = nn.functional.interpolate(pixels, size=DIGIT_SIDE, mode="bilinear").expand(1, 3, -1, -1)
    return pixels, Image.fromarray(grey.astype(np.uint8))


def digit_examples(folder: Path) -> list[list[str]]:
    """Write three digits that the digit networks are not trained on.

    Args:
        folder (`Path`): Where to.

    Returns:
        `list[list[str]]`: The files, as examples of the one input; none without scikit-learn.
    """
    try:
        _, (images, labels) = load_digits_images()
    except ImportError:
        return []
    files = []
    for row in (0, 3, 7):
        grey = ((images[row, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
        file = folder / f"digit_{int(labels[row])}.png"
        Image.fromarray(grey).resize((128, 128), Image.Resampling.NEAREST).save(file)
        files.append([str(file)])
    return files


def _show_widths(pair: Pair) -> str:
    """Convolutions of both networks by name, with a bar for the share that is left."""
    dense = {name: m.out_channels for name, m in pair.dense.named_modules() if isinstance(m, nn.Conv2d)}
    modules = dict(pair.pruned.named_modules())
    rows, shares = [], []
    for name, before in dense.items():
        module = modules.get(f"network.{name}", modules.get(name))
        if module is None:
            continue
        rows.append([name, "", before, module.out_channels])
        shares.append(module.out_channels / before)
    return table(["convolution", "kept", "before", "after"], rows, {1: shares})


def _explain_time() -> str:
    clock = "CPU time" if torch.get_num_threads() == 1 else "wall clock"
    return (
        f"Milliseconds are the shortest of 15 passes, {clock}, {torch.get_num_threads()} thread(s), both networks "
        "taking turns. Small networks at batch 1 are bound by calls, not by arithmetic."
    )


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]
