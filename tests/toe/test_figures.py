import sys

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image

from hf_efficient import ToEConfig, TokenExpansion
from hf_efficient.toe.cost_toe import count_patches
from hf_efficient.toe.figures_toe import choose_patches, plot_accuracy, plot_expansion


def test_chosen_patches_are_those_of_the_training(make_vit, count_hooks):
    model = make_vit().train()
    pixels = torch.randn(2, 3, 32, 32)
    config = ToEConfig(after_layer=2)
    kept = choose_patches(model, pixels, 1, config)
    rows = model.vit.layers[1](model.vit.layers[0](model.vit.embeddings(pixels)))
    index = TokenExpansion(config)(rows, 1).index[:, 1:] - 1
    assert kept.shape == (2, 64)
    assert torch.equal(kept.nonzero()[:, 1].view(2, 32), index.sort(dim=1).values)
    assert model.training
    assert count_hooks(model) == 0


def test_choosing_leaves_frozen_parts_in_their_mode(make_vit):
    model = make_vit().train()
    model.vit.embeddings.eval()
    choose_patches(model, torch.randn(1, 3, 32, 32), 1)
    assert model.training
    assert not any(module.training for module in model.vit.embeddings.modules())


def test_kept_patches_are_coloured_outlined_and_the_others_blue_and_struck_through(make_vit, tmp_path):
    model, pixels, config = make_vit(), torch.rand(2, 3, 32, 32), ToEConfig(after_layer=2)
    colours = (pixels * 255).byte().permute(0, 2, 3, 1).numpy()
    figure = plot_expansion(model, pixels, [Image.fromarray(colours[0]), colours[1]], config)
    axes = np.array(figure.axes).reshape(2, 4)
    titles = [f"stage {stage}: {kept} of 64 tokens\nfrom layer 3 on" for stage, kept in ((1, 32), (2, 48), (3, 64))]
    assert [axis.get_title() for axis in axes[0]] == ["image", *titles]
    for stage in (1, 2, 3):
        kept = choose_patches(model, pixels, stage, config).view(2, 8, 8).numpy()
        for row in range(2):
            shown = np.asarray(axes[row, stage].images[0].get_array())
            mask = kept[row].repeat(4, axis=0).repeat(4, axis=1)  # a patch has 4 x 4 pixels
            assert np.array_equal(shown[mask], colours[row][mask] / 255)
            red, _, blue = shown[~mask].T
            assert (blue - red).min(initial=1) > 0.3  # never grey
            assert blue.min(initial=1) > 0.6  # never black
            assert red.max(initial=0) < 0.6  # never white
            framed = np.pad(kept[row], 1)
            edges = (framed[1:] != framed[:-1]).sum() + (framed[:, 1:] != framed[:, :-1]).sum()
            outline, strokes = axes[row, stage].collections
            assert len(outline.get_segments()) == edges
            dropped = [(int(x1), int(y2)) for (x1, _), (_, y2) in strokes.get_segments()]
            assert sorted(dropped) == sorted((x, y) for y, x in zip(*map(list, (~kept[row]).nonzero())))
    figure.savefig(tmp_path / "expansion.png")


def test_a_line_runs_along_its_patch(make_vit):
    """The corner patch is the first seed; its outer edges are drawn where it is."""
    figure = plot_expansion(make_vit(), torch.rand(1, 3, 32, 32))
    lines = {tuple(map(tuple, segment)) for segment in figure.axes[1].collections[0].get_segments()}
    assert {((0, 0), (1, 0)), ((0, 0), (0, 1))} <= lines


def test_grey_pictures_are_drawn_in_grey(make_vit):
    figure = plot_expansion(make_vit(num_channels=1), torch.randn(1, 1, 32, 32))
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert shown.shape == (32, 32, 3)
    assert np.ptp(shown, axis=2).max() == 0


def test_pyplot_knows_nothing_of_the_figures(make_vit):
    """Else each would stay in memory, and a server's thread could draw none on macOS."""
    before = pyplot.get_fignums()
    plot_expansion(make_vit(), torch.rand(1, 3, 32, 32))
    plot_accuracy([{"arm": "toe", "history": [{"cpu_seconds": 60.0, "accuracy": 0.2}]}])
    assert pyplot.get_fignums() == before


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'need matplotlib; run pip install "hf-efficient\[quickstart\]"'):
        plot_accuracy([])


def test_patches_must_form_a_square(make_vit):
    with pytest.raises(ValueError, match="must give a square of patches, got 48"):
        plot_expansion(make_vit(image_size=(24, 32)), torch.randn(1, 3, 24, 32))


def test_accuracy_over_time(tmp_path):
    history = [{"cpu_seconds": 60.0 * i, "accuracy": 0.2 * i} for i in range(1, 4)]
    runs = [{"arm": arm, "history": history} for arm in ("full", "toe", "toe")]
    figure = plot_accuracy([runs[0] | {"title": "all tokens"}, *runs[1:]], target=0.5)
    assert [line.get_xdata()[-1] for line in figure.axes[0].lines[:3]] == [3.0] * 3
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["all tokens", "toe"]
    figure.savefig(tmp_path / "accuracy.png")


def test_patches_are_counted(make_vit, count_hooks):
    model = make_vit()
    assert count_patches(model, torch.zeros(1, 3, 32, 32)) == 64
    assert count_hooks(model) == 0
