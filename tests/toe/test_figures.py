import pytest
import torch

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


def test_pictures(make_vit, tmp_path):
    figure = plot_expansion(make_vit(), torch.randn(2, 3, 32, 32))
    assert [axis.get_title() for axis in figure.axes[:3]] == [
        f"stage {i}: {n} of 64" for i, n in ((1, 32), (2, 48), (3, 64))
    ]
    veil = figure.axes[0].images[1].get_array()
    assert (veil[..., 3] > 0).mean() == pytest.approx(0.5)  # half of the patches are dark
    figure.savefig(tmp_path / "expansion.png")
    history = [{"cpu_seconds": 60.0 * i, "accuracy": 0.2 * i} for i in range(1, 4)]
    figure = plot_accuracy([{"arm": arm, "history": history} for arm in ("full", "toe", "toe")], target=0.5)
    assert [line.get_xdata()[-1] for line in figure.axes[0].lines[:3]] == [3.0] * 3
    figure.savefig(tmp_path / "accuracy.png")
    with pytest.raises(ValueError, match="must give a square of patches, got 48"):
        plot_expansion(make_vit(image_size=(24, 32)), torch.randn(1, 3, 24, 32))


def test_patches_are_counted(make_vit, count_hooks):
    model = make_vit()
    assert count_patches(model, torch.zeros(1, 3, 32, 32)) == 64
    assert count_hooks(model) == 0
