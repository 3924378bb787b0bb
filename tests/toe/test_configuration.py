import dataclasses

import numpy as np
import pytest

from hf_efficient import ToECallback, ToEConfig, TokenExpansion
from hf_efficient.toe import speedup_bound


def test_defaults_are_the_recipe_of_the_paper():
    config = ToEConfig()
    assert config.stage_starts == (0.0, 1 / 3, 2 / 3)
    assert config.keep_rates == (0.5, 0.75, 1.0)
    assert (config.initial_keep_rate, config.expansion_steps, config.distance, config.after_layer) == (
        0.25,
        2,
        "cosine",
        1,
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.distance = "manhattan"


@pytest.mark.parametrize(
    ("name", "rates", "first"),
    [
        ("deit", (0.5, 0.75, 1.0), 0.25),
        ("lv-vit", (0.4, 0.7, 1.0), 0.2),
        ("efficient-train", (0.6, 0.8, 1.0), 0.3),
        ("fast", (0.3, 0.6, 1.0), 0.2),
    ],
)
def test_presets(name, rates, first):
    config = ToEConfig.preset(name, distance="euclidean")
    assert (config.keep_rates, config.initial_keep_rate, config.distance) == (rates, first, "euclidean")


def test_round_trip_through_a_dict():
    config = ToEConfig.preset("fast", stage_starts=(0, 5, 10))
    assert ToEConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("starts", "progress", "stage"),
    [
        ((0.0, 1 / 3, 2 / 3), 0.0, 1),
        ((0.0, 1 / 3, 2 / 3), 99 / 300, 1),
        ((0.0, 1 / 3, 2 / 3), 100 / 300, 2),
        ((0.0, 1 / 3, 2 / 3), 199 / 300, 2),
        ((0.0, 1 / 3, 2 / 3), 200 / 300, 3),
        ((0.0, 1 / 3, 2 / 3), 1.0, 3),
        ((0, 100, 200), 99.99, 1),
        ((0, 100, 200), 100, 2),
        ((5, 50, 100), 4.9, 0),  # YOLOS begins on all tokens
        ((5, 50, 100), 5, 1),
    ],
)
def test_stage_follows_progress(starts, progress, stage):
    assert ToEConfig(stage_starts=starts).stage_at(progress) == stage


def test_zero_fits_epochs_and_shares():
    assert ToEConfig(stage_starts=(0, 1, 2)).counts_epochs
    assert ToEConfig(stage_starts=(0.0, 1, 2)).counts_epochs
    assert not ToEConfig(stage_starts=(0, 0.2, 0.5)).counts_epochs
    assert not ToEConfig(stage_starts=(0,), keep_rates=(0.5,)).counts_epochs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_rates": (0.75, 0.5, 1.0)}, r"`keep_rates` must rise strictly within \(0, 1\], got \(0.75, 0.5, 1.0\)"),
        ({"keep_rates": (0.5, 0.5, 1.0)}, r"`keep_rates` must rise strictly .* got \(0.5, 0.5, 1.0\)"),
        ({"keep_rates": (0.5, 0.75, 1.2)}, r"`keep_rates` .* got \(0.5, 0.75, 1.2\)"),
        ({"keep_rates": (0.5, 1.0)}, r"`keep_rates` needs one rate for each of the 3 `stage_starts`"),
        ({"keep_rates": 0.5}, r"`keep_rates` must be a list or tuple of numbers, got 0.5"),
        ({"keep_rates": ("0.5", "0.75", "1")}, r"`keep_rates` must hold at least one number and nothing else"),
        ({"initial_keep_rate": 0.6}, r"`initial_keep_rate` must not be above the first keep rate, got 0.6 > 0.5"),
        ({"initial_keep_rate": 0}, r"`initial_keep_rate` must be a number above 0 .* token is kept, got 0"),
        ({"initial_keep_rate": "a quarter"}, r"`initial_keep_rate` must be a number above 0 .* got 'a quarter'"),
        ({"initial_keep_rate": float("nan")}, r"`initial_keep_rate` must be a number above 0 .* got nan"),
        ({"keep_rates": (0.5, float("nan"), 1.0)}, r"`keep_rates` must rise strictly within \(0, 1\], got \(0.5, nan"),
        (
            {"stage_starts": (0.0, float("nan"), 0.5)},
            r"`stage_starts` must rise strictly from 0 or later, got \(0.0, n",
        ),
        ({"distance": "chebyshev"}, r"`distance` must be one of 'cosine', 'euclidean', 'manhattan', got 'chebyshev'"),
        ({"stage_starts": (0, 0.5, 2)}, r"`stage_starts` must be all integers .* got \(0, 0.5, 2\)"),
        (
            {"stage_starts": (0.0, 0.6, 0.3)},
            r"`stage_starts` must rise strictly .* got \(0.0, 0.6, 0.3\)",
        ),
        ({"stage_starts": (-1, 2, 3)}, r"`stage_starts` must rise strictly from 0 or later"),
        ({"stage_starts": (0.0, 0.5, 1.0)}, r"`stage_starts` as shares must lie in \[0, 1\), got 1.0"),
        ({"stage_starts": ()}, r"`stage_starts` must hold at least one number"),
        ({"stage_starts": (0, True, 2)}, r"`stage_starts` must hold at least one number and nothing else"),
        ({"expansion_steps": 0}, r"`expansion_steps` must be an integer of at least 1, got 0"),
        ({"after_layer": 0}, r"`after_layer` must be an integer of at least 1, got 0"),
        ({"after_layer": 1.0}, r"`after_layer` must be an integer of at least 1, got 1.0"),
    ],
)
def test_bad_values_get_a_sentence(fields, message):
    with pytest.raises(ValueError, match=message):
        ToEConfig(**fields)


def test_unknown_preset():
    with pytest.raises(ValueError, match="must be one of 'deit', 'lv-vit', 'efficient-train', 'fast', got 'faster'"):
        ToEConfig.preset("faster")


def test_what_is_no_schedule_gets_a_sentence_wherever_one_is_taken(make_vit):
    for take in (ToECallback, TokenExpansion, lambda config: speedup_bound(make_vit(), 64, config)):
        with pytest.raises(ValueError, match=r"must be a `ToEConfig`, got 'fast'; write `ToEConfig.preset\('fast'\)`"):
            take("fast")
        with pytest.raises(ValueError, match=r"`ToEConfig`, got \{'distance': 'cosine'\}; make one by `ToEConfig\("):
            take({"distance": "cosine"})


def test_numbers_of_numpy_are_numbers():
    config = ToEConfig(stage_starts=np.arange(3), keep_rates=np.array([0.5, 0.75, 1.0], np.float32))
    assert config == ToEConfig(stage_starts=(0, 1, 2))
    assert all(type(start) is int for start in config.stage_starts)
