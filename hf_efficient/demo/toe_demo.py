"""The tab of ToE in the demo: which patches of a picture every stage of a training keeps."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_efficient.toe.configuration_toe import ToEConfig
from hf_efficient.toe.cost_toe import speedup_bound
from hf_efficient.toe.expansion_toe import TokenExpansion
from hf_efficient.toe.figures_toe import choose_patches

from .pictures_demo import block, crop_square, draw_patches, figure, paragraph, read_picture, table
from .serve_demo import CARDS


CARD = CARDS["toe"]
PRESETS = {
    "DeiT recipe: 50, 75, 100 %": "deit",
    "LV-ViT recipe: 40, 70, 100 %": "lv-vit",
    "EfficientTrain recipe: 60, 80, 100 %": "efficient-train",
    "fast: 30, 60, 100 %": "fast",
}


@dataclass
class ToEDemo:
    """A vision transformer whose patches are chosen.

    Args:
        checkpoint (`str`, *optional*): Folder or Hub id of a plain vision transformer; None makes one with random
            weights.
    """

    checkpoint: str | None = None
    _model: Any = None
    _processor: Any = None

    def load(self) -> Any:
        """Load or make the model once.

        Returns:
            `PreTrainedModel`
        """
        if self._model is None and self.checkpoint:
            self._processor = AutoImageProcessor.from_pretrained(self.checkpoint)
            self._model = AutoModelForImageClassification.from_pretrained(self.checkpoint, dtype=torch.float32).eval()
        elif self._model is None:
            size = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3, "num_hidden_layers": 12}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self._model = ViTForImageClassification(ViTConfig(**size)).eval()
        return self._model

    def about(self) -> str:
        """Say which model chooses.

        Returns:
            `str`: One or two sentences.
        """
        if self.checkpoint:
            return f"The patches are chosen by {self.checkpoint.rstrip('/').rpartition('/')[2]}, a plain ViT."
        return (
            f"The trained checkpoint {CARD} is missing, so a ViT-tiny with random weights chooses: it compares what "
            "one untrained layer makes of the patches, as in the first steps of a training, and nothing learned."
        )

    def show(self, path: str | None, preset: str) -> str:
        """Draw what every stage keeps.

        Args:
            path (`str`, *optional*): The picture.
            preset (`str`): One of `PRESETS`.

        Returns:
            `str`: HTML of the result.

        Raises:
            ValueError: If the picture cannot be used; the message says why.
        """
        picture = read_picture(path)
        model = self.load()
        config, pixels = ToEConfig.preset(PRESETS.get(preset, preset)), self._prepare(picture)
        height, width = pixels.shape[2:]
        expansion = TokenExpansion(config)
        masks = [choose_patches(model, pixels, stage, config)[0].numpy() for stage in range(1, config.num_stages + 1)]
        patches = len(masks[0])
        grid_rows = round((patches * height / width) ** 0.5)
        bound, costs = speedup_bound(model, patches, config)
        ends = [*config.stage_starts[1:], 1.0]
        figures, rows = [], []
        for number, (mask, start, end) in enumerate(zip(masks, config.stage_starts, ends), 1):
            kept = expansion.num_kept(patches, number)
            caption = f"Stage {number}, {start:.0%} to {end:.0%} of the training: {kept} of {patches} patches"
            figures.append(figure(draw_patches(picture, mask.reshape(grid_rows, -1), grey=True), caption, caption))
            rows.append([f"stage {number}", kept, _count_new(masks, number), f"{costs[number - 1]:.2f}"])
        return block(
            f'<div class="cards">{"".join(figures)}</div>',
            paragraph(
                "Kept patches are outlined and bright. Dimmed ones are merged into the kept patch most like them, so "
                "their content is averaged in, not thrown away."
            ),
            table(["", "patches trained on", "new in this stage", "share of multiply-adds"], rows),
            paragraph(
                f"For this model the schedule allows a training {bound:.2f} times as fast at equal epochs, by its "
                f"multiply-adds; that is calculated, nothing was trained here. It sees {width} x {height} pixels, the "
                "middle of the picture.",
            ),
        )

    def _prepare(self, picture: Image.Image) -> torch.Tensor:
        """The middle of a picture as the model takes it."""
        if self._processor is not None:
            square = crop_square(picture, min(picture.size))
            return self._processor(square, return_tensors="pt")["pixel_values"]
        square = crop_square(picture, self._model.config.image_size)
        values = torch.from_numpy(np.asarray(square, dtype=np.float32) / 127.5 - 1)
        return values.permute(2, 0, 1)[None]  # (1, 3, height, width)


def _count_new(masks: list[np.ndarray], stage: int) -> int:
    """Patches of a stage that the one before had not."""
    before = masks[stage - 2] if stage > 1 else np.zeros_like(masks[0])
    return int((masks[stage - 1] & ~before).sum())
