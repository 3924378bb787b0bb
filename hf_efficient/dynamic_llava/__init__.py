"""Dynamic-LLaVA (arXiv 2412.00876): a LLaVA that drops image tokens and caches only the text worth keeping.

Reading order: `configuration`, `sparsity` (the equations), `predictors`, `cache`, `decoder` (what happens at the
sparse layer), `modeling`, `generation`, `loading`; then `callback`, `trainer`, `convert` and `figures`, which no
checkpoint needs.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from .configuration_dynamic_llava import DynamicLlavaConfig
from .modeling_dynamic_llava import DynamicLlavaForConditionalGeneration, DynamicLlavaModel


AutoConfig.register(DynamicLlavaConfig.model_type, DynamicLlavaConfig)
AutoModel.register(DynamicLlavaConfig, DynamicLlavaModel)
AutoModelForImageTextToText.register(DynamicLlavaConfig, DynamicLlavaForConditionalGeneration)
AutoModelForMultimodalLM.register(DynamicLlavaConfig, DynamicLlavaForConditionalGeneration)

__all__ = ["DynamicLlavaConfig", "DynamicLlavaForConditionalGeneration", "DynamicLlavaModel"]
