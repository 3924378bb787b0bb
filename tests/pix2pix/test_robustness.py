"""The grid, the cross matrix and the page: every figure equals torchmetrics' on the same images."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torchmetrics
from PIL import Image
from torch import nn

from hf_efficient import ImageToImagePipeline, Pix2PixConfig, Pix2PixModel, cartoonize, evaluate_robustness
from hf_efficient.pix2pix.report_pix2pix import plot_title
from hf_efficient.pix2pix.robustness_pix2pix import IDENTITY, RobustnessReport


class Colours(nn.Module):
    """A feature network small enough for a test: mean and spread of each colour."""

    name = "colours"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


@pytest.fixture
def photos(picture):
    return [{"image": picture(24, 24 + 8 * number)} for number in range(4)]


@pytest.fixture(scope="module")
def small() -> Pix2PixModel:
    torch.manual_seed(0)
    return Pix2PixModel(Pix2PixConfig(num_levels=3, base_channels=4, image_size=16)).eval()


@pytest.fixture(scope="module")
def report(small):
    """Severities 0, 2 and 5 of a small generator, and of one that gives each cartoon back."""
    echo = Pix2PixModel(Pix2PixConfig(num_levels=1, base_channels=1, image_size=8))
    echo.network.forward = lambda pixels: pixels
    noise, photos = np.random.default_rng(0), []
    for number in range(4):
        values = Image.fromarray(noise.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        photos.append({"image": values.resize((24 + 8 * number, 24), Image.Resampling.BICUBIC)})
    models, trained_on = {"small": small, "echo": echo}, {"small": "palette"}
    settings = {"severities": (0, 2, 5), "features": Colours(), "num_samples": 2, "trained_on": trained_on}
    report = evaluate_robustness(models, photos, **settings)
    report.photos = photos
    return report


def test_every_cell_of_the_grid_is_measured(report):
    assert report.models == [IDENTITY, "small", "echo"]
    assert report.methods == ["bilateral", "palette", "mean_shift"]
    cells = {(row["model"], row["method"], row["severity"]) for row in report.rows}
    assert len(cells) == len(report.rows) == 3 * 3 * 3
    assert report.figures == ["psnr", "ssim", "pixel_dissimilarity", "kid", "feature_cosine"]
    assert (report.images, report.feature_network) == (4, "colours")


def test_figures_are_those_of_torchmetrics(report):
    row = next(r for r in report.rows if (r["model"], r["method"], r["severity"]) == (IDENTITY, "palette", 5))
    pairs = []
    for photo in report.photos:
        cartoon = cartoonize(photo["image"], method="palette", strength=5)
        pairs.append([torch.from_numpy(np.array(x)).permute(2, 0, 1)[None] / 255 for x in (cartoon, photo["image"])])
    functional = torchmetrics.functional
    psnr = [functional.image.peak_signal_noise_ratio(*pair, data_range=1.0) for pair in pairs]
    ssim = [functional.image.structural_similarity_index_measure(*pair, data_range=1.0) for pair in pairs]
    cosine = [functional.cosine_similarity(*(x.flatten()[None].double() for x in pair)) for pair in pairs]
    assert row["psnr"] == pytest.approx(np.mean(psnr), abs=1e-4)
    assert row["ssim"] == pytest.approx(np.mean(ssim), abs=1e-4)
    assert row["pixel_dissimilarity"] == pytest.approx(1 - np.mean([float(c) for c in cosine]), abs=1e-6)
    metric = torchmetrics.image.kid.KernelInceptionDistance(feature=Colours(), subsets=50, subset_size=4)
    for cartoon, photo in pairs:
        metric.update(photo, real=True)
        metric.update(cartoon, real=False)
    torch.manual_seed(0)
    assert row["kid"] == pytest.approx(float(metric.compute()[0]), abs=1e-6)


def test_a_generator_that_gives_back_its_input_equals_the_cartoon_itself(report):
    for method in report.methods:
        for figure in report.figures:
            curves = [report.curve(model, method, figure) for model in ("echo", IDENTITY)]
            assert curves[0] == pytest.approx(curves[1], abs=1e-6)


def test_severity_zero_is_the_photograph_and_more_severity_is_worse(report):
    for method in report.methods:
        assert 0 not in report.curve(IDENTITY, method, "psnr")  # no error: there is no such figure
        assert report.curve(IDENTITY, method, "ssim")[0] == pytest.approx(1)
        assert report.curve(IDENTITY, method, "pixel_dissimilarity")[0] == 0  # exactly, and printed so
        assert report.curve(IDENTITY, method, "psnr")[2] > report.curve(IDENTITY, method, "psnr")[5]


def test_a_sheet_shows_the_cartoons_that_went_in_above_what_came_out(report):
    assert sorted(report.samples) == sorted(f"{m}, {name}" for m in report.methods for name in ("small", "echo"))
    sheet, photo = np.asarray(report.samples["palette, echo"]), report.photos[0]["image"]
    width, height, severities = *photo.size, (0, 2, 5)

    def cell(row: int, column: int) -> np.ndarray:
        top, left = 18 + 4 + row * (height + 18 + 4), 4 + column * (width + 4)
        return sheet[top : top + height, left : left + width]

    for column, severity in enumerate(severities):
        cartoon = cartoonize(photo, method="palette", strength=severity)
        assert np.array_equal(cell(0, column), cartoon)
        assert np.array_equal(cell(1, column), cartoon)  # this model gives it back
    assert np.array_equal(cell(1, 3), photo)
    other = np.asarray(report.samples["palette, small"])
    assert other.shape == sheet.shape  # two rows for each of two photographs
    assert np.array_equal(other[22 : 22 + height], sheet[22 : 22 + height])
    assert not np.array_equal(other[44 + height : 44 + 2 * height], sheet[44 + height : 44 + 2 * height])


def test_the_matrix_averages_cartoons_and_the_gap_starts_at_the_photograph(report):
    curve = report.curve("small", "bilateral", "ssim")
    assert report.cross_matrix("ssim")["small"]["bilateral"] == pytest.approx((curve[2] + curve[5]) / 2)
    assert report.clean_gap("ssim")["small"]["bilateral"] == pytest.approx((curve[2] + curve[5]) / 2 - curve[0])
    assert "bilateral" not in report.clean_gap("psnr").get(IDENTITY, {})


def test_the_same_call_gives_the_same_figures(small, report):
    settings = {"severities": (5,), "methods": ["palette"], "features": Colours()}
    again = evaluate_robustness({"small": small}, report.photos, **settings)
    row = next(r for r in report.rows if (r["model"], r["method"], r["severity"]) == ("small", "palette", 5))
    assert again.rows[1] == pytest.approx(row)


def test_extra_metrics_and_limits(tiny_model, photos):
    kid = torchmetrics.image.kid.KernelInceptionDistance(feature=Colours(), subsets=2, subset_size=3)
    extra = {"set_distance": kid, "mse": torchmetrics.MeanSquaredError()}
    report = evaluate_robustness(
        tiny_model,
        [row["image"] for row in photos],
        severities=(3,),
        methods=["bilateral"],
        limit=3,
        extra_metrics=extra,
    )
    assert report.images == 3
    assert report.figures == ["psnr", "ssim", "pixel_dissimilarity", "set_distance", "mse"]
    assert all(math.isfinite(row["set_distance"]) and row["mse"] > 0 for row in report.rows)


def test_turned_and_deep_photographs_are_read_as_they_are_seen(tiny_model, picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(24, 16).save(tmp_path / "turned.png", exif=exif)
    grey = np.asarray(picture(24, 16).convert("L"))
    settings = {"methods": ["palette"], "severities": (3,)}
    odd = evaluate_robustness(
        tiny_model, [Image.open(tmp_path / "turned.png"), Image.fromarray(grey.astype(np.uint16) * 257)], **settings
    )
    plain = evaluate_robustness(
        tiny_model, [picture(24, 16).rotate(270, expand=True), Image.fromarray(grey).convert("RGB")], **settings
    )
    assert odd.rows == plain.rows


def test_a_folder_by_its_path_and_one_method_by_its_name(tiny_model, picture, tmp_path):
    picture(24, 24).save(tmp_path / "a.png")
    settings = {"severities": (3,), "num_samples": 0}
    by_path = evaluate_robustness(tiny_model, tmp_path, methods="palette", **settings)
    listed = evaluate_robustness(tiny_model, [picture(24, 24)], methods=["palette"], **settings)
    assert by_path.rows == listed.rows
    assert evaluate_robustness(tiny_model, str(tmp_path), methods="palette", severities=3).rows == listed.rows
    with pytest.raises(FileNotFoundError, match="nope does not exist; name a folder of pictures"):
        evaluate_robustness(tiny_model, "nope")
    with pytest.raises(ValueError, match=r"got \['sketch'\]"):
        evaluate_robustness(tiny_model, tmp_path, methods="sketch")


def test_a_figure_that_one_photograph_lacks_is_the_mean_of_the_others(tiny_model, picture):
    black, settings = Image.new("RGB", (24, 24)), {"methods": ["palette"], "severities": (3,)}
    both = evaluate_robustness(tiny_model, [black, picture(24, 24)], **settings).rows[0]
    alone = evaluate_robustness(tiny_model, [picture(24, 24)], **settings).rows[0]
    for name in ("psnr", "pixel_dissimilarity"):  # the cartoon of black is black: no error, and no angle
        assert both[name] == pytest.approx(alone[name])
    assert both["ssim"] == pytest.approx((1 + alone["ssim"]) / 2)


def test_black_translations_are_not_called_identical(photos, tmp_path):
    dead = Pix2PixModel(Pix2PixConfig(num_levels=1, base_channels=1, image_size=8))
    dead.network.forward = lambda pixels: -torch.ones_like(pixels)
    report = evaluate_robustness(dead, photos, severities=(0,), methods=["palette"], limit=1)
    rows = {row["model"]: row for row in report.rows}
    assert rows["model"]["pixel_dissimilarity"] is None  # black has no angle to anything
    itself, black = str(report).splitlines()[1:]
    assert ("identical" in itself, "identical" in black, "undefined" in black) == (True, False, True)
    page = report.save(tmp_path).read_text()
    assert (page.count("<td>identical</td>"), page.count("<td>undefined</td>")) == (1, 1)


def test_names_are_escaped_in_the_page(small, photos, tmp_path):
    name = "<td><script>alert(1)</script>"
    report = evaluate_robustness({name: small}, photos, severities=(0, 3), methods=["palette"], limit=2)
    text = report.save(tmp_path, title=name).read_text()
    assert "<script>" not in text
    assert "&lt;td&gt;&lt;script&gt;" in text


def test_the_report_is_written(report, tmp_path):
    page = report.save(tmp_path / "report", title="A <title>")
    names = {path.name for path in page.parent.iterdir()}
    assert {"index.html", "robustness.json", "robustness.png"} <= names
    assert not [name for name in names if name.startswith(".")]
    assert sum(name.startswith("samples_") for name in names) == 6
    data = json.loads((page.parent / "robustness.json").read_text())
    assert data == json.loads(json.dumps(report.to_dict()))
    text = page.read_text()
    assert "A &lt;title&gt;" in text
    assert not re.search(r'(src|href)="(?!data:)', text)  # needs no other file
    assert text.count("<img ") == 6
    assert text.count('<svg viewBox="0 0 360 236"') == 5
    assert 'class="home"' in text
    assert text.count("PSNR (dB), higher is better; none for identical images</figcaption>") == 1
    assert text.count("none for identical images") == 1
    ticks = re.findall(r'text-anchor="end">([^<]+)<', text)
    assert len(ticks) == 15
    assert max(map(len, ticks)) <= 8  # wider ones would be cut off at the left; 1 - 0.9999999 is written as 0
    for tag in ("table", "figure", "svg", "main", "ul"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag
    assert Image.open(page.parent / "robustness.png").size[0] > 800
    titles = [name for name in report.figures if "\n(none for identical images)" in plot_title(report, name)]
    assert titles == ["psnr"]
    whole = RobustnessReport([row for row in report.rows if row["psnr"] is not None], 4)
    assert plot_title(whole, "psnr") == "PSNR (dB)"
    for value in ("0.00136", "0.00622", "0.01052"):
        assert value in text
    assert all(math.isfinite(entry["value"]) for entry in report.metrics("photos", "test"))
    assert str(report).count("\n") == len(report.rows)


def test_wrong_input_is_named(tiny_model, photos, tmp_path):
    with pytest.raises(ValueError, match=r"some of bilateral, palette, mean_shift, got \['sketch'\]"):
        evaluate_robustness(tiny_model, photos, methods=["sketch"])
    with pytest.raises(ValueError, match=r"whole numbers from 0 to 5, got \[6\]"):
        evaluate_robustness(tiny_model, photos, severities=[6])
    with pytest.raises(ValueError, match="one of the columns image, got 'photo'"):
        evaluate_robustness(tiny_model, photos, image_column="photo")
    for argument in ("limit", "batch_size"):
        with pytest.raises(ValueError, match=f"`{argument}` must be at least 1, got 0"):
            evaluate_robustness(tiny_model, photos, **{argument: 0})
    with pytest.raises(ValueError, match="at least 11 pixels, got 24x8 in its row 1"):
        evaluate_robustness(tiny_model, [photos[0], Image.new("RGB", (24, 8))])
    table = datasets.Dataset.from_dict({"image": [{"bytes": b"no picture", "path": None}]})
    with pytest.raises(ValueError, match=r"^Row 0 of `dataset` holds no picture; replace it or take it out of"):
        evaluate_robustness(tiny_model, table.cast_column("image", datasets.Image()))
    photos[0]["image"].save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:100])
    opened = {"image": Image.open(tmp_path / "cut.png")}
    with pytest.raises(ValueError, match=r"^Row 1 of `dataset` holds no readable picture: .*; replace it or"):
        evaluate_robustness(tiny_model, [photos[0], opened])
    larger = Pix2PixModel(Pix2PixConfig(num_levels=1, base_channels=1, image_size=8))
    larger.network.forward = lambda pixels: pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    with pytest.raises(ValueError, match="keep the size of its input, but 'twice' turns 24x24 pixels into 48x48"):
        evaluate_robustness({"twice": larger}, photos, severities=[1], methods=["palette"])
    with pytest.raises(ValueError, match="at least one photograph"):
        evaluate_robustness(tiny_model, [])
    with pytest.raises(ValueError, match="must hold images, got str in its row 0"):
        evaluate_robustness(tiny_model, ["a.png"])
    with pytest.raises(ValueError, match="a pipeline or a path, got int"):
        evaluate_robustness(3, photos)
    with pytest.raises(FileNotFoundError, match="weights of tf_efficientnet_lite0"):
        evaluate_robustness(tiny_model, photos, features=tmp_path / "nothing.safetensors")


def _chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
    return next((path for path in map(shutil.which, names) if path), None)


@pytest.mark.slow
@pytest.mark.skipif(_chromium() is None, reason="no Chromium on this machine; install the package `chromium`")
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_in_a_browser(report, tmp_path, width, theme):
    page = report.save(tmp_path / "report")
    picture = tmp_path / "page.png"
    command = [_chromium(), "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},900"]
    command += [f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--blink-settings=preferredColorScheme=" + ("0" if theme == "dark" else "1")]
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.shape[1] == width
    assert (pixels[:, :8].mean() < 60) == (theme == "dark")  # the margin has the colour of the theme
    assert pixels.std() > 5
    probe = Path(tmp_path / "probe.html")
    script = "<script>document.title = document.documentElement.scrollWidth - innerWidth</script>"
    probe.write_text(page.read_text().replace("</body>", script + "</body>"))
    done = subprocess.run([*command, "--dump-dom", probe.as_uri()], check=True, capture_output=True, timeout=120)
    overflow = int(re.search(r"<title>(-?\d+)</title>", done.stdout.decode())[1])
    assert overflow <= 0  # nothing sticks out: wide tables and sheets scroll inside their frame


def test_methods_and_severities_count_once_numbers_may_be_of_numpy(tiny_model, picture, tmp_path):
    photos = [picture(16, 16), picture(20, 20)]
    report = evaluate_robustness(tiny_model, photos, methods=["palette", "palette"], severities=np.array([1, 2, 2]))
    assert [row["severity"] for row in report.rows if row["model"] == "model"] == [1, 2]
    assert report.save(tmp_path / "report").is_file()


def test_the_baseline_keeps_its_name_and_every_sheet_its_file(tiny_model, picture, tmp_path):
    photos = [picture(16, 16), picture(20, 20)]
    with pytest.raises(ValueError, match="must not be named 'the cartoon itself'"):
        evaluate_robustness({"the cartoon itself": tiny_model}, photos, methods="palette", severities=1)
    models = {"run a": tiny_model, "run_a": tiny_model, "Run/A": tiny_model}
    report = evaluate_robustness(models, photos, methods="palette", severities=1)
    report.save(tmp_path)
    names = [file.name.lower() for file in tmp_path.glob("samples*.png")]
    assert len(report.samples) == 3 == len(set(names))


def state(network: nn.Module) -> dict:
    """Mode of every module, and format, device and values of every tensor."""
    tensors = {name: (value.dtype, value.device, value.clone()) for name, value in network.state_dict().items()}
    return {"modes": [module.training for module in network.modules()], "tensors": tensors}


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_networks_come_back_as_they_were(picture, breaks, wrapped):
    """Half precision, training mode, one layer in evaluation mode: also where a photograph cannot be measured."""
    torch.manual_seed(0)
    model = Pix2PixModel(Pix2PixConfig(num_levels=2, base_channels=2, image_size=16, norm="batch")).train()
    model.network.down_norm[1].eval()
    features = nn.Sequential(Colours(), nn.BatchNorm1d(6)).train()
    if wrapped:  # a pipeline on a CPU turns half precision to float32 itself, when it is built
        given = ImageToImagePipeline(model=model, device="cpu")
        model.train()
    else:
        given = model.half()
    identities = [id(value) for value in (*model.parameters(), *model.buffers())]
    before = [state(network) for network in (model, features)]

    def broken(*args):
        raise ValueError("broken off")

    settings = {"methods": ["palette"], "severities": (0, 3), "features": features}
    photos = [picture(16, 16), picture(20, 20)]
    if breaks:
        model.network.down[1].register_forward_pre_hook(broken)
        with pytest.raises(ValueError, match="broken off"):
            evaluate_robustness({"small": given}, photos, **settings)
    else:
        evaluate_robustness({"small": given}, photos, **settings)
    for network, old in zip((model, features), before):
        new = state(network)
        assert new["modes"] == old["modes"]
        assert new["tensors"].keys() == old["tensors"].keys()
        for name, (dtype, device, value) in old["tensors"].items():
            assert new["tensors"][name][:2] == (dtype, device), name
            assert torch.equal(new["tensors"][name][2], value), name
    assert [id(value) for value in (*model.parameters(), *model.buffers())] == identities


def test_a_pipeline_whose_model_was_trained_on_is_measured_in_evaluation_mode(picture):
    torch.manual_seed(0)
    config = Pix2PixConfig(num_levels=6, base_channels=2, image_size=64, norm="batch", dropout=0.5)
    pipe = ImageToImagePipeline(model=Pix2PixModel(config), device="cpu")
    photos, settings = [picture(64, 64)], {"methods": ["palette"], "severities": (3,)}
    expected = evaluate_robustness(pipe, photos, **settings).rows
    pipe.model.train()
    assert evaluate_robustness(pipe, photos, **settings).rows == expected
    assert pipe.model.training


@pytest.mark.parametrize(
    ("trained_on", "message"),
    [
        ("palette", "`trained_on` must map names of models to cartoonizers, got 'palette'"),
        ({"large": "palette"}, "`trained_on` must name models among small, echo, got 'large'"),
        (
            {"small": "sketch"},
            "`trained_on` must name cartoonizers among bilateral, palette, mean_shift, got 'sketch'",
        ),
        ({"small": ["palette"]}, r"cartoonizers among bilateral, .*, got \['palette'\]"),
    ],
)
def test_what_a_model_was_trained_on_is_checked_before_it_is_measured(tiny_model, photos, trained_on, message):
    with pytest.raises(ValueError, match=message):
        evaluate_robustness({"small": tiny_model, "echo": tiny_model}, photos, trained_on=trained_on)


def test_a_figure_that_is_no_number_is_none_in_the_json(tiny_model, picture, tmp_path):
    """The PSNR of torchmetrics is infinite for the photograph itself, and dead features have no angle."""

    class Dead(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(images), 2)

    extra = {"peak": torchmetrics.image.PeakSignalNoiseRatio(data_range=1.0)}
    settings = {"severities": (0, 3), "methods": ["palette"], "features": Dead(), "extra_metrics": extra}
    report = evaluate_robustness(tiny_model, [picture(16, 16), picture(20, 20)], **settings)
    assert report.curve(IDENTITY, "palette", "peak").keys() == {3}
    report.save(tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    data = json.loads((tmp_path / "robustness.json").read_text(), parse_constant=refuse)
    assert data["rows"][0]["peak"] is None
    assert str(report).splitlines()[1].split()[-1] == "undefined"


def test_a_model_that_does_not_load_is_named(photos):
    with pytest.raises(OSError, match=r"`model` must be a folder here or a Hub id that loads, got 'nope/none' \("):
        evaluate_robustness("nope/none", photos)
