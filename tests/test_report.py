"""`efficiency_report`: counts checked by hand, an untouched model, a verdict that never overclaims, the command."""

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_efficient import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    DynamicLlavaConfig,
    DynamicLlavaForConditionalGeneration,
    KDFSConfig,
    Pix2PixConfig,
    Pix2PixModel,
    ToEConfig,
    cli,
    count_flops,
    efficiency_report,
    token_expansion,
)
from hf_efficient.kdfs.masking_kdfs import KDFSMaskedModel
from hf_efficient.kdfs.slicing_kdfs import slice_network
from hf_efficient.kdfs.structure_kdfs import read_structure
from hf_efficient.report import measure_report
from hf_efficient.report.llava_report import paper_flops
from hf_efficient.report.measure_report import Cost, Phase, count_macs, outliers, peak_bytes
from hf_efficient.report.model_report import judge


IMAGE, TOKENS, WORDS, ANSWER = 60, 16, 7, 6
CPU = torch.device("cpu")


@pytest.fixture
def sparse_llava() -> DynamicLlavaForConditionalGeneration:
    """4 decoder layers, 2 of them sparse, 3 of 16 image tokens kept."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
    )
    return DynamicLlavaForConditionalGeneration.from_llava(
        LlavaForConditionalGeneration(config).eval(),
        predictor_hidden_size=16,
        predictor_num_heads=2,
        predictor_intermediate_size=32,
        predictor_num_layers=1,
    )


@pytest.fixture
def question() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, *[IMAGE] * TOKENS, *range(3, 2 + WORDS)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 16, 16)}


def make_vit() -> ViTForImageClassification:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTForImageClassification(ViTConfig(**shape, image_size=16, patch_size=4, num_labels=3))


def labelled(count: int = 2) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 3, 16, 16), "labels": torch.arange(count)}


# -------------------------------------------------------------------------------------------------------------- counts


class Attention(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Linear(4, 5), (3, 4), 3 * 4 * 5),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 8, 8), 2 * 4 * 4 * 9 * 2 * 6),
        (nn.ConvTranspose2d(4, 6, 4, 2, 1), (1, 4, 5, 5), 25 * 16 * 4 * 6),
        (Attention(), (2, 3, 7, 8), 2 * 3 * 2 * 7 * 7 * 8),
        (nn.LSTM(8, 16), (5, 2, 8), 5 * 2 * 4 * 16 * (8 + 16)),
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (1, 5, 16), 5 * (4 * 256 + 2 * 512) + 2 * 25 * 16),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_multiply_adds_by_hand(module, shape, macs):
    module.eval()
    x = torch.zeros(shape)
    with torch.no_grad():
        assert count_macs(lambda: module(x))[0] == macs


def test_backward_pass_is_counted():
    layer, x = nn.Linear(4, 5), torch.zeros(3, 4)
    assert count_macs(lambda: layer(x).sum().backward())[0] == 2 * 3 * 4 * 5  # no gradient for x
    assert torch.backends.mha.get_fastpath_enabled()


def test_peak_memory_of_a_known_allocation():
    found = peak_bytes(lambda: torch.ones(8 * 2**20), CPU)
    if found is None:
        pytest.skip("this system does not tell the peak of the resident memory")
    assert 0.9 * 2**25 < found < 1.2 * 2**25


def test_formula_of_the_paper_at_7b():
    config = DynamicLlavaConfig(text_config=LlamaConfig(hidden_size=4096, num_hidden_layers=32))
    assert paper_flops(config, 576) / 1e12 == pytest.approx(10.07, abs=0.005)  # Table 1 of the paper
    assert paper_flops(config, 576, int(0.2 * 576)) / 1e12 == pytest.approx(2.49, abs=0.005)


# -------------------------------------------------------------------------------------------------------- four methods


def test_sparse_llava_beside_itself(sparse_llava, question):
    report = efficiency_report(sparse_llava, question, repeats=1, new_tokens=ANSWER)
    names = ["image encoder", "prefill", "decoding with cache", "decoding without cache"]
    assert [phase.name for phase in report.phases] == names
    assert report.baseline == "the same model with sparsity off"
    assert report.parameters["model"] == sum(p.numel() for p in sparse_llava.parameters())
    assert report.kept["image_tokens"] == [TOKENS, 3]
    prefill, cached, uncached = (report.phase(name) for name in names[1:])

    layer = sum(p.numel() for p in sparse_llava.model.language_model.layers[0].parameters() if p.dim() == 2)
    prompt = question["input_ids"].shape[1]

    def decoder(tokens: int, layers: int) -> int:
        return layers * (tokens * layer + 2 * tokens**2 * 32)

    head = 32 * 64
    assert prefill.baseline.macs == decoder(prompt, 4) + head
    predictor = sparse_llava.model.image_score_predictor
    with torch.no_grad():
        extra = count_macs(lambda: predictor(torch.zeros(1, TOKENS, 32)))[0]
    kept = prompt - TOKENS + 3
    assert prefill.model.macs == decoder(prompt, 2) + decoder(kept, 2) + head + extra
    assert prefill.baseline.paper_flops == 4 * (32 * TOKENS * 32**2 + 4 * TOKENS**2 * 32)
    assert prefill.model.paper_flops == paper_flops(sparse_llava.config, TOKENS, 3)
    tokens = [prompt + step for step in range(1, ANSWER)]
    expected = sum(4 * (layer + 2 * count * 32) + head for count in tokens) / len(tokens)
    assert cached.baseline.macs == round(expected)
    assert uncached.baseline.macs == round(sum(decoder(count, 4) + head for count in tokens) / len(tokens))

    slot = 2 * 2 * 8 * 4  # keys and values of two heads of width 8 in float32
    assert prefill.baseline.cache_bytes == 4 * prompt * slot
    assert cached.baseline.cache_bytes == 4 * (prompt + ANSWER - 1) * slot
    assert prefill.model.cache_bytes == 2 * (-(-prompt // 16) + -(-kept // 16)) * 16 * slot  # steps of 16 slots
    exact = sum(report.kept["cached_tokens_of_layers"]) * slot
    assert report.kept["cached_tokens_of_layers"][:2] == [prompt + ANSWER - 1] * 2
    assert exact <= cached.model.cache_bytes <= exact + 4 * 16 * slot
    assert "Not judged: time" in report.verdict
    assert "paper FLOPs" in str(report)


def test_dense_llava_alone_and_with_a_baseline(sparse_llava, question):
    del question["attention_mask"]
    sparse_llava.config.vision_keep_rate, sparse_llava.config.use_output_text_predictor = 1.0, False
    report = efficiency_report(sparse_llava, question, repeats=1, new_tokens=2)
    assert report.baseline is None
    assert report.verdict.startswith("Nothing was compared")
    assert "Sparsity is switched off" in str(report)
    with pytest.raises(ValueError, match="must be a LLaVA with its head, got Linear"):
        efficiency_report(sparse_llava, question, nn.Linear(2, 2))


def test_stages_of_toe(monkeypatch):
    model, rows = make_vit(), 17
    seconds = iter([2.0] * 100)
    monkeypatch.setattr(measure_report, "read_clocks", lambda run, device: (next(seconds), 1.0) if not run() else None)
    report = efficiency_report(model, labelled(), repeats=2)
    assert report.kind == "toe"
    assert report.kept == {"patch_tokens": 16, "kept_in_stages": {"1": 8, "2": 12, "3": 16}}
    names = [f"stage {stage}" for stage in (1, 2, 3)]
    assert [phase.name for phase in report.phases] == [*names, "whole training"]
    block = 4 * 16 * 16 + 2 * 16 * 24
    trained = 2 * (rows * block + 2 * rows**2 * 16) + 16 * 3  # everything but the patch projection, one image
    full = 2 * (3 * trained + 2 * 16 * 3 * 16 * 16)  # its input needs no gradient
    first, second, third = (report.phase(name) for name in names)
    assert first.baseline.macs == third.model.macs == full
    assert first.model.macs < second.model.macs < full
    whole = report.phase("whole training")
    assert whole.model.macs == round((first.model.macs + second.model.macs + full) / 3)
    assert whole.model.wall_seconds == pytest.approx(2.0)
    assert not any("toe" in str(hook) for module in model.modules() for hook in module._forward_pre_hooks.values())


def test_toe_on_request():
    model, batch = make_vit(), labelled()
    assert efficiency_report(model, batch, repeats=1, toe=False).phases[0].name == "forward pass"
    with pytest.raises(ValueError, match="must hold `labels`"):
        efficiency_report(model, {"pixel_values": batch["pixel_values"]}, toe=True)
    config = ToEConfig(stage_starts=(0, 3), keep_rates=(0.25, 1.0))
    report = efficiency_report(model, batch, repeats=1, toe=config)
    assert report.kept["kept_in_stages"] == {"1": 4, "2": 16}
    assert [phase.name for phase in report.phases] == ["stage 1", "stage 2"]
    with token_expansion(model), pytest.raises(ValueError, match="is being trained with ToE"):
        efficiency_report(model, batch, repeats=1)


def test_pruned_network_beside_the_dense_one():
    dense = CifarResNetForImageClassification(CifarResNetConfig(depth=8)).eval()
    settings = KDFSConfig(target_flops_reduction=0.5, reconstruction_weight=0.0)
    masked = KDFSMaskedModel(copy.deepcopy(dense), read_structure(dense, (3, 16, 16)), settings)
    with torch.no_grad():
        for logits in masked.mask_logits:
            logits.copy_(torch.randn_like(logits))
    masked.freeze_masks()
    pruned = slice_network(masked, dense)
    report = efficiency_report(pruned, {"pixel_values": torch.randn(2, 3, 16, 16)}, dense, repeats=1)
    phase = report.phase("forward pass")
    assert report.kind == "kdfs"
    assert phase.model.macs == 2 * count_flops(pruned, (3, 16, 16))
    assert phase.baseline.macs == 2 * count_flops(dense, (3, 16, 16))
    assert report.kept["filters"][0] == 16 * 3 + 32 * 2 + 64 * 2
    assert report.kept["filters"][1] < report.kept["filters"][0]
    swapped = efficiency_report(dense, {"pixel_values": torch.randn(1, 3, 16, 16)}, pruned, repeats=1)
    assert "filters" not in swapped.kept  # the baseline has fewer: it is not what the model was pruned from
    assert "parameters" in report.gains
    assert f"{report.parameters['model'] / report.parameters['baseline']:.2f} of the parameters" in report.verdict
    alone = efficiency_report(pruned, {"pixel_values": torch.randn(1, 3, 16, 16)}, repeats=1)
    assert alone.verdict.startswith("Nothing was compared")
    assert alone.gains == ()


def test_pix2pix_generator():
    model = Pix2PixModel(Pix2PixConfig(num_levels=3, base_channels=4, image_size=16))
    report = efficiency_report(model, {"pixel_values": torch.randn(2, 3, 16, 16)}, repeats=1)
    network = next(module for module in model.modules() if hasattr(module, "up_norm"))
    sides = {"down": (8, 4, 2), "up": (8, 4, 2)}  # a transposed convolution is counted at its input
    expected = sum(
        2 * layer.weight.numel() * side**2
        for name, layers in sides.items()
        for side, layer in zip(layers, getattr(network, name))
    )
    assert report.kind == "pix2pix"
    assert report.phases[0].model.macs == expected


# --------------------------------------------------------------------------------------------------- the model is left


class Noisy(nn.Module):
    """Draws random numbers, changes a buffer and itself, and breaks when told so."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.broken = False

    def forward(self, x):
        self.calls += 1
        self.last = torch.rand(1) + random.random() + np.random.rand()
        if self.broken and self.calls > 2:
            raise RuntimeError("shapes do not match\nand more")
        return self.linear(x)


def state_of(model: nn.Module) -> dict:
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [list(module._forward_hooks.items()) for module in model.modules()],
        "names": [sorted(vars(module)) for module in model.modules()],
        "buffers": [buffer.tolist() for buffer in model.buffers()],
        "grads": [parameter.grad for parameter in model.parameters()],
        "random": [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()],
    }


@pytest.mark.parametrize("broken", [False, True])
def test_model_is_left_as_it_was(broken):
    model = Noisy().train()
    model.linear.eval()
    model.broken = broken
    model.linear.register_forward_hook(lambda *args: None)
    model.linear.weight.grad = torch.ones(4, 4)
    before = state_of(model)
    if broken:
        with pytest.raises(ValueError, match=r"got x \(2, 4\) float32: shapes do not match$"):
            efficiency_report(model, {"x": torch.zeros(2, 4)}, repeats=2)
    else:
        efficiency_report(model, {"x": torch.zeros(2, 4)}, repeats=2)
    after = state_of(model)
    assert after["grads"][0] is before["grads"][0]
    assert before == after


def test_sparse_llava_and_vit_are_left_as_they_were(sparse_llava, question):
    settings, record = sparse_llava.config.to_dict(), object()
    sparse_llava.model.last_sparsity = record
    efficiency_report(sparse_llava.train(), question, repeats=1, new_tokens=2)
    assert sparse_llava.config.to_dict() == settings
    assert sparse_llava.model.last_sparsity is record
    assert sparse_llava.training
    question["input_ids"][0, 1] = 2  # an image token too few
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        efficiency_report(sparse_llava, question, repeats=1)
    assert sparse_llava.config.to_dict() == settings
    vit, batch = make_vit().eval(), labelled()
    before = state_of(vit)
    with torch.inference_mode():
        efficiency_report(vit, batch, repeats=1)
    assert state_of(vit) == before
    assert all(parameter.grad is None for parameter in vit.parameters())


# --------------------------------------------------------------------------------------------------------- the verdict


def phase(speedups, cpu=None, name="prefill", **costs) -> Phase:
    cpu = speedups if cpu is None else cpu
    model = Cost(costs.pop("macs", 50), tuple((1.0, 1.0) for _ in speedups), **costs)
    return Phase(name, "pass", model, Cost(100, tuple(zip(speedups, cpu)), cache_bytes=100))


def test_no_gain_against_itself(monkeypatch):
    monkeypatch.setattr(measure_report, "read_clocks", lambda run, device: (run(), (0.5, 0.5))[1])
    model = nn.Linear(4, 4)
    report = efficiency_report(model, {"input": torch.zeros(1, 4)}, model, repeats=5)
    assert report.verdict == "No gain. No gain in time, within noise: forward pass (1.00x)."
    assert report.gains == ()


def test_noise_alone_is_hardly_ever_a_gain():
    generator = np.random.default_rng(0)
    claimed = 0
    for _ in range(2000):
        noise = np.exp(0.2 * generator.standard_normal((2, 9)))  # a busy machine: 20 %, the clocks independent
        claimed += phase(noise[0].tolist(), noise[1].tolist()).faster
    assert claimed < 20


@pytest.mark.parametrize(("rounds", "skipped"), [(1, 0), (5, 0), (7, 0), (9, 1), (20, 5)])
def test_interval_of_the_median(rounds, skipped):
    assert outliers(rounds) == skipped


@pytest.mark.parametrize(
    ("speedups", "cpu", "costs", "verdict", "gains"),
    [
        ([1.5] * 5, None, {}, "Gain: 1.50x as fast in prefill.", ("prefill",)),
        ([1.5] * 5, [1.2] * 5, {}, "Gain: 1.20x as fast in prefill.", ("prefill",)),
        (
            [1.5] * 5,
            [1.0] * 5,
            {},
            "No gain. No gain in time, within noise: prefill (1.50x by the wall clock, 1.00x by CPU time with 0.50 of",
            (),
        ),
        ([1.5, 1.5, 1.5, 1.5, 0.9], None, {}, "No gain. No gain in time, within noise: prefill (1.50x with", ()),
        ([1.02] * 5, None, {"macs": 100}, "No gain. No gain in time, within noise: prefill (1.02x).", ()),
        ([0.8] * 5, None, {"macs": 100}, "No gain. Slower: prefill (0.80x).", ()),
        ([0.7, 1.4, 0.7, 1.4, 0.7], [0.9] * 5, {"macs": 100}, "No gain. Slower: prefill (0.90x).", ()),
        ([1.5] * 4, None, {}, "Not judged: time, with fewer than 5 rounds.", ()),
        (
            [0.8] * 5,
            None,
            {"cache_bytes": 40},
            "Gain: 0.40 of the cache bytes in prefill. Slower: prefill",
            ("cache bytes",),
        ),
    ],
)
def test_verdict(speedups, cpu, costs, verdict, gains):
    found, names = judge([phase(speedups, cpu, **costs)], {"model": 10, "baseline": 10})
    assert found.startswith(verdict)
    assert names == gains


# ------------------------------------------------------------------------------------------------------ what comes out


def test_json_table_and_picture(tmp_path):
    report = efficiency_report(nn.Linear(4, 5), {"input": torch.zeros(3, 4)}, nn.Linear(4, 5), repeats=5)
    values = report.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["phases"][0]["model"]["flops"] == 2 * values["phases"][0]["model"]["macs"] == 120
    assert values["phases"][0]["macs_ratio"] == 1
    assert set(values["meta"]) >= {"command", "commit", "cpu", "threads", "date", "versions"}
    lines = str(report).splitlines()
    assert lines[0] == "Linear, 25 parameters"
    assert lines[-1] == f"Verdict: {report.verdict}"
    assert any(line.startswith("forward pass  pass  baseline  60    120") for line in lines)
    texts = [text.get_text() for axes in report.figure().axes for text in axes.texts]
    assert "forward pass" in texts
    assert report.plot(tmp_path / "report.png") == tmp_path / "report.png"
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 900
    with pytest.raises(ValueError, match=r"must end in \.png, \.svg, \.pdf, got 'report\.exe'"):
        report.plot(tmp_path / "report.exe")
    with pytest.raises(FileNotFoundError):
        report.plot(tmp_path / "no" / "report.png")
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
    with pytest.raises(ValueError, match="must be one of forward pass, got 'prefill'"):
        report.phase("prefill")


LINEAR = nn.Linear(4, 5)


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        (("bert", {"x": 1}), {}, "`model` must be a torch module, got str: load the model first."),
        ((LINEAR, [torch.zeros(1)]), {}, "`inputs` must be a dict of tensors by name, got list: pass what"),
        ((LINEAR, {}), {}, "`inputs` must be a dict of tensors by name, got an empty one"),
        ((LINEAR, {"input": torch.zeros(2, 3)}), {}, r"must fit the forward pass of Linear, got input \(2, 3\) float"),
        ((LINEAR, {"picture": torch.zeros(2, 4)}), {}, "got picture .*: .*unexpected keyword argument 'picture'"),
        ((LINEAR, {"input": torch.zeros(2, 4)}), {"repeats": 0}, "`repeats` must be an integer of at least 1, got 0"),
        ((LINEAR, {"input": torch.zeros(2, 4)}, 3), {}, "`baseline` must be a torch module, got int"),
        ((LINEAR, {"input": torch.zeros(2, 4)}), {"toe": "fast"}, "`toe` must be a ToEConfig, True, False or None"),
        ((nn.Linear(4, 5, device="meta"), {"input": torch.zeros(2, 4)}), {}, "Linear is on the meta device: load it"),
    ],
)
def test_bad_input_is_one_sentence(arguments, options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        efficiency_report(*arguments, **options)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": torch.zeros(1, 23)}, "must be a prompt that is to be answered, got `labels` as well"),
        ({"input_ids": None}, "must hold `input_ids` of shape"),
        ({"attention_mask": torch.tensor([[1] * 22 + [0]])}, "must pad on the left"),
    ],
)
def test_what_is_no_question_is_refused(sparse_llava, question, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        efficiency_report(sparse_llava, {**question, **change})


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def networks(tmp_path):
    """Folders of two small classifiers without an image processor."""
    for name, depth in (("small", 8), ("large", 14)):
        config = CifarResNetConfig(depth=depth, hidden_sizes=[4, 8, 8], image_size=16)
        CifarResNetForImageClassification(config).save_pretrained(tmp_path / name)
    return tmp_path


def test_command(networks, capsys, tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "$x$[1].png")
    arguments = ["report", str(networks / "small"), "--baseline", str(networks / "large"), "--repeats", "1"]
    arguments += ["--image", str(tmp_path / "$x$[1].png"), "--batch-size", "2", "--threads", "1"]
    arguments += ["--plot", str(tmp_path / "report.png"), "--json", str(tmp_path / "report.json")]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "Picture: $x$[1].png." in text
    assert "Verdict: Gain: " in text
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["inputs"] == {"pixel_values": "(2, 3, 16, 16) float32"}
    assert values["picture"] == "$x$[1].png"
    assert values["phases"][0]["macs_ratio"] < 1
    assert (tmp_path / "report.png").is_file()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--repeats", "0"], "--repeats must be at least 1, got 0."),
        (["--dtype", "load"], "--dtype must be a floating point dtype such as float32 or bfloat16, got 'load'."),
        (["--dtype", "int8"], "--dtype must be a floating point dtype such as float32 or bfloat16, got 'int8'."),
        (["--device", "cuda:999999"], "--device must be one that torch can use here, such as cpu, got 'cuda:999999'."),
        (["--device", "xpu:77"], "--device must be one that torch can use here, such as cpu, got 'xpu:77'."),
        (["--device", "meta"], "--device must be one that torch can use here, such as cpu, got 'meta'."),
        (["--plot", "report.exe"], "The picture must end in .png, .svg, .pdf, got 'report.exe'."),
        (["--plot", "no/such/report.png"], "--plot no/such/report.png: the folder does not exist"),
        (["--plot", "/proc/report.png"], "--plot /proc/report.png: nothing can be written into /proc ("),
        (["--image", "no.png"], "--image no.png cannot be read as a picture: "),
        (["--prompt", "x"], "--prompt is for a LLaVA, but"),
        (["--toe", "fast"], "MODEL must be one of the vision transformers ToE knows (vit, "),
    ],
)
def test_command_complains_in_one_sentence(networks, capsys, options, sentence):
    if "/proc/report.png" in options and not Path("/proc/self").is_dir():
        pytest.skip("nothing else refuses the administrator")
    assert cli.main(["report", str(networks / "small"), *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"hf-efficient report: error: {sentence}")


@pytest.mark.parametrize("baseline", [False, True])
def test_damaged_weights_are_one_sentence(networks, capsys, baseline):
    weights = networks / "small" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    models = [str(networks / "large"), "--baseline"] if baseline else []
    assert cli.main(["report", *models, str(networks / "small")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    argument = "--baseline" if baseline else "MODEL"
    assert error.startswith(
        f"hf-efficient report: error: {argument} {networks / 'small'} holds weights that cannot be read"
    )


def test_the_size_fits_the_generator(tmp_path, capsys):
    Pix2PixModel(Pix2PixConfig(num_levels=3, base_channels=4, image_size=16)).save_pretrained(tmp_path / "generator")
    assert cli.main(["report", str(tmp_path / "generator"), "--size", "12"]) == 2
    assert "error: --size must be a multiple of 8 for this generator, got 12." in capsys.readouterr().err


def test_a_picture_has_one_or_three_channels(tmp_path, capsys):
    config = CifarResNetConfig(depth=8, hidden_sizes=[4, 8, 8], image_size=16, num_channels=4)
    CifarResNetForImageClassification(config).save_pretrained(tmp_path / "four")
    assert cli.main(["report", str(tmp_path / "four")]) == 2
    assert "takes 4 channels, and a picture has 1 or 3: call hf_efficient.efficiency_report" in capsys.readouterr().err


def test_kinds_that_the_command_loads(repository):
    from transformers import BertConfig, ResNetConfig

    from hf_efficient.report.commands_report import _choose_auto

    assert _choose_auto(ResNetConfig()).__name__ == "AutoModelForImageClassification"
    assert _choose_auto(Pix2PixConfig()).__name__ == "AutoModelForImageToImage"
    assert _choose_auto(DynamicLlavaConfig()).__name__ == "AutoModelForImageTextToText"
    remote = SimpleNamespace(model_type="other", auto_map={"AutoModelForImageClassification": "x.Y"})
    assert _choose_auto(remote).__name__ == "AutoModelForImageClassification"
    with pytest.raises(ValueError, match=r"got 'bert': call hf_efficient\.efficiency_report"):
        _choose_auto(BertConfig())


@pytest.mark.slow
def test_command_on_the_published_llava(repository, capsys, tmp_path):
    card = repository / "model_cards" / "dynamic-llava-easy-vqa"
    options = ["--image", str(card / "sample.png"), "--repeats", "5", "--new-tokens", "8", "--quiet", "--json", "-"]
    assert cli.main(["report", str(card), "--prompt", "what color is the shape?", *options]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["kept"]["image_tokens"] == [64, 12]
    assert "cache bytes" in values["gains"]
    assert cli.main(["report", str(card), "--prompt", "<image>", *options]) == 2
    assert "--prompt must be words alone, got '<image>' in it" in capsys.readouterr().err
