"""A compiled model does not notice by itself that hooks come and go."""

import pytest
import torch
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, YolosConfig, YolosForObjectDetection

from hf_efficient import ToECallback, ToEConfig, token_expansion


def timm_vit():
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=2, model_args=sizes)
    return TimmWrapperForImageClassification(config)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["vit", "timm", "yolos"])
def test_attaching_twice_to_a_compiled_model(host, make_vit, shape):
    if host == "yolos":
        model = YolosForObjectDetection(YolosConfig(**shape | {"image_size": [32, 32]}, num_detection_tokens=5))
    else:
        model = make_vit() if host == "vit" else timm_vit()
    pixels = torch.randn(2, 3, 32, 32)
    model.train()
    plain = model(pixels).logits
    expected = {}
    for preset in ("deit", "fast"):
        with token_expansion(model, ToEConfig.preset(preset)) as expansion:
            for progress in (0.0, 0.5, 0.9):
                expansion.set_progress(progress)
                expected[preset, progress] = model(pixels).logits
    evaluated = model.eval()(pixels).logits
    model.train()

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixels).logits, plain)
    for preset in ("deit", "fast"):
        with token_expansion(compiled, ToEConfig.preset(preset)) as expansion:
            for progress in (0.0, 0.5, 0.9):
                expansion.set_progress(progress)
                logits = compiled(pixels).logits
                torch.testing.assert_close(logits, expected[preset, progress])
                assert (progress == 0.9) == torch.equal(expected[preset, progress], plain)
                logits.sum().backward()
            model.eval()
            torch.testing.assert_close(compiled(pixels).logits, evaluated)
            model.train()
        torch.testing.assert_close(compiled(pixels).logits, plain)


@pytest.mark.slow
def test_trainer_compiles(make_vit, make_trainer, count_hooks):
    """Losses with and without compiling, two trainings after each other on the same model."""
    losses = {}
    for compiling in (False, True):
        model = make_vit()
        losses[compiling] = []
        for preset in ("deit", "fast"):
            trainer = make_trainer(
                model,
                [ToECallback(ToEConfig.preset(preset))],
                torch_compile=compiling,
                torch_compile_backend="aot_eager" if compiling else None,
                max_steps=6,
                eval_strategy="steps",
                eval_steps=3,
            )
            trainer.train()
            history = trainer.state.log_history
            losses[compiling] += [entry[key] for entry in history for key in ("loss", "eval_loss") if key in entry]
            kept = [32, 32, 48, 48, 64, 64] if preset == "deit" else [19, 19, 38, 38, 64, 64]
            assert [entry["toe_kept_tokens"] for entry in history if "loss" in entry] == kept
        assert count_hooks(model) == 0
    assert len(losses[True]) == 2 * (6 + 2)
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)
