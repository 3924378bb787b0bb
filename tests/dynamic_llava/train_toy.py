"""One small training run in a process of its own: for the tests that need several processes, or one that dies."""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration

from hf_efficient import (
    DynamicLlavaForConditionalGeneration,
    DynamicLlavaTrainer,
    DynamicLlavaTrainingArguments,
)


sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import IMAGE, TOKENS, llava_config, opinionated


def make_model():
    torch.manual_seed(0)
    llava = LlavaForConditionalGeneration(llava_config())
    sizes = {"predictor_hidden_size": 16, "predictor_num_heads": 2, "predictor_intermediate_size": 32}
    settings = {"vision_keep_rate": 0.3, "output_text_min_length": 4, "predictor_num_layers": 1, **sizes}
    return opinionated(DynamicLlavaForConditionalGeneration.from_llava(llava, **settings))


def make_example(number, image, answer):
    generator = torch.Generator().manual_seed(number)
    prompt = [1, *[IMAGE] * TOKENS, 5] if image else [1, *[7] * TOKENS, 5]
    ids = torch.cat([torch.tensor(prompt), torch.randint(3, 110, (8,), generator=generator)])
    labels = ids.clone()
    labels[: len(ids) - answer] = -100
    example = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    if image:
        example["pixel_values"] = torch.randn(3, 16, 16, generator=generator)
    return example


def collate(examples):
    batch = {name: torch.stack([e[name] for e in examples]) for name in ("input_ids", "labels", "attention_mask")}
    pixels = [example["pixel_values"] for example in examples if "pixel_values" in example]
    return {**batch, "pixel_values": torch.stack(pixels)} if pixels else batch


def noiseless(logits, tau=1.0, hard=False, **kwargs):
    soft = (logits / tau).softmax(dim=-1)
    return F.one_hot(soft.argmax(dim=-1), 2).to(soft.dtype) - soft.detach() + soft


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("--max-steps", type=int, default=1)
    parser.add_argument("--save-steps", type=int, default=0)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--die-at", type=int, default=0)
    parser.add_argument("--data", default="plain", choices=["plain", "text-only", "short", "mixed"])
    for flag in ("--resume", "--sgd", "--no-noise", "--checkpointing", "--train-tower"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    if options.no_noise:
        F.gumbel_softmax = noiseless
    # "mixed": the first process meets images, the second text alone
    image = {"plain": lambda i: True, "short": lambda i: True, "text-only": lambda i: False}
    has_image = image.get(options.data, lambda i: (i // options.batch) % 2 == 0)
    examples = [make_example(i, has_image(i), 2 if options.data == "short" else 8) for i in range(4)]
    settings = {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 1.0, "predictor_learning_rate": 1.0}
    args = DynamicLlavaTrainingArguments(
        options.output,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        logging_steps=1,
        lr_scheduler_type="constant",
        activation_checkpointing=options.checkpointing,
        freeze_vision_tower=not options.train_tower,
        train_sampling_strategy="sequential",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **(settings if options.sgd else {}),
    )
    if args.world_size != options.world_size:
        sys.exit(f"{args.world_size} processes instead of {options.world_size}")
    trainer = DynamicLlavaTrainer(make_model(), args, train_dataset=examples, data_collator=collate)
    if options.die_at:
        trainer._save_optimizer_and_scheduler = lambda folder, save=trainer._save_optimizer_and_scheduler: (
            os._exit(9) if trainer.state.global_step == options.die_at else save(folder)
        )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train(resume_from_checkpoint=options.resume or None)
    if trainer.is_world_process_zero():
        after = {name: value.detach() for name, value in trainer.model.named_parameters()}
        log = trainer.state.log_history[0]
        torch.save({"before": before, "after": after, "log": log}, Path(options.output) / "result.pt")
    if args.world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        os._exit(0)  # DistributedDataParallel holds gloo's threads, and those may abort while the interpreter ends


if __name__ == "__main__":
    main()
