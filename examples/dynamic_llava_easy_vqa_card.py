"""Checkpoint folder of `dynamic_llava_easy_vqa.py`: weights in fp16, processor, pictures, `results.json` and card."""

import shutil
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from dynamic_llava_easy_vqa_data import COLORS, SHAPES, TOKENS, EasyVQA
from PIL import Image, ImageDraw, ImageFont
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from hf_efficient import DynamicLlavaForConditionalGeneration
from hf_efficient.hub import write_results


NAME = "dynamic-llava-easy-vqa"
KINDS = {"shape": "shape", "color": "colour", "yes_no": "yes or no"}
ROWS = {
    "dense": "dense",
    "dense_continued": "dense, trained on for the same steps",
    "learned": "sparse, tokens chosen by the predictor",
    "random": "sparse, random tokens",
    "uniform": "sparse, evenly spaced tokens",
}
USAGE = """
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

checkpoint = "dynamic-llava-easy-vqa"  # this repository: its name on the Hub or a local copy
model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True, dtype="float32")
processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)

image = Image.new("RGB", (64, 64), "lavender")
image.paste("teal", (20, 30, 44, 50))  # a teal rectangle
content = [{"type": "image", "image": image}, {"type": "text", "text": "what shape is in the image?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
tokens = model.generate(**inputs)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
print("image tokens kept:", model.last_sparsity.image_index[0][0].tolist())
"""
LIMITS = [
    "It knows easy-VQA only: one shape (circle, rectangle, triangle) in one of eight colours on a pale ground, the "
    "107 questions of the data, answers of one word. Everything else it answers by chance.",
    "The predictor of generated text is in the weights but untrained and switched off: one-word answers leave nothing "
    "to drop. See the checkpoint `dynamic-llava-scenes` for it.",
    "At this size fewer tokens save arithmetic and cache, not noticeable time.",
]
DATASET = {"id": "easy-vqa", "name": "easy-VQA", "url": "https://github.com/vzhou842/easy-VQA", "license": "MIT"}
PAPER = {
    "title": "Dynamic-LLaVA: Efficient Multimodal Large Language Models via Dynamic Vision-language Context "
    "Sparsification",
    "url": "https://arxiv.org/abs/2412.00876",
    "bibtex": """@inproceedings{huang2025dynamicllava,
  title     = {Dynamic-LLaVA: Efficient Multimodal Large Language Models via Dynamic Vision-language Context Sparsification},
  author    = {Huang, Wenxuan and Zhai, Zijie and Shen, Yunhang and Cao, Shaosheng and Zhao, Fei and Xu, Xiangfeng and Ye, Zheyu and Lin, Shaohui},
  booktitle = {International Conference on Learning Representations},
  year      = {2025}
}""",  # noqa: E501 - an entry to copy
}


@torch.no_grad()
def ask(model: Any, processor: LlavaProcessor, image: Image.Image, question: str) -> tuple[str, dict[str, float]]:
    """Answer one question the way a user asks it; also what the prefill costs, its attention by the plain kernel."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = model.generate(**inputs, do_sample=False, return_dict_in_generate=True)
    layers = out["cache" if "cache" in out else "past_key_values"].layers  # renamed in transformers 5.24
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for x in layers for t in (x.keys, x.values)}
    features = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs, mm_encoder_outputs={"image": features}, logits_to_keep=1)
    answer = processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer, {"prefill_flops": counter.get_total_flops(), "kv_bytes": sum(sizes.values())}


def draw_panels(dense: Any, sparse: Any, data: EasyVQA, processor: LlavaProcessor, zoom: int = 4) -> Image.Image:
    """Eight questions: the picture as the sparse layers see it, and the answers of both models."""
    side, font, bold = 64 * zoom, ImageFont.load_default(15), ImageFont.load_default(17)
    width, height = side + 24, side + 92
    sheet = Image.new("RGB", (4 * width, 2 * height), "white")
    pen = ImageDraw.Draw(sheet)
    for panel in range(8):
        wanted = (SHAPES, COLORS, ("yes", "no"))[panel % 3]
        own = [row for row, image in enumerate(data.image_of) if image == panel]
        row = next((row for row in own if data.answers[row] in wanted), own[0])
        picture = data.picture(panel)
        said = [ask(model, processor, picture, data.questions[row])[0] for model in (dense, sparse)]
        kept = sparse.last_sparsity.image_index[0][0].tolist()
        left, top = panel % 4 * width + 12, panel // 4 * height + 12
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, top))
        step, veil = 8 * zoom, Image.new("RGB", (8 * zoom, 8 * zoom), (70, 74, 86))
        for patch in range(TOKENS):
            spot = (left + patch % 8 * step, top + patch // 8 * step)
            if patch not in kept:
                behind = sheet.crop((*spot, spot[0] + step, spot[1] + step))
                sheet.paste(Image.blend(behind, veil, 0.72), spot)
        for patch in kept:
            spot = (left + patch % 8 * step, top + patch // 8 * step)
            pen.rectangle((*spot, spot[0] + step - 1, spot[1] + step - 1), outline=(255, 140, 0), width=2)
        pen.text((left, top + side + 8), data.questions[row], fill="black", font=font)
        for line, (name, answer) in enumerate(zip(("dense", "sparse"), said, strict=True)):
            color = (0, 110, 60) if answer == data.answers[row] else (190, 20, 20)
            spot = (left + line * side // 2, top + side + 36)
            pen.text(spot, f"{name}:", fill=(110, 110, 110), font=font)
            pen.text((spot[0], spot[1] + 18), answer, fill=color, font=bold)
    return sheet


def accuracy_table(runs: list[dict[str, Any]], split: str) -> dict[str, Any]:
    """Rows dense, dense trained on, learned, random, uniform; means over seeds, percent."""
    base, rows = next(run[split]["all"] for run in runs if run["arm"] == "dense"), []
    for arm, label in ROWS.items():
        shares = [run[split] for run in runs if run["arm"] == arm]
        if not shares:
            continue
        found = [share["all"] for share in shares]
        row = [label, TOKENS if arm.startswith("dense") else int(TOKENS * 0.2), len(found), f"{mean(found):.2f}"]
        row += [f"{min(found):.2f} to {max(found):.2f}" if len(found) > 1 else "", f"{mean(found) - base:+.2f}"]
        row += [f"{mean(share[kind] for share in shares if kind in share):.2f}" for kind in KINDS if kind in shares[0]]
        rows.append(row)
    kinds = [label for kind, label in KINDS.items() if kind in runs[0][split]]
    columns = ["model", "image tokens from layer 2 on", "seeds", "right", "lowest to highest", "against dense", *kinds]
    questions = runs[0][split]["questions"]
    return {
        "title": f"Right answers on {questions:,} questions ({split.replace('_', ' ')} split), percent",
        "columns": columns,
        "rows": rows,
        "note": "Means over the seeds. All sparse rows had the same steps, data, seeds and learning rates from the "
        "same dense model. Answers by greedy `generate()`, weights rounded to fp16.",
    }


def write_checkpoint(
    folder: Path,
    output: Path,
    split: tuple[str, EasyVQA, list[int]],
    processor: LlavaProcessor,
    pretraining: dict[str, Any],
    runs: list[dict[str, Any]],
    seeds: list[int],
    meta: dict[str, Any],
) -> None:
    """Write everything that is pushed into `folder`, whole or not at all."""
    split, data, _ = split
    dense = LlavaForConditionalGeneration.from_pretrained(output / "dense", dtype=torch.float32).eval()
    source = output / f"sparse-{seeds[0]}"
    sparse = DynamicLlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    costs = [ask(model, processor, data.picture(0), data.questions[0])[1] for model in (dense, sparse)]
    names = {"prefill_flops": "decoder prefill, FLOPs", "kv_bytes": "key-value cache, bytes in fp32"}
    cost_rows = [
        [name, *(c[key] for c in costs), f"{costs[0][key] / costs[1][key]:.2f}"] for key, name in names.items()
    ]
    own = next(run for run in runs if run["arm"] == "learned" and run["seed"] == seeds[0])
    parameters = sum(weight.numel() for weight in sparse.parameters())
    question = "what color is the shape?"
    results = {
        "name": NAME,
        "title": "Dynamic-LLaVA on easy-VQA",
        "summary": f"A LLaVA of {parameters / 1e6:.1f} M parameters, trained from scratch, that answers questions "
        f"about coloured shapes from {int(TOKENS * 0.2)} of its {TOKENS} image tokens. It is small enough to run "
        "anywhere; the first table sets the learned choice of tokens beside random and evenly spaced ones.",
        "method": "A small predictor reads the image tokens that enter decoder layer 2 and keeps the 20 % it "
        "scores highest; the others leave the computation and the key-value cache of this and all later layers. "
        "Predictor and decoder were trained together with the straight-through Gumbel softmax from a dense LLaVA.",
        "paper": PAPER,
        "license": "apache-2.0",
        "datasets": [DATASET],
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava", "dynamic-llava", "token-pruning"],
        "usage": USAGE,
        "tables": [
            accuracy_table(runs, split),
            {
                "title": "Cost of one question",
                "columns": ["", "dense", "sparse", "dense / sparse"],
                "rows": cost_rows,
                "note": "FLOPs are counted (two for a multiply-add), predictor included, vision tower left out.",
            },
        ],
        "pictures": [
            {
                "file": "kept_tokens.png",
                "caption": "Bright patches are the image tokens that the layers from 2 on see (0 and 1 see all); both "
                "models answer below, green is right.",
            }
        ],
        "metrics": [
            {
                "dataset": "easy-vqa",
                "split": split,
                "type": "accuracy",
                "name": "accuracy with 20 % of the image tokens",
                "value": round(own[split]["all"] / 100, 4),
            }
        ],
        "runs": [{**{k: v for k, v in run.items() if not isinstance(v, dict)}, **flat(run, split)} for run in runs],
        "seeds": seeds,
        "limits": [*compare_choices(runs, split), *LIMITS],
        "sample": {"file": "sample.png", "text": question},
        "details": {"pretraining": pretraining, "measured": runs},
        "meta": meta,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}_", dir=folder.parent))
    try:
        sparse.half().save_pretrained(building)
        sparse.float()
        processor.save_pretrained(building)
        draw_panels(dense, sparse, data, processor).save(building / "kept_tokens.png", optimize=True)
        data.picture(0).save(building / "sample.png")
        write_results(building, results)
        building.chmod(0o755)
        (building / "model.safetensors").chmod(0o644)
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def compare_choices(runs: list[dict[str, Any]], split: str) -> list[str]:
    """Say so where the learned choice is no better than the controls."""
    right = {arm: [run[split]["all"] for run in runs if run["arm"] == arm] for arm in ("learned", "random", "uniform")}
    if not all(right.values()) or mean(right["learned"]) - max(mean(right["random"]), mean(right["uniform"])) > 0.5:
        return []
    return [
        "The task is too easy to tell a good choice of tokens from a bad one: layers 0 and 1, which see all of them, "
        "read what a one-word answer needs, so that random and evenly spaced tokens do as well as learned ones, and "
        "which patches the predictor keeps means little."
    ]


def flat(run: dict[str, Any], split: str) -> dict[str, str]:
    """Shares of a run as columns of the card."""
    return {
        label: f"{run[split][kind]:.2f}" for kind, label in {"all": "right", **KINDS}.items() if kind in run[split]
    }
