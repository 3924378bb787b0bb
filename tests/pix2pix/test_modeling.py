"""Shapes, receptive fields, norms, gradients and ONNX of the networks."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from hf_efficient import Pix2PixConfig, Pix2PixDiscriminator, Pix2PixModel
from hf_efficient.pix2pix.modeling_pix2pix import Pix2PixScore, Pix2PixUpConv


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def awaken(model: nn.Module) -> nn.Module:
    """Give batch norms running averages that differ from their initial ones, and the network visible contrast."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.rand(module.running_mean.shape, generator=generator) - 0.5)
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model


@pytest.mark.parametrize("levels", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
def test_a_unet_of_any_depth_keeps_the_size(levels, norm):
    config = Pix2PixConfig(num_levels=levels, base_channels=2, norm=norm, image_size=64)
    model = Pix2PixModel(config).eval()
    images = random_images(2, 3, 64, 128)
    with torch.no_grad():
        output = model(images, labels=images)
    assert output.reconstruction.shape == images.shape
    assert output.reconstruction.abs().max() <= 1
    torch.testing.assert_close(output.loss, (output.reconstruction - images).abs().mean())


@pytest.mark.parametrize(("generator", "blocks"), [("resnet_6blocks", 6), ("resnet_9blocks", 9)])
def test_a_resnet_keeps_the_size(generator, blocks):
    model = Pix2PixModel(Pix2PixConfig(generator=generator, base_channels=2, image_size=16)).eval()
    assert len(model.network.blocks) == blocks
    with torch.no_grad():
        assert model(random_images(1, 3, 20, 28)).reconstruction.shape == (1, 3, 20, 28)


@pytest.mark.parametrize("size", [(4, 4), (4, 20), (8, 4)])
def test_a_resnet_takes_images_of_four_pixels(size):
    model = Pix2PixModel(Pix2PixConfig(generator="resnet_6blocks", base_channels=2, image_size=4)).eval()
    with torch.no_grad():
        answer = model(random_images(2, 3, *size)).reconstruction
    assert answer.shape == (2, 3, *size)
    assert answer.isfinite().all()


def test_the_default_is_the_networks_of_the_paper():
    with torch.device("meta"):
        generator, discriminator = Pix2PixModel(Pix2PixConfig()), Pix2PixDiscriminator()
        batch = Pix2PixModel(Pix2PixConfig(norm="batch"))
    # 54.414 M and 2.769 M parameters are what the widely used implementation prints for unet_256 and the 70x70
    # discriminator with batch norm; instance norm has biases instead of the norms' weights
    assert sum(p.numel() for p in batch.parameters()) == 54_413_955
    batch_discriminator = Pix2PixDiscriminator(norm="batch")
    assert sum(p.numel() for p in batch_discriminator.parameters()) == 2_768_705
    assert len(generator.network.down) == 8
    assert [conv.out_channels for conv in generator.network.down] == [64, 128, 256, 512, 512, 512, 512, 512]
    assert sum(isinstance(module, nn.Conv2d) for module in discriminator.modules()) == 5


@pytest.mark.parametrize("receptive_field", [1, 16, 34, 70, 142, 286])
def test_one_score_sees_exactly_its_receptive_field(receptive_field):
    side = 3 * receptive_field // 2 * 2 + 64
    network = Pix2PixDiscriminator(receptive_field, num_channels=2, base_channels=1, norm="none")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.1)  # all positive: no activation can cancel a pixel's gradient
    target = torch.ones(1, 1, side, side, requires_grad=True)
    scores = network(torch.ones(1, 1, side, side), target)
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    rows, columns = target.grad[0, 0].nonzero(as_tuple=True)
    assert int(rows.max() - rows.min()) + 1 == receptive_field
    assert int(columns.max() - columns.min()) + 1 == receptive_field
    assert len(rows) == receptive_field**2


def test_an_answer_never_depends_on_its_batch_mates():
    for norm, stats in (("instance", "running"), ("batch", "running"), ("batch", "batch"), ("none", "running")):
        config = Pix2PixConfig(num_levels=4, base_channels=4, norm=norm, inference_stats=stats, image_size=16)
        model = awaken(Pix2PixModel(config)).eval()
        images = random_images(3, 3, 16, 16)
        with torch.no_grad():
            together = model(images).reconstruction
            alone = torch.cat([model(image[None]).reconstruction for image in images])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_batch_statistics_at_inference_are_those_of_a_training_step_of_one_image():
    config = Pix2PixConfig(num_levels=4, base_channels=4, norm="batch", dropout=0.0, image_size=16)
    model = awaken(Pix2PixModel(config))
    per_image = Pix2PixModel(Pix2PixConfig(**{**config.to_dict(), "inference_stats": "batch"})).eval()
    per_image.load_state_dict(model.state_dict())
    image = random_images(1, 3, 16, 16)
    with torch.no_grad():
        training = model.train()(image).reconstruction
        running = model.eval()(image).reconstruction
        torch.testing.assert_close(per_image(image).reconstruction, training, atol=1e-5, rtol=0)
    assert (running - training).abs().max() > 0.01  # the two modes are not the same thing


def test_running_averages_count_a_training_step_once():
    model = Pix2PixModel(Pix2PixConfig(num_levels=3, base_channels=4, norm="batch", image_size=16)).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    with torch.no_grad():
        model(random_images(2, 3, 16, 16))
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name
    model(random_images(2, 3, 16, 16))
    assert all(not torch.equal(v, before[n]) for n, v in model.named_buffers() if n.endswith("running_mean"))


def test_dropout_is_off_at_inference_unless_asked_for():
    config = Pix2PixConfig(num_levels=6, base_channels=2, image_size=64)
    model, image = awaken(Pix2PixModel(config)).eval(), random_images(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(image).reconstruction, model(image).reconstruction)
        model.config.inference_dropout = True
        assert not torch.equal(model(image).reconstruction, model(image).reconstruction)


@pytest.mark.parametrize("generator", ["unet", "resnet_6blocks"])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_gradient_reaches_every_weight(generator, norm):
    config = Pix2PixConfig(generator=generator, num_levels=4, base_channels=4, norm=norm, dropout=0.0, image_size=16)
    model = awaken(Pix2PixModel(config)).train()
    discriminator = Pix2PixDiscriminator(16, base_channels=4, norm=norm)
    source, target = random_images(2, 3, 16, 16), random_images(2, 3, 16, 16, seed=1)
    (discriminator(source, model(source).reconstruction).mean() + model(source, labels=target).loss).backward()
    for name, parameter in [*model.named_parameters(), *discriminator.named_parameters()]:
        assert parameter.grad is not None, name
        before_norm = norm == "instance" and name.endswith("bias")  # a norm takes away what a bias before it adds
        assert before_norm or parameter.grad.abs().max() > 0, name


def assert_same_sums(layer, reference, images):
    reference.load_state_dict(layer.state_dict())
    images, other = images.requires_grad_(), images.detach().clone().requires_grad_()
    left, right = layer(images), reference(other)
    torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-5)
    for output in (left, right):
        output.square().sum().backward()
    torch.testing.assert_close(images.grad, other.grad, atol=1e-4, rtol=1e-5)
    for one, two in zip(layer.parameters(), reference.parameters()):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels", [5, 3, 1])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2), (2, 4, 4), (1, 3, 5), (4, 4, 4), (2, 8, 8), (1, 16, 12)])
def test_small_maps_and_few_channels_go_through_the_same_sums(shape, channels, bias, monkeypatch):
    batch, height, width = shape
    layer = Pix2PixUpConv(6, channels, bias=bias)
    images = random_images(batch, 6, height, width)
    assert_same_sums(layer, nn.ConvTranspose2d(6, channels, 4, 2, 1, bias=bias), images)
    ours = channels <= layer.max_channels or batch * height * width <= layer.max_pixels
    monkeypatch.setattr(nn.ConvTranspose2d, "forward", lambda self, x: "torch's own")
    assert isinstance(layer(images), str) is not ours


@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 3, 5), (2, 31, 31)])
def test_scores_go_through_the_same_sums(shape, monkeypatch):
    batch, height, width = shape
    layer, images = Pix2PixScore(6), random_images(batch, 6, height, width)
    assert_same_sums(layer, nn.Conv2d(6, 1, 4, 1, 1), images)
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: "torch's own")
    assert isinstance(layer(images), torch.Tensor)
    assert layer(images.double()) == "torch's own"
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(images) == "torch's own"


def test_source_and_target_of_unequal_channels():
    model = Pix2PixModel(
        Pix2PixConfig(num_levels=2, base_channels=2, num_channels=1, num_output_channels=3, image_size=8)
    )
    assert model(random_images(1, 1, 8, 8)).reconstruction.shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_levels": 9}, r"`num_levels=9`.*at most 8 levels"),
        ({"num_levels": 0}, r"`num_levels` must be at least 1, got 0"),
        ({"base_channels": 0}, r"`base_channels` must be at least 1, got 0"),
        ({"norm": "layer"}, r"`norm` must be one of instance, batch, none, got 'layer'"),
        ({"generator": "vit"}, r"`generator` must be one of unet.*got 'vit'"),
        ({"inference_stats": "frozen"}, r"`inference_stats` must be one of running, batch, got 'frozen'"),
        ({"dropout": 1.0}, r"`dropout` must lie in \[0, 1\), got 1.0"),
        ({"image_size": 1}, r"`image_size` must be at least 2, got 1"),
        ({"generator": "resnet_6blocks", "image_size": 2}, r"`image_size` must be at least 4 for a ResNet.*got 2"),
        ({"num_channels": 4}, r"`num_channels` must be 1 \(grey\) or 3 \(RGB\), got 4"),
        ({"num_level": 6}, r"`num_level` is no field of Pix2PixConfig; `num_levels` is"),
        ({"inference_dropuot": True}, r"`inference_dropout` is: spell it so, or leave `inference_dropuot` out"),
        ({"num_input_channels": 1}, r"`num_channels` is: spell it so, or leave `num_input_channels` out"),
    ],
)
def test_a_wrong_configuration_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Pix2PixConfig(**fields)


def test_a_misspelt_field_is_named_and_foreign_files_load(tmp_path, tiny_config, caplog):
    tiny_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`base_channel` is no field"):
        Pix2PixConfig.from_pretrained(tmp_path, base_channel=8)
    file = tmp_path / "config.json"
    foreign = {"num_labels": 3, "output_attentions": True, "layer_norm_eps": 1e-5, "max_image_size": 8, "hub_note": ""}
    file.write_text(json.dumps(json.loads(file.read_text()) | foreign))
    config = Pix2PixConfig.from_pretrained(tmp_path)
    assert (config.num_labels, config.hub_note, config.num_levels) == (3, "", 3)
    assert not caplog.messages
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dropouts": 0.1, "img_size": 8}))
    config = Pix2PixConfig.from_pretrained(tmp_path)  # who loads a file did not write it
    assert config.to_dict() == Pix2PixConfig.from_dict(config.to_dict()).to_dict()
    assert not hasattr(config, "dropouts")
    assert [line.split()[0] for line in caplog.messages] == ["`dropouts`", "`img_size`"]
    assert caplog.messages[0].endswith("is passed over; where `dropout` is meant, spell it so in the file.")


def test_a_setting_of_ones_own_is_checked_when_a_checkpoint_is_loaded(tmp_path, tiny_config):
    tiny_config.save_pretrained(tmp_path)
    for fields, message in (
        ({"inference_stats": "frozen"}, "`inference_stats` must be one of running, batch, got 'frozen'"),
        ({"num_levels": 9}, "`num_levels=9` .* at most 4 levels"),
        ({"dropout": 1.5}, "`dropout` must lie in .*, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            Pix2PixConfig.from_pretrained(tmp_path, **fields)
        with pytest.raises(ValueError, match=message):
            AutoConfig.from_pretrained(tmp_path, return_unused_kwargs=True, **fields)
    assert Pix2PixConfig.from_pretrained(tmp_path, inference_stats="batch").inference_stats == "batch"


def test_a_wrong_input_is_named(tiny_model):
    with pytest.raises(ValueError, match=r"divisible by 8, got 20x16"):
        tiny_model(torch.zeros(1, 3, 20, 16))
    with pytest.raises(ValueError, match=r"\(batch, 3, height, width\), got \(1, 1, 16, 16\)"):
        tiny_model(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"both images of a pair need the same size"):
        tiny_model(torch.zeros(1, 3, 16, 16), labels=torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"1, 16, 34, 70, 142, 286 pixels, got 71"):
        Pix2PixDiscriminator(71)
    with pytest.raises(ValueError, match="`norm` must be one of instance, batch, none, got 'layer'"):
        Pix2PixDiscriminator(16, norm="layer")
    for name in ("num_channels", "base_channels"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            Pix2PixDiscriminator(16, **{name: 0})
    with pytest.raises(ValueError, match=r"`receptive_field=70` needs images of at least 24 pixels, got 16x32"):
        Pix2PixDiscriminator(70, base_channels=1)(torch.zeros(1, 3, 16, 32), torch.zeros(1, 3, 16, 32))


@pytest.mark.parametrize("receptive_field", [1, 16, 34, 70, 142, 286])
def test_the_smallest_image_gets_one_score(receptive_field):
    side = {1: 1, 16: 6, 34: 12, 70: 24, 142: 48, 286: 96}[receptive_field]
    images = torch.zeros(1, 3, side, side)
    scores = Pix2PixDiscriminator(receptive_field, base_channels=1, norm="none")(images, images)
    assert scores.shape == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("generator", "norm", "stats"),
    [
        ("unet", "batch", "running"),
        ("unet", "batch", "batch"),
        ("unet", "instance", "running"),
        ("resnet_6blocks", "batch", "running"),
    ],
)
def test_onnx_gives_the_answers_of_the_chosen_mode(tmp_path, generator, norm, stats):
    import onnxruntime

    fields = {"generator": generator, "norm": norm, "inference_stats": stats}
    model = awaken(Pix2PixModel(Pix2PixConfig(num_levels=4, base_channels=4, image_size=16, **fields))).eval()
    model.config.return_dict = False
    batch = torch.export.Dim("batch", min=1, max=16)
    torch.onnx.export(
        model,
        (random_images(2, 3, 16, 16),),
        tmp_path / "model.onnx",
        dynamo=True,
        dynamic_shapes={"pixel_values": {0: batch}},
        input_names=["pixel_values"],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for rows in (1, 3):
        images = random_images(rows, 3, 16, 16, seed=rows)
        with torch.no_grad():
            expected = model(images)[0]
        answer = torch.from_numpy(session.run(None, {"pixel_values": images.numpy()})[0])
        torch.testing.assert_close(answer, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("generator", ["unet", "resnet_6blocks"])
def test_dropout_that_onnx_would_lose_is_refused(tmp_path, generator):
    config = Pix2PixConfig(generator=generator, num_levels=6, base_channels=1, image_size=64, inference_dropout=True)
    model, file = Pix2PixModel(config).eval(), tmp_path / "model.onnx"
    with pytest.raises(Exception, match="`inference_dropout` must be False for an export to ONNX, got True"):
        torch.onnx.export(model, (random_images(1, 3, 64, 64),), file, dynamo=True, verbose=False)
    assert not file.exists()
    assert model(random_images(1, 3, 64, 64)).reconstruction.shape == (1, 3, 64, 64)


def test_weights_may_lie_channels_last():
    model = Pix2PixModel(Pix2PixConfig(num_levels=4, base_channels=4, image_size=32)).eval()
    pixels = torch.randn(1, 3, 32, 32)
    expected = model(pixels).reconstruction
    model.to(memory_format=torch.channels_last)
    found = model(pixels.to(memory_format=torch.channels_last)).reconstruction
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
