"""The runs of `kdfs_prune_cifar.py`: each trains one network for the same number of epochs and writes its result."""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kdfs_prune_cifar_data import Images, accuracy, collate
from kdfs_prune_cifar_networks import SHAPE, folded, fresh_network, random_network, taylor_network
from kdfs_prune_cifar_runs import CpuClock, Results, begin_run, epochs_of, read_start, recipe
from transformers import TrainingArguments, set_seed

from hf_efficient import KDFSConfig, KDFSPrunedModelForImageClassification, KDFSPruner, count_flops
from hf_efficient.kdfs.pruner_kdfs import measure_latency
from hf_efficient.kdfs.resuming_kdfs import last_whole_checkpoint
from hf_efficient.kdfs.trainer_kdfs import DistillationTrainer
from hf_efficient.results import write_whole


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
    "dense": Arm("dense", "dense, trained on for the same epochs", 4, reduction=0.0, distil=False),
    "kdfs": Arm("kdfs", "KDFS -50 %", 4),
    "torch_pruning": Arm("torch_pruning", "Torch-Pruning (Taylor) -50 %", 4, distil=False),
    "torch_pruning_kd": Arm("torch_pruning", "Torch-Pruning (Taylor) -50 %, with distillation", 4),
    "random": Arm("random", "random masks -50 %, same distillation and fine-tuning"),
    "scratch": Arm("scratch", "the KDFS network from scratch", distil=False),
    "kdfs_no_kd": Arm("kdfs", "KDFS -50 %, no distillation", distil=False),
    "kdfs_no_reconstruction": Arm("kdfs", "KDFS -50 %, no reconstruction", settings={"reconstruction_weight": 0.0}),
    "kdfs_55": Arm("kdfs", "KDFS -55 %", reduction=0.55),
    "dense_56": Arm("dense", "ResNet-56, trained on for the same epochs", depth=56, reduction=0.0, distil=False),
    "kdfs_56": Arm("kdfs", "ResNet-56, KDFS -50 %", depth=56),
}


def arguments(folder: Path, options: Any, depth: int, seed: int) -> TrainingArguments:
    """The same for every arm: what differs is the network, not the schedule."""
    return TrainingArguments(
        output_dir=str(folder / "training"),
        num_train_epochs=epochs_of(options, depth),
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
        bf16=options.bf16,
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
        "importance_images": options.importance_images,
        "reconstruction_weight": options.reconstruction_weight,
        "flops_weight": options.flops_weight,
        "kd_weight": options.kd_weight,
        "kd_temperature": options.kd_temperature,
        "exclude_layers": [options.exclude_layers] if options.exclude_layers else None,
        **arm.settings,
    }
    if not arm.distil:
        settings["kd_weight"] = 0.0
    return KDFSConfig(**settings)


def run_kdfs(arm: Arm, teacher, train: Images, folder: Path, options: Any, seed: int, clock: CpuClock) -> tuple:
    """The whole pass; it resumes by itself. The note after it spares the pass when only measuring was cut off."""
    note = folder / "trained.json"
    if note.is_file():
        model = KDFSPrunedModelForImageClassification.from_pretrained(folder / "model")
        return model, json.loads(note.read_text(encoding="utf-8"))
    pruner = KDFSPruner.from_pretrained(teacher, teacher=folded(teacher))
    args = arguments(folder, options, arm.depth, seed)
    config = kdfs_config(arm, options)
    pruner.prune(folder / "model", config, train, args=args, data_collator=collate, callbacks=[clock])
    extra = {"log": pruner.history, "layers": pruner.report["layers"]}
    write_whole(note, json.dumps(extra) + "\n")
    return pruner.pruned_model, extra


def fit(arm: Arm, model, teacher, train: Images, folder: Path, options: Any, seed: int, clock: CpuClock) -> list[dict]:
    """Train a network as it is, with or without the teacher; goes on from its last whole checkpoint."""
    trainer = DistillationTrainer(
        model=model,
        args=arguments(folder, options, arm.depth, seed),
        train_dataset=train,
        data_collator=collate,
        teacher=folded(teacher) if arm.distil else None,
        kd_weight=options.kd_weight if arm.distil else 0.0,
        kd_temperature=options.kd_temperature,
        callbacks=[clock],
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder / "training"))
    return trainer.state.log_history


def start_network(arm: Arm, teacher, train: Images, seed: int, results: Results, exclude: str) -> torch.nn.Module:
    """What an arm other than KDFS starts from."""
    if arm.kind == "random":
        return random_network(teacher, arm.reduction, seed, exclude)
    if arm.kind == "torch_pruning":
        return taylor_network(teacher, arm.reduction, train)
    return fresh_network(results.weights("kdfs", seed)) if arm.kind == "scratch" else copy.deepcopy(teacher)


def short(log: list[dict]) -> list[dict]:
    """What is kept of a Trainer's log: four digits of the losses of every epoch."""
    kept = [entry for entry in log if "loss" in entry]
    return [
        {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in entry.items()}
        for entry in kept
    ]


def run_arm(
    name: str, seed: int, teacher, train: Images, held_out: Images, folder: Path, results: Results, options: Any
) -> dict:
    """One run: train, evaluate, measure, keep its result."""
    arm = ARMS[name]
    begin_run(folder, name, seed, recipe(options, arm))
    set_seed(seed)
    clock = CpuClock(folder / "cpu_seconds.json")
    extra: dict[str, Any] = {}
    if arm.kind == "kdfs":
        model, extra = run_kdfs(arm, teacher, train, folder, options, seed, clock)
    else:
        model = start_network(arm, teacher, train, seed, results, options.exclude_layers)
        extra["log"] = fit(arm, model, teacher, train, folder, options, seed, clock)
    extra["log"] = short(extra["log"])
    model = model.to("cpu")  # where all networks are judged and timed, also after training on a GPU
    print(f"{name} seed {seed}: trained; measuring latency and accuracy", flush=True)
    dense, macs = count_flops(teacher, SHAPE), count_flops(model, SHAPE)
    latency = {
        str(batch): measure_latency({"dense": teacher, "sliced": model}, SHAPE, batch_size=batch) for batch in (1, 64)
    }
    result = {
        "arm": name,
        "title": arm.title,
        "seed": seed,
        "epochs": epochs_of(options, arm.depth),
        "accuracy": accuracy(model, held_out),
        "teacher_accuracy": accuracy(teacher, held_out),
        "start": read_start(options.weights),
        "images": len(held_out),
        "macs": macs,
        "flops_reduction": 1 - macs / dense,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "latency_seconds": latency,
        "threads": torch.get_num_threads(),
        "recipe": recipe(options, arm),
        "meta": options.meta,
        "core_hours": clock.seconds() / 3600,
        **extra,
    }
    results.save(result, folder / "model" if (name, seed) == ("kdfs", 0) else None)
    return result
