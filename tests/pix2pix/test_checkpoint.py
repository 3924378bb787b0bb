"""Survives: every way to save, then every way to load, also where the package cannot be imported."""

import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageToImage,
    Swin2SRConfig,
    Swin2SRForImageSuperResolution,
    pipeline,
)
from transformers.dynamic_module_utils import check_imports, get_relative_import_files

from hf_efficient import ImageToImagePipeline, Pix2PixConfig, Pix2PixImageProcessor, Pix2PixModel


SHIPPED = [f"{role}_pix2pix.py" for role in ("configuration", "modeling", "image_processing", "pipeline")]
CLEAN = """
import os
import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageToImage, pipeline

root, picture, again = sys.argv[1:]
image = Image.open(picture)
expected = np.asarray(Image.open(os.path.join(root, "model", "expected.png")))
folders = {name: os.path.join(root, name) for name in sorted(os.listdir(root))}
for name, folder in {**folders, "hub": "somebody/pix2pix"}.items():
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "pix2pix"
    models = [auto.from_pretrained(folder, trust_remote_code=True) for auto in (AutoModel, AutoModelForImageToImage)]
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(image, return_tensors="pt")
    for model in models:
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        with torch.no_grad():
            answer = processor.post_process_image_to_image(model.eval()(**inputs), [image.size[::-1]])[0]
        assert np.array_equal(answer, expected), name
    pipes = [
        pipeline("image-to-image", model=folder, trust_remote_code=True),
        pipeline(model=folder, trust_remote_code=True),
    ]
    for pipe in pipes:
        assert np.array_equal(pipe(picture), expected), name
    try:
        pipeline("image-to-image", model=folder, trust_remote_code=False)
    except (ValueError, KeyError):
        pass
    else:
        raise SystemExit("ran code without trust")
    if name in ("model", "hub"):
        pipes[0].save_pretrained(os.path.join(again, name + "_pipe"))
        models[0].save_pretrained(os.path.join(again, name + "_model"))
for name in os.listdir(again):
    pipe = pipeline(model=os.path.join(again, name), trust_remote_code=True)
    assert np.array_equal(pipe(picture), expected), name
print("all loaded")
"""


@pytest.fixture
def saved(tmp_path: Path, tiny_model, picture) -> tuple[Path, Path]:
    """Folders of checkpoints saved in every way, each with the expected answer to one picture."""
    root, image_file = tmp_path / "saved", tmp_path / "picture.png"
    picture(21, 13).save(image_file)
    pipe = ImageToImagePipeline(model=tiny_model, image_processor=Pix2PixImageProcessor.for_model(tiny_model.config))
    tiny_model.save_pretrained(root / "model")
    pipe.save_pretrained(root / "pipe")
    for name in ("model", "pipe"):
        pipe(str(image_file)).save(root / name / "expected.png")
    repository = tmp_path / "hf_home" / "hub" / "models--somebody--pix2pix"  # what a download leaves in the cache
    shutil.copytree(root / "model", repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return root, image_file


def test_every_shipped_file_stands_on_its_own():
    folder = Path(__import__("hf_efficient").__file__).parent / "pix2pix"
    files = {Path(name).name for name in get_relative_import_files(folder / "modeling_pix2pix.py")}
    assert files | {"modeling_pix2pix.py"} == set(SHIPPED)
    for name in SHIPPED:
        check_imports(folder / name)
        text = (folder / name).read_text()
        assert "from __future__" not in text
        imports = [line for line in text.splitlines() if line.lstrip().startswith(("from ", "import "))]
        assert not [line for line in imports if "hf_efficient" in line]


def test_a_saved_checkpoint_holds_every_file(saved):
    for name in ("model", "pipe"):
        names = {path.name for path in (saved[0] / name).iterdir()}
        wanted = {*SHIPPED, "config.json", "model.safetensors", "preprocessor_config.json", "expected.png"}
        assert names == wanted, name  # nothing missing, no temporary file left


@pytest.mark.parametrize("name", ["model", "pipe"])
def test_loads_without_trust_where_the_package_is_installed(saved, name):
    root, image_file = saved
    folder = root / name
    expected = np.asarray(Image.open(folder / "expected.png"))
    assert type(AutoConfig.from_pretrained(folder)) is Pix2PixConfig
    for auto in (AutoModel, AutoModelForImageToImage):
        assert type(auto.from_pretrained(folder)) is Pix2PixModel
    assert type(AutoImageProcessor.from_pretrained(folder)) is Pix2PixImageProcessor
    for pipe in (pipeline("image-to-image", model=str(folder)), pipeline(model=str(folder))):
        assert type(pipe) is ImageToImagePipeline
        assert np.array_equal(pipe(str(image_file)), expected)


def test_loads_where_the_package_and_torchvision_are_missing(saved, tmp_path, clean_process):
    (tmp_path / "again").mkdir()
    done = clean_process(CLEAN, *saved, tmp_path / "again", block=("hf_efficient", "torchvision", "timm"))
    assert "all loaded" in done.stdout
    for folder in (tmp_path / "again").iterdir():  # saved by the remote code, loaded by the installed package
        pipe = pipeline("image-to-image", model=str(folder))
        assert type(pipe) is ImageToImagePipeline
        assert np.array_equal(pipe(str(saved[1])), Image.open(saved[0] / "model" / "expected.png"))


INSTALLED = """
import importlib.util
import hf_efficient
import numpy as np
from PIL import Image
from transformers import pipeline

assert not importlib.util.find_spec("torchvision")
for trust in (None, True):
    pipe = pipeline("image-to-image", model=sys.argv[1], trust_remote_code=trust)
    assert type(pipe) is hf_efficient.ImageToImagePipeline
    assert np.array_equal(pipe(sys.argv[2]), Image.open(sys.argv[1] + "/expected.png"))
print("all loaded")
"""


@pytest.mark.slow
def test_the_installed_package_needs_no_torchvision(saved, clean_process):
    done = clean_process(INSTALLED, saved[0] / "model", saved[1], block=("torchvision", "timm"))
    assert "all loaded" in done.stdout


@pytest.mark.slow
def test_loads_where_the_package_is_missing_and_torchvision_is_there(saved, tmp_path, clean_process):
    (tmp_path / "again").mkdir()
    assert "all loaded" in clean_process(CLEAN, *saved, tmp_path / "again").stdout


def test_architecture_comes_from_the_file(tmp_path):
    config = Pix2PixConfig(generator="resnet_6blocks", base_channels=4, norm="batch", dropout=0.0, image_size=16)
    Pix2PixModel(config).save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    assert len(loaded.network.blocks) == 6


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("generator", "resnet_9blocks", "blocks.6.conv1.bias is missing"),
        ("base_channels", 8, "is of another shape"),
        ("generator", "unet", "is missing"),
    ],
)
def test_weights_of_another_architecture_are_refused(tmp_path, field, value, what):
    Pix2PixModel(Pix2PixConfig(generator="resnet_6blocks", base_channels=4, image_size=256)).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, field: value}))
    with pytest.raises(ValueError, match=f"not those of the architecture in its configuration: .*{what}"):
        AutoModel.from_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True).config.to_dict()[field] == value


def test_left_over_weights_are_refused(tmp_path):
    Pix2PixModel(Pix2PixConfig(generator="resnet_9blocks", base_channels=4, image_size=16)).save_pretrained(tmp_path)
    config = Pix2PixConfig.from_pretrained(tmp_path, generator="resnet_6blocks")
    with pytest.raises(ValueError, match=r"blocks\.6\.conv1\.bias is left over"):
        Pix2PixModel.from_pretrained(tmp_path, config=config)


def test_a_stock_model_saved_through_the_pipeline_stays_stock(tmp_path, picture):
    sizes = {"depths": [1], "num_heads": [1], "embed_dim": 8, "window_size": 4, "image_size": 8, "upscale": 2}
    model = Swin2SRForImageSuperResolution(Swin2SRConfig(**sizes)).eval()
    from transformers import Swin2SRImageProcessorPil

    pipe = pipeline("image-to-image", model=model, image_processor=Swin2SRImageProcessorPil())
    first = pipe(picture(13, 10))
    assert first.size == (20, 26)  # twice the input, without the padding
    with torch.no_grad():
        raw = model(**Swin2SRImageProcessorPil()(picture(13, 10), return_tensors="pt")).reconstruction[0]
    expected = (raw.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()[:26, :20]
    assert np.array_equal(first, expected)
    for image in (np.asarray(picture(13, 10)), np.asarray(picture(13, 10)) / 255, picture(13, 10).convert("RGBA")):
        assert np.array_equal(pipe(image), first)
    pipe.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".py"]
    assert np.array_equal(pipeline("image-to-image", model=str(tmp_path))(picture(13, 10)), first)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, tiny_model, picture):
    tiny_model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    larger = Pix2PixModel(Pix2PixConfig(num_levels=3, base_channels=64, image_size=16))
    limit, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # no file may grow beyond 100 kB
    try:
        with pytest.raises(Exception, match=os.strerror(errno.EFBIG)):
            larger.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_over_a_differently_split_checkpoint(tmp_path, tiny_model):
    large = Pix2PixModel(Pix2PixConfig(num_levels=3, base_channels=8, image_size=16))
    large.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    tiny_model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*.safetensors*")] == ["model.safetensors"]
    large.save_pretrained(tmp_path, max_shard_size="30KB")
    loaded = AutoModel.from_pretrained(tmp_path)
    for name, value in large.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_saving_over_a_generator_of_another_depth(tmp_path, tiny_model, picture):
    tiny_model.save_pretrained(tmp_path)
    Pix2PixImageProcessor.for_model(tiny_model.config, do_resize=True).save_pretrained(tmp_path)
    tiny_model.save_pretrained(tmp_path)
    assert Pix2PixImageProcessor.from_pretrained(tmp_path).do_resize  # settings that fit are kept
    Pix2PixModel(Pix2PixConfig(num_levels=4, base_channels=4, image_size=16)).save_pretrained(tmp_path)
    assert pipeline("image-to-image", model=str(tmp_path))(picture(21, 8)).size == (8, 21)


def test_half_precision_weights_answer_like_float32_ones(tmp_path, tiny_model, picture):
    tiny_model.half().save_pretrained(tmp_path)
    pipe = pipeline("image-to-image", model=str(tmp_path), device="cpu")
    assert pipe.model.dtype == torch.float32
    reference = Pix2PixModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        raw = reference(**pipe.image_processor(picture(), return_tensors="pt"))
    assert np.array_equal(pipe(picture()), pipe.image_processor.post_process_image_to_image(raw)[0])
