"""The `hf-efficient` command: help, exit codes, sentences instead of tracebacks, JSON and quiet output."""

import argparse
import io
import json
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers.utils import logging

from hf_efficient import cli, hub, quickstart, results


@pytest.fixture
def toy(monkeypatch):
    """A subcommand `toy MODE` that does what MODE says."""

    class Toy:
        """Do a toy thing.

        Examples:
          hf-efficient toy fine
        """

        @staticmethod
        def add_arguments(parser: argparse.ArgumentParser) -> None:
            parser.add_argument("mode", metavar="MODE")
            parser.add_argument("--some-rate", action="store_true")

        @staticmethod
        def run(arguments: argparse.Namespace) -> dict:
            errors = {
                "value": ValueError("rate must be in (0, 1],\n   got 2: choose a smaller one."),
                "file": FileNotFoundError("x.png does not exist."),
                "import": ImportError("timm is missing; pip install timm."),
                "stop": KeyboardInterrupt(),
                "stop_with_words": KeyboardInterrupt("step 3\n is kept."),
                "bug": RuntimeError("a bug"),
                "named": ValueError("`mode` must be fine, pass `some_rate=True` or `other=True`."),
                "system": NotADirectoryError(20, "Not a directory", "/a/file/out"),
            }
            if arguments.mode == "chatty":
                print("{'loss': 1.0}")  # as a Trainer does
                warnings.warn("of a library", stacklevel=1)
                logging.get_logger("transformers.somewhere").warning("of transformers")
                logging.get_logger("hf_efficient.somewhere").warning("of ours")
            if arguments.mode in errors:
                raise errors[arguments.mode]
            result = {"answer": 42, "text": "The answer is 42."}
            if arguments.mode == "foreign":  # the name of a file that is not UTF-8, as Python reads it
                return {"file": "caf\udce9.png", "text": "Wrote caf\udce9.png \u2192 done."}
            return result | ({"incomplete": "1 of 2 answers is missing."} if arguments.mode == "part" else {})

    monkeypatch.setitem(cli._COMMANDS, "toy", ("cli", "Toy", "a toy"))
    monkeypatch.setattr(cli, "Toy", Toy, raising=False)


def test_help_names_every_command_with_examples(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in cli._COMMANDS:
        assert re.search(rf"^    {name}\b", text, re.M), name
    assert "examples:\n  hf-efficient quickstart" in text


@pytest.mark.parametrize("name", sorted(cli._COMMANDS))
def test_help_of_a_command_has_an_example_that_parses(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    examples = re.findall(rf"^\s+hf-efficient {name}(.*)$", text, re.M)
    assert examples
    assert "--json FILE" in text
    assert "--quiet" in text
    parser, _ = cli._build_parser(name, cli.load_command(name))
    for example in examples:
        assert parser.parse_args([name, *shlex.split(example)]).command == name


def test_result_goes_to_the_terminal_and_into_the_file(toy, capsys, tmp_path):
    assert cli.main(["toy", "fine"]) == 0
    assert capsys.readouterr().out == "The answer is 42.\n"
    assert cli.main(["toy", "fine", "--quiet", "--json", str(tmp_path / "out.json")]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "out.json").read_text()) == {"answer": 42}
    assert cli.main(["toy", "fine", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == {"answer": 42}


def test_names_of_files_in_another_encoding_are_written_with_escapes(toy, capsys, tmp_path, monkeypatch):
    file = tmp_path / "out.json"
    assert cli.main(["toy", "foreign", "--json", str(file)]) == 0
    assert json.loads(file.read_bytes()) == {"file": "caf\udce9.png"}
    assert capsys.readouterr().out == "Wrote caf\\udce9.png \u2192 done.\n"
    for arguments, written in (([], b"Wrote caf\\udce9.png \\u2192 done.\n"), (["--json", "-"], None)):
        narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="\n")  # a terminal of Windows
        monkeypatch.setattr(sys, "stdout", narrow)
        assert cli.main(["toy", "foreign", *arguments]) == 0
        narrow.flush()
        found = narrow.buffer.getvalue()
        assert found == written if written else json.loads(found) == {"file": "caf\udce9.png"}


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        ("value", "hf-efficient toy: error: rate must be in (0, 1], got 2: choose a smaller one.\n"),
        ("file", "hf-efficient toy: error: x.png does not exist.\n"),
        ("import", "hf-efficient toy: error: timm is missing; pip install timm.\n"),
        ("named", "hf-efficient toy: error: MODE must be fine, pass --some-rate or `other=True`.\n"),
        (
            "system",
            "hf-efficient toy: error: /a/file/out: Not a directory; check this path, or choose another one.\n",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(toy, capsys, mode, sentence, monkeypatch):
    monkeypatch.delenv("HF_EFFICIENT_TRACEBACK", raising=False)
    assert cli.main(["toy", mode]) == 2
    captured = capsys.readouterr()
    assert captured.err == sentence
    assert captured.out == ""


def test_a_partial_result_is_written_and_told_apart_from_wrong_input(toy, capsys, tmp_path):
    file = tmp_path / "out.json"
    assert cli.main(["toy", "part", "--json", str(file)]) == 3
    captured = capsys.readouterr()
    assert captured.out == "The answer is 42.\n"
    assert captured.err == "hf-efficient toy: incomplete: 1 of 2 answers is missing.\n"
    assert json.loads(file.read_text()) == {"answer": 42}


def test_standard_output_holds_the_result_alone(toy, capsys):
    """What libraries print goes to standard error, what they say about themselves nowhere."""
    assert cli.main(["toy", "chatty", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"answer": 42}
    assert "{'loss': 1.0}" in captured.err
    assert "library" not in captured.err
    assert "of transformers" not in captured.err
    assert cli.main(["toy", "chatty", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_command_leaves_the_settings_of_the_process_alone(toy):
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled(), warnings.filters[:])
    assert cli.main(["toy", "fine", "--quiet"]) == 0
    assert cli.main(["toy", "value", "--quiet"]) == 2
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), warnings.filters[:]) == before


def test_traceback_on_request(toy, monkeypatch):
    monkeypatch.setenv("HF_EFFICIENT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="rate must be"):
        cli.main(["toy", "value"])


def test_a_bug_keeps_its_traceback_and_an_interrupt_ends_quietly(toy, capsys):
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["toy", "bug"])
    assert cli.main(["toy", "stop"]) == 130
    said = capsys.readouterr().err.strip()
    assert said.endswith(": interrupted; files that are there are whole, and the same command begins anew.")
    assert cli.main(["toy", "stop_with_words"]) == 130
    assert capsys.readouterr().err == "\nhf-efficient toy: interrupted; step 3 is kept.\n"


@pytest.mark.parametrize("option", ["--some-rate", "--some_rate"])
def test_options_may_be_typed_with_underscores_values_stay_as_they_are(toy, capsys, tmp_path, option):
    file = tmp_path / "--my_result=a_b.json"
    assert cli.main(["toy", "fine_mode", option, f"--json={file}"]) == 0
    assert json.loads(file.read_text())["answer"] == 42


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["toy"], ["toy", "fine", "--frobnicate"], ["--json"]])
def test_wrong_arguments_end_with_2_in_one_line(toy, capsys, argv):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_json_into_a_missing_folder_is_refused_before_the_work(toy, capsys, tmp_path):
    assert cli.main(["toy", "bug", "--json", str(tmp_path / "no" / "out.json")]) == 2
    assert "the folder does not exist" in capsys.readouterr().err
    assert cli.main(["toy", "bug", "--json", str(tmp_path)]) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="nothing else refuses the administrator")
def test_json_where_nothing_can_be_written_is_refused_before_the_work(toy, capsys):
    assert cli.main(["toy", "bug", "--json", "/proc/out.json"]) == 2
    assert "--json /proc/out.json: nothing can be written into /proc (" in capsys.readouterr().err


def test_installed_command_runs():
    command = Path(sys.executable).with_name("hf-efficient")
    done = subprocess.run([command, "push", "/does/not/exist", "me/x"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.endswith("is not a folder; name one that save_pretrained() wrote.\n")
    assert "Traceback" not in done.stderr


def test_help_loads_no_torch():
    """As the installed command does it; `push` asks huggingface_hub for its rules, which is quick."""
    code = """
import contextlib, io, sys
sys.argv[0] = "hf-efficient"
from hf_efficient import cli
for name in cli._COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        cli.main([name, "--help"])
    heavy = {"torch", "datasets", "transformers.modeling_utils"} & set(sys.modules)
    if heavy or "--json FILE" not in text.getvalue():
        sys.exit(f"{name}: {heavy} {text.getvalue()[:200]}")
sys.exit(cli.main(["prune", "--model", "/no/such", "--dataset", "d", "--output", "out"]))  # loads all the same
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "prune: error: --model /no/such is no folder here" in done.stderr.splitlines()[-1]


def test_push_hands_its_options_on(monkeypatch, tmp_path, capsys):
    seen = {}

    def push(folder, repo_id, **options):
        seen.update(options, folder=folder, repo_id=repo_id)
        return "https://huggingface.co/me/x/commit/1"

    monkeypatch.setattr(hub, "push_checkpoint", push)
    assert cli.main(["push", str(tmp_path), "me/x", "--private", "--revision", "v1", "--message", "First"]) == 0
    assert seen == {
        "folder": str(tmp_path),
        "repo_id": "me/x",
        "private": True,
        "revision": "v1",
        "commit_message": "First",
    }
    assert capsys.readouterr().out == "Pushed: https://huggingface.co/me/x/commit/1\n"


@pytest.mark.parametrize("repo_id", ["a/b/c", "no spaces", "../up", "-x"])
def test_push_to_an_impossible_name(tmp_path, capsys, repo_id):
    assert cli.main(["push", str(tmp_path), "--", repo_id]) == 2
    assert (
        f"REPO_ID must be user/name, of letters, digits, '.', '_' and '-', got {repo_id!r}" in capsys.readouterr().err
    )


def test_push_offline_is_one_sentence(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert cli.main(["push", str(tmp_path), "me/x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-efficient push: error: ")
    assert "offline" in error
    assert len(error.splitlines()) == 1


def test_quickstart_from_a_wheel_says_to_clone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quickstart, "__file__", str(tmp_path / "site-packages" / "hf_efficient" / "quickstart.py"))
    assert cli.main(["quickstart", "--output", str(tmp_path / "out")]) == 2
    assert "clone the repository" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_quickstart_puts_the_parts_into_one_table(monkeypatch, tmp_path, capsys):
    part = {
        "table": {"title": "two items", "columns": ["item", "n"], "rows": [["a", 1], ["b\x1b[31m", 20]]},
        "summary": [["tokens", 64, 12], ["answer", "yes", "no"]],
        "pictures": [{"file": "a.png", "caption": "A picture"}],
        "notes": ["A note."],
    }
    given = {}

    def run(checkpoints, output):
        given.update(checkpoints=checkpoints, output=output)
        (output / "a.png").write_text("a picture")
        return part

    monkeypatch.setattr(quickstart, "_PARTS", {"Toy": quickstart._Part("toy"), "Other": quickstart._Part("toy")})
    monkeypatch.setattr(quickstart, "import_module", lambda name, package: SimpleNamespace(run=run))
    out = tmp_path / "new" / "out"
    assert cli.main(["quickstart", "--output", str(out), "--json", str(tmp_path / "q.json")]) == 0
    text, said = capsys.readouterr()
    assert re.fullmatch(r"Toy: done in [\d.]+ s \(1 of 2\)\nOther: done in [\d.]+ s \(2 of 2\)\n", said)
    assert [path.name for path in out.iterdir()] == ["a.png"]
    assert given["checkpoints"].name == "model_cards"
    assert "Toy     tokens   64       12    0.19\n" in text
    assert "Toy     answer   yes      no\n" in text
    assert "\x1b" not in text
    assert f"{out / 'a.png'}: A picture" in text
    report = json.loads((tmp_path / "q.json").read_text())
    assert report["parts"]["Toy"]["summary"] == part["summary"]
    assert set(report["meta"]) >= {"command", "commit", "cpu", "threads", "date", "versions"}


def test_a_picture_of_quickstart_that_is_broken_off_is_not_left(monkeypatch, tmp_path, capsys):
    def run(checkpoints, output):
        (output / "a.png").write_text("half a pict")
        raise OSError("The disk is full.")

    monkeypatch.setattr(quickstart, "_PARTS", {"Toy": quickstart._Part("toy")})
    monkeypatch.setattr(quickstart, "import_module", lambda name, package: SimpleNamespace(run=run))
    assert cli.main(["quickstart", "--output", str(tmp_path / "out")]) == 2
    assert "The disk is full." in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("absent", ["config.json", "model.safetensors", "package"])
def test_quickstart_says_what_is_missing_before_any_work(monkeypatch, tmp_path, capsys, absent):
    """The last part lacks something: the first one has not run when that is said."""
    last = quickstart._Part("last", ("card",), ("no_such_package",) if absent == "package" else ())
    monkeypatch.setattr(quickstart, "_PARTS", {"First": quickstart._Part("first"), "Last": last})
    monkeypatch.setattr(quickstart, "import_module", lambda name, package: pytest.fail(f"{name} was run"))
    monkeypatch.setattr(quickstart, "find_checkpoints", lambda: tmp_path)
    (tmp_path / "card").mkdir()
    for file in {"config.json", "model.safetensors"} - {absent}:
        (tmp_path / "card" / file).write_text("{}")
    assert cli.main(["quickstart", "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    if absent == "package":
        assert 'Last needs no_such_package, not installed here: run pip install -e ".[quickstart]".\n' in said
    else:
        assert f"Last needs the checkpoint {tmp_path / 'card'}, but there is no {absent}: check out" in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_every_part_of_quickstart_names_what_it_needs(repository):
    """The entries are those that the modules read: the constants of the parts and the packages of the extra."""
    from hf_efficient.dynamic_llava import quickstart_dynamic_llava
    from hf_efficient.pix2pix import quickstart_pix2pix

    parts = quickstart._PARTS
    assert parts["Dynamic-LLaVA"].checkpoints == (quickstart_dynamic_llava.EASY_VQA, quickstart_dynamic_llava.SCENES)
    assert parts["Pix2Pix"].checkpoints == (quickstart_pix2pix.CHECKPOINT,)
    quickstart._check_needs(repository / "model_cards")


def test_table_is_set_in_columns():
    table = results.format_table(["name", "value"], [["a", 1.23456], ["bcd", 12_345]])
    assert table == "name   value\n----  ------\na      1.235\nbcd   12,345"
    assert results.format_table(["x"], []) == "x\n-"
