"""A pruned checkpoint survives: saved, loaded, without the package, as ONNX, fine-tuned further."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from local_hub import LocalHub
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    ViTImageProcessor,
)

from hf_efficient import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    KDFSPrunedConfig,
    KDFSPrunedModel,
    KDFSPrunedModelForImageClassification,
)
from hf_efficient.kdfs.modeling_kdfs_pruned import export_onnx, fold_scatters


FAMILIES = ["cifar_resnet", "resnet_bottleneck", "mobilenet_v2"]
LOAD = """
import json, sys
sys.modules["optimum"] = sys.modules["torch_pruning"] = None
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

result = {}
for folder in sys.argv[1:]:
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    features = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    picture = Image.open(folder + "/picture.png")
    inputs = processor(picture, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
        shape = list(features(**inputs).last_hidden_state.shape)
    best = pipeline("image-classification", folder, trust_remote_code=True)(picture)[0]
    model.save_pretrained(folder + "-again")
    again = AutoModelForImageClassification.from_pretrained(folder + "-again", trust_remote_code=True).eval()
    with torch.no_grad():
        same = torch.equal(again(**inputs).logits, logits)
    result[folder] = {"logits": logits.tolist(), "shape": shape, "best": best["label"], "same": same,
                      "widths": len(config.widths)}
print(json.dumps(result))
"""


def save(pruned, shape, folder):
    pruned.save_pretrained(folder)
    size = {"height": shape[1], "width": shape[2]}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (shape[1], shape[2], 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(folder / "picture.png")
    return folder


@pytest.mark.parametrize("family", ["cifar_resnet", "resnet_bottleneck"])
def test_fresh_weights_are_weights(network, slice_randomly, family):
    """From a configuration alone: the layers of another width are initialised, every kept filter has one place."""
    model, shape = network(family)
    _, pruned = slice_randomly(model, shape, target_flops_reduction=0.35)
    fresh = AutoModelForImageClassification.from_config(pruned.config)
    like = type(model)(model.config)
    for name, value in fresh.network.state_dict().items():
        if name.endswith("filter_index"):
            width = fresh.network.get_submodule(name.removesuffix(".filter_index")).num_features
            assert sorted(value[value < width].tolist()) == list(range(width))
            assert int(value.max()) <= width
        elif value.is_floating_point():
            assert torch.isfinite(value).all(), name
            spread, expected = float(value.std()), float(like.state_dict()[name].std())
            assert spread < 3 * expected + 1e-6, name
            assert spread > expected / 3 - 1e-6, name
    assert torch.isfinite(fresh(torch.randn(2, *shape)).logits).all()


@pytest.mark.parametrize("labels", [2, 3, 10])
def test_any_number_of_labels_survives(tmp_path, labels):
    """transformers leaves its default of two labels out of the file, where ten are the default of this network."""
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, hidden_sizes=[4, 4, 4], num_labels=labels))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.id2label == model.config.id2label
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loaded_in_another_data_type(slice_randomly, tmp_path, dtype):
    """The network before pruning was loaded from a checkpoint, so its configuration names a data type."""
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "dense")
    dense = ResNetForImageClassification.from_pretrained(tmp_path / "dense")
    assert dense.config.dtype == torch.float32
    _, pruned = slice_randomly(dense, (3, 32, 32), target_flops_reduction=0.35)
    pruned.save_pretrained(tmp_path / "pruned")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "pruned", dtype=dtype)
    assert {weight.dtype for weight in loaded.parameters()} == {loaded.dtype} == {loaded.config.dtype} == {dtype}
    pruned.to(dtype).save_pretrained(tmp_path / "half")
    for given in ({}, {"dtype": "auto"}):
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "half", **given)
        assert {weight.dtype for weight in again.parameters()} == {dtype}
        for name, value in pruned.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(network, slice_randomly, tmp_path, family):
    model, shape = network(family)
    _, pruned = slice_randomly(model, shape, target_flops_reduction=0.35)
    pruned.save_pretrained(tmp_path)
    loaded, info = KDFSPrunedModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in pruned.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    images = torch.randn(2, *shape)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, pruned(images).logits, rtol=1e-6, atol=1e-7)
        features = AutoModel.from_pretrained(tmp_path).eval()
        assert type(features) is KDFSPrunedModel
        assert features(images).last_hidden_state.dim() == 4
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is KDFSPrunedModelForImageClassification
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["base_config"]["model_type"] == model.config.model_type
    widths = document["widths"]
    for name, (inputs, outputs) in widths.items():
        weight = pruned.network.get_submodule(name).weight
        assert weight.shape[0] == outputs, name
        assert inputs >= 1
    index = [value for name, value in loaded.state_dict().items() if name.endswith("filter_index")]
    assert len(index) == len(document["scattered"])
    assert all(value.dtype == torch.int64 for value in index)
    assert loaded.config.id2label == model.config.id2label


def test_without_the_package(network, slice_randomly, tmp_path, clean_process):
    folders, expected = [], {}
    for family in ("cifar_resnet", "resnet_bottleneck"):
        model, shape = network(family)
        _, pruned = slice_randomly(model, shape, target_flops_reduction=0.35)
        folder = save(pruned, shape, tmp_path / family)
        folders.append(folder)
        expected[str(folder)] = pruned
    answer = json.loads(clean_process(LOAD, *folders).stdout.splitlines()[-1])
    for folder, pruned in expected.items():
        processor = ViTImageProcessor.from_pretrained(folder)
        inputs = processor(Image.open(f"{folder}/picture.png"), return_tensors="pt")
        with torch.no_grad():
            logits = pruned(**inputs).logits
        got = answer[folder]
        torch.testing.assert_close(torch.tensor(got["logits"]), logits, rtol=1e-5, atol=1e-5)
        assert got["best"] == pruned.config.id2label[int(logits.argmax())]
        assert got["same"]
        assert got["shape"][0] == 1
        assert got["widths"] == len(pruned.config.widths) > 5


def test_a_plain_trainer_goes_on(network, slice_randomly, arguments, toy_data):
    model, shape = network("resnet_bottleneck")
    _, pruned = slice_randomly(model, shape, target_flops_reduction=0.35)
    rows = toy_data(16, size=shape[1], labels=4)
    before = {name: value.clone() for name, value in pruned.state_dict().items()}
    trainer = Trainer(model=pruned, args=arguments(max_steps=3, per_device_train_batch_size=8), train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    changed = [name for name, value in pruned.state_dict().items() if not torch.equal(value, before[name])]
    assert not [name for name in changed if name.endswith("filter_index")]
    assert set(changed) >= {name for name, _ in pruned.named_parameters()}


def test_a_pruned_network_gets_a_head_for_other_labels(network, slice_randomly, tmp_path):
    """Where the last convolution lost filters, the width of the old head stands in the configuration."""
    model, shape = network("plain")
    _, pruned = slice_randomly(model, shape, target_flops_reduction=0.3)
    assert "linear" in pruned.config.widths
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert loaded(torch.zeros(2, *shape)).logits.shape == (2, 3)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    assert again(torch.zeros(2, *shape)).logits.shape == (2, 3)


@pytest.mark.parametrize("family", ["cifar_resnet", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def test_onnx_gives_the_same_answers_at_any_batch_size(network, slice_randomly, tmp_path, family):
    import onnxruntime

    model, shape = network(family)
    _, pruned = slice_randomly(model, shape, target_flops_reduction=0.35)
    pruned.train()
    file = pruned.export_onnx(tmp_path)
    assert pruned.training
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(file))
    pruned.eval()
    for batch in (1, 2, 5):
        images = torch.randn(batch, *shape)
        got = torch.from_numpy(session.run(["logits"], {"pixel_values": images.numpy()})[0])
        with torch.no_grad():
            expected = pruned(images).logits
        assert (got - expected).abs().max() < 1e-4
        assert torch.equal(got.argmax(dim=1), expected.argmax(dim=1))
    with pytest.raises((FileExistsError, NotADirectoryError)):
        export_onnx(pruned, file, shape)


@pytest.mark.parametrize(
    ("layer_type", "round_to", "expected"), [("bottleneck", 8, 4), ("bottleneck", 1, None), ("basic", 8, 0)]
)
def test_folded_scatters_give_the_same_answers(slice_randomly, layer_type, round_to, expected):
    """A 1x1 convolution that ends a residual branch and reads a multiple of 8 channels has zero filters instead."""
    shape = (3, 32, 32)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[64, 128], depths=[2, 2], layer_type=layer_type)
    _, pruned = slice_randomly(
        ResNetForImageClassification(config), shape, target_flops_reduction=0.5, round_to=round_to
    )
    folded = copy.deepcopy(pruned).eval()
    count = fold_scatters(folded, torch.zeros(1, *shape))
    left = sum(hasattr(module, "filter_index") for module in folded.modules())
    assert left == sum(hasattr(module, "filter_index") for module in pruned.modules()) - count
    assert count == expected or (expected is None and count < 4)
    images = torch.randn(2, *shape)
    with torch.no_grad():
        torch.testing.assert_close(folded(images).logits, pruned.eval()(images).logits, rtol=1e-6, atol=1e-6)
    for module in folded.modules():
        if isinstance(module, torch.nn.Conv2d) and hasattr(module, "filter_index"):
            assert module.kernel_size != (1, 1) or module.in_channels % 8
    assert sum(hasattr(module, "filter_index") for module in pruned.modules()) == left + count  # left as it is


@pytest.mark.parametrize("layer_type", ["bottleneck", "basic"])
def test_channels_last_stays_channels_last(slice_randomly, layer_type):
    """Same logits and gradients; no layer after a scatter falls back to the other memory format."""
    shape = (3, 32, 32)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], layer_type=layer_type)
    _, pruned = slice_randomly(ResNetForImageClassification(config), shape, target_flops_reduction=0.5)
    images, labels = torch.randn(3, *shape), torch.tensor([0, 1, 0])
    other = copy.deepcopy(pruned).to(memory_format=torch.channels_last)
    formats = []
    for module in other.modules():
        if isinstance(module, torch.nn.Conv2d) or hasattr(module, "filter_index"):
            module.register_forward_hook(
                lambda module, args, output: formats.append(output.is_contiguous(memory_format=torch.channels_last))
            )
    expected = pruned.eval()(images, labels=labels)
    found = other.eval()(images.to(memory_format=torch.channels_last), labels=labels)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert len(formats) > 10
    assert all(formats)
    expected.loss.backward()
    found.loss.backward()
    for (name, want), (_, got) in zip(pruned.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-5, msg=name)


PUSH = """
import sys
from transformers import AutoImageProcessor
from hf_efficient import KDFSPrunedModelForImageClassification
KDFSPrunedModelForImageClassification.from_pretrained(sys.argv[1]).push_to_hub("me/pruned")
AutoImageProcessor.from_pretrained(sys.argv[1]).push_to_hub("me/pruned")
"""
FETCH = """
import json, sys
sys.modules.update(dict.fromkeys(("hf_efficient", "optimum", "torch_pruning")))
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
model = AutoModelForImageClassification.from_pretrained("me/pruned", trust_remote_code=True).eval()
picture = Image.open(sys.argv[1])
with torch.no_grad():
    logits = model(**AutoImageProcessor.from_pretrained("me/pruned")(picture, return_tensors="pt")).logits
best = pipeline("image-classification", "me/pruned", trust_remote_code=True)(picture)[0]["label"]
print(json.dumps({"logits": logits.tolist(), "best": best}))
"""


@pytest.mark.slow
def test_pushed_to_a_hub_and_loaded_from_it(network, slice_randomly, tmp_path):
    model, shape = network("cifar_resnet")
    _, pruned = slice_randomly(model, shape, target_flops_reduction=0.35)
    folder = save(pruned, shape, tmp_path / "pruned")

    def client(code, home, *arguments):
        environment = {**os.environ, **hub.client_environment(tmp_path / home)}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    with LocalHub() as hub:
        client(PUSH, "there", folder)
        pushed = hub.files("me/pruned")
        assert {"config.json", "model.safetensors", "modeling_kdfs_pruned.py", "configuration_cifar_resnet.py"} <= {
            *pushed
        }
        assert json.loads(pushed["config.json"])["widths"] == pruned.config.widths
        answer = json.loads(client(FETCH, "here", folder / "picture.png").splitlines()[-1])
    inputs = ViTImageProcessor.from_pretrained(folder)(Image.open(folder / "picture.png"), return_tensors="pt")
    with torch.no_grad():
        expected = pruned(**inputs).logits
    torch.testing.assert_close(torch.tensor(answer["logits"]), expected, rtol=1e-5, atol=1e-5)
    assert answer["best"] == pruned.config.id2label[int(expected.argmax())]


@pytest.mark.slow
def test_timm_networks_load_from_their_checkpoint(network, slice_randomly, tmp_path):
    model, shape = network("timm_efficientnet_lite0")
    _, pruned = slice_randomly(model, shape, target_flops_reduction=0.35)
    pruned.save_pretrained(tmp_path)
    images = torch.randn(2, *shape)
    with torch.no_grad():
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(images).logits, pruned(images).logits)
        features = AutoModel.from_pretrained(tmp_path).eval()(images)
    assert features.pooler_output.shape[0] == 2
    assert loaded.config.num_labels == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": {"cifar_resnet.conv1": [3, 0]}}, r"\[3, 0\]"),
        ({"base_config": {"model_type": "no_such_network"}}, "no_such_network"),
    ],
)
def test_a_broken_config_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KDFSPrunedConfig(**settings)


@pytest.mark.parametrize(
    ("widths", "message"), [({"nowhere": [3, 4]}, "nowhere"), ({"cifar_resnet.layer1": [3, 4]}, "Sequential")]
)
def test_widths_that_do_not_fit_are_refused(widths, message):
    with pytest.raises(ValueError, match=message):
        KDFSPrunedModelForImageClassification(KDFSPrunedConfig(widths=widths))


@pytest.mark.parametrize("pruned", [False, True])
def test_another_problem_is_not_trained_with_the_cross_entropy(slice_randomly, pruned):
    """Several classes per image got the loss of one class, in silence."""
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, hidden_sizes=[8, 8, 16], num_labels=4))
    if pruned:
        _, model = slice_randomly(model, (3, 16, 16), target_flops_reduction=0.3)
    images, several = torch.randn(2, 3, 16, 16), torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1]])
    assert model(images, labels=torch.tensor([1, 3])).loss > 0
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match=r"`problem_type` must be .* but is 'multi_label_classification'"):
        model(images, labels=several)
    assert model(images).loss is None
