"""A resumed training reads the weights of its checkpoint, whatever names they were saved under."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    YolosConfig,
    YolosForObjectDetection,
)

from hf_efficient import ToECallback
from hf_efficient.toe.resume_toe import renames_on_saving, translate_names


LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
SHAPE = LAYERS | {"image_size": 16, "patch_size": 4}
TIMM = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def towers():
    return {
        "vision_config": dict(SHAPE),
        "text_config": LAYERS | {"vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1},
    }


HOSTS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SHAPE)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**SHAPE)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**SHAPE)),
    "dinov2-registers": lambda: Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**SHAPE)),
    "clip": lambda: CLIPForImageClassification(CLIPConfig(**towers())),
    "siglip": lambda: SiglipForImageClassification(SiglipConfig(**towers())),
    "beit": lambda: BeitForImageClassification(BeitConfig(**SHAPE, use_absolute_position_embeddings=True)),
    "yolos": lambda: YolosForObjectDetection(YolosConfig(**SHAPE | {"image_size": [16, 16]})),
    "timm": lambda: TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=2, model_args=TIMM)
    ),
}


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def spoiled(model):
    """A weight that does not come from the checkpoint is seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9.0)
    return model


@pytest.mark.parametrize("name", HOSTS)
def test_saved_names_of_every_family(name, tmp_path):
    saved = HOSTS[name]()
    saved.save_pretrained(tmp_path)
    fresh = spoiled(HOSTS[name]())
    translate_names(fresh)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), False)  # what the Trainer does
    assert_same(weights(fresh), weights(saved))
    renamed = load_file(tmp_path / "model.safetensors").keys() != saved.state_dict().keys()
    assert renames_on_saving(saved) == renamed


@pytest.fixture
def checkpoint(make_vit, make_trainer, tmp_path):
    """Path of step 4, in stage 2, and the weights after step 6."""
    trainer = make_trainer(make_vit(), [ToECallback()], max_steps=6, save_strategy="steps", save_steps=3)
    trainer.train()
    return str(tmp_path / "run" / "checkpoint-3"), weights(trainer.model)


def test_one_callback_may_serve_several_trainers(checkpoint, make_vit, make_trainer):
    path, expected = checkpoint
    callback = ToECallback()
    other, model = make_vit(), spoiled(make_vit())
    waiting = make_trainer(other, [callback], max_steps=6)
    trainer = make_trainer(model, [callback], max_steps=6)
    trainer.train(resume_from_checkpoint=path)
    assert_same(weights(model), expected)
    assert not model._load_state_dict_pre_hooks
    spoiled(other)
    waiting.train(resume_from_checkpoint=path)  # made first, trained last
    assert_same(weights(other), expected)
    assert not other._load_state_dict_pre_hooks


@pytest.mark.parametrize("late", ["add_callback", "model_init"])
def test_a_callback_that_came_too_late_says_so(late, checkpoint, make_vit, make_trainer):
    path, _ = checkpoint
    if late == "add_callback":
        trainer = make_trainer(make_vit(), max_steps=6)
        trainer.add_callback(ToECallback())
    else:  # the trainer makes the model anew when training starts
        trainer = make_trainer(
            None, [ToECallback()], max_steps=6, trainer_arguments={"model_init": lambda: make_vit()}
        )
    with pytest.raises(ValueError, match="other weights than those of the checkpoint"):
        trainer.train(resume_from_checkpoint=path)


class NeckForImageClassification(ViTForImageClassification):
    """A model of one's own that cannot be built from a config alone, or not as it was."""

    def __init__(self, config, neck):
        super().__init__(config)
        self.neck = torch.nn.Linear(neck, neck)


class WiderNeckForImageClassification(NeckForImageClassification):
    def __init__(self, config, neck=3):
        super().__init__(config, neck)


@pytest.mark.parametrize("model_class", [NeckForImageClassification, WiderNeckForImageClassification])
def test_a_model_with_more_arguments_resumes(model_class, make_vit, make_trainer, tmp_path):
    config = make_vit().config
    torch.manual_seed(0)
    whole = make_trainer(model_class(config, 5), [ToECallback()], max_steps=6, save_strategy="steps", save_steps=3)
    whole.train()
    model = spoiled(model_class(config, 5))
    make_trainer(model, [ToECallback()], max_steps=6).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3")
    )
    assert_same(weights(model), weights(whole.model))


@pytest.mark.parametrize("buildable", [True, False])
def test_names_of_another_model_class(buildable, make_vit, caplog):
    """The file of a bare tower, whose names the model does not save itself: read as `from_pretrained` reads it."""
    saved = make_vit()
    head = {name: value for name, value in saved.state_dict().items() if name.startswith("classifier")}
    state = {name.removeprefix("vit."): value for name, value in saved.state_dict().items()}
    assert state.keys() != saved.state_dict().keys()
    fresh = spoiled(make_vit() if buildable else NeckForImageClassification(saved.config, 5))
    translate_names(fresh)
    fresh.load_state_dict(state | head, False)
    if buildable:
        assert_same(weights(fresh), weights(saved))
    assert ("does not hold all weights of NeckForImageClassification" in caplog.text) != buildable


def test_the_same_trainer_cannot_resume(checkpoint, make_vit, make_trainer):
    """Its first training has taken the translation of names away."""
    path, _ = checkpoint
    trainer = make_trainer(make_vit(), [ToECallback()], max_steps=6)
    trainer.train()
    with pytest.raises(ValueError, match="must be given to a new Trainer"):
        trainer.train(resume_from_checkpoint=path)


def test_weights_keep_their_precision(checkpoint, make_vit, make_trainer):
    """The configuration may still name the data type of the file that the training began with."""
    path, expected = checkpoint
    model = spoiled(make_vit())
    model.config.dtype = torch.float16
    make_trainer(model, [ToECallback()], max_steps=6).train(resume_from_checkpoint=path)
    assert_same(weights(model), expected)
    assert model.config.dtype == torch.float16


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # called by peft
def test_lora_resumes_with_the_same_weights(make_vit, make_trainer, tmp_path):
    def make():
        torch.manual_seed(5)  # the adapter starts at random
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        return get_peft_model(make_vit(), lora)

    whole = make_trainer(make(), [ToECallback()], max_steps=6, save_strategy="steps", save_steps=3)
    whole.train()
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(9.0)
    make_trainer(model, [ToECallback()], max_steps=6).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3")
    )
    assert_same(weights(whole.model), weights(model))
