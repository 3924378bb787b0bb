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
    assert capsys.readouterr().out == f"Wrote {dest}; its predictors are untrained.\n"
    assert json.loads(out.read_text()) == {"folder": str(dest)}
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


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dest": "full"}, "which holds files: choose another folder or pass --overwrite."),
        ({"dest": "full/precious.txt"}, "DEST must be a folder, got the file"),
        ({"dest": "full/precious.txt/sub"}, "DEST must lie where folders can be made"),
        ({"source": "missing"}, "there is no such folder"),
        ({"options": ["--vision-keep-rate", "2"]}, "--vision-keep-rate must be a number in (0, 1], got 2.0"),
        ({"options": ["--sparse-layer", "9"]}, "--sparse-layer must be below the number of decoder layers (4), got 9"),
        ({"options": ["--dtype", "int8"]}, "--dtype must be 'auto' or a floating point dtype such as 'bfloat16', got"),
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


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("nobody/nothing", "there is no such folder, and the Hub could not be asked"),
        ("./no/such/folder", "there is no such folder, and a Hub id is `user/name`"),
    ],
)
def test_a_source_that_is_no_folder_may_be_a_hub_id(tmp_path, capsys, source, sentence):
    for command in ("convert-llava", "convert-dynamic-llava"):
        assert cli.main([command, source, str(tmp_path / "sparse")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"SOURCE must be a folder or a Hub id, got {source!r}: {sentence}" in line


def test_a_llava_of_transformers_is_sent_to_the_other_command(source, tmp_path, capsys):
    assert cli.main(["convert-dynamic-llava", str(source), str(tmp_path / "sparse")]) == 2
    assert "`hf-efficient convert-llava`" in capsys.readouterr().err


def test_convert_llava_never_unpickles(source, tmp_path, capsys):
    (source / "model.safetensors").unlink()
    torch.save({}, source / "pytorch_model.bin")
    assert cli.main(["convert-llava", str(source), str(tmp_path / "sparse")]) == 2
    assert "safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("overwrite", [False, True])
def test_convert_dynamic_llava_hands_its_options_on(tmp_path, monkeypatch, capsys, overwrite):
    from hf_efficient.dynamic_llava import convert_dynamic_llava

    seen = {}

    def convert(source, destination, *, overwrite):
        seen.update(source=source, destination=destination, overwrite=overwrite)
        return tmp_path / "done"

    monkeypatch.setattr(convert_dynamic_llava, "convert_dynamic_llava_checkpoint", convert)
    assert cli.main(["convert-dynamic-llava", "authors", "sparse", *(["--overwrite"] if overwrite else [])]) == 0
    assert seen == {"source": "authors", "destination": "sparse", "overwrite": overwrite}
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'done'}.\n"


def test_convert_dynamic_llava_mistake_is_one_sentence(tmp_path, capsys):
    assert cli.main(["convert-dynamic-llava", str(tmp_path / "missing"), str(tmp_path / "sparse"), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-efficient convert-dynamic-llava: error: ")
    assert "missing" in line
    assert list(tmp_path.iterdir()) == []
