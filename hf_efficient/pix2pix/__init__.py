"""Pix2Pix: paired image translation, cartoon to photo, and its robustness (arXiv 1611.07004 and 2101.09793).

Reading order: `configuration_pix2pix` (every field), `modeling_pix2pix` (generators and discriminator),
`image_processing_pix2pix` and `pipeline_pix2pix` (images in, images out), `pairs_pix2pix`, `losses_pix2pix` and
`trainer_pix2pix` (data and the adversarial steps), `cartoonize_pix2pix` and `robustness_pix2pix` (the second paper),
`convert_pix2pix`, `figures_pix2pix`.

Importing this folder registers the generator with the Auto classes and brings the `image-to-image` task back.
"""

import transformers.pipelines
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageToImage

from .configuration_pix2pix import Pix2PixConfig
from .image_processing_pix2pix import Pix2PixImageProcessor
from .modeling_pix2pix import ImageToImageOutput, Pix2PixDiscriminator, Pix2PixModel
from .pipeline_pix2pix import ImageToImageError, ImageToImagePipeline


__all__ = [
    "ImageToImageError",
    "ImageToImageOutput",
    "ImageToImagePipeline",
    "Pix2PixConfig",
    "Pix2PixDiscriminator",
    "Pix2PixImageProcessor",
    "Pix2PixModel",
]


def _register() -> None:
    AutoConfig.register("pix2pix", Pix2PixConfig, exist_ok=True)
    AutoModel.register(Pix2PixConfig, Pix2PixModel, exist_ok=True)
    AutoModelForImageToImage.register(Pix2PixConfig, Pix2PixModel, exist_ok=True)
    AutoImageProcessor.register(
        Pix2PixConfig,
        image_processor_classes={"pil": Pix2PixImageProcessor, "torchvision": Pix2PixImageProcessor},
        exist_ok=True,
    )
    # transformers 5 refuses the removed task by this table before it asks the registry
    getattr(transformers.pipelines, "REMOVED_TASKS", {}).pop("image-to-image", None)
    registry = transformers.pipelines.PIPELINE_REGISTRY
    if "image-to-image" not in registry.supported_tasks:
        registry.register_pipeline(
            "image-to-image",
            pipeline_class=ImageToImagePipeline,
            pt_model=AutoModelForImageToImage,
            default={"model": ("caidas/swin2SR-classical-sr-x2-64", "main")},
            type="image",
        )
        # otherwise saving a stock model through the pipeline would make it ask for code that it does not need
        del ImageToImagePipeline._registered_impl


_register()
