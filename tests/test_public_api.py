"""The public names are a contract; importing the package is cheap and loads nothing it does not need."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_efficient


REPOSITORY = Path(__file__).resolve().parent.parent

# What users type, by part. A part is held to its names once it stands in `LANDED`.
CONTRACT = {
    "dynamic_llava": (
        "DynamicLlavaConfig DynamicLlavaModel DynamicLlavaForConditionalGeneration DynamicLlavaCallback "
        "DynamicLlavaTrainer DynamicLlavaTrainingArguments SparseCache SparsityRecord plot_kept_tokens "
        "convert_dynamic_llava_checkpoint"
    ),
    "toe": "ToEConfig ToECallback TokenExpansion token_expansion restore_tokens",
    "kdfs": (
        "KDFSConfig KDFSPruner KDFSTrainer KDFSPrunedConfig KDFSPrunedModel KDFSPrunedModelForImageClassification "
        "CifarResNetConfig CifarResNetForImageClassification count_flops"
    ),
    "pix2pix": (
        "Pix2PixConfig Pix2PixModel Pix2PixDiscriminator Pix2PixTrainer Pix2PixTrainingArguments ImageToImageOutput "
        "Pix2PixImageProcessor ImageToImagePipeline cartoonize evaluate_robustness convert_pix2pix_checkpoint"
    ),
    "report": "efficiency_report",
    "hub": "push_checkpoint",
}
LANDED = ("dynamic_llava", "toe", "kdfs", "pix2pix", "report", "hub")
NAMES = sorted(hf_efficient._EXPORTS)


def in_fresh_process(code: str) -> dict:
    """Run code that prints one JSON object on its last line."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("part", LANDED)
def test_contract_is_exported(part):
    assert set(CONTRACT[part].split()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_name_resolves_and_is_documented(name):
    thing = getattr(hf_efficient, name)
    assert thing.__name__ == name
    assert thing.__module__ == f"hf_efficient.{hf_efficient._EXPORTS[name]}"
    assert inspect.getdoc(thing), f"{name} has no docstring"
    own = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    assert own, f"{name} inherits its docstring from the host"


def test_names_are_listed():
    assert set(NAMES) <= set(dir(hf_efficient))
    assert set(hf_efficient.__all__) == {"__version__", *NAMES}


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'DynamicLava'"):
        hf_efficient.DynamicLava  # noqa: B018


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert hf_efficient.__version__ == version("hf-efficient")


def test_import_loads_no_optional_part():
    """Trainers, converters, figures and the house load when they are used, and so do all optional packages."""
    loaded = in_fresh_process(
        "import json, sys\nfrom transformers import pipeline\nbefore = set(sys.modules)\nimport hf_efficient\n"
        "print(json.dumps({'new': sorted(set(sys.modules) - before)}))"
    )["new"]
    assert "hf_efficient" in loaded
    roles = ("trainer_", "callback_", "convert_", "figures_", "pruner_", "commands_", "quickstart", "robustness_")
    house = ("hub", "cli", "report", "results")
    names = [module.split(".")[-1] for module in loaded if module.startswith("hf_efficient.")]
    assert not [name for name in names if name.startswith(roles) or name in house]
    optional = {"matplotlib", "cv2", "skimage", "sklearn", "timm", "gradio", "onnx", "optimum", "torchmetrics"}
    assert not optional & {module.split(".")[0] for module in loaded}


def test_help_does_not_load_torch():
    loaded = in_fresh_process(
        "import json, sys\nsys.argv = ['/some/where/hf-efficient', '--help']\nfrom hf_efficient.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = [name for name in ('torch', 'transformers', 'numpy') if name in sys.modules]\n"
        "print(json.dumps({'code': code, 'heavy': heavy}))"
    )
    assert loaded == {"code": 0, "heavy": []}


@pytest.mark.slow
def test_import_costs_at_most_half_a_second():
    """CPU time over `from transformers import pipeline`; the smallest of three interleaved runs of each."""
    code = "import json, time\n{}\nprint(json.dumps({{'seconds': time.process_time()}}))"
    host, ours = [], []
    for _ in range(3):
        host.append(in_fresh_process(code.format("from transformers import pipeline"))["seconds"])
        ours.append(in_fresh_process(code.format("from transformers import pipeline\nimport hf_efficient"))["seconds"])
    assert min(ours) - min(host) <= 0.5, f"host {host}, with hf_efficient {ours}"
