"""The runs of `kdfs_prune_cifar.py`: each trains one network for the same number of epochs and writes its result."""

import copy
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kdfs_prune_cifar_data import LABELS, Images, accuracy, collate
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_efficient import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    KDFSConfig,
    KDFSPrunedModelForImageClassification,
    KDFSPruner,
    count_flops,
)
from hf_efficient.kdfs.masking_kdfs import KDFSMaskedModel
from hf_efficient.kdfs.pruner_kdfs import measure_latency
from hf_efficient.kdfs.slicing_kdfs import slice_network
from hf_efficient.kdfs.structure_kdfs import read_structure
from hf_efficient.kdfs.trainer_kdfs import DistillationTrainer
from hf_efficient.results import write_whole


SHAPE = (3, 32, 32)
KD = {"kd_weight": 1.0, "kd_temperature": 3.0}


@dataclass
class Arm:
    """One line of the comparison.

    Args:
        kind (`str`): `dense`, `kdfs`, `torch_pruning`, `random` or `scratch`.
        title (`str`): As in the tables.
        seeds (`int`): Number of seeds.
        depth (`int`): 20 or 56.
        reduction (`float`): Share of the multiply-adds to remove.
        distil (`bool`): Train with the teacher's answers.
        settings (`dict`): Further fields of [`KDFSConfig`].
    """

    kind: str
    title: str
    seeds: int = 1
    depth: int = 20
    reduction: float = 0.5
    distil: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


ARMS = {
    "dense": Arm("dense", "dense, trained on for the same epochs", 3, reduction=0.0, distil=False),
    "kdfs": Arm("kdfs", "KDFS -50 %", 3),
    "torch_pruning": Arm("torch_pruning", "Torch-Pruning (Taylor) -50 %", 3, distil=False),
    "torch_pruning_kd": Arm("torch_pruning", "Torch-Pruning (Taylor) -50 %, with distillation", 3),
    "random": Arm("random", "random masks -50 %, same distillation and fine-tuning"),
    "scratch": Arm("scratch", "the KDFS network from scratch", distil=False),
    "kdfs_no_kd": Arm("kdfs", "KDFS -50 %, no distillation", distil=False),
    "kdfs_no_reconstruction": Arm("kdfs", "KDFS -50 %, no reconstruction", settings={"reconstruction_weight": 0.0}),
    "kdfs_55": Arm("kdfs", "KDFS -55 %", reduction=0.55),
    "dense_56": Arm("dense", "ResNet-56, trained on for the same epochs", depth=56, reduction=0.0, distil=False),
    "kdfs_56": Arm("kdfs", "ResNet-56, KDFS -50 %", depth=56),
}


def load_teacher(weights: Path | None, depth: int, smoke: bool) -> CifarResNetForImageClassification:
    """The trained network, or a small fresh one for smoke runs."""
    if smoke:
        set_seed(0)
        return CifarResNetForImageClassification(CifarResNetConfig(depth=8, hidden_sizes=[8, 8, 16], num_labels=4))
    names = dict(enumerate(LABELS))
    return CifarResNetForImageClassification.from_original(weights / f"resnet{depth}_jpeg.safetensors", id2label=names)


def arguments(folder: Path, options: Any, seed: int) -> TrainingArguments:
    """The same for every arm: what differs is the network, not the schedule."""
    return TrainingArguments(
        output_dir=str(folder / "training"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        max_grad_norm=0.0,
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        eval_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to="none",
        seed=seed,
        use_cpu=options.cpu,
        disable_tqdm=options.quiet,
    )


def kdfs_config(arm: Arm, options: Any) -> KDFSConfig:
    """Settings of the pass; the flags of the command line stand over the defaults."""
    settings = {
        "target_flops_reduction": arm.reduction,
        "fine_tune_share": options.fine_tune_share,
        "mask_learning_rate": options.mask_learning_rate,
        "initial_keep_margin": options.keep_margin,
        "initial_importance_spread": options.importance_spread,
        "reconstruction_weight": options.reconstruction_weight,
        "flops_weight": options.flops_weight,
        **KD,
        **arm.settings,
    }
    if not arm.distil:
        settings["kd_weight"] = 0.0
    return KDFSConfig(**settings)


def run_kdfs(arm: Arm, teacher, train: Images, folder: Path, options: Any, seed: int) -> tuple[Any, dict]:
    """The whole pass; it resumes by itself."""
    pruner = KDFSPruner.from_pretrained(teacher)
    args = arguments(folder, options, seed)
    pruner.prune(folder / "model", kdfs_config(arm, options), train, args=args, data_collator=collate)
    return pruner.pruned_model, {"log": pruner.history, "layers": pruner.report["layers"]}


def fit(model, teacher, train: Images, folder: Path, options: Any, seed: int, distil: bool) -> list[dict]:
    """Train a network as it is, with or without the teacher; goes on from its last checkpoint."""
    weight = KD["kd_weight"] if distil else 0.0
    trainer = DistillationTrainer(
        model=model,
        args=arguments(folder, options, seed),
        train_dataset=train,
        data_collator=collate,
        teacher=copy.deepcopy(teacher) if distil else None,
        kd_weight=weight,
        kd_temperature=KD["kd_temperature"],
    )
    before = folder / "training"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(before)) if before.is_dir() else None)
    return trainer.state.log_history


def random_network(arm: Arm, teacher, seed: int) -> KDFSPrunedModelForImageClassification:
    """The teacher without filters drawn at random, at the same cost."""
    structure = read_structure(teacher, SHAPE)
    config = KDFSConfig(target_flops_reduction=arm.reduction, initial_keep_margin=0.0, initial_importance_spread=0.0)
    masked = KDFSMaskedModel(copy.deepcopy(teacher), structure, config)
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for logits in masked.mask_logits:
            logits.copy_(torch.randn(logits.shape, generator=generator))
    masked.freeze_masks()
    return slice_network(masked, teacher)


def taylor_network(arm: Arm, teacher, train: Images) -> Any:
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
    goal = (1 - arm.reduction) * count_flops(teacher, SHAPE)
    while count_flops(model, SHAPE) > goal and pruner.current_step < 400:
        pruner.step()
    model.zero_grad(set_to_none=True)
    return model


def run_arm(name: str, seed: int, teacher, train: Images, held_out: Images, output: Path, options: Any) -> dict:
    """One run: train, evaluate, measure, write `result.json`; a finished run is not repeated."""
    arm, folder = ARMS[name], output / f"{name}-{seed}"
    file = folder / "result.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    set_seed(seed)
    start = time.time()
    extra: dict[str, Any] = {}
    if arm.kind == "kdfs":
        model, extra = run_kdfs(arm, teacher, train, folder, options, seed)
    else:
        if arm.kind == "dense":
            model = copy.deepcopy(teacher)
        elif arm.kind == "random":
            model = random_network(arm, teacher, seed)
        elif arm.kind == "scratch":
            config = KDFSPrunedModelForImageClassification.from_pretrained(output / f"kdfs-{seed}" / "model").config
            model = KDFSPrunedModelForImageClassification(config)
            copy_indices(output / f"kdfs-{seed}" / "model", model)
        else:
            model = taylor_network(arm, teacher, train)
        extra["log"] = fit(model, teacher, train, folder, options, seed, arm.distil)
    dense, macs = count_flops(teacher, SHAPE), count_flops(model, SHAPE)
    latency = {
        str(batch): measure_latency({"dense": teacher, "sliced": model}, SHAPE, batch_size=batch) for batch in (1, 64)
    }
    result = {
        "arm": name,
        "title": arm.title,
        "seed": seed,
        "epochs": options.epochs,
        "accuracy": accuracy(model, held_out),
        "teacher_accuracy": accuracy(teacher, held_out),
        "images": len(held_out),
        "macs": macs,
        "flops_reduction": 1 - macs / dense,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "latency_seconds": latency,
        "threads": torch.get_num_threads(),
        "seconds": time.time() - start,
        **extra,
    }
    write_whole(file, json.dumps(result, indent=2) + "\n")
    return result


def copy_indices(folder: Path, model: torch.nn.Module) -> None:
    """A fresh network of the same shape needs the same places for its filters."""
    trained = KDFSPrunedModelForImageClassification.from_pretrained(folder).state_dict()
    own = model.state_dict()
    for key, value in trained.items():
        if key.endswith("filter_index"):
            own[key].copy_(value)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
