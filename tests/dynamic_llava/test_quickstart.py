"""The part of Dynamic-LLaVA in quickstart, on toy checkpoints: what it compares, what it shows, what it asks for."""

import json
import sys

import pytest
import torch
from PIL import Image

from hf_efficient import DynamicLlavaForConditionalGeneration
from hf_efficient.dynamic_llava import quickstart_dynamic_llava as part


@pytest.fixture
def checkpoints(make_sparse, word_processor, tmp_path):
    folder = tmp_path / "model_cards"
    for name in (part.EASY_VQA, part.SCENES):
        make_sparse().half().save_pretrained(folder / name)
        word_processor.save_pretrained(folder / name)
        Image.new("RGB", (16, 16), "teal").save(folder / name / "sample.png")
        truth = "on the field a1 there is a small red ring . on the field b2 there is a large blue cross ."
        results = {"sample": {"file": "sample.png", "text": "w5 w6 w7", "truth": truth}}
        (folder / name / "results.json").write_text(json.dumps(results))
    return folder


def test_questions_have_ten_different_answers():
    questions = part._pick_questions()
    assert len(questions) == part.QUESTIONS == 10
    assert len({truth for _, truth, _ in questions}) == 10


def test_part(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(part, "QUESTIONS", 3)
    monkeypatch.setattr(part, "REPEATS", 1)
    output = tmp_path / "out"
    output.mkdir()
    result = part.run(checkpoints, output)
    assert len(result["table"]["rows"]) == 4
    assert all(len(row) == len(result["table"]["columns"]) for row in result["table"]["rows"])
    items = result["details"]["items"]
    json.dumps(result)
    for item in items:
        dense, sparse = item["dense"], item["sparse"]
        assert (dense["image_tokens"], sparse["image_tokens"]) == (16, 4)
        assert dense["text_tokens"] >= sparse["text_tokens"]
        assert sparse["prefill_flops"] < dense["prefill_flops"]
        assert dense["prefill_ms"] > 0
        assert sparse["prefill_ms"] > 0
    scene = items[-1]
    assert ["scene, facts right of 6", 0, 0] in result["summary"], "an untrained model says nothing of the truth"
    assert any(note.startswith("Scene, truth:  on the field a1") for note in result["notes"])
    assert scene["dense"]["text_tokens"] > scene["sparse"]["text_tokens"] > 0
    assert scene["sparse"]["kv_bytes"] < scene["dense"]["kv_bytes"]
    assert {picture["file"] for picture in result["pictures"]} == {path.name for path in output.iterdir()}
    for picture in result["pictures"]:
        assert min(Image.open(output / picture["file"]).size) > 100


def test_answers_are_those_of_the_model(checkpoints, word_processor):
    """The dense column is the model with sparsity off, the sparse one the model as it loads."""
    model, processor = part.load_checkpoint(checkpoints / part.SCENES)
    image = Image.open(checkpoints / part.SCENES / "sample.png")
    item = part.compare_answers(model, processor, image, "w5 w6 w7", 20)
    assert model.config.use_vision_predictor
    assert model.config.use_output_text_predictor

    fresh = DynamicLlavaForConditionalGeneration.from_pretrained(checkpoints / part.SCENES, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "w5 w6 w7"}]}]
    inputs = word_processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )

    def answer():
        out = fresh.generate(**inputs, max_new_tokens=20, do_sample=False)
        return word_processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    assert item["sparse"]["answer"] == answer()
    fresh.config.use_vision_predictor = fresh.config.use_output_text_predictor = False
    assert item["dense"]["answer"] == answer()
    assert item["dense"]["answer"] != item["sparse"]["answer"]


def test_facts_of_the_scene_are_counted_for_both():
    truth = "on the field a1 there is a small red ring . on the field b2 there is a large blue cross ."
    scene = {"dense": {"answer": truth}, "sparse": {"answer": truth.replace("red", "green")}}
    assert part._count_facts(scene, truth) == [["scene, facts right of 6", 6, 5]]
    assert part._count_facts(scene, "") == []


def test_long_words_show_that_they_were_cut():
    assert part._shorten("rectangle", 12) == "rectangle"
    assert part._shorten("does the image contain a circle?", 12) == "does the..."


def test_missing_checkpoint_and_data_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="dynamic-llava-easy-vqa holds no checkpoint"):
        part.run(tmp_path, tmp_path)
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ImportError, match=r"pip install -e \"\.\[quickstart\]\""):
        part.run(tmp_path, tmp_path)


@pytest.mark.slow
def test_part_needs_no_torchvision(checkpoints, tmp_path, clean_process):
    """The extra `quickstart` brings all it needs: core requirements, easy-vqa and matplotlib."""
    (tmp_path / "out").mkdir()
    code = (
        "from pathlib import Path\nfrom hf_efficient.dynamic_llava import quickstart_dynamic_llava as part\n"
        "part.QUESTIONS, part.REPEATS = 2, 1\n"
        "print(len(part.run(Path(sys.argv[1]), Path(sys.argv[2]))['table']['rows']))\n"
    )
    block = ("torchvision", "timm", "scipy", "sklearn", "skimage", "cv2", "torchmetrics", "gradio", "onnx")
    done = clean_process(code, checkpoints, tmp_path / "out", block=block)
    assert done.stdout.splitlines()[-1] == "3"
