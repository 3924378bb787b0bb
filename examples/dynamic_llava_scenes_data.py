"""Scenes of coloured shapes with full descriptions: drawing, words, grading and the processor.

A scene is decided by one integer. It is a 64x64 picture with four to six objects on a 4x4 grid of places, and a
description of 60 to 120 words that names field (as on a chessboard), size, colour and shape of each object in reading
order, in varying sentences. `dynamic_llava_scenes.py` trains on them.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast


IMAGE_SIZE, PATCH_SIZE, CELL, GRID = 64, 8, 16, 4
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
SIZES = {"small": 4.6, "large": 7.2}  # half the width in pixels
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 220, 50),
    "purple": (150, 50, 185),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
FIELDS = tuple(column + row for row in "4321" for column in "abcd")  # as on a chessboard, in reading order
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
OPENINGS = (
    "this picture shows several shapes on a {tone} background .",
    "here is a {tone} scene with a few shapes .",
    "we look at a {tone} picture with shapes in it .",
)
SENTENCES = (
    "on the field {field} there is a {thing} .",
    "on the field {field} we can see a {thing} .",
    "next , on the field {field} , there is a {thing} .",
    "the field {field} of the grid holds a {thing} .",
    "then , on {field} , we find a {thing} .",
    "look at the field {field} for a {thing} .",
)
CLOSINGS = ("that makes {count} shapes in total .", "so there are {count} shapes here .")
PROMPTS = ("describe the picture .", "what do you see in the picture ?", "tell me what is in this scene .")
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{{ message['role'] }} :"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %} <image>{% elif part['type'] == 'text' %}"
    " {{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %} </s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
HELD_OUT_SEED = 1_000_000_000  # training uses the seeds below, the held-out scenes those from here on


@dataclass
class Scene:
    """One picture and its description; `objects` maps a cell (0..15, reading order) to size, colour and shape."""

    seed: int
    image: Image.Image
    objects: dict[int, tuple[str, str, str]]
    prompt: str
    description: str


def _draw(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, half: float, colour: tuple, scale: int) -> None:
    x, y, half = x * scale, y * scale, half * scale
    box = (x - half, y - half, x + half, y + half)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        inset = 0.12 * half
        pen.rectangle((box[0] + inset, box[1] + inset, box[2] - inset, box[3] - inset), fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - half), (x + half, y + half), (x - half, y + half)], fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=round(0.42 * half))
    else:
        arm = 0.3 * half
        pen.rectangle((x - arm, y - half, x + arm, y + half), fill=colour)
        pen.rectangle((x - half, y - arm, x + half, y + arm), fill=colour)


def make_scene(seed: int) -> Scene:
    """Draw and describe the scene of one seed."""
    random, scale = np.random.default_rng(seed), 3

    def pick(names):
        return names[random.integers(len(names))]

    cells = sorted(random.choice(GRID * GRID, size=random.integers(4, 7), replace=False).tolist())
    dark = random.random() < 0.5
    base = random.uniform(25, 70) if dark else random.uniform(195, 240)
    ground = base + random.uniform(-14, 14, 3) + np.linspace(-8, 8, IMAGE_SIZE * scale)[:, None, None]
    ground = ground.clip(0, 255).astype(np.uint8)  # (rows, 1, 3): a soft gradient from top to bottom
    image = Image.fromarray(np.repeat(ground, IMAGE_SIZE * scale, axis=1))
    pen, objects = ImageDraw.Draw(image), {}
    for cell in cells:
        size, colour, shape = (pick(names) for names in (list(SIZES), list(COLOURS), SHAPES))
        half = SIZES[size] + random.uniform(-0.4, 0.4)
        reach = CELL / 2 - half
        x = cell % GRID * CELL + CELL / 2 + random.uniform(-reach, reach)
        y = cell // GRID * CELL + CELL / 2 + random.uniform(-reach, reach)
        tint = tuple(int(np.clip(value + random.uniform(-18, 18), 0, 255)) for value in COLOURS[colour])
        _draw(pen, shape, x, y, half, tint, scale)
        objects[cell] = (size, colour, shape)
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image, dtype=np.float32) + 3 * random.standard_normal(
        (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32
    )
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    sentences = [pick(OPENINGS).format(tone="dark" if dark else "light")]
    for cell, thing in objects.items():
        sentences.append(pick(SENTENCES).format(field=FIELDS[cell], thing=" ".join(thing)))
    sentences.append(pick(CLOSINGS).format(count=NUMBERS[len(cells)]))
    description = " ".join(sentences)
    words = len(description.split())
    if not 60 <= words <= 120:
        raise ValueError(f"a description has 60 to 120 words, scene {seed} has {words}: change the sentences")
    return Scene(seed, image, objects, pick(PROMPTS), description)


def names_total(description: str, scene: Scene) -> bool:
    """Whether a description says how many shapes there are."""
    return f" {NUMBERS[len(scene.objects)]} shapes" in description


def build_processor() -> LlavaProcessor:
    """The processor of the scenes: CLIP images of 64x64, one token a word, padding on the left, a chat template."""
    text = " ".join((*OPENINGS, *SENTENCES, *CLOSINGS, *PROMPTS, *SIZES, *COLOURS, *SHAPES, *FIELDS, *NUMBERS))
    words = re.findall(r"\w+|[^\w\s]", re.sub(r"\{\w+\}", " ", text) + " light dark user assistant system :")
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocabulary = {word: index for index, word in enumerate([*special, *dict.fromkeys(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def conversation(prompt: str, image: Image.Image) -> list[dict]:
    """The messages that ask one question about one picture."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]


class SceneDataset(torch.utils.data.Dataset):
    """Scenes `first` to `first + length - 1` as model inputs; labels hide the prompt with -100."""

    def __init__(self, processor: LlavaProcessor, length: int, first: int = 0):
        self.tokenizer, self.length, self.first = processor.tokenizer, length, first
        images = "<image>" * IMAGE_TOKENS
        self.prompts = {text: self.tokenizer(f"<s>user : {images} {text} assistant :").input_ids for text in PROMPTS}

    def __len__(self):
        return self.length

    def __getitem__(self, index: int) -> dict:
        scene = make_scene(self.first + index)
        pixels = (np.asarray(scene.image, dtype=np.float32) / 255 - 0.5) / 0.5
        prompt = self.prompts[scene.prompt]
        answer = self.tokenizer(f"{scene.description} </s>").input_ids
        return {
            "pixel_values": torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
            "input_ids": torch.tensor(prompt + answer),
            "labels": torch.tensor([-100] * len(prompt) + answer),
        }

    def collate(self, rows: list[dict]) -> dict:
        """Pad a batch on the right; padding is neither attended nor labelled."""
        pad = torch.nn.utils.rnn.pad_sequence
        ids = [row["input_ids"] for row in rows]
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "input_ids": pad(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100),
        }


class PatchDataset(SceneDataset):
    """The same scenes for the tower: each patch names what lies in its cell.

    Labels are rank in reading order, size, colour, shape, own field and the next occupied field; 0 is "none".
    """

    def __getitem__(self, index: int) -> dict:
        scene = make_scene(self.first + index)
        pixels = (np.asarray(scene.image, dtype=np.float32) / 255 - 0.5) / 0.5
        cells, following = torch.zeros(GRID * GRID, 6, dtype=torch.long), [*list(scene.objects)[1:], -1]
        for rank, (cell, (size, colour, shape)) in enumerate(scene.objects.items(), start=1):
            names = (list(SIZES).index(size), list(COLOURS).index(colour), SHAPES.index(shape))
            cells[cell] = torch.tensor([rank, *(name + 1 for name in (*names, cell, following[rank - 1]))])
        side = CELL // PATCH_SIZE
        patches = cells.view(GRID, GRID, 6).repeat_interleave(side, 0).repeat_interleave(side, 1).view(-1, 6)
        return {"pixel_values": torch.from_numpy(pixels.transpose(2, 0, 1).copy()), "labels": patches}

    def collate(self, rows: list[dict]) -> dict:
        """Stack a batch."""
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
