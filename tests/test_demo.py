"""The demo: what each tab answers, right and wrong input; in the slow tier every tab once in headless Chromium."""

import ast
import html
import os
import re
import struct
import sys
import tempfile
import zlib
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_efficient import (
    CifarResNetConfig,
    KDFSPrunedConfig,
    KDFSPrunedModelForImageClassification,
    Pix2PixConfig,
    Pix2PixModel,
    cli,
    count_flops,
)
from hf_efficient.demo import serve_demo
from hf_efficient.demo.dynamic_llava_demo import DynamicLlavaDemo, _find_threshold
from hf_efficient.demo.kdfs_demo import KDFSDemo
from hf_efficient.demo.pictures_demo import MAX_SIDE, OUTLINE, block, draw_patches, paragraph, read_picture, table
from hf_efficient.demo.pix2pix_demo import Pix2PixDemo
from hf_efficient.demo.toe_demo import PRESETS, ToEDemo
from hf_efficient.dynamic_llava import quickstart_dynamic_llava
from hf_efficient.kdfs.modeling_kdfs_pruned import build_network


REPOSITORY = Path(__file__).resolve().parent.parent
CARDS = REPOSITORY / "model_cards"
SPACE = REPOSITORY / "examples" / "space"
DEIT = next(iter(PRESETS))


def words(page: str) -> str:
    """What a visitor reads."""
    return html.unescape(re.sub(r"<[^>]+>", " ", page.replace("<wbr>", "")))


@pytest.fixture
def photo(tmp_path) -> str:
    """A picture of smooth colours, wider than high."""
    values = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    path = tmp_path / "a <b>photo.png"
    Image.fromarray(values).resize((150, 100), Image.Resampling.BICUBIC).save(path)
    return str(path)


@pytest.fixture
def wrong_files(tmp_path) -> dict[str, str]:
    """Name -> what the answer must say."""
    (tmp_path / "notes <i>.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) - 40])
    Image.new("RGB", (200, 3), "red").save(tmp_path / "thin.png")
    for name, side in (("giant.png", 9000), ("bomb.png", 60_000)):  # the header alone says how large they are
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + whole[33:])
    with open(tmp_path / "heavy.png", "wb") as file:
        file.truncate(21 * 2**20)
    return {
        "notes <i>.png": "notes <i>.png is not a picture",
        "empty.png": "is not a picture",
        "drawing.svg": "is not a picture",
        "broken.png": "broken.png is broken",
        "thin.png": "200 x 3 pixels, at least 8 x 8",
        "giant.png": "9000 x 9000 pixels, at most 50 million",
        "bomb.png": "pixels, at most 50 million",
        "heavy.png": "21 MB, at most 20",
    }


def test_wrong_uploads_are_answered_in_words(wrong_files, tmp_path):
    for name, sentence in wrong_files.items():
        with pytest.raises(ValueError, match=re.escape(sentence)):
            read_picture(str(tmp_path / name))
    with pytest.raises(ValueError, match="no picture yet"):
        read_picture(None)


def test_pictures_of_every_kind_are_read(tmp_path):
    Image.new("RGBA", (40, 30), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_picture(str(tmp_path / "clear.png")).getpixel((5, 5)) == (255, 255, 255)
    grey = Image.fromarray(np.full((20, 20), 257 * 100, dtype=np.uint16))
    grey.save(tmp_path / "deep.png")
    assert read_picture(str(tmp_path / "deep.png")).getpixel((5, 5)) == (100, 100, 100)
    turned = Image.new("RGB", (60, 20), "blue")
    exif = turned.getexif()
    exif[274] = 6  # turned by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(str(tmp_path / "turned.jpg")).size == (20, 60)
    Image.new("P", (3000, 1500)).save(tmp_path / "large.gif")
    assert read_picture(str(tmp_path / "large.gif")).size == (MAX_SIDE, MAX_SIDE // 2)


def test_dropped_patches_are_dimmed_and_kept_ones_outlined():
    mask = np.zeros((4, 4), dtype=bool)
    mask[1, 1:3] = True
    drawn = np.asarray(draw_patches(Image.new("RGB", (50, 50), (200, 0, 0)), mask))
    cell = len(drawn) // 4
    assert tuple(drawn[cell + cell // 2, cell + cell // 2]) == (200, 0, 0)
    assert drawn[5, 5, 0] < 120
    assert tuple(drawn[cell + cell // 2, cell]) == OUTLINE
    assert tuple(drawn[cell, 2 * cell]) == OUTLINE
    assert tuple(drawn[cell + cell // 2, 2 * cell]) == (200, 0, 0)  # no line between two kept ones
    grey = np.asarray(draw_patches(Image.new("RGB", (50, 50), (200, 0, 0)), np.ones((4, 4), dtype=bool), grey=True))
    assert len(set(grey[9, 9])) == 1


def test_text_cannot_become_markup():
    evil = "<img src=x onerror=alert(1)>"
    for page in (paragraph(evil), block(table([evil], [[evil]]))):
        assert "<img" not in page
        assert html.escape(evil) in page


# ------------------------------------------------------------------------------------------------- Dynamic-LLaVA


@pytest.fixture
def llava(monkeypatch) -> DynamicLlavaDemo:
    monkeypatch.setattr(quickstart_dynamic_llava, "REPEATS", 1)
    return DynamicLlavaDemo({"easy-VQA": CARDS / "dynamic-llava-easy-vqa", "scenes": CARDS / "dynamic-llava-scenes"})


def test_asking_shows_both_answers_and_what_was_kept(llava):
    sample = next(example for example in llava.examples() if example[0] == "easy-VQA")
    page = llava.ask(*sample, 0.2, True, 0.5)
    answers = re.findall(r'id="hfe-(\w+)">(\w+)<', page)
    assert answers == [("dense", "red"), ("sparse", "red")]
    text = words(page)
    assert "Dense: all 64 image tokens" in text
    assert "Sparse: 12 of 64 image tokens" in text
    assert re.search(r"image tokens kept\s+64\s+12\s+0\.19", text)
    assert "Both answers are the same." in text
    assert page.count("data:image/png;base64,") == 2


def test_everything_may_be_kept_and_unknown_words_are_named(llava, photo):
    page = llava.ask("easy-VQA", photo, "what color is the <b>elephant</b> ?", 1.0, True, 0.5)
    assert "<b>elephant" not in page
    text = words(page)
    assert "Sparse: 64 of 64 image tokens" in text
    assert "The model never learned b, elephant:" in text


def test_share_of_words_is_aimed_at(llava, monkeypatch):
    monkeypatch.setattr("hf_efficient.demo.dynamic_llava_demo.MAX_ANSWER", 9)
    name, path, question = next(example for example in llava.examples() if example[0] == "scenes")
    model, processor = llava.load(name)
    picture, rates = read_picture(path), {"vision_keep_rate": 0.4}
    thresholds = [_find_threshold(model, processor, picture, question, rates, share) for share in (0, 0.25, 0.75, 1)]
    assert thresholds == sorted(thresholds, reverse=True)
    assert (thresholds[0], thresholds[-1]) == (1.0, 0.0)
    page = llava.ask(name, path, question, 0.4, False, 0.75)
    kept = int(re.search(r"words of the answer kept\s+8\s+(\d)", words(page))[1])
    assert 4 <= kept < 8  # the scores of a first answer are those of this one but for what was dropped
    assert page.count('class="gone"') == 8 - kept


def test_questions_that_cannot_be_asked(llava, photo):
    for question, sentence in (
        ("  ", "question is empty"),
        ("a" * 301, "301 characters, at most 300"),
        ("what is <image>?", "own sign <image>"),
    ):
        with pytest.raises(ValueError, match=sentence):
            llava.ask("easy-VQA", photo, question, 0.2, True, 0.5)
    with pytest.raises(ValueError, match="no picture yet"):
        llava.ask("easy-VQA", None, "what shape is it?", 0.2, True, 0.5)
    with pytest.raises(ValueError, match="no sparse LLaVA here"):
        DynamicLlavaDemo({}).ask("easy-VQA", photo, "what?", 0.2, True, 0.5)
    assert llava.rates("easy-VQA") == (0.2, False)
    assert llava.rates("scenes") == (0.4, True)


# ----------------------------------------------------------------------------------------------------------- ToE


@pytest.fixture
def vit(tmp_path) -> str:
    folder = tmp_path / "vit-toe-cifar10"
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=4, **size)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def test_stages_of_a_checkpoint(vit, photo):
    page = ToEDemo(vit).show(photo, "fast: 30, 60, 100 %")
    text = words(page)
    for number, kept in ((1, 19), (2, 38), (3, 64)):
        assert re.search(rf"Stage {number}, .* of the training: {kept} of 64 patches", text)
    assert re.search(r"stage 2\s+38\s+19\s+0\.\d\d", text)
    assert "chosen by vit-toe-cifar10" in ToEDemo(vit).about()
    assert "32 x 32 pixels" in text
    assert page.count("<img ") == 3


def test_stages_of_a_model_that_names_its_size_elsewhere(tmp_path, photo):
    """CLIP has the size in its vision configuration, timm's wrapper in none that we know."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = CLIPConfig(vision_config={**size, "image_size": 24, "patch_size": 4}, text_config=size)
    CLIPForImageClassification(config).save_pretrained(tmp_path / "clip")
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "clip")
    text = words(ToEDemo(str(tmp_path / "clip")).show(photo, DEIT))
    assert "18 of 36 patches" in text
    assert "24 x 24 pixels" in text


def test_stages_without_a_checkpoint_say_that_nothing_was_learned(photo):
    state = torch.get_rng_state()
    page = ToEDemo().show(photo, DEIT)
    assert torch.equal(torch.get_rng_state(), state)
    text = words(page)
    for kept in (98, 147, 196):
        assert f"{kept} of 196 patches" in text
    assert "vit-toe-cifar10 is missing" in ToEDemo().about()
    assert "random weights" in ToEDemo().about()


# ---------------------------------------------------------------------------------------------------------- KDFS


@pytest.fixture
def pruned(tmp_path) -> tuple[str, str]:
    """A pruned network and the dense one it belongs to, with random weights."""
    base = CifarResNetConfig(depth=8, hidden_sizes=[8, 8, 8], id2label={0: "cat", 1: "<i>dog</i>", 2: "ship"})
    names = [f"cifar_resnet.layer{stage}.0" for stage in (1, 2, 3)]
    widths = {f"{name}.{layer}": pair for name in names for layer, pair in (("conv1", [8, 4]), ("bn1", [4, 4]))}
    widths |= {f"{name}.conv2": [4, 8] for name in names}
    folder, dense = tmp_path / "resnet20-kdfs-cifar10", tmp_path / "resnet20-cifar10"
    config = KDFSPrunedConfig(base_config=base, widths=widths, input_shape=[3, 32, 32])
    KDFSPrunedModelForImageClassification(config).save_pretrained(folder)
    build_network(base).save_pretrained(dense)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder), str(dense)


def test_pruned_beside_dense(pruned, photo):
    tab = KDFSDemo(*pruned)
    page = tab.compare(photo)
    text = words(page)
    macs = [count_flops(network, (3, 32, 32)) for network in (tab.pair.dense, tab.pair.pruned)]
    assert macs[1] < macs[0]
    assert re.search(rf"multiply-adds, one image\s+{macs[0]:,}\s+{macs[1]:,}\s+{macs[1] / macs[0]:.2f}", text)
    assert len(re.findall(r"cifar_resnet\.layer\d\.0\.conv1\s+8\s+4\b", text)) == 3
    assert len(re.findall(r"ms, batch (?:1|64)\s+[\d.,e+]+\s+[\d.,e+]+", text)) == 2
    assert "<i>dog" not in page
    with torch.no_grad():
        pixels = tab.pair.processor(
            read_picture(photo).crop((25, 0, 125, 100)).resize((32, 32), Image.Resampling.LANCZOS), return_tensors="pt"
        )
        for title, network in (("dense", tab.pair.dense), ("pruned", tab.pair.pruned)):
            best = network(**pixels).logits.argmax().item()
            guess = re.search(rf"<h3>{title}</h3>.*?<tbody><tr><td>(.*?)</td>", page, re.S)[1]
            assert html.unescape(guess) == network.config.id2label[best]


def test_without_the_dense_weights_nothing_is_guessed_by_them(pruned, photo):
    tab = KDFSDemo(pruned[0])
    page = tab.compare(photo)
    assert "<h3>pruned</h3>" in page
    assert "<h3>dense</h3>" not in page
    assert "weights of the dense network are not here" in words(page)
    assert "<h3>pruned</h3>" not in tab.compare(None)


def test_digits_are_trained_where_the_checkpoint_is_missing(photo, monkeypatch):
    from hf_efficient.kdfs.quickstart_kdfs import load_digits_images

    tab = KDFSDemo()
    with pytest.raises(ValueError, match="press the button that trains"):
        tab.compare(photo)
    rows, held_out = load_digits_images()
    monkeypatch.setattr("hf_efficient.demo.kdfs_demo.load_digits_images", lambda: (rows[:64], held_out))
    monkeypatch.setattr("hf_efficient.demo.kdfs_demo.DENSE_EPOCHS", 5)
    monkeypatch.setattr("hf_efficient.demo.kdfs_demo.PRUNE_EPOCHS", 10)
    told = []
    text = words(tab.train_digits(lambda share, doing: told.append((share, doing))))
    assert "Not resnet20-kdfs-cifar10, which is missing: a ResNet-8 trained just now on 64 handwritten digits" in text
    assert [share for share, _ in told] == sorted(share for share, _ in told)
    assert told[-1] == (1.0, "learning which filters to drop")
    macs = [count_flops(network, (3, 16, 16)) for network in (tab.pair.dense, tab.pair.pruned)]
    assert macs[1] < 0.7 * macs[0]
    assert words(tab.compare(photo)).count("probability") == 2


# ------------------------------------------------------------------------------------------------------- Pix2Pix


@pytest.fixture
def generator(tmp_path) -> str:
    folder = tmp_path / "pix2pix-cartoon2photo"
    Pix2PixModel(Pix2PixConfig(num_levels=3, base_channels=4, image_size=32)).save_pretrained(folder)
    return str(folder)


def test_cartoon_and_back(generator, photo):
    cartoon, translated, page = Pix2PixDemo(generator).run(photo, "palette", 3)
    assert cartoon.size == translated.size == (48, 32)
    assert len(cartoon.getcolors(10_000)) < len(read_picture(photo).resize((48, 32)).getcolors(10_000))
    assert re.search(r"cartoon\s+\d+\.\d\s+\d", words(page))
    assert re.search(r"translated\s+\d+\.\d\s+\d", words(page))
    *_, page = Pix2PixDemo(generator).run(photo, "palette", 0)
    assert re.search(r"cartoon\s+identical", words(page))


def test_cartoon_without_a_checkpoint(photo):
    cartoon, translated, page = Pix2PixDemo().run(photo, "bilateral", 3)
    assert cartoon.size == (384, 256)
    assert translated is None
    assert "pix2pix-cartoon2photo is missing, so cartoons are made but not translated back" in Pix2PixDemo().about()
    assert re.search(r"cartoon\s+\d+\.\d\s+\d", words(page))
    with pytest.raises(ValueError, match="method must be one of bilateral, palette, mean_shift"):
        Pix2PixDemo().run(photo, "sketch", 3)


# ---------------------------------------------------------------------------------------------- page and command


@pytest.fixture
def page_module():
    from hf_efficient.demo import page_demo

    return page_demo


def test_a_mistake_becomes_a_sentence_and_the_last_result_stays(page_module, caplog):
    gradio = serve_demo.import_gradio()

    def fail(mistake: Exception) -> str:
        raise mistake

    handler = page_module._answer_in_words(gradio, fail, 2)
    message, *others = handler(ValueError("no <b>good</b>"))
    assert "no &lt;b&gt;good&lt;/b&gt;" in message
    assert others == [gradio.skip()] * 2
    message, *others = handler(RuntimeError("secret inside"))
    assert "secret" not in message
    assert "error of its own" in message
    assert page_module._answer_in_words(gradio, lambda: ("a", "b"), 2)() == ("", "a", "b")


def test_the_page_asks_nobody_else(page_module):
    app = page_module.build_demo(serve_demo.Checkpoints(), serve_demo.import_gradio())
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert app.analytics_enabled is False
    assert app.config["analytics_enabled"] is False
    assert [block.label for block in app.blocks.values() if type(block).__name__ == "Tab"] == [
        "LLaVA",
        "ToE",
        "KDFS",
        "Pix2Pix",
    ]
    assert not re.findall(r"https?://.{60}", str([component["props"] for component in app.config["components"]]))
    theme = page_module.make_theme(serve_demo.import_gradio())
    assert not theme._stylesheets


def _checkpoint(folder: Path) -> Path:
    """A folder that looks like a checkpoint."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_nothing_is_left_of_the_examples(page_module, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    app = page_module.build_demo(serve_demo.Checkpoints(), serve_demo.import_gradio())
    assert list(tmp_path.glob("hf_efficient_demo_*/*.jpg"))
    app.forget_examples()
    assert not list(tmp_path.glob("hf_efficient_demo_*"))


def test_checkpoints_are_found_beside_the_package_or_named(monkeypatch, vit, tmp_path):
    found = serve_demo.Checkpoints.find(toe="someone/vit")
    assert list(found.llava) == ["easy-VQA", "scenes"]
    assert found.toe == "someone/vit"
    named = serve_demo.Checkpoints.find(llava=[str(CARDS / "dynamic-llava-scenes")], kdfs="someone/pruned")
    assert list(named.llava) == ["dynamic-llava-scenes"]
    assert (named.kdfs, named.kdfs_dense) == ("someone/pruned", None)
    with pytest.raises(FileNotFoundError, match="nowhere holds no config"):
        serve_demo.Checkpoints.find(llava=["nowhere"])
    with pytest.raises(ValueError, match="--llava names two folders scenes: rename one of them"):
        serve_demo.Checkpoints.find(llava=[str(_checkpoint(tmp_path / name / "scenes")) for name in "ab"])
    for name, option in (("toe", "toe"), ("kdfs_dense", "kdfs-dense")):
        for wrong, why in ((tmp_path, "holds no config.json"), ("./nowhere", "is no folder here and no Hub id")):
            with pytest.raises(FileNotFoundError, match=re.escape(f"--{option} {wrong} {why}; name a checkpoint")):
                serve_demo.Checkpoints.find(**{name: str(wrong)})

    def wheel() -> Path:
        raise FileNotFoundError

    monkeypatch.setattr(serve_demo, "find_checkpoints", wheel)
    assert serve_demo.Checkpoints.find() == serve_demo.Checkpoints()
    assert serve_demo.Checkpoints(pix2pix=Path("a/b")).pix2pix == "a/b"


def test_the_command_complains_well(monkeypatch, capsys):
    assert cli.main(["demo", "--port", "0"]) == 2
    assert "--port must be from 1 to 65535, got 0" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["demo", "--no-browser"]) == 2
    assert 'needs Gradio; run pip install "hf-efficient[demo]"' in capsys.readouterr().err


def test_the_space_is_ready():
    header = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (header["sdk"], header["license"]) == ("gradio", "apache-2.0")
    assert (SPACE / header["app_file"]).is_file()
    assert len(header["short_description"]) <= 60
    listed = set((SPACE / "requirements.txt").read_text(encoding="utf-8").split())
    wanted = [line.partition(";") for line in requires("hf-efficient")]
    core = {name.strip().replace(" ", "") for name, _, marker in wanted if not marker}
    extra = {name.strip().replace(" ", "") for name, _, marker in wanted if marker.strip() == 'extra == "demo"'}

    def plain(names: set[str]) -> set[str]:
        return {re.match(r"[\w-]+", name)[0].lower() for name in names}

    assert plain(core) <= plain(listed)
    assert plain(extra) <= plain(listed)
    imported = [node for node in ast.parse((SPACE / "app.py").read_text()).body if isinstance(node, ast.ImportFrom)]
    assert [(node.module, [name.name for name in node.names]) for node in imported] == [
        ("hf_efficient.demo", ["Checkpoints", "launch"])
    ]


# ------------------------------------------------------------------------------------------------------- browser


@pytest.fixture
def address(page_module, vit, pruned, generator, monkeypatch):
    """The demo served on the shipped sparse LLaVAs and three tiny checkpoints."""
    monkeypatch.setattr(quickstart_dynamic_llava, "REPEATS", 1)
    llava = {"easy-VQA": CARDS / "dynamic-llava-easy-vqa"}
    checkpoints = serve_demo.Checkpoints(llava, toe=vit, kdfs=pruned[0], kdfs_dense=pruned[1], pix2pix=generator)
    app = serve_demo.launch(checkpoints, host="127.0.0.1")
    yield app.local_url
    app.close()


def wait_for(driver, script: str, seconds: float = 240) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, seconds, 0.5).until(lambda _: driver.execute_script(f"return Boolean({script})"), script)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1300, False), (400, True)], ids=["wide-light", "narrow-dark"])
def test_every_tab_in_a_browser(address, open_browser, photo, wrong_files, tmp_path, width, dark):
    driver = open_browser(address, width, 900, dark)
    wait_for(driver, "document.querySelector('#ask')")

    def click(selector: str) -> None:
        driver.execute_script(f"document.querySelector('{selector}').click()")

    def upload(button: str, path: str) -> None:
        panel = f"document.querySelector('{button}').closest('[role=tabpanel]')"
        driver.execute_script(f"({panel}.querySelector('[aria-label=\"Remove Image\"]') || document.body).click()")
        wait_for(driver, f"{panel}.querySelector('input[type=file]')")
        driver.execute_script(f"return {panel}.querySelector('input[type=file]')").send_keys(path)
        wait_for(driver, f"{panel}.querySelector('[data-testid=image] img, .image-frame img')")

    def choose_tab(title: str) -> None:
        driver.execute_script(
            "[...document.querySelectorAll('button[role=tab]')]"
            ".filter(tab => tab.textContent.trim() == arguments[0]).forEach(tab => tab.click())",
            title,
        )

    wrong = str(tmp_path / "notes <i>.png")
    tabs = (
        ("LLaVA", "#ask", "llava", "#hfe-sparse"),
        ("ToE", "#stages", "toe", "#toe-result figure"),
        ("KDFS", "#compare", "kdfs", "#hfe-top5"),
        ("Pix2Pix", "#translate", "pix2pix", "#pix2pix-result table"),
    )
    for title, button, name, result in tabs:
        choose_tab(title)
        wait_for(driver, f"document.querySelector('{button}') && document.querySelector('{button}').offsetParent")
        if name == "llava":
            box = driver.execute_script("return document.querySelector('textarea, input[type=text]')")
            box.send_keys("what color is the shape?")
        upload(button, wrong)
        click(button)
        wait_for(driver, f"document.querySelector('#{name}-message [role=alert]')")
        shown = driver.execute_script(f"return document.querySelector('#{name}-message').innerText")
        assert "is not a picture that can be read" in shown, title
        assert "Traceback" not in shown
        upload(button, photo)
        click(button)
        wait_for(driver, f"document.querySelector('{result}')")
        assert not driver.execute_script(f"return document.querySelector('#{name}-message [role=alert]')"), title
        overflow = driver.execute_script("return document.documentElement.scrollWidth - innerWidth")
        assert overflow <= 0, f"{title} sticks out by {overflow} pixels"
        cut = driver.execute_script(
            "return [...document.querySelectorAll('.hfe .scroll')].filter(box => box.offsetParent)"
            ".map(box => [box.innerText, box.scrollWidth - box.clientWidth]).filter(([_, pixels]) => pixels > 1)"
        )
        assert not cut, f"{title} has tables that do not fit"
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background)[:3])) < 80) == dark
    errors = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors
