"""The LoRA recipe of the README: train, save, load, merge; and predictors kept apart from their base."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Gemma2Config, LlavaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

from hf_efficient import (
    DynamicLlavaForConditionalGeneration,
    DynamicLlavaTrainer,
    DynamicLlavaTrainingArguments,
)

from .conftest import llava_config
from .test_training import PREDICTORS, stack


LANGUAGE = r".*language_model.*(q_proj|k_proj|v_proj|o_proj)"


def recipe(**settings):
    return LoraConfig(**{"target_modules": LANGUAGE, "modules_to_save": list(PREDICTORS), **settings})


@pytest.fixture
def trainer_of(tmp_path, make_examples):
    def make(model, **settings):
        args = DynamicLlavaTrainingArguments(
            str(tmp_path / "run"),
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            per_device_train_batch_size=4,
            learning_rate=0.05,
            predictor_learning_rate=0.01,
            predictor_weight_decay=0.1,
            **{"max_steps": 3, "save_strategy": "no", **settings},
        )
        return DynamicLlavaTrainer(model, args, train_dataset=make_examples())

    return make


def test_the_recipe_trains_saves_loads_and_merges(make_trainable, make_examples, trainer_of, tmp_path):
    base = {name: value.clone() for name, value in make_trainable(opinions=True).state_dict().items()}
    model = get_peft_model(make_trainable(opinions=True), recipe())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert not any("vision_tower" in name for name in trained)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = trainer_of(model, save_strategy="steps", save_steps=3, activation_checkpointing=True)
    trainer.create_optimizer()
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {0.05, 0.01}, "predictors inside peft's wrapper have their own rate"
    decayed = {group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert decayed == {0.0, 0.1}
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == trained

    batch = stack(make_examples(3))
    with torch.no_grad():
        wanted = model.eval()(**batch)
        untrained = make_trainable(opinions=True).eval()(**batch)
    assert (wanted.logits - untrained.logits).abs().max() > 1e-3

    folder = tmp_path / "run" / "checkpoint-3"
    file = load_file(folder / "adapter_model.safetensors")
    assert all(any(name in key for key in file) for name in PREDICTORS), "the predictors are in the adapter's file"
    loaded = PeftModel.from_pretrained(make_trainable(opinions=True), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, wanted.logits, atol=1e-6, rtol=0)

    merged = loaded.merge_and_unload()
    assert type(merged) is DynamicLlavaForConditionalGeneration
    for name in PREDICTORS:
        weight = getattr(merged.model, name).output_mlp[-1].weight
        assert not torch.equal(
            weight, base[f"model.{name}.output_mlp.{len(getattr(merged.model, name).output_mlp) - 1}.weight"]
        )
    merged.save_pretrained(tmp_path / "merged")
    again = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        result = again(**batch)
    torch.testing.assert_close(result.logits, wanted.logits, atol=1e-5, rtol=0)
    assert [row[0].tolist() for row in result.sparsity.image_index] == [
        row[0].tolist() for row in wanted.sparsity.image_index
    ]


@pytest.mark.slow
def test_a_resumed_adapter_lands_in_the_same_state(make_trainable, trainer_of, tmp_path):
    runs = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        torch.manual_seed(0)
        model = get_peft_model(make_trainable(), recipe())
        trainer = trainer_of(model, max_steps=3, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        runs.append(dict(model.named_parameters()))
    assert runs[0].keys() == runs[1].keys()
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


class TestRefuses:
    def test_predictors_that_the_adapter_leaves_frozen(self, make_trainable, trainer_of):
        model = get_peft_model(make_trainable(), recipe(modules_to_save=None))
        with pytest.raises(ValueError, match=r"`image_score_predictor` must be trainable, .* modules_to_save="):
            trainer_of(model)

    def test_predictors_wrapped_by_lora(self, make_trainable, trainer_of):
        model = get_peft_model(
            make_trainable(), recipe(target_modules=r".*score_predictor.*(fc1|fc2)", modules_to_save=None)
        )
        with pytest.raises(ValueError, match=r"`target_modules` must not reach the predictors, got LoRA weights"):
            trainer_of(model)

    def test_a_peft_model_as_dense_model(self, make_llava):
        wrapped = get_peft_model(make_llava(), LoraConfig(target_modules=LANGUAGE))
        with pytest.raises(ValueError, match=r"`model` must be a plain LLaVA, got PeftModel.*merge_and_unload"):
            DynamicLlavaForConditionalGeneration.from_llava(wrapped)

    @pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
    def test_other_architectures_by_name(self, make_llava, tmp_path, kind):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ValueError, match=rf"`model_type` 'llava'\), got '{kind}': NeXT, OneVision"):
            DynamicLlavaForConditionalGeneration.from_llava(tmp_path)

    def test_another_architecture_as_model(self):
        config = llava_config()
        parts = {"text_config": config.text_config, "vision_config": config.vision_config}
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(**parts, image_token_index=120))
        with pytest.raises(ValueError, match="got 'llava_next'"):
            DynamicLlavaForConditionalGeneration.from_llava(model)

    def test_an_unsupported_language_model(self, tmp_path):
        LlavaConfig(text_config=Gemma2Config(), vision_config=llava_config().vision_config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"one of llama, mistral, qwen2, got 'gemma2'"):
            DynamicLlavaForConditionalGeneration.from_llava(tmp_path)

    def test_loading_arguments_for_a_model_in_memory(self, make_llava):
        with pytest.raises(ValueError, match="`dtype` only applies where a checkpoint is loaded"):
            DynamicLlavaForConditionalGeneration.from_llava(make_llava(), dtype=torch.bfloat16)


def test_fresh_predictors_are_warned_about(make_llava, caplog):
    DynamicLlavaForConditionalGeneration.from_llava(make_llava())
    assert "The predictors of this sparse LLaVA are untrained" in caplog.text


class TestPredictorsAlone:
    def test_round_trip(self, make_trainable, make_examples, tmp_path):
        source = make_trainable(opinions=True, output_text_threshold=0.4)
        assert source.save_predictors(tmp_path / "predictors") == tmp_path / "predictors"
        files = sorted(file.name for file in (tmp_path / "predictors").iterdir())
        assert files == ["predictors.safetensors", "predictors_config.json"]
        source.config.vision_keep_rate = 0.2
        source.save_predictors(tmp_path / "predictors")  # over the older ones
        target = make_trainable()
        target.load_predictors(tmp_path / "predictors")
        assert (target.config.vision_keep_rate, target.config.output_text_threshold) == (0.2, 0.4)
        batch = stack(make_examples(2))
        with torch.no_grad():
            assert torch.equal(source.eval()(**batch).logits, target.eval()(**batch).logits)

    def test_inside_an_adapter_the_trained_ones_are_meant(self, make_trainable, tmp_path):
        adapted = get_peft_model(make_trainable(), recipe())
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(0.5)
        adapted.save_predictors(tmp_path)
        plain, other = make_trainable(), get_peft_model(make_trainable(), recipe())
        plain.load_predictors(tmp_path)
        other.load_predictors(tmp_path)
        merged = [model.merge_and_unload().model for model in (adapted, other)]
        for name in PREDICTORS:
            expected = getattr(merged[0], name).state_dict()
            for model in (plain.model, merged[1]):
                got = getattr(model, name).state_dict()
                assert got.keys() == expected.keys()
                assert all(torch.equal(value, expected[key]) for key, value in got.items())

    def test_sizes_that_do_not_fit_change_nothing(self, make_trainable, tmp_path):
        make_trainable(predictor_hidden_size=32).save_predictors(tmp_path)
        model = make_trainable()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"predictors of this model's sizes, got \d+ tensors that do not fit"):
            model.load_predictors(tmp_path)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model.config.predictor_hidden_size == 16

    def test_another_number_of_heads_which_no_shape_tells_changes_nothing(self, make_trainable, tmp_path):
        make_trainable(predictor_num_heads=4).save_predictors(tmp_path)
        model = make_trainable()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"`folder` must hold predictors of 2 attention heads, .* got 4"):
            model.load_predictors(tmp_path)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model.config.predictor_num_heads == 2

    @pytest.mark.parametrize("name", ["predictors.safetensors", "predictors_config.json"])
    def test_a_missing_file(self, make_trainable, tmp_path, name):
        model = make_trainable()
        model.save_predictors(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"without {name}"):
            model.load_predictors(tmp_path)
