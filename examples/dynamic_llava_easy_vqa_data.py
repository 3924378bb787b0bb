"""easy-VQA for a small LLaVA: images, questions, augmentation, processor and collator of `dynamic_llava_easy_vqa.py`.

easy-VQA (Victor Zhou, MIT) holds 5,000 pictures of 64 x 64 pixels, each with one coloured shape, and 48,248 questions
with 13 one-word answers. The data lie in the `easy-vqa` wheel; a folder of parquet files works too.

Run as a script it writes a sheet of training images and their augmented versions, with what is known about each:
    python examples/dynamic_llava_easy_vqa_data.py --output sheet.png
"""

import argparse
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SIZE, PATCH = 64, 8
TOKENS = (SIZE // PATCH) ** 2
IGNORED = -100
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% else %}{{ 'USER: ' }}{% endif %}
{%- if message['content'] is string %}{{ message['content'] }}
{%- else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}
{%- for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}
{%- endif %}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


@dataclass
class EasyVQA:
    """One split in memory.

    Attributes:
        relief (`torch.FloatTensor` of shape `(images, 3, 64, 64)`): Normalised pixels minus the background colour.
        background (`torch.FloatTensor` of shape `(images, 3, 1, 1)`): Most frequent colour of each image.
        box (`torch.FloatTensor` of shape `(images, 4)`): Left, top, right, bottom of the shape in pixels.
        questions, answers, image_of: One entry per question.
        shape, color (`torch.LongTensor` of shape `(images,)`): What the questions and answers of an image tell about
            it, -100 where they leave it open.
    """

    relief: Tensor
    background: Tensor
    box: Tensor
    questions: list[str]
    answers: list[str]
    image_of: list[int]
    shape: Tensor
    color: Tensor

    def pixels(self, images: Tensor, augment: bool = False) -> Tensor:
        """Normalised pixels `(batch, 3, 64, 64)` in [-1, 1], exactly what the image processor gives."""
        relief = self.relief[images]
        if augment:
            relief = warp(relief, self.box[images])
        return relief + self.background[images]

    def picture(self, image: int) -> Image.Image:
        """The picture itself."""
        pixels = ((self.pixels(torch.tensor([image]))[0] + 1) * 127.5).round().to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def load_easy_vqa(split: str, folder: str | None = None) -> EasyVQA:
    """Read `"train"` or `"test"` from the wheel, or from `{split}_images.parquet` and `{split}_questions.parquet`."""
    if folder is None:
        import easy_vqa

        paths = getattr(easy_vqa, f"get_{split}_image_paths")()
        pictures = [Image.open(paths[index]) for index in range(len(paths))]
        questions, answers, image_of = getattr(easy_vqa, f"get_{split}_questions")()
    else:
        from datasets import Dataset

        pictures = Dataset.from_parquet(str(Path(folder) / f"{split}_images.parquet"))["image"]
        rows = Dataset.from_parquet(str(Path(folder) / f"{split}_questions.parquet"))
        questions, image_of = list(rows["question"]), list(rows["image_id"])
        answers = [rows.features["answer"].int2str(answer) for answer in rows["answer"]]
    pixels = torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]))
    codes = (pixels.long() @ torch.tensor([1 << 16, 1 << 8, 1])).flatten(1).mode().values
    background = torch.stack([codes >> 16, codes >> 8 & 255, codes & 255], 1)  # (images, 3)
    relief = (pixels.int() - background[:, None, None]).permute(0, 3, 1, 2)  # (images, 3, 64, 64)
    inked = relief.abs().sum(1) > 30
    ruler = torch.arange(SIZE)
    edges = [
        pick(torch.where(inked.any(axis), ruler, fill), 1)
        for pick, fill in ((torch.amin, SIZE), (torch.amax, -1))
        for axis in (1, 2)
    ]
    box = torch.stack([edges[0], edges[1], edges[2] + 1, edges[3] + 1], 1).float()
    shape, color = read_facts(len(pixels), questions, answers, image_of)
    background = (background / 127.5 - 1)[:, :, None, None]
    return EasyVQA(relief / 127.5, background, box, questions, answers, image_of, shape, color)


def read_facts(images: int, questions: list[str], answers: list[str], image_of: list[int]) -> tuple[Tensor, Tensor]:
    """Shape and colour of every image, as far as its own questions and answers tell: by naming or by elimination."""
    open_facts = [(set(SHAPES), set(COLORS)) for _ in range(images)]
    for question, answer, image in zip(questions, answers, image_of, strict=True):
        negated = bool(re.search(r"\b(no|not)\b", question))
        for left, words in zip(open_facts[image], (SHAPES, COLORS), strict=True):
            named = {word for word in words if re.search(rf"\b{word}\b", question)}
            if answer in words:
                left &= {answer}
            elif answer not in ("yes", "no"):
                left &= named or left  # "what is the blue shape?"
            elif named and (answer == "yes") != negated:
                left &= named
            else:
                left -= named

    def number(left: set[str], words: tuple[str, ...]) -> int:
        return words.index(next(iter(left))) if len(left) == 1 else IGNORED

    shape = torch.tensor([number(shapes, SHAPES) for shapes, _ in open_facts])
    return shape, torch.tensor([number(colors, COLORS) for _, colors in open_facts])


def warp(relief: Tensor, box: Tensor) -> Tensor:
    """Move, mirror and (every second image) rescale the shape, always whole inside the picture."""
    batch = len(relief)
    size, centre = box[:, 2:] - box[:, :2], (box[:, 2:] + box[:, :2]) / 2
    scale = torch.empty(batch).uniform_(0.8, 1.25).minimum(SIZE / size.amax(1)).maximum(9 / size.amax(1))
    scale = torch.where(torch.rand(batch) < 0.5, scale, 1.0)[:, None]
    target = torch.rand(batch, 2) * (SIZE - size * scale) + size * scale / 2
    target = torch.where(scale == 1, centre + (target - centre).round(), target)  # whole pixels keep the edges sharp
    mirror = torch.stack([torch.where(torch.rand(batch) < 0.5, -1.0, 1.0), torch.ones(batch)], 1)
    step = mirror / scale
    offset = centre / 32 - 1 - (target / 32 - 1) * step
    affine = torch.cat([torch.diag_embed(step), offset[..., None]], 2)  # (batch, 2, 3)
    return F.grid_sample(relief, F.affine_grid(affine, list(relief.shape), align_corners=False), align_corners=False)


def make_processor(data: EasyVQA) -> LlavaProcessor:
    """A LLaVA processor whose vocabulary is the words of the training questions and answers."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"]
    words = sorted({word for text in data.questions + data.answers for word in re.findall(r"\w+|[^\w\s]+", text)})
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]+"), behavior="removed", invert=True)
    core.add_special_tokens(special)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def encode(data: EasyVQA, processor: LlavaProcessor) -> list[tuple[list[int], list[int]]]:
    """Token ids of every prompt (chat template, image placeholders expanded) and its answer with `</s>`."""
    known = {}
    for question in set(data.questions):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        prompt = prompt.replace("<image>", "<image>" * TOKENS)
        known[question] = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    end = processor.tokenizer.eos_token_id
    answers = {answer: [processor.tokenizer.convert_tokens_to_ids(answer), end] for answer in set(data.answers)}
    return [(known[q], answers[a]) for q, a in zip(data.questions, data.answers, strict=True)]


def balance(data: EasyVQA) -> list[float]:
    """Weight of every question: yes and no equally frequent for each wording, few with "no" or "not" in them."""
    pairs, texts = Counter(zip(data.questions, data.answers, strict=True)), Counter(data.questions)
    weights = []
    for text, answer in zip(data.questions, data.answers, strict=True):
        negated = " no " in text or " not " in text
        even = texts[text] / pairs[text, answer] * (0.25 if negated else 1.0)
        weights.append(even if answer in ("yes", "no") else 1.0)
    return weights


class QuestionCollator:
    """One question a row; prompt and padding carry the label -100, so that only the answer is learned."""

    def __init__(self, data: EasyVQA, processor: LlavaProcessor):
        self.data, self.pad, self.encoded = data, processor.tokenizer.pad, encode(data, processor)

    def __call__(self, rows: list[int]) -> dict[str, Tensor]:
        """Batch of the questions with the numbers `rows`."""
        texts = [self.encoded[row] for row in rows]
        batch = self.pad({"input_ids": [prompt + answer for prompt, answer in texts]}, return_tensors="pt")
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, (_, answer) in enumerate(texts):  # padded on the left: each answer ends its row
            labels[row, -len(answer) :] = torch.tensor(answer)
        images = torch.tensor([self.data.image_of[row] for row in rows])
        return {**batch, "labels": labels, "pixel_values": self.data.pixels(images, augment=True)}


def main() -> None:
    """Write a sheet of images, originals in the upper row of each pair and augmented ones below."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="easy_vqa_sheet.png", help="picture to write")
    parser.add_argument("--data", help="folder of parquet files instead of the easy-vqa wheel")
    parser.add_argument("--smoke", action="store_true", help="4 images only")
    options = parser.parse_args()
    data = load_easy_vqa("train", options.data)
    across = 2 if options.smoke else 12
    sheet = Image.new("RGB", (across * 100, 4 * 100), "white")
    for index in range(2 * across):
        for below in (False, True):
            pixels = ((data.pixels(torch.tensor([index]), below)[0] + 1) * 127.5).clamp(0, 255).to(torch.uint8)
            tile = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((96, 96))
            sheet.paste(tile, (index % across * 100, (index // across * 2 + below) * 100))
    sheet.save(options.output)
    known = [int((facts >= 0).sum()) for facts in (data.shape, data.color)]
    print(f"{len(data.shape)} images, shape known of {known[0]}, colour of {known[1]}; sheet in {options.output}")


if __name__ == "__main__":
    main()
