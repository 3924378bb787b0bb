"""Four published efficiency methods as first-class citizens of the Hugging Face ecosystem.

Importing the package registers its configurations and models with transformers' Auto classes and brings the
`image-to-image` pipeline task back; everything else loads when its name is first used.
"""

import sys
from importlib import import_module
from pathlib import Path


__version__ = "0.1.0"

# public name -> module below this package that defines it
_EXPORTS: dict[str, str] = {
    # Dynamic-LLaVA
    "DynamicLlavaConfig": "dynamic_llava.configuration_dynamic_llava",
    "DynamicLlavaModel": "dynamic_llava.modeling_dynamic_llava",
    "DynamicLlavaForConditionalGeneration": "dynamic_llava.modeling_dynamic_llava",
    "SparseCache": "dynamic_llava.cache_dynamic_llava",
    "SparsityRecord": "dynamic_llava.cache_dynamic_llava",
    "DynamicLlavaCallback": "dynamic_llava.callback_dynamic_llava",
    "DynamicLlavaTrainer": "dynamic_llava.trainer_dynamic_llava",
    "DynamicLlavaTrainingArguments": "dynamic_llava.trainer_dynamic_llava",
    "plot_kept_tokens": "dynamic_llava.figures_dynamic_llava",
    "convert_dynamic_llava_checkpoint": "dynamic_llava.convert_dynamic_llava",
    # ToE
    "ToEConfig": "toe.configuration_toe",
    "ToECallback": "toe.callback_toe",
    "TokenExpansion": "toe.expansion_toe",
    "token_expansion": "toe.attachment_toe",
    "restore_tokens": "toe.expansion_toe",
    # KDFS
    "KDFSConfig": "kdfs.configuration_kdfs",
    "KDFSPruner": "kdfs.pruner_kdfs",
    "KDFSTrainer": "kdfs.trainer_kdfs",
    "KDFSPrunedConfig": "kdfs.configuration_kdfs_pruned",
    "KDFSPrunedModel": "kdfs.modeling_kdfs_pruned",
    "KDFSPrunedModelForImageClassification": "kdfs.modeling_kdfs_pruned",
    "CifarResNetConfig": "kdfs.configuration_cifar_resnet",
    "CifarResNetForImageClassification": "kdfs.modeling_cifar_resnet",
    "count_flops": "kdfs.flops_kdfs",
    # Pix2Pix
    "Pix2PixConfig": "pix2pix.configuration_pix2pix",
    "Pix2PixModel": "pix2pix.modeling_pix2pix",
    "Pix2PixDiscriminator": "pix2pix.modeling_pix2pix",
    "Pix2PixTrainer": "pix2pix.trainer_pix2pix",
    "Pix2PixTrainingArguments": "pix2pix.trainer_pix2pix",
    "ImageToImageOutput": "pix2pix.modeling_pix2pix",
    "Pix2PixImageProcessor": "pix2pix.image_processing_pix2pix",
    "ImageToImagePipeline": "pix2pix.pipeline_pix2pix",
    "convert_pix2pix_checkpoint": "pix2pix.convert_pix2pix",
    "cartoonize": "pix2pix.cartoonize_pix2pix",
    "evaluate_robustness": "pix2pix.robustness_pix2pix",
    # the whole house
    "efficiency_report": "report.model_report",
    "push_checkpoint": "hub",
}

# folders whose import registers Auto classes or brings a pipeline task back
_REGISTERING: tuple[str, ...] = ("dynamic_llava", "pix2pix", "kdfs")

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register() -> None:
    """Register our configurations, models and pipelines with transformers; done once when the package is imported."""
    for folder in _REGISTERING:
        import_module(f".{folder}", __name__)


# These commands answer `--help` without loading torch and register when they run something.
_program = [Path(word).stem for word in sys.argv[:1]] + sys.argv[1:2]
if _program[:1] != ["hf-efficient"] and _program != ["optimum-cli", "prune"]:
    register()
