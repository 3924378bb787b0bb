"""The networks that `kdfs_prune_cifar.py` starts from: teacher, random masks, Torch-Pruning, a fresh small one."""

import copy
from pathlib import Path

import torch
from kdfs_prune_cifar_data import LABELS, Images
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import set_seed

from hf_efficient import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    KDFSConfig,
    KDFSPrunedModelForImageClassification,
    count_flops,
)
from hf_efficient.kdfs.masking_kdfs import KDFSMaskedModel
from hf_efficient.kdfs.slicing_kdfs import slice_network
from hf_efficient.kdfs.structure_kdfs import read_structure


SHAPE = (3, 32, 32)


def load_teacher(weights: Path | None, depth: int, smoke: bool) -> CifarResNetForImageClassification:
    """The trained network, or a small fresh one for smoke runs."""
    if smoke:
        set_seed(0)
        return CifarResNetForImageClassification(CifarResNetConfig(depth=8, hidden_sizes=[8, 8, 16], num_labels=4))
    names = dict(enumerate(LABELS))
    return CifarResNetForImageClassification.from_original(weights / f"resnet{depth}_jpeg.safetensors", id2label=names)


def folded(network: CifarResNetForImageClassification) -> CifarResNetForImageClassification:
    """The same answers for a quarter less: normalisations go into the convolutions, channels lie last in memory."""
    model = copy.deepcopy(network).eval().requires_grad_(False)
    for module in model.modules():
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
            if hasattr(module, norm):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, torch.nn.Identity())
    return model.to(memory_format=torch.channels_last)


def random_network(teacher, reduction: float, seed: int, exclude: str) -> KDFSPrunedModelForImageClassification:
    """The teacher without filters drawn at random, at the same cost."""
    structure = read_structure(teacher, SHAPE, exclude=[exclude] if exclude else None)
    config = KDFSConfig(target_flops_reduction=reduction, initial_keep_margin=0.0, initial_importance_spread=0.0)
    masked = KDFSMaskedModel(copy.deepcopy(teacher), structure, config)
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for logits in masked.mask_logits:
            logits.copy_(torch.randn(logits.shape, generator=generator))
    masked.freeze_masks()
    return slice_network(masked, teacher)


def taylor_network(teacher, reduction: float, train: Images) -> torch.nn.Module:
    """Torch-Pruning, global Taylor importance, steps until the multiply-adds are met.

    It prunes coupled channels together, and the parameter-free shortcuts couple whole stages through zero padding,
    which it cannot follow. So it prunes what is free there: the first convolution of every block.
    """
    import torch_pruning as tp

    model = copy.deepcopy(teacher).train().requires_grad_(True)
    batch = train.__getitems__(list(range(min(512, len(train)))))
    model(batch["pixel_values"], labels=batch["labels"]).loss.backward()
    inner = {module.conv1 for name, module in model.named_modules() if hasattr(module, "conv2")}
    whole = [layer for layer in model.modules() if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
    pruner = tp.pruner.BasePruner(
        model.eval(),
        torch.zeros(1, *SHAPE),
        importance=tp.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=0.95,
        max_pruning_ratio=0.9,
        iterative_steps=400,
        ignored_layers=[layer for layer in whole if layer not in inner],
        output_transform=lambda output: output.logits.sum(),
    )
    goal = (1 - reduction) * count_flops(teacher, SHAPE)
    while count_flops(model, SHAPE) > goal and pruner.current_step < 400:
        pruner.step()
    model.zero_grad(set_to_none=True)
    return model


def fresh_network(folder: Path) -> KDFSPrunedModelForImageClassification:
    """The shape of a pruned network with new weights; its filters keep their places."""
    trained = KDFSPrunedModelForImageClassification.from_pretrained(folder)
    model = KDFSPrunedModelForImageClassification(trained.config)
    own = model.state_dict()
    for key, value in trained.state_dict().items():
        if key.endswith("filter_index"):
            own[key].copy_(value)
    return model
