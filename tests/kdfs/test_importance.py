"""The keep/drop logits start from what a filter does to the loss, measured before the first step."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from hf_efficient import CifarResNetConfig, CifarResNetForImageClassification, KDFSConfig, KDFSTrainer
from hf_efficient.kdfs import importance_kdfs
from hf_efficient.kdfs.importance_kdfs import (
    first_rows,
    keep_logits,
    marginal_cost,
    measure_sensitivity,
    own_random_state,
)
from hf_efficient.kdfs.masking_kdfs import KDFSMaskedModel
from hf_efficient.kdfs.structure_kdfs import read_structure


def masked_cifar(**settings):
    torch.manual_seed(0)
    network = CifarResNetForImageClassification(CifarResNetConfig(depth=8, hidden_sizes=[8, 8, 16], num_labels=4))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    config = KDFSConfig(target_flops_reduction=0.4, **settings)
    return KDFSMaskedModel(network, read_structure(network, (3, 32, 32)), config)


def batches(count=2):
    generator = torch.Generator().manual_seed(1)
    return [
        {"pixel_values": torch.randn(3, 3, 32, 32, generator=generator), "labels": torch.tensor([0, 1, 3])}
        for _ in range(count)
    ]


def test_sensitivity_is_the_first_order_change_of_the_loss():
    """Of a filter before a normalisation: gamma times its gradient plus beta times its gradient."""
    model = masked_cifar().train()
    found = measure_sensitivity(model, iter(batches()))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    squares = 0
    for batch in batches():
        model.network.eval().zero_grad()
        model.network(**batch).loss.backward()
        squares += torch.cat(
            [
                norm.weight * norm.weight.grad + norm.bias * norm.bias.grad
                for name, norm in model.network.named_modules()
                if isinstance(norm, nn.BatchNorm2d) and ".layer" in name
            ]
        ).square()
    names = [group.name for group in model.structure.groups]
    assert names == sorted(names)  # the order of the modules above
    assert torch.allclose(found, (squares / 2).sqrt().double(), rtol=1e-4, atol=1e-9)


def test_cost_is_what_one_filter_less_saves():
    model = masked_cifar()
    cost = marginal_cost(model)
    for filter_index in (0, 9, len(cost) - 1):
        masks = torch.ones(len(cost))
        masks[filter_index] = 0
        assert model.dense_macs - float(model.cost.count_macs(masks)) == pytest.approx(float(cost[filter_index]))


def test_logits_compare_filters_of_all_layers_by_their_worth():
    sensitivity = torch.tensor([1e-3, 1e-2, 1e-1, 1.0, 0.0], dtype=torch.float64)
    cost = torch.tensor([1.0, 1.0, 1.0, 10.0, 1.0], dtype=torch.float64)
    logits = keep_logits(sensitivity, cost, margin=2.0, spread=0.5)
    assert logits[2] == logits[3]  # ten times the loss for ten times the multiply-adds
    assert logits[4] == logits[0] < logits[1] < logits[2]
    assert float(logits.mean()) == pytest.approx(2.0)
    assert float(logits.std()) == pytest.approx(0.5)
    assert torch.allclose(logits[1] - logits[0], logits[2] - logits[1])
    assert keep_logits(torch.zeros(3).double(), torch.ones(3).double(), 2.0, 1.0).tolist() == [2.0, 2.0, 2.0]
    worst = keep_logits(
        torch.cat([torch.ones(99), torch.tensor([1e-30])]).double(), torch.ones(100).double(), 2.0, 1.0
    )
    assert worst.min() == -1.0  # three standard deviations


class Stream(IterableDataset):
    def __iter__(self):
        yield from ({"row": index} for index in range(100))


def test_rows_lie_evenly_or_come_first():
    rows = [{"row": index} for index in range(100)]
    collate = lambda chunk: [row["row"] for row in chunk]  # noqa: E731
    assert list(first_rows(rows, 3, collate)) == [[0, 50, 99]]
    assert [len(chunk) for chunk in first_rows(rows, 40, collate)] == [16, 16, 8]
    assert [row for chunk in first_rows(rows, 1000, collate) for row in chunk] == list(range(100))
    assert list(first_rows(Stream(), 18, collate)) == [list(range(16)), [16, 17]]


def test_random_numbers_go_on_as_if_nothing_had_been_drawn():
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    expected = draw()
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    with own_random_state(3):
        inside = draw()
    assert draw() == expected
    with own_random_state(3):
        assert draw() == inside


def test_training_starts_from_it_once(arguments, toy_data, monkeypatch):
    calls = []
    original = importance_kdfs.measure_sensitivity

    def counted(model, batches):
        batches = list(batches)
        calls.append(sum(len(batch["labels"]) for batch in batches))
        return original(model, iter(batches))

    monkeypatch.setattr(importance_kdfs, "measure_sensitivity", counted)
    model = masked_cifar(initial_importance_spread=2.0)
    before = [logits.detach().clone() for logits in model.mask_logits]
    args = arguments(
        max_steps=2, learning_rate=0.0, per_device_train_batch_size=4, save_strategy="steps", save_steps=1
    )
    trainer = KDFSTrainer(model, args, train_dataset=toy_data())
    trainer.train()
    assert calls == [8]  # two steps of four images
    keep = torch.cat([(logits[:, 1] - logits[:, 0]).detach() for logits in model.mask_logits])
    assert float(keep.mean()) == pytest.approx(2.0, abs=0.1)
    assert float(keep.std()) == pytest.approx(2.0, abs=0.3)
    assert not any(torch.equal(logits, old) for logits, old in zip(model.mask_logits, before, strict=True))
    trainer.train()
    again = KDFSTrainer(masked_cifar(initial_importance_spread=2.0), args, train_dataset=toy_data())
    again.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-1")
    again.train()  # on with logits that were trained
    assert calls == [8]


def test_nothing_is_measured_where_it_is_not_wanted(arguments, toy_data, monkeypatch):
    monkeypatch.setattr(importance_kdfs, "measure_sensitivity", lambda *_: pytest.fail("measured"))
    for settings in ({"importance_images": 0}, {"initial_importance_spread": 0.0}):
        KDFSTrainer(masked_cifar(**settings), arguments(max_steps=1), train_dataset=toy_data()).train()
    with pytest.raises(ValueError, match=r"`importance_images` must be an integer of at least 0, but is -1"):
        KDFSConfig(importance_images=-1)
