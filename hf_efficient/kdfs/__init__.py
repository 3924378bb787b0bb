"""KDFS: learned filter pruning of convolutional networks (arXiv 2307.00198).

Read in this order: `configuration_kdfs` (settings), `tracing_kdfs` and `structure_kdfs` (which filters can go, who
reads them), `sampling_kdfs`, `losses_kdfs` and `flops_kdfs` (the equations), `masking_kdfs` (masks on a network),
`rows_kdfs` (what the data must be), `trainer_kdfs`, `slicing_kdfs`, `resuming_kdfs`, `pruner_kdfs` (the pass).
`configuration_kdfs_pruned`, `modeling_kdfs_pruned` and the two `cifar_resnet` files travel inside checkpoints.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_cifar_resnet import CifarResNetConfig
from .configuration_kdfs_pruned import KDFSPrunedConfig
from .modeling_cifar_resnet import CifarResNetForImageClassification, CifarResNetModel
from .modeling_kdfs_pruned import KDFSPrunedModel, KDFSPrunedModelForImageClassification


AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig, exist_ok=True)
AutoModel.register(CifarResNetConfig, CifarResNetModel, exist_ok=True)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification, exist_ok=True)
AutoConfig.register(KDFSPrunedConfig.model_type, KDFSPrunedConfig, exist_ok=True)
AutoModel.register(KDFSPrunedConfig, KDFSPrunedModel, exist_ok=True)
AutoModelForImageClassification.register(KDFSPrunedConfig, KDFSPrunedModelForImageClassification, exist_ok=True)

__all__ = [
    "CifarResNetConfig",
    "CifarResNetForImageClassification",
    "CifarResNetModel",
    "KDFSPrunedConfig",
    "KDFSPrunedModel",
    "KDFSPrunedModelForImageClassification",
]
