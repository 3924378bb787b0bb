"""Every example says what it reproduces, has --help and --smoke, and its smoke run ends well."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
METHODS = ("dynamic_llava", "toe", "kdfs", "pix2pix")
MAX_LINES = 250


# names that other people's scripts may read from a benchmark's JSON, and numbers that follow from configs alone
PROMISED = {
    "dynamic_llava_benchmark": (
        "prefill_speedup prefill_mac_ratio cached_decode_time_ratio kv_bytes_ratio uncached_decode_speedup "
        "uncached_mac_ratio train_step_ratio flops_7b_dense_T flops_7b_sparse_T flops_13b_dense_T flops_13b_sparse_T"
    ),
    "pix2pix_benchmark": (
        "train_step_speedup train_step_share inference_speedup images_per_second pipeline_overhead peak_bytes"
    ),
}
CALCULATED = {
    "dynamic_llava_benchmark": {
        "flops_7b_dense_T": 10.1,
        "flops_7b_sparse_T": 2.5,
        "flops_13b_dense_T": 19.6,
        "flops_13b_sparse_T": 4.7,
    },
}


def imported_parts() -> set[str]:
    """Examples that another example imports: a part of it, kept in a file of its own for its length."""
    sources = {path.stem: ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for path in FILES}
    modules = {
        node.module for nodes in sources.values() for node in nodes if isinstance(node, ast.ImportFrom) and node.module
    }
    return modules & set(sources)


def is_script(path: Path) -> bool:
    return '__name__ == "__main__"' in path.read_text(encoding="utf-8") and path.stem not in imported_parts()


SCRIPTS = [path for path in FILES if is_script(path)]
BENCHMARKS = [path for path in SCRIPTS if path.stem.endswith("_benchmark")]


def name(path: Path) -> str:
    return path.stem


def run(path: Path, *arguments: str, cwd: Path, timeout: float = 600) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, path, *arguments], capture_output=True, text=True, cwd=cwd, timeout=timeout)
    assert done.returncode == 0, f"{path.name} {' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def options(path: Path) -> set[str]:
    """The long options a script adds to its parser, read from the source, without those it calls itself with."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    calls = [call for call in calls if not any("SUPPRESS" in ast.dump(keyword) for keyword in call.keywords)]
    words = [argument.value for call in calls for argument in call.args if isinstance(argument, ast.Constant)]
    return {word for word in words if isinstance(word, str) and re.fullmatch(r"--[a-z][a-z-]*", word)}


def test_the_examples_are_seen():
    assert {"dynamic_llava_easy_vqa", "dynamic_llava_scenes", "dynamic_llava_benchmark"} <= {p.stem for p in SCRIPTS}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_file(path):
    source = path.read_text(encoding="utf-8")
    assert path.stem.startswith(METHODS), f"{path.name} must be called <method>_<verb>.py"
    lines = source.count("\n")
    assert lines <= MAX_LINES, f"{path.name} has {lines} lines, at most {MAX_LINES} are read in one go"
    assert ast.get_docstring(ast.parse(source)), f"{path.name} has no docstring"


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_script_says_what_it_reproduces(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert f"python examples/{path.name}" in text, "the docstring gives the command"
    assert re.search(r"\b(hours?|minutes?|seconds?|h|min)\b", text), "the docstring says how long it takes"
    assert re.search(r"\d", text), "the docstring gives the expected number"


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_script_has_the_common_options(path):
    wanted = {"--preset", "--json"} if path in BENCHMARKS else {"--smoke"}
    assert wanted <= options(path), f"{path.name} lacks {', '.join(sorted(wanted - options(path)))}"


def test_table_of_examples_is_complete():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in SCRIPTS if path.name not in table]
    assert not missing, f"examples/README.md does not name {missing}"
    gone = [found for found in re.findall(r"\b\w+\.py\b", table) if not (EXAMPLES / found).is_file()]
    assert not gone, f"examples/README.md names {gone}"


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_help(path, tmp_path):
    text = run(path, "--help", cwd=tmp_path).stdout
    for option in options(path):
        assert option in text


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in SCRIPTS if path not in BENCHMARKS], ids=name)
def test_smoke_run(path, tmp_path):
    """Scripts write below the current folder unless told otherwise; the clone must stay as it was."""
    before = {file: file.stat().st_mtime_ns for file in EXAMPLES.parent.glob("model_cards/*/*")}
    run(path, "--smoke", cwd=tmp_path)
    assert {file: file.stat().st_mtime_ns for file in EXAMPLES.parent.glob("model_cards/*/*")} == before


@pytest.mark.parametrize("path", BENCHMARKS, ids=name)
def test_a_benchmark_looks_for_the_folder_of_its_figures_first(path, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path.name, "--json", "no/such/figures.json"])
    module = importlib.import_module(path.stem)
    monkeypatch.setattr(module, "run_meta", lambda: pytest.fail("it began to measure"))
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2
    assert "--json no/such/figures.json: the folder does not exist; create it first." in capsys.readouterr().err


def test_peak_memory_is_in_bytes_on_every_system(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    benchmark = importlib.import_module("pix2pix_benchmark")
    usage = SimpleNamespace(ru_maxrss=3)
    monkeypatch.setitem(sys.modules, "resource", SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: usage))
    for platform, found in (("linux", 3 * 1024), ("darwin", 3)):
        monkeypatch.setattr(sys, "platform", platform)
        assert benchmark.peak_bytes() == found
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert benchmark.peak_bytes() is None


@pytest.mark.slow
@pytest.mark.parametrize("path", BENCHMARKS, ids=name)
def test_small_benchmark(path, tmp_path):
    run(path, "--preset", "small", "--json", str(tmp_path / "out.json"), cwd=tmp_path)
    numbers = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert set(numbers.pop("meta")) >= {"command", "commit", "cpu", "threads", "date", "versions"}
    assert set(numbers) >= set(PROMISED.get(path.stem, "").split())
    for key, value in CALCULATED.get(path.stem, {}).items():
        assert numbers[key] == pytest.approx(value, abs=0.05), key

    def leaves(value):
        return [leaf for child in value.values() for leaf in leaves(child)] if isinstance(value, dict) else [value]

    assert all(isinstance(leaf, int | float | str) for leaf in leaves(numbers)), numbers
