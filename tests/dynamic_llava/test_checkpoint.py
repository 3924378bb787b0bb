"""Checkpoints of a sparse LLaVA live where hf_efficient does not."""

import json
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import check_imports, get_relative_import_files

from hf_efficient import DynamicLlavaForConditionalGeneration


SHIPPED = {
    f"{role}_dynamic_llava.py"
    for role in (
        "configuration",
        "modeling",
        "cache",
        "sparsity",
        "predictors",
        "decoder",
        "generation",
        "loading",
    )
}

CLIENT = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
folder, again = sys.argv[1:]
inputs = torch.load(f"{folder}/inputs.pt")
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.model_type == "dynamic_llava" and config.vision_keep_rate == 0.3
try:
    AutoModel.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("loaded code without being asked to")
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(base).__name__ == "DynamicLlavaModel" and "transformers_modules" in type(base).__module__
for place, auto in ((folder, AutoModelForImageTextToText), (again, AutoModelForMultimodalLM)):
    model = auto.from_pretrained(place, trust_remote_code=True)
    tokens = model.generate(**inputs["batch"], max_new_tokens=30)
    assert torch.equal(tokens, inputs["tokens"]), tokens
    sparsity = model.last_sparsity
    assert len(sparsity.image_index[0][0]) == 4 and torch.equal(sparsity.text_keep[0], inputs["kept"]), sparsity
    loss = model.train()(**inputs["batch"], labels=inputs["labels"]).loss
    loss.backward()
    assert all(p.grad is not None for p in model.model.image_score_predictor.parameters())
    if place == folder:
        model.save_pretrained(again)
print("fine")
"""


@pytest.mark.slow
@pytest.mark.parametrize("block", [("hf_efficient",), ("hf_efficient", "torchvision", "timm")])
def test_loads_generates_trains_and_saves_without_the_package(make_sparse, make_batch, clean_process, tmp_path, block):
    model = make_sparse()
    batch = make_batch([3, "image", 5])
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    tokens = model.generate(**batch, max_new_tokens=30)
    kept = model.last_sparsity.text_keep[0]
    assert 0 < kept.sum() < len(kept)
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    torch.save({"batch": batch, "tokens": tokens, "labels": labels, "kept": kept}, folder / "inputs.pt")
    done = clean_process(CLIENT, folder, tmp_path / "again", block=block)
    assert done.stdout.split()[-1] == "fine"


def test_checkpoint_holds_exactly_what_it_needs(make_sparse, tmp_path):
    make_sparse().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == SHIPPED
    assert not list(tmp_path.glob("*.bin"))
    config = json.loads((tmp_path / "config.json").read_text())
    heads = {"AutoModelForImageTextToText", "AutoModelForMultimodalLM"}
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel"} | heads
    assert config["architectures"] == ["DynamicLlavaForConditionalGeneration"]
    package = Path(__import__("hf_efficient").__file__).parent / "dynamic_llava"
    for name in SHIPPED:
        check_imports(package / name)
    assert {Path(name).name for name in get_relative_import_files(package / "modeling_dynamic_llava.py")} == (
        SHIPPED - {"modeling_dynamic_llava.py"}
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_predictors_exact(make_sparse, tmp_path, dtype):
    make_sparse().save_pretrained(tmp_path)
    model = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert model.lm_head.weight.dtype == dtype
    assert {p.dtype for p in model.model.image_score_predictor.parameters()} == {torch.float32}
    assert {p.dtype for p in model.model.output_text_score_predictor.parameters()} == {torch.float32}
