"""Which models ToE finds its way into, and what it does there."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaForImageClassification,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    SiglipConfig,
    SiglipForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMSNConfig,
    ViTMSNForImageClassification,
    ViTPreTrainedModel,
    YolosConfig,
    YolosForObjectDetection,
)

from hf_efficient import ToECallback, ToEConfig, TokenExpansion, token_expansion
from hf_efficient.toe.attachment_toe import find_encoder
from hf_efficient.toe.cost_toe import speedup_bound


LAYERS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
GRID = {"image_size": 32, "patch_size": 4}
SHAPE = LAYERS | GRID
NO_BIAS = {
    "use_absolute_position_embeddings": True,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
}
BOXES = [{"class_labels": torch.tensor([1, 0]), "boxes": torch.rand(2, 4) * 0.4 + 0.2} for _ in range(2)]
# weights of the hosts that plain training does not reach either
UNUSED = ("pooler", "mask_token", "vision_model.head", "vision_model.post_layernorm")


def timm_vit(**arguments):
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2} | arguments
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=2, model_args=sizes)
    return TimmWrapperForImageClassification(config)


def yolos(middle):
    shape = SHAPE | {"image_size": [32, 32], "num_detection_tokens": 5, "use_mid_position_embeddings": middle}
    model = YolosForObjectDetection(YolosConfig(**shape))
    with torch.no_grad():  # they start at zero, where a wrong row would go unseen
        for name, parameter in model.named_parameters():
            if "position_embeddings" in name:
                parameter.normal_()
    return model


def vision(**shape):
    return {"vision_config": shape, "text_config": LAYERS | {"vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1}}


# name -> (model, prefix rows, suffix rows)
HOSTS = {
    "vit": (lambda: ViTForImageClassification(ViTConfig(**SHAPE)), 1, 0),
    "deit": (lambda: DeiTForImageClassification(DeiTConfig(**SHAPE)), 2, 0),
    "dinov2": (lambda: Dinov2ForImageClassification(Dinov2Config(**SHAPE)), 1, 0),
    "dinov2-registers": (
        lambda: Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**SHAPE, num_register_tokens=4)),
        5,
        0,
    ),
    "clip": (lambda: CLIPForImageClassification(CLIPConfig(**vision(**SHAPE))), 1, 0),
    "siglip": (lambda: SiglipForImageClassification(SiglipConfig(**vision(**SHAPE))), 0, 0),
    "beit": (lambda: BeitForImageClassification(BeitConfig(**SHAPE, **NO_BIAS, drop_path_rate=0.0)), 1, 0),
    "vit-msn": (lambda: ViTMSNForImageClassification(ViTMSNConfig(**SHAPE)), 1, 0),
    "ijepa": (lambda: IJepaForImageClassification(IJepaConfig(**SHAPE)), 0, 0),
    "timm": (timm_vit, 1, 0),
    "timm-registers": (lambda: timm_vit(reg_tokens=3, class_token=False, global_pool="avg"), 3, 0),
    "yolos": (lambda: yolos(middle=False), 1, 5),
    "yolos-middle": (lambda: yolos(middle=True), 1, 5),
    "peft-vit": (
        lambda: get_peft_model(HOSTS["vit"][0](), LoraConfig(target_modules=["q_proj", "v_proj"])),
        1,
        0,
    ),
}


def run(model, pixels):
    labels = copy.deepcopy(BOXES) if "Detection" in type(model).__name__ else torch.tensor([0, 1])
    output = model(pixel_values=pixels, labels=labels)
    return output.logits, output.loss


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # called by peft
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", HOSTS)
def test_every_host(name, attention, rows_seen, count_hooks):
    make, prefix, suffix = HOSTS[name]
    model = make()
    if not name.startswith("timm"):  # timm chooses its attention itself
        model.set_attn_implementation(attention)
    hooks_before = count_hooks(model)
    pixels = torch.randn(2, 3, 32, 32)
    model.eval()
    evaluated = run(model, pixels)[0]
    model.train()
    plain = run(model, pixels)[0]
    site = find_encoder(model)
    assert (site.num_prefix_tokens, site.num_suffix_tokens, len(site.layers)) == (prefix, suffix, 3)
    watched = [rows_seen(layer) for layer in site.layers]
    with token_expansion(model, ToEConfig()) as expansion:
        for progress, kept in ((0.0, 32), (0.5, 48), (0.9, 64)):
            expansion.set_progress(progress)
            logits, loss = run(model, pixels)
            others = prefix + suffix
            assert [rows[-1] for rows, _ in watched] == [64 + others, kept + others, kept + others]
            # the last stage is plain training, the others are not
            assert torch.equal(logits, plain) == (kept == 64)
            model.zero_grad()
            loss.backward()
            for parameter_name, parameter in model.named_parameters():
                if parameter.requires_grad and not any(part in parameter_name for part in UNUSED):
                    assert parameter.grad is not None, parameter_name
                    assert torch.isfinite(parameter.grad).all(), parameter_name
        expansion.set_progress(0.0)
        model.eval()
        assert torch.equal(run(model, pixels)[0], evaluated)  # evaluation sees all tokens
    model.train()
    assert torch.equal(run(model, pixels)[0], plain)
    for _, handle in watched:
        handle.remove()
    assert count_hooks(model) == hooks_before


@pytest.mark.parametrize("after_layer", [1, 2])
def test_hook_equals_a_model_written_out(after_layer, make_vit):
    """The wiring against the layers called by hand."""
    model = make_vit(num_hidden_layers=4).train()
    pixels = torch.randn(2, 3, 32, 32)
    config = ToEConfig(after_layer=after_layer)
    with token_expansion(model, config):
        logits = model(pixels).logits
    rows = model.vit.embeddings(pixels)
    for position, layer in enumerate(model.vit.layers):
        if position == after_layer:
            rows = TokenExpansion(config)(rows, 1).tokens
        rows = layer(rows)
    assert rows.shape[1] == 33
    assert torch.equal(logits, model.classifier(model.vit.layernorm(rows)[:, 0]))


@pytest.mark.parametrize("after_layer", [1, 2])
@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_middle_positions_of_yolos_follow_the_index(after_layer, size):
    """Each kept row gets the position row of its own place behind each layer, exactly."""
    model = yolos(middle=True).train()
    pixels = torch.randn(2, 3, *size)
    config = ToEConfig(after_layer=after_layer)
    with token_expansion(model, config):
        logits = model(pixels).logits
    body = model.vit
    rows, index = body.embeddings(pixels), None
    middle = body.encoder.interpolation(size)
    for position, layer in enumerate(body.encoder.layer):
        if position == after_layer:
            rows, index = TokenExpansion(config)(rows, 1, 1, 5)
        rows = layer(rows)
        if position < len(body.encoder.layer) - 1:
            added = middle[position]
            rows = rows + (added if index is None else torch.cat([added[:, i] for i in index]))
    assert rows.shape[1] < 64
    assert torch.equal(logits, model.class_labels_classifier(body.layernorm(rows)[:, -5:]))


def test_context_manager_detaches_after_an_exception(make_vit, count_hooks):
    model = make_vit().train()
    pixels = torch.randn(2, 3, 32, 32)
    plain = model(pixels).logits

    def break_off():
        with token_expansion(model) as expansion:
            assert not torch.equal(model(pixels).logits, plain)
            assert expansion.index.shape == (2, 33)
            raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        break_off()
    assert count_hooks(model) == 0
    assert torch.equal(model(pixels).logits, plain)


def test_a_forward_pass_that_breaks_off_may_be_tried_again(make_vit):
    """As a loop does that halves its batch when memory runs out: the next one is shortened as well."""

    def break_off(layer, args):
        raise RuntimeError("broken off")

    model = make_vit().train()
    pixels = torch.randn(2, 3, 32, 32)
    with token_expansion(model) as expansion:
        handle = model.vit.layers[0].register_forward_pre_hook(break_off)
        with pytest.raises(RuntimeError, match="broken off"):
            model(pixels)
        handle.remove()
        model(pixels)
        assert expansion.index.shape == (2, 33)


def test_a_second_attachment_replaces_the_first(make_vit, count_hooks):
    model = make_vit().train()
    with token_expansion(model), token_expansion(model, ToEConfig.preset("fast")) as inner:
        model(torch.randn(2, 3, 32, 32))
        assert inner.index.shape == (2, 1 + 19)
        assert count_hooks(model) == 2
    assert count_hooks(model) == 0


def test_progress_in_epochs_and_shares(make_vit):
    model = make_vit().train()
    with token_expansion(model, ToEConfig(stage_starts=(5, 50, 100))) as expansion:
        assert expansion.stage == 0  # before the first start all tokens are seen
        for epoch, stage in ((4.9, 0), (5, 1), (50, 2), (300, 3)):
            expansion.set_progress(epoch)
            assert expansion.stage == stage
        with pytest.raises(ValueError, match=r"`progress` must be epochs of at least 0, .* got -1"):
            expansion.set_progress(-1)
        with pytest.raises(ValueError, match=r"`progress` must be epochs of at least 0, .* got nan"):
            expansion.set_progress(float("nan"))
        with pytest.raises(ValueError, match="got 'half'"):
            expansion.set_progress("half")
    with (
        token_expansion(model) as expansion,
        pytest.raises(ValueError, match=r"`progress` must be a share of the training in \[0, 1\], .* got 2"),
    ):
        expansion.set_progress(2)


def test_a_hook_that_is_gone_is_not_silently_plain_training(make_vit):
    model = make_vit().train()
    with token_expansion(model) as outer:
        with token_expansion(model) as inner:
            inner.set_progress(0.5)
            with pytest.raises(RuntimeError, match="one ToE in a model, but its hook is gone"):
                outer.set_progress(0.5)
        with pytest.raises(RuntimeError, match="open one `token_expansion` around the whole training"):
            outer.set_progress(0.5)


def test_learns_on_toy_data(make_vit, images):
    model = make_vit().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    with token_expansion(model) as expansion:
        for step in range(24):
            expansion.set_progress(step / 24)
            loss = model(images.images, labels=images.labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    assert losses[-1] < 0.3 * losses[0]
    assert (model(images.images).logits.argmax(-1) == images.labels).all()


def test_hook_may_sit_in_a_copy_or_a_wrapped_model(make_vit, count_hooks):
    """An average of the weights is a deep copy made while the hooks are in; it can be freed of them as well."""
    model = make_vit().train()
    wrapper = torch.nn.ModuleDict({"teacher": torch.nn.Linear(2, 2), "student": model})
    with token_expansion(wrapper):
        average = copy.deepcopy(model)
        assert count_hooks(average) == 1
    assert ToECallback.detach(average) == 1
    assert count_hooks(average) == count_hooks(model) == 0


def test_bound_of_a_schedule():
    """Figures of the paper's shapes, and of the small model that the example trains."""
    deit_small = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    with torch.device("meta"):
        model = ViTForImageClassification(deit_small)
    for preset, bound in (("deit", 1.31), ("lv-vit", 1.39), ("efficient-train", 1.24)):
        assert speedup_bound(model, 196, ToEConfig.preset(preset))[0] == pytest.approx(bound, abs=5e-3)
    bound, shares = speedup_bound(model, 196)
    assert shares == pytest.approx([0.532, 0.762, 1], abs=1e-3)
    assert speedup_bound(model, 196, ToEConfig(stage_starts=(0, 100, 200)), 300)[0] == pytest.approx(bound)
    # a training that begins on all tokens gains less
    assert 1 < speedup_bound(model, 196, ToEConfig(stage_starts=(5, 100, 200)), 300)[0] < bound
    with pytest.raises(ValueError, match=r"`num_epochs` must be above the last of `stage_starts` .* got 200"):
        speedup_bound(model, 196, ToEConfig(stage_starts=(0, 100, 200)), 200)
    for count in (0, -4, 14.5):
        with pytest.raises(ValueError, match=f"`num_patches` must be an integer of at least 1, .* got {count}"):
            speedup_bound(model, count)


class Both(torch.nn.Module):
    """A module of one's own, with models of transformers and timm beside each other."""

    def __init__(self, **models):
        super().__init__()
        self.models = torch.nn.ModuleDict({name: make() for name, make in models.items()})

    def forward(self, pixels, words, mask):
        image = self.models["image"](pixels).logits
        return image + self.models["text"](words, attention_mask=mask).last_hidden_state[:, 0, :2]


def bert():
    return BertModel(BertConfig(**LAYERS, vocab_size=9))


def resnet():
    return ResNetModel(ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8))


def timm_resnet():
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet18", num_labels=2))


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_text_encoder_beside_the_tower_does_not_count(name, rows_seen, count_hooks):
    model = Both(text=bert, teacher=resnet, image=HOSTS[name][0]).train()
    image, words = torch.randn(2, 3, 32, 32), torch.ones(2, 4, dtype=torch.long)
    rows, handle = rows_seen(find_encoder(model).layers[1])
    with token_expansion(model):
        model(image, words, torch.ones(2, 4)).sum().backward()
    handle.remove()
    assert rows == [33]
    assert model.models["text"].embeddings.word_embeddings.weight.grad is not None
    assert count_hooks(model) == 0


def test_a_tower_in_two_places_is_one(make_vit):
    """As in a network with two branches of the same weights."""
    vit = make_vit()
    branches = [torch.nn.Sequential(vit), torch.nn.Sequential(vit)]
    assert find_encoder(torch.nn.ModuleList(branches)).layers is vit.vit.layers


def make_llava():
    text = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**SHAPE), text_config=text, image_token_index=8)
    return LlavaForConditionalGeneration(config)


MAE = {"decoder_num_hidden_layers": 1, "decoder_hidden_size": 32, "decoder_num_attention_heads": 2}
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4}


def swin():
    return SwinForImageClassification(SwinConfig(**GRID, **SWIN))


class OwnMaskedImageModel(ViTForMaskedImageModeling):
    """Has a head that reads every patch, whatever its name."""


class BackboneForImageClassification(ViTForImageClassification):
    """Has a head of transformers that reads one row."""


class OwnForSemanticSegmentation(ViTPreTrainedModel):
    """Has a head of its own, of which the name is all that can be known."""


def test_own_subclasses_are_judged_by_what_they_are():
    assert find_encoder(BackboneForImageClassification(ViTConfig(**SHAPE))).num_prefix_tokens == 1
    with pytest.raises(ValueError, match="OwnMaskedImageModel: its head reads every patch"):
        find_encoder(OwnMaskedImageModel(ViTConfig(**SHAPE)))
    with pytest.raises(ValueError, match="OwnForSemanticSegmentation: its head reads every patch"):
        find_encoder(OwnForSemanticSegmentation(ViTConfig(**SHAPE)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (swin, "cannot train Swin.* within windows"),
        (lambda: DINOv3ViTModel(DINOv3ViTConfig(**SHAPE)), r"cannot train DINOv3ViTModel.* \(rope\)"),
        (lambda: ViTForMaskedImageModeling(ViTConfig(**SHAPE)), "ViTForMaskedImageModeling: its head reads every pat"),
        (lambda: ViTMAEForPreTraining(ViTMAEConfig(**SHAPE, **MAE)), "ViTMAE.*already drops tokens"),
        (lambda: BeitForImageClassification(BeitConfig(**SHAPE, use_relative_position_bias=True)), "position bias"),
        (lambda: BeitForImageClassification(BeitConfig(**SHAPE, use_shared_relative_position_bias=True)), "for all p"),
        (
            lambda: ResNetForImageClassification(ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8)),
            "must be one of the vision transformers .* got ResNetForImageClassification of type 'resnet'",
        ),
        (lambda: make_llava(), "got LlavaForCond.* can train its `model.vision_tower` by itself, a CLIPVisionModel"),
        (lambda: "google/vit", "`model` must be a torch module, got 'google/vit'; load the model first"),
        (lambda: torch.nn.Linear(2, 2), "`model` must hold a vision transformer, but Linear has no encoder layers"),
        (lambda: ViTForImageClassification(ViTConfig(**SHAPE | {"num_hidden_layers": 1})), "at least two .* has 1"),
        (lambda: ViTForImageClassification(ViTConfig(**SHAPE | {"num_hidden_layers": 0})), "at least two .* has 0"),
        (
            lambda: torch.nn.ModuleList([ViTForImageClassification(ViTConfig(**SHAPE)) for _ in range(2)]),
            "must hold one vision transformer, but has 2",
        ),
        (
            lambda: Both(image=HOSTS["vit"][0], text=bert, other=make_llava),
            r"one vision transformer, but has 2 \(ViTForImageClassification, LlavaForConditionalGeneration\)",
        ),
        (lambda: Both(text=bert, image=make_llava), "got LlavaForCond.* can train its `model.vision_tower`"),
        (lambda: Both(text=bert, image=swin), "cannot train Swin.* within windows"),
        (
            lambda: Both(text=bert, image=timm_resnet),
            "must hold a vision transformer, but has none among BertModel, TimmWrapperForImageClassification;",
        ),
        (
            timm_resnet,
            "`VisionTransformer` family only.* got ResNet in TimmWrapperForImageClassification",
        ),
    ],
)
def test_refused_models_get_a_reason(make, message, count_hooks):
    model = make()
    hooks = count_hooks(model) if isinstance(model, torch.nn.Module) else 0
    with pytest.raises(ValueError, match=message), token_expansion(model):
        pass
    if isinstance(model, torch.nn.Module):
        assert count_hooks(model) == hooks


def test_too_deep_an_expansion(make_vit):
    with (
        pytest.raises(ValueError, match="`after_layer` must be below the number of encoder layers, got 3 for the 3"),
        token_expansion(make_vit(), ToEConfig(after_layer=3)),
    ):
        pass


@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_attention_mask_is_refused_at_the_first_forward(progress, make_vit):
    model = make_vit().train()
    mask = torch.ones(2, 65, dtype=torch.long)
    mask[:, 60:] = 0
    with token_expansion(model) as expansion:
        expansion.set_progress(progress)
        with pytest.raises(ValueError, match="cannot train ViTForImageClassification with an `attention_mask`"):
            model(torch.randn(2, 3, 32, 32), attention_mask=mask)
        model.eval()
        model(torch.randn(2, 3, 32, 32), attention_mask=mask)  # evaluation may have one
    model.train()
    model(torch.randn(2, 3, 32, 32), attention_mask=mask)


def test_hidden_states_of_timm_are_refused_at_the_first_forward():
    """timm lays them out as the whole grid, which reshapes fewer tokens without an error."""
    model = timm_vit().train()
    pixels = torch.randn(2, 3, 32, 32)
    plain = model(pixels, output_hidden_states=True).hidden_states
    message = "cannot train TimmWrapperForImageClassification with `output_hidden_states`"
    with token_expansion(model) as expansion:
        with pytest.raises(ValueError, match=message):
            model(pixels, output_hidden_states=True)
        model.config.output_hidden_states = True
        with pytest.raises(ValueError, match=message):
            model(pixels)
        model(pixels, output_hidden_states=False)
        assert expansion.index.shape == (2, 33)
        rows = model(pixels, output_fmt="NLC").hidden_states
        assert [state.shape for state in rows] == [(2, 64, 32), (2, 32, 32), (2, 32, 32)]
        model.eval()
        assert model(pixels).hidden_states[-1].shape == (2, 32, 8, 8)  # evaluation may ask for them
    after = model.train()(pixels).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(after, plain, strict=True))
