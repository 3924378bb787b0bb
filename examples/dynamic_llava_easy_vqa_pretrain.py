"""Train the dense LLaVA of `dynamic_llava_easy_vqa.py` from scratch: tower, projector, whole model.

1. The CLIP-type tower learns shape and colour of the training images (as far as their own questions tell them), read
   from each patch that shows a piece of the shape. Most steps see 20 of the 64 patches, at a third of the cost.
2. The projector learns to turn each patch into the sum of the word embeddings of its shape and colour (the first stage
   of LLaVA), and every attention layer starts with equal query and key weights, so that a word looks at patches that
   resemble it. Without the two the model stays at the 82 % that can be guessed from such questions.
3. The stock `LlavaForConditionalGeneration` learns to answer, six questions of an image in one row. A block mask lets
   each question see the image and itself, so that a row costs little more than one question and no answer gives
   another away. Yes and no are made equally frequent for each wording, and right after a shape or colour is named it
   is asked whether the image shows it. The tower stays as it is.

The last 400 training images are held out of both; every choice here was made on them.

    python examples/dynamic_llava_easy_vqa_pretrain.py
"""

import argparse
import json
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
    balance,
    encode,
    load_easy_vqa,
    make_processor,
)
from dynamic_llava_easy_vqa_tower import TowerWithHeads, align_projector, collate_images, start_alike
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_efficient.results import write_whole


TRAIN_IMAGES = 3600  # of 4,000; the rest is held out
WIDTH = 96
STEPS = (900, 450)  # tower, whole model


def collate_questions(data: EasyVQA, processor: LlavaProcessor, together: int = 6):
    """Collator from image numbers to rows `image, question, answer, question, answer, ...` with a block mask.

    An image is asked `together` questions drawn from those of all training images with the same shape and colour.
    """
    encoded, weights = encode(data, processor), balance(data)
    facts = list(zip(data.shape.tolist(), data.color.tolist(), strict=True))
    key_of = [(image,) if IGNORED in pair else pair for image, pair in enumerate(facts)]
    pools: dict[tuple, list[int]] = {}
    for question, image in enumerate(data.image_of):
        if image < TRAIN_IMAGES:
            pools.setdefault(key_of[image], []).append(question)
    weights_of = {key: [weights[question] for question in pool] for key, pool in pools.items()}
    vocabulary = processor.tokenizer.get_vocab()
    named, negations = {vocabulary[word] for word in (*SHAPES, *COLORS)}, {vocabulary["no"], vocabulary["not"]}
    truths = [vocabulary["yes"], vocabulary["no"]]
    start = 2 + TOKENS  # <s> USER: <image> x 64

    def collate(rows: list[int]) -> dict[str, Tensor]:
        ids, labels, blocks, positions = [], [], [], []
        for image in rows:
            asked = random.choices(pools[key_of[image]], weights_of[key_of[image]], k=together)
            texts = [encoded[question] for question in asked]
            ids.append(texts[0][0][:start] + [token for prompt, answer in texts for token in prompt[start:] + answer])
            lengths = [len(prompt) - start + len(answer) for prompt, answer in texts]
            labels.append([IGNORED] * start)
            for prompt, answer in texts:
                hints = [IGNORED] * (len(prompt) - start)
                if answer[0] in truths:
                    negated = not negations.isdisjoint(prompt)
                    for place, token in enumerate(prompt[start:-1]):
                        if token in named:  # right after a shape or colour is named: does the image show it?
                            hints[place + 1] = truths[(answer[0] == truths[0]) == negated]
                labels[-1] += hints + answer
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
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **special,
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_id=processor.image_token_id,
        image_seq_length=TOKENS,
        tie_word_embeddings=True,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.generation_config = GenerationConfig(
        max_new_tokens=8,
        **special,
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
        logging_steps=25,
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
    """Train, from the last checkpoint if there is one; gives the seconds of the whole training.

    An interrupted training counts as if all its steps had taken as long as those after the last start.
    """
    folder = Path(trainer.args.output_dir)
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    steps_left = trainer.args.max_steps - (int(last.rsplit("-", 1)[1]) if last else 0)
    if last and isinstance(trainer.model, PreTrainedModel):
        # `Trainer` looks for the names of the modules; a LLaVA is saved under the names of older releases
        weights = type(trainer.model).from_pretrained(last, dtype=torch.float32).state_dict()
        trainer.model.load_state_dict(weights, strict=False)
    start = time.time()
    trainer.train(resume_from_checkpoint=last)  # after the last step this only loads: the rate is 0
    timing = folder / "seconds.json"
    if not timing.exists():
        write_whole(timing, json.dumps((time.time() - start) * trainer.args.max_steps / max(1, steps_left)))
    return json.loads(timing.read_text())


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
    start_alike(model)
    images_known = [i for i in images if IGNORED not in (data.shape[i], data.color[i])]
    record["projector_loss"] = align_projector(model, collate_images(data)(images_known), processor, steps[1])
    print(record, flush=True)
    model.model.vision_tower.requires_grad_(False)
    settings = arguments(output / "llava", steps[1], 20, 2e-3, seed)
    collate = collate_questions(data, processor)
    record["llava_seconds"] = fit(Trainer(model, settings, train_dataset=images, data_collator=collate))
    model.save_pretrained(output / "dense")
    processor.save_pretrained(output / "dense")
    write_whole(record_file, json.dumps(record, indent=1))
    return record


def main() -> None:
    """Train the dense model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/easy_vqa"), help="folder of all trainings")
    parser.add_argument("--data", help="folder of parquet files instead of the easy-vqa wheel")
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    options = parser.parse_args()
    data = load_easy_vqa("train", options.data)
    print(pretrain(options.output, data, make_processor(data), (2, 2) if options.smoke else STEPS))


if __name__ == "__main__":
    main()
