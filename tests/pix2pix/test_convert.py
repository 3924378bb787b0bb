"""Agrees with the original: checkpoints of the widely used PyTorch layout answer as that network does.

The networks below are written from the description of that layout (`netG` of pytorch-CycleGAN-and-pix2pix): nested
U-Net blocks whose first activation works in place, and a flat ResNet; they share no code with the package.
"""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel

from hf_efficient import Pix2PixModel, convert_pix2pix_checkpoint


NORMS = {
    "batch": nn.BatchNorm2d,
    "instance": partial(nn.InstanceNorm2d, affine=False, track_running_stats=False),
    "none": lambda channels: nn.Identity(),
}


class Block(nn.Module):
    """One U-Net level around the next one."""

    def __init__(self, outer, inner, inputs, inside, norm, where, dropout):
        super().__init__()
        self.outermost = where == "outermost"
        bias = norm == "instance"
        down = nn.Conv2d(inputs, inner, 4, 2, 1, bias=bias)
        twice = inner if where == "innermost" else 2 * inner
        up = nn.ConvTranspose2d(twice, outer, 4, 2, 1, bias=bias or self.outermost)
        leaky, relu = nn.LeakyReLU(0.2, True), nn.ReLU(True)
        if where == "outermost":
            layers = [down, inside, relu, up, nn.Tanh()]
        elif where == "innermost":
            layers = [leaky, down, relu, up, NORMS[norm](outer)]
        else:
            layers = [leaky, down, NORMS[norm](inner), inside, relu, up, NORMS[norm](outer)]
            layers += [nn.Dropout(0.5)] if dropout else []
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        return self.model(x) if self.outermost else torch.cat([x, self.model(x)], 1)


class UNet(nn.Module):
    def __init__(self, levels, width, norm, channels=(3, 3)):
        super().__init__()
        block = Block(width * 8, width * 8, width * 8, None, norm, "innermost", False)
        for _ in range(levels - 5):
            block = Block(width * 8, width * 8, width * 8, block, norm, "middle", True)
        for k in (4, 2, 1):
            block = Block(width * k, width * 2 * k, width * k, block, norm, "middle", False)
        self.model = Block(channels[1], width, channels[0], block, norm, "outermost", False)

    def forward(self, x):
        return self.model(x)


class ResidualBlock(nn.Module):
    def __init__(self, width, norm, dropout):
        super().__init__()
        bias = norm == "instance"
        layers = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=bias), NORMS[norm](width), nn.ReLU(True)]
        layers += [nn.Dropout(0.5)] if dropout else []
        layers += [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=bias), NORMS[norm](width)]
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.conv_block(x)


class ResNet(nn.Module):
    def __init__(self, blocks, width, norm, dropout):
        super().__init__()
        bias = norm == "instance"
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7, bias=bias), NORMS[norm](width), nn.ReLU(True)]
        for k in (1, 2):
            layers += [nn.Conv2d(width * k, width * 2 * k, 3, 2, 1, bias=bias), NORMS[norm](width * 2 * k)]
            layers += [nn.ReLU(True)]
        layers += [ResidualBlock(width * 4, norm, dropout) for _ in range(blocks)]
        for k in (4, 2):
            layers += [nn.ConvTranspose2d(width * k, width * k // 2, 3, 2, 1, output_padding=1, bias=bias)]
            layers += [NORMS[norm](width * k // 2), nn.ReLU(True)]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        return self.model(x)


def trained(network: nn.Module) -> nn.Module:
    """Random weights of visible size and, for batch norm, running averages of a few batches."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (0.5 if parameter.ndim == 1 else 0))
        network.train()
        for _ in range(3):
            network(torch.rand(2, 3, 128, 128) * 2 - 1)
    return network.eval()


CASES = {
    "unet_128 batch": lambda: UNet(7, 2, "batch"),
    "unet_256 instance": lambda: UNet(8, 2, "instance"),
    "unet_128 none": lambda: UNet(7, 2, "none"),
    "resnet_6blocks batch": lambda: ResNet(6, 2, "batch", False),
    "resnet_9blocks instance dropout": lambda: ResNet(9, 2, "instance", True),
    "resnet_6blocks none": lambda: ResNet(6, 2, "none", False),
    "unet_256 batch": lambda: UNet(8, 2, "batch"),
    "unet_128 instance": lambda: UNet(7, 2, "instance"),
    "resnet_6blocks instance": lambda: ResNet(6, 2, "instance", False),
    "resnet_9blocks batch": lambda: ResNet(9, 2, "batch", False),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_outputs_equal_the_original_network(name, prefix, tmp_path):
    network = CASES[name]()
    if "256" not in name:
        trained(network)
    source = tmp_path / "latest_net_G.pth"
    torch.save({prefix + key: value for key, value in network.eval().state_dict().items()}, source)
    folder = convert_pix2pix_checkpoint(source, tmp_path / "converted")
    assert folder == tmp_path / "converted"
    model = AutoModel.from_pretrained(folder).eval()
    side = 256 if "256" in name else 128
    image = torch.rand(1, 3, side, side) * 2 - 1
    with torch.no_grad():
        answer, expected = model(image).reconstruction, network(image)
    assert expected.std() > 1e-3
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=0)
    config, words = model.config, name.split()
    assert (config.norm, config.base_channels) == (words[1], 2)
    if words[0].startswith("unet"):
        assert (config.generator, config.num_levels, config.image_size) == ("unet", side.bit_length() - 1, side)
    else:
        assert (config.generator, config.dropout) == (words[0], 0.5 if "dropout" in words else 0.0)


def test_per_image_statistics_equal_the_original_in_training_mode(tmp_path):
    """The paper keeps batch statistics at inference; the original does so when `eval()` is not called."""
    network = trained(UNet(7, 2, "batch"))
    torch.save(network.state_dict(), tmp_path / "net.pth")
    folder = convert_pix2pix_checkpoint(tmp_path / "net.pth", tmp_path / "converted")
    model = Pix2PixModel.from_pretrained(folder, inference_stats="batch").eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    image = torch.rand(1, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(model(image).reconstruction, network(image), atol=1e-4, rtol=0)


def test_reads_safetensors_old_running_averages_and_other_channels(tmp_path):
    network = UNet(7, 2, "instance", channels=(1, 3)).eval()
    weights = dict(network.state_dict())
    weights["model.model.1.model.2.running_mean"] = torch.ones(4)  # written by torch < 0.4, ignored by the original
    save_file(weights, tmp_path / "net.safetensors")
    model = Pix2PixModel.from_pretrained(convert_pix2pix_checkpoint(tmp_path / "net.safetensors", tmp_path / "out"))
    image = torch.rand(1, 1, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(image).reconstruction, network(image), atol=1e-5, rtol=0)


def test_keeps_an_existing_folder_unless_told(tmp_path):
    torch.save(UNet(7, 1, "batch").state_dict(), tmp_path / "net.pth")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert_pix2pix_checkpoint(tmp_path / "net.pth", folder)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    convert_pix2pix_checkpoint(tmp_path / "net.pth", folder, overwrite=True)
    assert not (folder / "mine.txt").exists()
    assert (folder / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pth", "out"]  # nothing temporary is left


@pytest.mark.parametrize("inside", ["net.pth", "deeper/net.pth"])
def test_a_folder_that_holds_the_file_is_never_replaced(tmp_path, inside):
    source = tmp_path / "run" / inside
    source.parent.mkdir(parents=True, exist_ok=True)
    torch.save(UNet(7, 1, "batch").state_dict(), source)
    with pytest.raises(FileExistsError, match="`destination` must not hold what is converted"):
        convert_pix2pix_checkpoint(source, tmp_path / "run", overwrite=True)
    assert source.is_file()


def test_an_older_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    torch.save(UNet(7, 1, "batch").state_dict(), tmp_path / "net.pth")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    replace = os.replace

    def fail(source, destination):
        if Path(source).name == "checkpoint":
            raise PermissionError(13, "in use", str(destination))
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PermissionError):
        convert_pix2pix_checkpoint(tmp_path / "net.pth", folder, overwrite=True)
    assert (folder / "mine.txt").read_text() == "mine"


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_a_wrong_file_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resnet = ResNet(6, 1, "batch", False).state_dict()
    bad = {
        "other.pth": ({"conv1.weight": torch.zeros(1)}, "no key starts with"),
        "blocks.pth": ({k: v for k, v in resnet.items() if "model.15." not in k}, "6 or 9 residual blocks"),
        "extra.pth": ({**resnet, "model.99.weight": torch.zeros(1)}, "'model.99.weight'"),
        "missing.pth": ({k: v for k, v in resnet.items() if k != "model.4.weight"}, "down.0.weight.* is missing"),
        "shape.pth": ({**resnet, "model.4.weight": torch.zeros(9, 1, 3, 3)}, "down.0.weight.* another shape"),
        "numbers.pth": ({0: torch.zeros(1)}, "flat dictionary of tensors"),
        "nested.pth": ({"netG": resnet}, "flat dictionary of tensors"),
        "evil.pth": ({"model.1.weight": Evil()}, "code in a pickle is never run"),
    }
    for name, (content, message) in bad.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            convert_pix2pix_checkpoint(tmp_path / name, tmp_path / "out")
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "text.safetensors").write_text("no checkpoint")
    for name in ("text.pth", "text.safetensors"):
        with pytest.raises(ValueError, match=name):
            convert_pix2pix_checkpoint(tmp_path / name, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        convert_pix2pix_checkpoint(tmp_path / "nowhere.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()
