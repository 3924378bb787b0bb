"""`hf-efficient report`: load a model, make an input for it, and print what it costs."""

import argparse
from pathlib import Path
from typing import Any


PROMPT = "What is in the picture?"
_SCHEDULES = ("deit", "lv-vit", "efficient-train", "fast", "off")
_LEAST = {"batch_size": 1, "new_tokens": 2, "repeats": 1, "threads": 1, "size": 1}


class Report:
    """Measure multiply-adds, time, memory and cache of a model, phase by phase, and say what is gained.

    MODEL is a Hub id or a folder: a LLaVA (a sparse one is compared with itself with sparsity off), a vision
    transformer (training steps in the stages of ToE against all tokens), a pruned CNN, a Pix2Pix generator or another
    image model, which --baseline gives something to be compared with. Without --image the picture is one that
    scikit-image brings or, without that package, noise; the report says which.

    Examples:
      hf-efficient report ./model_cards/dynamic-llava-scenes --image photo.png --plot report.png
      hf-efficient report ./pruned --baseline user/resnet-18 --batch-size 8 --threads 1 --json report.json
      hf-efficient report google/vit-base-patch16-224 --toe fast --repeats 5 --quiet --json -
    """

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of `report` to `parser`."""
        add = parser.add_argument
        add("model", metavar="MODEL", help="Hub id or folder")
        add("--baseline", metavar="MODEL", help="second model on the same input, to compare with")
        add("--image", metavar="FILE", help="picture (default: one of scikit-image's, or noise)")
        add("--prompt", metavar="TEXT", help=f"question to a LLaVA (default: {PROMPT})")
        add("--size", type=int, metavar="N", help="side of the picture in pixels (default: as the model is used)")
        add("--batch-size", type=int, default=1, metavar="N", help="copies of the input (default: 1)")
        add("--new-tokens", type=int, default=32, metavar="N", help="answer tokens of a LLaVA (default: 32)")
        add("--repeats", type=int, default=9, metavar="N", help="timed rounds (default: 9)")
        add("--threads", type=int, metavar="N", help="threads of torch (default: as it is set)")
        add("--device", help="such as cpu or cuda:0 (default: a GPU where there is one)")
        add("--dtype", default="float32", help="of the weights (default: float32)")
        add("--toe", choices=_SCHEDULES, help="schedule for a vision transformer (default: deit, where it fits)")
        add("--plot", metavar="FILE", help="also write the picture of the report (.png, .svg or .pdf)")
        add("--trust-remote-code", action="store_true", help="run code that comes with a model")

    @staticmethod
    def run(arguments: argparse.Namespace) -> dict[str, Any]:
        """Load, measure, and show the table and the verdict."""
        import torch

        from .model_report import efficiency_report

        _check(arguments)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(arguments.threads or threads)
            picture, shown = _open_picture(arguments.image)
            auto, model = _load(arguments.model, arguments)
            other, baseline = (
                _load(arguments.baseline, arguments, "--baseline") if arguments.baseline else (auto, None)
            )
            if other is not auto:
                raise ValueError(
                    f"--baseline {arguments.baseline} is of another kind ({type(baseline).__name__}) than the model "
                    f"({type(model).__name__}): name a model that takes the same input."
                )
            inputs, toe = _make_inputs(auto.__name__, model, picture, arguments)
            counts = {"repeats": arguments.repeats, "new_tokens": arguments.new_tokens}
            report = efficiency_report(model, inputs, baseline, toe=toe, **counts)
            values = report.to_dict() | {"model": arguments.model, "picture": shown}
        finally:
            torch.set_num_threads(threads)
        lines = [arguments.model, *str(report).split("\n"), f"Picture: {shown}."]
        if arguments.plot:
            values["plot"] = str(report.plot(arguments.plot))
            lines.append(f"Wrote {arguments.plot}.")
        printable = ("".join(filter(str.isprintable, line)) for line in lines)
        return {**values, "text": "\n".join(printable)}


def _check(arguments: argparse.Namespace) -> None:
    """Refuse wrong options before anything is loaded."""
    import torch

    for name, low in _LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, got {value}.")
    dtype = getattr(torch, arguments.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"--dtype must be a floating point dtype such as float32 or bfloat16, got {arguments.dtype!r}."
        )
    try:
        torch.zeros(1, device=arguments.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device must be one that torch can use here, such as cpu, got {arguments.device!r}."
        ) from error
    if arguments.plot:
        from hf_efficient.results import check_target

        from .figures_report import check_ending

        check_target("--plot", check_ending(arguments.plot))


def _open_picture(file: str | None) -> tuple[Any, str]:
    """A picture and what it is, in words."""
    import numpy as np
    from PIL import Image

    if file is not None:
        try:
            with Image.open(Path(file)) as image:
                return image.convert("RGB"), Path(file).name
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"--image {file} cannot be read as a picture: {error}") from error
    try:
        from skimage import data
    except ImportError:
        noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
        return Image.fromarray(noise), "512 x 512 pixels of noise, since scikit-image is not installed"
    return Image.fromarray(data.astronaut()), "scikit-image's astronaut"


def _trust(arguments: argparse.Namespace) -> dict[str, bool]:
    return {"trust_remote_code": True} if arguments.trust_remote_code else {}


def _load(name: str, arguments: argparse.Namespace, argument: str = "MODEL") -> tuple[Any, Any]:
    """The Auto class that fits a checkpoint, and the model on its device."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, **_trust(arguments))
    except (OSError, ValueError, KeyError) as error:
        where = "holds no configuration" if Path(name).is_dir() else "is no folder here and no Hub id"
        reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
        raise ValueError(f"{argument} {name} {where} that could be loaded ({reason}).") from error
    auto = _choose_auto(config, argument)
    dtype = getattr(torch, arguments.dtype)
    try:
        model = auto.from_pretrained(name, config=config, dtype=dtype, **_trust(arguments))
    except (SafetensorError, RuntimeError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise ValueError(
            f"{argument} {name} holds weights that cannot be read ({reason}): take another copy."
        ) from error
    return auto, model.to(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def _choose_auto(config: Any, argument: str = "MODEL") -> Any:
    import transformers as t

    kinds = [
        (t.AutoModelForImageTextToText, t.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, ("llava", "dynamic_llava")),
        (t.AutoModelForImageToImage, t.MODEL_FOR_IMAGE_TO_IMAGE_MAPPING, None),
        (t.AutoModelForImageClassification, t.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, None),
    ]
    own = getattr(config, "auto_map", None) or {}
    for auto, mapping, model_types in kinds:
        known = type(config) in mapping or auto.__name__ in own
        if known and (model_types is None or config.model_type in model_types):
            return auto
    raise ValueError(
        f"{argument} must be a LLaVA-1.5, an image classifier or an image-to-image model, got {config.model_type!r}: "
        "call hf_efficient.efficiency_report(model, inputs) in Python for any other."
    )


def _make_inputs(auto: str, model: Any, picture: Any, arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Inputs for the model, and the schedule of ToE (False measures the forward pass)."""
    import torch

    from hf_efficient.toe.configuration_toe import ToEConfig

    from .toe_report import can_train_with_toe

    classifies, count = auto == "AutoModelForImageClassification", arguments.batch_size
    if not classifies and arguments.toe not in (None, "off"):
        raise ValueError(
            f"--toe {arguments.toe} is for a vision transformer that classifies, not a {type(model).__name__}: leave "
            "it out."
        )
    if auto == "AutoModelForImageTextToText":
        return _ask(model, picture, arguments), None
    if arguments.prompt is not None:
        raise ValueError(f"--prompt is for a LLaVA, but {arguments.model} takes no text: leave it out.")
    pixels = _make_pixels(classifies, model.config, picture, arguments)
    inputs = {"pixel_values": pixels.repeat(count, 1, 1, 1).to(model.dtype)}
    if not classifies or arguments.toe == "off" or (arguments.toe is None and not can_train_with_toe(model)):
        return inputs, False
    return inputs | {"labels": torch.zeros(count, dtype=torch.long)}, ToEConfig.preset(arguments.toe or "deit")


def _ask(model: Any, picture: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the processor of a LLaVA makes of a question about the picture."""
    from transformers import AutoProcessor

    if arguments.size is not None:
        raise ValueError("--size does not fit a LLaVA, whose vision tower has a size of its own: leave it out.")
    processor = AutoProcessor.from_pretrained(arguments.model, **_trust(arguments))
    prompt, token = PROMPT if arguments.prompt is None else arguments.prompt, processor.image_token
    if token in prompt:
        raise ValueError(f"--prompt must be words alone, got {token!r} in it, which stands for the picture.")
    text = f"{token}\n{prompt}"
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    count = arguments.batch_size
    inputs = processor(text=[text] * count, images=[picture] * count, return_tensors="pt")
    return {**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}


def _make_pixels(classifies: bool, config: Any, picture: Any, arguments: argparse.Namespace) -> Any:
    """Pixels `(1, channels, height, width)`: by the processor of a classifier, or scaled to [-1, 1]."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor

    size = arguments.size
    if size is None and classifies:
        try:
            processor = AutoImageProcessor.from_pretrained(arguments.model, **_trust(arguments))
            return processor(images=[picture], return_tensors="pt")["pixel_values"]
        except OSError:  # none was saved: the configuration may know the size
            size = (getattr(config, "input_shape", None) or [None])[-1]
    size = size or getattr(config, "image_size", None)
    if not isinstance(size, int):
        raise ValueError(f"{arguments.model} does not say how large its pictures are: give --size.")
    divisor = getattr(config, "size_divisor", 1)
    if size % divisor:
        raise ValueError(f"--size must be a multiple of {divisor} for this generator, got {size}.")
    channels = getattr(config, "num_channels", 3)
    if channels not in (1, 3):
        raise ValueError(
            f"{arguments.model} takes {channels} channels, and a picture has 1 or 3: call "
            "hf_efficient.efficiency_report(model, inputs) in Python."
        )
    square = picture.convert("L" if channels == 1 else "RGB").resize((size, size), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.asarray(square).copy()).reshape(size, size, channels).permute(2, 0, 1)
    return values[None].float() / 127.5 - 1
