"""`hf-efficient convert-llava`: a stock checkpoint in, a whole sparse one out, one sentence on a mistake."""

import json

import pytest
import torch

from hf_efficient import DynamicLlavaForConditionalGeneration, cli


@pytest.fixture
def source(make_llava, word_processor, tmp_path):
    folder = tmp_path / "llava"
    make_llava().save_pretrained(folder)
    word_processor.save_pretrained(folder)
    return folder


def test_convert_llava_keeps_weights_and_processor(source, tmp_path, make_batch, capsys):
    dest = tmp_path / "made" / "sparse"
    out = tmp_path / "out.json"
    settings = ["--vision-keep-rate", "0.5", "--sparse-layer", "3", "--json", str(out)]
    assert cli.main(["convert-llava", str(source), str(dest), *settings]) == 0
    assert f"Wrote {dest} with " in capsys.readouterr().out
    assert json.loads(out.read_text())["processor"] is True
    assert sorted(path.name for path in dest.parent.iterdir()) == ["sparse"]
    assert {"config.json", "model.safetensors", "modeling_dynamic_llava.py", "tokenizer.json"} <= {
        path.name for path in dest.iterdir()
    }
    model = DynamicLlavaForConditionalGeneration.from_pretrained(dest).eval()
    assert (model.config.vision_keep_rate, model.config.sparse_layer) == (0.5, 3)

    from transformers import LlavaForConditionalGeneration

    host = LlavaForConditionalGeneration.from_pretrained(source).eval()
    model.config.use_vision_predictor = model.config.use_output_text_predictor = False
    batch = make_batch([3, "image", 4])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, host(**batch).logits)


def test_convert_llava_without_processor_says_so(source, tmp_path, make_llava, capsys):
    make_llava().save_pretrained(tmp_path / "bare")
    out = tmp_path / "out.json"
    assert cli.main(["convert-llava", str(tmp_path / "bare"), str(tmp_path / "sparse"), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["processor"] is False


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dest": "full"}, "must not exist or be an empty folder"),
        ({"source": "missing"}, "missing"),
        ({"options": ["--vision-keep-rate", "2"]}, "`vision_keep_rate` must be a number in (0, 1], got 2.0"),
        ({"options": ["--sparse-layer", "9"]}, "`sparse_layer` must be below the number of decoder layers (4), got 9"),
    ],
)
def test_convert_llava_mistakes(source, tmp_path, capsys, change, sentence):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    dest = tmp_path / change.get("dest", "sparse")
    origin = tmp_path / change.get("source", "llava")
    assert cli.main(["convert-llava", str(origin), str(dest), "--quiet", *change.get("options", [])]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-efficient")]
    assert len(lines) == 1
    assert sentence in lines[0]
    assert (tmp_path / "full" / "precious.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "llava"]


def test_convert_llava_interrupted_leaves_nothing(source, tmp_path, monkeypatch, capsys):
    def save(self, folder, **kwargs):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr(DynamicLlavaForConditionalGeneration, "save_pretrained", save)
    assert cli.main(["convert-llava", str(source), str(tmp_path / "sparse")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llava"]


def test_convert_llava_never_unpickles(source, tmp_path, capsys):
    (source / "model.safetensors").unlink()
    torch.save({}, source / "pytorch_model.bin")
    assert cli.main(["convert-llava", str(source), str(tmp_path / "sparse")]) == 2
    assert "safetensors" in capsys.readouterr().err
