"""The page of the demo: four tabs of Gradio around what `<method>_demo.py` does.

Mistakes of a visitor come back as a sentence above the last result, which stays.
"""

import functools
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.utils import logging

from .dynamic_llava_demo import MAX_QUESTION, DynamicLlavaDemo
from .kdfs_demo import KDFSDemo, digit_examples
from .pictures_demo import MAX_BYTES, STYLE, block, paragraph
from .pix2pix_demo import MAX_STRENGTH, TITLES, Pix2PixDemo
from .toe_demo import PRESETS, ToEDemo


logger = logging.get_logger(__name__)

PHOTOS = ("astronaut", "chelsea", "coffee")  # inside the scikit-image wheel
TITLE = "hf_efficient: four methods to try"


def make_theme(gradio: Any) -> Any:
    """Make the default theme on the fonts of the system: nothing is fetched from elsewhere.

    Args:
        gradio: The module.

    Returns:
        `gradio.themes.Default`
    """
    return gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build_demo(checkpoints: Any, gradio: Any) -> Any:
    """Build the page with its four tabs.

    Args:
        checkpoints ([`Checkpoints`]): What the tabs show.
        gradio: The module.

    Returns:
        `gradio.Blocks`: Not yet served.
    """
    folder = Path(tempfile.mkdtemp(prefix="hf_efficient_demo_"))
    photos = _write_photos(folder)
    with gradio.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gradio.Markdown(
            "# Four methods to try\n"
            "Published methods that make vision models cheaper to train and to run, on small checkpoints and a CPU. "
            "Uploads stay on the machine that runs this page and are deleted within two hours."
        )
        with gradio.Tab("LLaVA"):
            _llava_tab(gradio, DynamicLlavaDemo(checkpoints.llava))
        with gradio.Tab("ToE"):
            _toe_tab(gradio, ToEDemo(checkpoints.toe), photos)
        with gradio.Tab("KDFS"):
            _kdfs_tab(gradio, KDFSDemo(checkpoints.kdfs, checkpoints.kdfs_dense), photos, folder)
        with gradio.Tab("Pix2Pix"):
            _pix2pix_tab(gradio, Pix2PixDemo(checkpoints.pix2pix), photos)
    app.forget_examples = weakref.finalize(app, shutil.rmtree, folder, ignore_errors=True)  # at the latest at exit
    return app


def _write_photos(folder: Path) -> list[list[str]]:
    """Write the example photographs of scikit-image, if it is installed; one list for each, as an example."""
    try:
        from skimage import data
    except ImportError:
        return []
    files = []
    for name in PHOTOS:
        file = folder / f"{name}.jpg"
        Image.fromarray(getattr(data, name)()).convert("RGB").save(file, quality=92)
        files.append([str(file)])
    return files


# ------------------------------------------------------------------------------------------------------------ tabs


def _answer_in_words(gradio: Any, function: Callable, outputs: int) -> Callable:
    """Let a function return a message first: empty, or a sentence, and then the last result stays."""

    @functools.wraps(function)
    def answer(*args: Any) -> tuple:
        try:
            result = function(*args)
        except (ValueError, OSError, ImportError) as error:
            message = " ".join(str(error).split()) or type(error).__name__
        except Exception:
            logger.exception("The demo met an error of its own.")
            message = "The demo met an error of its own; the terminal that runs it shows which. Try something else."
        else:
            return ("", *(result if isinstance(result, tuple) else (result,)))
        return (block(paragraph(message, "trouble")), *(gradio.skip() for _ in range(outputs)))

    return answer


def _picture_input(gradio: Any) -> Any:
    """An upload that hands over the file as it is, so that a wrong one is answered by us and not by Gradio."""
    looks = {"label": "Picture", "height": 260, "elem_classes": "hfe-shown"}
    picture = gradio.Image(type="filepath", sources=["upload", "clipboard"], **looks)
    picture.preprocess = lambda payload: None if payload is None else payload.path
    return picture


def _llava_tab(gradio: Any, demo: DynamicLlavaDemo) -> None:
    names = list(demo.folders)
    first = names[0] if names else None
    rate, judges = demo.rates(first) if first else (0.2, False)
    with gradio.Row():
        with gradio.Column(scale=2, min_width=280):
            if not names:
                gradio.HTML(
                    block(paragraph("No sparse LLaVA is here: start the demo from a clone or with --llava.", "note"))
                )
            name = gradio.Radio(names, value=first, label="Checkpoint")
            picture = _picture_input(gradio)
            question = gradio.Textbox(label="Question", max_length=2 * MAX_QUESTION, placeholder="what shape is it?")
            image_rate = gradio.Slider(0.05, 1, rate, step=0.05, label="Image tokens kept, share")
            as_trained = gradio.Checkbox(True, label="Keep words as trained", visible=judges)
            word_rate = gradio.Slider(
                0,
                1,
                0.5,
                step=0.05,
                label="Words of the answer kept, share aimed at",
                info="the predictor's best words, by the scores of a first answer",
                visible=False,
            )
            button = gradio.Button("Ask", variant="primary", interactive=bool(names), elem_id="ask")
        with gradio.Column(scale=3, min_width=300):
            message = gradio.HTML(elem_id="llava-message")
            result = gradio.HTML(elem_id="llava-result")
    examples = demo.examples()
    if examples:
        gradio.Examples(examples, [name, picture, question], label="Examples", cache_examples=False)

    def adapt(chosen: str, trained: bool) -> tuple:
        kept, words = demo.rates(chosen)
        return gradio.update(value=kept), gradio.update(visible=words), gradio.update(visible=words and not trained)

    name.change(adapt, [name, as_trained], [image_rate, as_trained, word_rate], show_progress="hidden")
    as_trained.input(lambda trained: gradio.update(visible=not trained), as_trained, word_rate, show_progress="hidden")
    inputs = [name, picture, question, image_rate, as_trained, word_rate]
    ask = _answer_in_words(gradio, demo.ask, 1)
    gradio.on([button.click, question.submit], ask, inputs, [message, result], show_progress_on=result, api_name=False)


def _toe_tab(gradio: Any, demo: ToEDemo, photos: list[list[str]]) -> None:
    with gradio.Row():
        with gradio.Column(scale=2, min_width=280):
            gradio.HTML(block(paragraph(demo.about(), "note")))
            picture = _picture_input(gradio)
            preset = gradio.Dropdown(list(PRESETS), value=next(iter(PRESETS)), label="Schedule: patches by stage")
            button = gradio.Button("Show the stages", variant="primary", elem_id="stages")
        with gradio.Column(scale=3, min_width=300):
            message = gradio.HTML(elem_id="toe-message")
            result = gradio.HTML(elem_id="toe-result")
    if photos:
        gradio.Examples(photos, [picture], label="Examples", cache_examples=False)
    show = _answer_in_words(gradio, demo.show, 1)
    button.click(show, [picture, preset], [message, result], show_progress_on=result, api_name=False)


def _kdfs_tab(gradio: Any, demo: KDFSDemo, photos: list[list[str]], folder: Path) -> None:
    digits = demo.checkpoint is None

    def train(progress: Any = gradio.Progress()) -> str:  # noqa: B008 - Gradio finds its progress bar by the default
        return demo.train_digits(lambda share, text: progress(share, desc=text))

    with gradio.Row():
        with gradio.Column(scale=2, min_width=280):
            gradio.HTML(block(paragraph(demo.about(), "note")))
            if digits:
                start = gradio.Button("Train and prune on digits", variant="primary", elem_id="train")
            picture = _picture_input(gradio)
            button = gradio.Button(
                "Compare dense and pruned", variant="secondary" if digits else "primary", elem_id="compare"
            )
        with gradio.Column(scale=3, min_width=300):
            message = gradio.HTML(elem_id="kdfs-message")
            result = gradio.HTML(elem_id="kdfs-result")
    examples = digit_examples(folder) if digits else photos
    if examples:
        gradio.Examples(examples, [picture], label="Examples", cache_examples=False)
    if digits:
        begin = _answer_in_words(gradio, train, 1)
        start.click(begin, [], [message, result], show_progress_on=result, api_name=False)
    compare = _answer_in_words(gradio, demo.compare, 1)
    button.click(compare, [picture], [message, result], show_progress_on=result, api_name=False)


def _pix2pix_tab(gradio: Any, demo: Pix2PixDemo, photos: list[list[str]]) -> None:
    methods = [(title, method) for method, title in TITLES.items()]
    with gradio.Row():
        with gradio.Column(scale=2, min_width=280):
            gradio.HTML(block(paragraph(demo.about(), "note")))
            picture = _picture_input(gradio)
            method = gradio.Radio(methods, value=methods[0][1], label="Cartoonizer")
            strength = gradio.Slider(
                0, MAX_STRENGTH, 3, step=1, label="Strength", info="0 leaves the picture: for a cartoon of your own"
            )
            words = "Cartoonize and translate" if demo.checkpoint else "Cartoonize"
            button = gradio.Button(words, variant="primary", elem_id="translate")
        with gradio.Column(scale=3, min_width=300):
            message = gradio.HTML(elem_id="pix2pix-message")
            with gradio.Row():
                shown = {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"]}
                shown |= {"height": 300, "min_width": 220, "elem_classes": "hfe-shown"}
                cartoon = gradio.Image(label="Cartoon", elem_id="cartoon", **shown)
                photo = gradio.Image(label="Translated", elem_id="photo", visible=demo.checkpoint is not None, **shown)
            result = gradio.HTML(elem_id="pix2pix-result")
    if photos:
        gradio.Examples(photos, [picture], label="Examples", cache_examples=False)
    run, outputs = _answer_in_words(gradio, demo.run, 3), [message, cartoon, photo, result]
    button.click(run, [picture, method, strength], outputs, show_progress_on=result, api_name=False)


__all__ = ["MAX_BYTES", "STYLE", "build_demo", "make_theme"]
