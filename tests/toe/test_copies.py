"""A copy or a pickle of a model in training is a model that is not in training."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, YolosConfig, YolosForObjectDetection

from hf_efficient import ToECallback, efficiency_report, token_expansion


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


def training_output(model, pixels):
    return model.train()(pixels).logits


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("host", ["vit", "yolos"])
def test_a_copy_made_in_a_context_is_plain(host, make_copy, make_vit, shape, count_hooks):
    model = make_vit()
    if host == "yolos":
        sizes = shape | {"image_size": [32, 32], "num_detection_tokens": 5, "use_mid_position_embeddings": True}
        model = YolosForObjectDetection(YolosConfig(**sizes))
    pixels = torch.randn(2, 3, 32, 32)
    plain = training_output(model, pixels)
    with token_expansion(model) as expansion:
        twin = make_copy(model)
        assert torch.equal(training_output(twin, pixels), plain)
        assert expansion.index is None  # the copy reached nothing of the original
        expanded = training_output(model, pixels)
        assert not torch.equal(expanded, plain)
        with token_expansion(twin):  # and it can be trained by itself
            assert torch.equal(training_output(twin, pixels), expanded)
        assert count_hooks(twin) == 0
        twin = make_copy(model)
    assert torch.equal(training_output(twin, pixels), plain)
    assert ToECallback.detach(twin) == (3 if host == "yolos" else 2)
    assert count_hooks(twin) == 0
    assert b"hf_efficient" not in pickle.dumps(twin)  # loads where this package is missing


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end"])
def test_an_average_made_by_a_callback_is_plain(event, make_vit, make_trainer, tmp_path):
    class Average(TrainerCallback):
        def _copy(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                self.copies = [make_copy(model) for make_copy in COPIES.values()]

    setattr(Average, event, Average._copy)
    average = Average()
    model = make_vit()
    make_trainer(model, [ToECallback(), average], max_steps=3).train()
    pixels = torch.randn(2, 3, 32, 32)
    twin = make_vit()
    model.save_pretrained(tmp_path)
    names_of_a_file = load_file(tmp_path / "model.safetensors")
    for averaged in average.copies:
        twin.load_state_dict(averaged.state_dict())
        assert torch.equal(training_output(averaged, pixels), training_output(twin, pixels))
        with pytest.raises(RuntimeError, match="Missing key"):  # names of a file are for the trainer's model only
            averaged.load_state_dict(names_of_a_file)
        assert ToECallback.detach(averaged) == 3
        assert not averaged._load_state_dict_pre_hooks
        assert b"hf_efficient" not in pickle.dumps(averaged)


def test_a_copy_can_be_measured_while_the_training_goes_on(make_vit):
    model = make_vit()
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32), "labels": torch.tensor([0])}
    with token_expansion(model):
        twin = copy.deepcopy(model)
        efficiency_report(twin, inputs, repeats=1)
