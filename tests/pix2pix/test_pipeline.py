"""One image, lists, columns, generators, URLs and batches of unequal sizes; one broken file stops nothing."""

import base64
import io
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import ViTConfig, ViTModel, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from hf_efficient import ImageToImagePipeline, Pix2PixConfig, Pix2PixImageProcessor, Pix2PixModel
from hf_efficient.pix2pix import ImageToImageError


@pytest.fixture
def pipe(tiny_model):
    return pipeline("image-to-image", model=tiny_model, device="cpu")


@pytest.fixture
def expected(pipe, picture_folder):
    """Answers of the bare model to each picture of the folder, one at a time."""
    processor, answers = Pix2PixImageProcessor.for_model(pipe.model.config), []
    for path in sorted(picture_folder.iterdir()):
        image = Image.open(path)
        with torch.no_grad():
            output = pipe.model(**processor(image, return_tensors="pt"))
        answers.append(processor.post_process_image_to_image(output, [(image.height, image.width)])[0])
    return answers


def same(answers, expected):
    answers = list(answers)
    assert [answer.size for answer in answers] == [image.size for image in expected]
    for answer, image in zip(answers, expected):  # batched convolutions may round differently: one grey value
        assert np.abs(np.asarray(answer, int) - np.asarray(image, int)).max() <= 1
    return True


def test_the_task_is_back_and_a_model_instance_needs_no_processor(pipe):
    assert type(pipe) is ImageToImagePipeline
    assert "image-to-image" in transformers.pipelines.get_supported_tasks()
    assert pipe.image_processor.size_divisor == 8
    with pytest.raises(KeyError, match="removed"):  # the other removed tasks stay removed
        pipeline("summarization", model=pipe.model)


def test_every_way_to_name_one_image(pipe, picture_folder, expected):
    path = sorted(picture_folder.iterdir())[1]
    data = path.read_bytes()
    encoded = base64.b64encode(data).decode()
    array = np.asarray(Image.open(path))
    kinds = [str(path), path, Image.open(path), array, torch.from_numpy(array.copy()), data, encoded]
    kinds += [f"data:image/png;base64,{encoded}", {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}]
    kinds += [array.transpose(2, 0, 1), array / 255, io.BytesIO(data), path.open("rb"), bytearray(data)]
    kinds += [memoryview(data)]
    for kind in kinds:
        answer = pipe(kind)
        assert isinstance(answer, Image.Image)
        same([answer], expected[1:2])


def test_every_mode_of_image_comes_back_in_its_size(pipe, picture):
    image = picture(11, 18)
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "F", "HSV"):
        converted = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else None
        answer = pipe(converted or image.convert(mode))
        assert (answer.size, answer.mode) == (image.size, "RGB"), mode


def test_a_turned_photograph_comes_back_upright(pipe, tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(11, 18).save(tmp_path / "turned.png", exif=exif)
    upright = picture(11, 18).rotate(270, expand=True)
    for kind in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        answer = pipe(kind)
        assert answer.size == (11, 18)
        same([answer], [pipe(upright)])


def test_a_model_that_returns_tuples_is_asked_for_more(pipe, picture):
    expected = pipe(picture())
    pipe.model.config.return_dict = False  # as for an export to ONNX
    same([pipe(picture())], [expected])


def test_transparent_pixels_are_laid_over_white(pipe, picture):
    see_through = picture(11, 18).convert("RGBA")
    see_through.putalpha(Image.linear_gradient("L").resize(see_through.size))
    white = Image.alpha_composite(Image.new("RGBA", see_through.size, "white"), see_through).convert("RGB")
    same([pipe(see_through)], [pipe(white)])


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_lists_columns_and_streams_of_unequal_sizes(pipe, picture_folder, expected, batch_size):
    paths = [str(path) for path in sorted(picture_folder.iterdir())]
    table = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    opened = [[Image.open(path) for path in paths], [io.BytesIO(Path(path).read_bytes()) for path in paths]]
    for collection in (paths, tuple(paths), table["image"], *opened):
        answers = pipe(collection, batch_size=batch_size)
        assert isinstance(answers, list)
        same(answers, expected)
    streams = [(path for path in paths), iter(paths), KeyDataset(table, "image"), (row["image"] for row in table)]
    for stream in streams:
        answers = pipe(stream, batch_size=batch_size)
        assert not isinstance(answers, list)
        same(answers, expected)
    raw = table.cast_column("image", datasets.Image(decode=False))
    same(pipe(raw["image"], batch_size=batch_size), expected)
    assert pipe([]) == []


def test_a_stream_is_read_one_batch_at_a_time(pipe, picture):
    read = []

    def images():
        for index in range(100):
            read.append(index)
            yield picture(8, 8)

    next(pipe(images(), batch_size=2))
    assert len(read) <= 6


def test_arrays_of_four_axes_are_batches(pipe, picture):
    images = [np.asarray(picture(8, 8)), np.asarray(picture(8, 8))[::-1]]
    same(pipe(np.stack(images)), [pipe(image.copy()) for image in images])


def test_urls(pipe, picture_folder, expected):
    handler = partial(SimpleHTTPRequestHandler, directory=str(picture_folder))
    handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        same(pipe([f"{address}/{index}.png" for index in range(3)], timeout=10), expected)
        with pytest.raises(ImageToImageError, match="404"):
            pipe(f"{address}/missing.png")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_broken_file_does_not_stop_the_batch(pipe, picture_folder, expected, batch_size):
    paths = [str(path) for path in sorted(picture_folder.iterdir())]
    text = picture_folder / "notes.png"
    text.write_text("no image")
    cut = picture_folder / "cut.png"
    cut.write_bytes((picture_folder / "0.png").read_bytes()[:100])
    inputs = [paths[0], str(text), paths[1], "nowhere.png", str(cut), None, paths[2]]
    with pytest.raises(ImageToImageError) as caught:
        pipe(inputs, batch_size=batch_size)
    error = caught.value
    assert sorted(error.failures) == [1, 3, 4, 5]
    for name in ("notes.png", "nowhere.png", "cut.png", "NoneType"):
        assert name in str(error)
    assert [result is None for result in error.results] == [False, True, False, True, True, True, False]
    same([result for result in error.results if result is not None], expected)
    with pytest.raises(ImageToImageError, match=r"The input could not be translated \(.*notes\.png: .*\)\.$"):
        pipe(str(text))
    with pytest.raises(ImageToImageError, match="imagesab: no such file, and neither a URL nor the base64 of an"):
        pipe("imagesab")  # decodes as base64, but to no image
    for kind, what in ((None, "NoneType"), (3, "int")):
        with pytest.raises(ImageToImageError, match=rf"\({what}: an image must be a path, URL, .*\)\.$"):
            pipe(kind)
    with pytest.raises(ImageToImageError, match=r"^The input could not be translated \(bytes: no picture\)\.$"):
        pipe(b"no image")
    for file in (io.BytesIO(b"no image"), bytearray(b"no image")):
        with pytest.raises(ImageToImageError, match=rf"\({type(file).__name__}: no picture\)\.$"):
            pipe(file)
    with pytest.raises(ImageToImageError, match=r"\(StringIO: a file must be opened in binary mode\)\.$"):
        pipe(io.StringIO("no image"))
    with pytest.raises(ImageToImageError, match=r"Is a directory"):
        pipe(picture_folder)
    with pytest.raises(ImageToImageError, match=r"\([^(]*cut\.png: no readable picture: image file is truncated"):
        pipe(str(cut))
    with pytest.raises(ImageToImageError, match=r"\(nowhere\.png: No such file or directory\)"):
        pipe(Path("nowhere.png"))


class ReadsItsRows(torch.utils.data.Dataset):
    """Has a method of the name that files have, but holds several images."""

    def __init__(self, rows):
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, position):
        return self.read(position)

    def read(self, position):
        return self.rows[position]


@pytest.mark.parametrize("make_stream", [iter, ReadsItsRows])
def test_a_broken_file_in_a_stream_is_named_at_its_end(make_stream, pipe, picture_folder, expected):
    paths = [str(path) for path in sorted(picture_folder.iterdir())]
    stream, seen = pipe(make_stream([paths[0], "nowhere.png", *paths[1:]])), []
    with pytest.raises(ImageToImageError, match=r"item 1: nowhere\.png") as caught:
        seen.extend(stream)
    assert seen[1] is None
    same([answer for answer in seen if answer is not None], expected)
    assert list(caught.value.failures) == [1]


def test_a_model_that_gives_no_image_is_named(tmp_path, picture):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    model = ViTModel(ViTConfig(hidden_size=8, intermediate_size=8, **sizes))
    pipe = ImageToImagePipeline(model=model, image_processor=Pix2PixImageProcessor(size_divisor=16), device="cpu")
    with pytest.raises(ValueError, match="must be an image-to-image model, but ViTModel gives no image back"):
        pipe(picture(16, 16))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`model_type` must be 'pix2pix', this checkpoint has 'vit'"):
        Pix2PixModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [(40, 30), (5, 7)])
def test_a_processor_that_resizes_still_gives_the_size_back(tiny_model, picture, size):
    processor = Pix2PixImageProcessor.for_model(tiny_model.config, do_resize=True)
    pipe = ImageToImagePipeline(model=tiny_model, image_processor=processor, device="cpu")
    answers = pipe([picture(*size), picture(16, 16)], batch_size=2)
    assert answers[0].size == size[::-1]
    small = picture(*size).resize((16, 16), Image.Resampling.BICUBIC)
    expected = pipe(small).resize(size[::-1], Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(answers[0], int) - np.asarray(expected, int)).max() <= 2


def test_a_wrong_call_is_named(pipe, picture):
    table = datasets.Dataset.from_dict({"photo": ["a.png"]})
    with pytest.raises(TypeError, match=r"\['photo'\], as in pipe\(table\['photo'\]\)"):
        pipe(table)
    with pytest.raises(TypeError, match=r"\['photo'\], as in pipe\(table\['test'\]\['photo'\]\)"):
        pipe(datasets.DatasetDict(test=table))
    with pytest.raises(TypeError, match=r"\['photo'\], as in pipe\(table\['photo'\]\)"):
        pipe(table.to_iterable_dataset())
    with pytest.raises(TypeError, match=r"one of its columns, as in pipe\(table\['image'\]\)"):
        pipe(datasets.IterableDataset.from_generator(lambda: iter([{"image": picture()}])))
    with pytest.raises(TypeError, match="`strength`"):
        pipe(picture(), strength=3)


def test_large_images_use_the_device_and_dtype_of_the_model(tiny_model, picture):
    reference = pipeline("image-to-image", model=tiny_model, device="cpu")(picture(24, 40))
    half = pipeline("image-to-image", model=tiny_model.to(torch.bfloat16), device="cpu")
    answer = half(picture(24, 40))
    difference = np.abs(np.asarray(answer, int) - np.asarray(reference, int))
    assert answer.size == reference.size
    assert difference.mean() < 4


def test_a_model_that_was_just_trained_answers_as_in_evaluation(tiny_config, picture):
    torch.manual_seed(0)
    model = Pix2PixModel(Pix2PixConfig(**{**tiny_config.to_dict(), "norm": "batch", "dropout": 0.5})).train()
    pipe = pipeline("image-to-image", model=model)
    first, second = (np.asarray(pipe(picture())) for _ in range(2))
    assert not pipe.model.training
    assert np.array_equal(first, second)
