"""What is left on disk where a run was cut off at an awkward place."""

import os
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hf_efficient import CifarResNetConfig, CifarResNetForImageClassification, KDFSConfig, KDFSPruner
from hf_efficient.kdfs.resuming_kdfs import RUN_NAME, Run


class Phases(TrainerCallback):
    """Note which phases were trained; break off where one begins."""

    def __init__(self, breaks=False):
        self.seen, self.breaks = [], breaks

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.append(Path(args.output_dir).name)
        if self.breaks:
            raise KeyboardInterrupt


@pytest.fixture
def prune(arguments, toy_data, tmp_path):
    """Two steps into the same folders at every call."""

    def run(*callbacks, **settings):
        torch.manual_seed(0)
        model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, hidden_sizes=[8, 8, 16], num_labels=4))
        args = arguments(max_steps=2, save_strategy="steps", save_steps=1)
        config = KDFSConfig(**{"target_flops_reduction": 0.3, **settings})
        KDFSPruner(model).prune(tmp_path / "out", config, toy_data(16), args=args, callbacks=list(callbacks))

    return run


def test_masks_of_a_run_that_was_closed_by_half_are_not_taken_up(prune, tmp_path, monkeypatch):
    """The next run, with another target, would find them as its own and choose no filters."""

    def cut_off(self):
        (self.folder / RUN_NAME).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "close", cut_off)
        with pytest.raises(KeyboardInterrupt):
            prune()
    with pytest.raises(KeyboardInterrupt):
        prune(Phases(breaks=True), target_flops_reduction=0.5)
    phases = Phases()
    prune(phases, target_flops_reduction=0.5)
    assert phases.seen == ["sampling", "fine_tuning"]


def test_new_weights_never_stand_beside_the_old_configuration(prune, tmp_path, monkeypatch):
    """Where an earlier pruning is replaced, what was written by half does not load."""
    prune()
    config = tmp_path / "out" / "config.json"
    rename = os.replace

    def cut_off(source, target):
        if Path(target) == config:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut_off)
        with pytest.raises(KeyboardInterrupt):
            prune(target_flops_reduction=0.5)
    assert not config.exists()
    prune(target_flops_reduction=0.5)
    assert KDFSPruner.from_pretrained(tmp_path / "out").model.config.widths


class BreakAtFineTuning(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        if Path(args.output_dir).name == "fine_tuning":
            raise KeyboardInterrupt


def test_patterns_given_as_a_tuple_are_those_of_the_run(prune):
    with pytest.raises(KeyboardInterrupt):
        prune(BreakAtFineTuning(), target_flops_reduction=0.2, exclude_layers=("layer1",))
    phases = Phases()
    prune(phases, target_flops_reduction=0.2, exclude_layers=("layer1",))
    assert phases.seen == ["fine_tuning"]
