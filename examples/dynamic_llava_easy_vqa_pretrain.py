"""Train the dense LLaVA of `dynamic_llava_easy_vqa.py` from scratch: the vision tower first, then the whole model.

1. The CLIP-type tower learns shape and colour of the training images (as far as their own questions tell them), read
   from each patch that shows a piece of the shape. Most steps see only 20 of the 64 patches, which is three times
   cheaper.
2. The stock `LlavaForConditionalGeneration` learns to answer, four questions of an image in one row. A block mask lets
   each question see the image and itself, so that a row costs little more than one question and no answer gives
   another away. The tower stays as it is.

The last 400 training images are held out of both; every choice here was made on them.

    python examples/dynamic_llava_easy_vqa_pretrain.py --output easy_vqa_run
"""

import argparse
import json
import os
import random
import time
from pathlib import Path

import torch
from dynamic_llava_easy_vqa_data import (
    COLORS,
    IGNORED,
    PATCH,
    SHAPES,
    SIZE,
    TOKENS,
    EasyVQA,
    encode,
    load_easy_vqa,
    make_processor,
)
from dynamic_llava_easy_vqa_tower import TowerWithHeads, collate_images
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


TRAIN_IMAGES = 3600  # of 4,000; the rest is held out
WIDTH = 96
STEPS = (900, 500)  # tower, whole model


def collate_questions(data: EasyVQA, processor: LlavaProcessor, together: int = 4):
    """Collator from image numbers to rows `image, question, answer, question, answer, ...` with a block mask."""
    encoded = encode(data, processor)
    questions_of = [[] for _ in range(len(data.shape))]
    for question, image in enumerate(data.image_of):
        questions_of[image].append(question)
    start = 2 + TOKENS  # <s> USER: <image> x 64

    def collate(rows: list[int]) -> dict[str, Tensor]:
        ids, labels, blocks, positions = [], [], [], []
        for image in rows:
            asked = random.sample(questions_of[image], min(together, len(questions_of[image])))
            texts = [encoded[question] for question in asked]
            ids.append(texts[0][0][:start] + [token for prompt, answer in texts for token in prompt[start:] + answer])
            lengths = [len(prompt) - start + len(answer) for prompt, answer in texts]
            labels.append([IGNORED] * start)
            for prompt, answer in texts:
                labels[-1] += [IGNORED] * (len(prompt) - start) + answer
            blocks.append([0] * start + [number + 1 for number, n in enumerate(lengths) for _ in range(n)])
            positions.append([*range(start)] + [start + step for n in lengths for step in range(n)])
        length = max(map(len, ids))

        def pad(rows: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (length - len(row)) for row in rows])

        block = pad(blocks, -1)
        seen = (block[:, None] == 0) | (block[:, None] == block[:, :, None])  # (batch, query, key)
        return {
            "input_ids": pad(ids, processor.tokenizer.pad_token_id),
            "labels": pad(labels, IGNORED),
            "position_ids": pad(positions, 0),
            "attention_mask": (seen & torch.ones(length, length, dtype=torch.bool).tril())[:, None],
            "pixel_values": data.pixels(torch.tensor(rows), augment=True),
        }

    return collate


def build_llava(tower: CLIPVisionModel, processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """A LLaVA with a fresh six-layer Llama decoder behind the trained tower."""
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.05,
    )
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_id=processor.image_token_id,
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.generation_config = GenerationConfig(
        max_new_tokens=8,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        suppress_tokens=[processor.image_token_id],
    )
    return model


def arguments(folder: Path, steps: int, batch: int, rate: float, seed: int, kind=TrainingArguments, **more):
    """Settings shared by all trainings here: cosine schedule, a checkpoint every 100 steps to go on from."""
    return kind(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.05,
        adam_beta2=0.98,
        logging_steps=50,
        save_steps=100,
        save_total_limit=1,
        seed=seed,
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        **more,
    )


def fit(trainer: Trainer) -> float:
    """Train, from the last checkpoint if there is one; gives the seconds this process spent."""
    start, folder = time.time(), trainer.args.output_dir
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if os.path.isdir(folder) else None)
    return time.time() - start


def pretrain(output: Path, data: EasyVQA, processor: LlavaProcessor, steps: tuple[int, int], seed: int = 0) -> dict:
    """Train tower and dense model into `output / "dense"`; what is there already is not trained again."""
    record_file = output / "pretraining.json"
    if record_file.exists():
        return json.loads(record_file.read_text())
    output.mkdir(parents=True, exist_ok=True)
    set_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
        hidden_act="gelu",
    )
    reader = TowerWithHeads(config)
    images = list(range(TRAIN_IMAGES))
    settings = arguments(output / "tower", steps[0], 96, 2e-3, seed)
    record = {"tower_steps": steps[0], "llava_steps": steps[1], "seed": seed}
    record["tower_seconds"] = fit(Trainer(reader, settings, train_dataset=images, data_collator=collate_images(data)))
    held_out = collate_images(data, augment=False)(list(range(TRAIN_IMAGES, len(data.shape))))
    with torch.no_grad():
        logits = reader.eval()(**held_out)["logits"]
    for name, part in zip(("shape", "color"), logits.split([len(SHAPES), len(COLORS)], 1), strict=True):
        known = held_out[name] >= 0
        record[f"tower_{name}_held_out"] = (part.argmax(1) == held_out[name])[known].float().mean().item()
    print(record, flush=True)
    model = build_llava(reader.tower, processor)
    model.model.vision_tower.requires_grad_(False)
    settings = arguments(output / "llava", steps[1], 24, 2e-3, seed)
    collate = collate_questions(data, processor)
    record["llava_seconds"] = fit(Trainer(model, settings, train_dataset=images, data_collator=collate))
    model.save_pretrained(output / "dense")
    processor.save_pretrained(output / "dense")
    record_file.write_text(json.dumps(record, indent=1))
    return record


def main() -> None:
    """Train the dense model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("easy_vqa_run"), help="folder for checkpoints and the model"
    )
    parser.add_argument("--data", help="folder of parquet files instead of the easy-vqa wheel")
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    options = parser.parse_args()
    data = load_easy_vqa("train", options.data)
    print(pretrain(options.output, data, make_processor(data), (2, 2) if options.smoke else STEPS))


if __name__ == "__main__":
    main()
