"""A checkpoint of a ToE training is one of a model that never met ToE."""

import json

import pytest
import torch
from safetensors import safe_open

from hf_efficient import ToECallback


def test_saved_checkpoint_is_that_of_a_plain_training(make_vit, make_trainer, tmp_path):
    checkpoint = {}
    for name, callbacks in (("toe", [ToECallback()]), ("plain", [])):
        trainer = make_trainer(
            make_vit(), callbacks, output_dir=str(tmp_path / name), save_strategy="steps", save_steps=4, max_steps=6
        )
        trainer.train()
        checkpoint[name] = tmp_path / name / "checkpoint-4"  # written in the middle of the training, hooks in place
    files = {name: sorted(path.name for path in folder.iterdir()) for name, folder in checkpoint.items()}
    assert files["toe"] == files["plain"]
    configs = [json.loads((folder / "config.json").read_text()) for folder in checkpoint.values()]
    assert configs[0] == configs[1]
    contents = []
    for folder in checkpoint.values():
        with safe_open(folder / "model.safetensors", "pt") as file:
            contents.append((file.metadata(), {key: file.get_slice(key).get_shape() for key in file.keys()}))  # noqa: SIM118
    assert contents[0] == contents[1]


@pytest.mark.slow
def test_loads_where_the_package_is_missing(make_vit, make_trainer, clean_process, tmp_path):
    model = make_vit()
    trainer = make_trainer(model, [ToECallback()], max_steps=4)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    pixels = torch.randn(2, 3, 32, 32)
    torch.save(pixels, tmp_path / "pixels.pt")
    clean_process(
        "import torch\n"
        "from transformers import AutoModelForImageClassification\n"
        "model = AutoModelForImageClassification.from_pretrained(sys.argv[1])\n"
        "assert type(model).__module__ == 'transformers.models.vit.modeling_vit', type(model)\n"
        "torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])\n",
        tmp_path / "saved",
        tmp_path / "pixels.pt",
        tmp_path / "logits.pt",
    )
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model.eval()(pixels).logits)
