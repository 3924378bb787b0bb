"""Fine-tune a vision transformer on scikit-learn's digits with and without Token Expansion, whole and by LoRA.

Four arms with the same seeds, steps and data: all weights or LoRA of rank 8 and the head, each on all tokens and with
ToE. A model that `toe_train_vit.py` has trained is the natural start; written into that script's `--results` folder,
here KEEP, the table gets into the card. A finished arm is not repeated; other options want another `--output`.

    python examples/toe_finetune_vit.py --model KEEP/weights --output KEEP/finetune

takes some twenty minutes on one slow core for three seeds. To expect: ToE near the bound of multiply-adds that the
script prints (about 1.29 for 64 tokens and 8 layers), LoRA as well, since the layers it saves are the same ones. In so
short a training ToE may lose accuracy: about a point here.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from toe_train_vit_clock import Clock, accuracy
from toe_train_vit_data import Batches, Rows, decode
from toe_train_vit_report import spread
from toe_train_vit_runs import check_recipe
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, ViTConfig, set_seed
from transformers import ViTForImageClassification as ViT

from hf_efficient import ToECallback, ToEConfig
from hf_efficient.results import run_meta, write_whole
from hf_efficient.toe import speedup_bound
from hf_efficient.toe.cost_toe import count_patches


ARMS = ("full", "full toe", "lora", "lora toe")
# what the arms of a table have in common
RECIPE = ("model", "epochs", "learning_rate", "lora_learning_rate", "preset")


def make_model(args: argparse.Namespace, arm: str) -> torch.nn.Module:
    if args.model:
        model = AutoModelForImageClassification.from_pretrained(
            args.model, num_labels=10, ignore_mismatched_sizes=True, dtype=torch.float32
        )
    else:
        shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 1, "intermediate_size": 64}
        model = ViT(ViTConfig(**shape, image_size=16, patch_size=4, num_labels=10))
    torch.nn.init.zeros_(model.classifier.weight)  # the ten old classes mean something else
    if arm.startswith("lora"):
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        model = get_peft_model(model, lora)
    return model


def run(args: argparse.Namespace, arm: str, seed: int) -> dict:
    """Train one arm; a finished one is read back."""
    file = args.output / f"{arm.replace(' ', '-')}-{seed}.json"
    recipe = {name: getattr(args, name) for name in RECIPE}
    if file.exists():
        check_recipe(recipe, file)
        return json.loads(file.read_text(encoding="utf-8"))
    set_seed(seed)
    model = make_model(args, arm)
    size = model.config.image_size
    images, labels, _ = decode("digits", "train", size, args.scratch)
    tests, answers, _ = decode("digits", "test", size, args.scratch)
    training = TrainingArguments(
        output_dir=str(args.scratch),
        seed=seed,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=120,
        learning_rate=args.lora_learning_rate if arm.startswith("lora") else args.learning_rate,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        save_strategy="no",
        logging_steps=20,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer = Trainer(
        model,
        training,
        train_dataset=Rows(0, len(labels), augment=True),
        data_collator=Batches(images, labels, flip=False),
        compute_metrics=accuracy,
        callbacks=[*([ToECallback(ToEConfig.preset(args.preset))] if arm.endswith("toe") else []), Clock()],
    )
    trainer.train()
    spent = next(e["cpu_seconds"] for e in reversed(trainer.state.log_history) if "cpu_seconds" in e)
    trainer.data_collator = Batches(tests, answers, flip=False)
    score = trainer.evaluate(Rows(0, len(answers), augment=False))["eval_accuracy"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = {"arm": arm, "seed": seed, "cpu_seconds": spent, "test_accuracy": score, "trained_weights": trained}
    result["recipe"] = recipe
    write_whole(file, json.dumps(result) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint to start from (default: random weights of a toy model)")
    parser.add_argument("--output", type=Path, default=Path("toe_finetune"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--lora-learning-rate", type=float, default=3e-3)
    parser.add_argument("--preset", choices=("deit", "lv-vit", "efficient-train", "fast"), default="deit")
    parser.add_argument("--smoke", action="store_true", help="toy model, one seed, three epochs, under a minute")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}.")
    if args.smoke:
        args.model, args.seeds, args.epochs = None, [0], 3
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    meta = run_meta()
    args.output.mkdir(parents=True, exist_ok=True)
    # the arms of a seed follow each other: what else the machine does weighs on all of them
    with tempfile.TemporaryDirectory() as scratch:
        args.scratch = Path(scratch)
        runs = [run(args, arm, seed) for seed in args.seeds for arm in ARMS]
    model = make_model(args, "full")
    size = model.config.image_size
    patches = count_patches(model, torch.zeros(1, 3, size, size))
    bound = speedup_bound(model, patches, ToEConfig.preset(args.preset))[0]
    columns = ["arm", "weights trained", "CPU seconds", "times as fast", "bound", "accuracy, %"]
    rows = []
    for arm in ARMS:
        mine = [r for r in runs if r["arm"] == arm]
        plain = [r for r in runs if r["arm"] == arm.removesuffix(" toe")]
        speed = sum(r["cpu_seconds"] for r in plain) / sum(r["cpu_seconds"] for r in mine)
        row = [arm.replace("toe", "with ToE"), mine[0]["trained_weights"], spread([r["cpu_seconds"] for r in mine], 1)]
        row += [f"{speed:.3f}", f"{bound if arm.endswith('toe') else 1:.3f}"]
        rows.append([*row, spread([100 * r["test_accuracy"] for r in mine])])
    for line in [columns, *rows]:
        print(" | ".join(str(cell) for cell in line))
    title = f"Fine-tuning on scikit-learn's digits, {args.epochs} epochs"
    note = "Mean ± standard deviation over seeds, 360 test images; time is process CPU time on one thread."
    table = {"title": title, "columns": columns, "rows": rows, "note": note}
    write_whole(args.output / "table.json", json.dumps(table, indent=2) + "\n")
    write_whole(
        args.output / "results.json", json.dumps({"meta": meta, "table": table, "runs": runs}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
