"""`examples/pix2pix_cartoon.py`: exit code 2 and one sentence on wrong arguments, before a run is started."""

import subprocess
import sys

import pytest

from hf_efficient.results import read_results


@pytest.fixture
def cartoon(monkeypatch, tmp_path, repository):
    """`cartoon(*arguments)` runs the script and returns its exit code; it must start no process."""
    monkeypatch.syspath_prepend(str(repository / "examples"))
    for name in ("pix2pix_cartoon", "pix2pix_cartoon_report", "pix2pix_train_data"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import pix2pix_cartoon

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a run was started"))

    def run(*arguments: str) -> int:
        small = ["--size", "32", "--channels", "1", "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["pix2pix_cartoon.py", *small, *arguments])
        try:
            return pix2pix_cartoon.main()
        except SystemExit as end:
            return end.code

    run.module = pix2pix_cartoon
    return run


def test_wrong_arguments_are_one_sentence_and_exit_code_2(cartoon, tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    for arguments, message in (
        (["--dataset", "no/where"], "--dataset no/where is no folder here and no data set of the Hub"),
        (["--column", "photo"], "--column must be one of the columns image, got 'photo'"),
        (["--held-out", "9"], "--held-out must leave photographs to train on; it takes 9 of 3"),
        (["--held-out", "-1"], "--held-out must be at least 0, got -1"),
        (["--norm", "layer"], "argument --norm: invalid choice: 'layer'"),
        (["--discriminator-norm", "layer"], "argument --discriminator-norm: invalid choice: 'layer'"),
        (["--dropout", "1"], "--dropout must lie in [0, 1), got 1.0"),
        (["--channels", "0"], "--channels must be at least 1, got 0"),
        (["--receptive-field", "71"], "--receptive-field must be one of"),
        (["--runs", "l1", "bilateral", "--receptive-field", "142"], "at least 48 pixels high and wide for a discri"),
        (["--gan-loss", "wgan"], "--gan-loss must be one of vanilla"),
        (["--lambda-l1", "-1"], "--lambda-l1 must be at least 0, got -1.0"),
        (["--ema-decay", "1"], "--ema-decay must lie in [0, 1), got 1.0"),
        (["--strength", "9"], "--strength must be a whole number from 0 to 5, got 9"),
        (["--severities", "9"], "--severities must be whole numbers from 0 to 5, got [9]"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--processes", "0"], "--processes must be at least 1, got 0"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--features", nowhere], f"--features {nowhere} is no file"),
        (["--repeats", nowhere], f"--repeats {nowhere} holds no results.json"),
        (["--choices", nowhere], f"--choices {nowhere} holds no results.json"),
    ):
        assert cartoon(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, arguments
        assert "Traceback" not in error
        assert error.partition("error: ")[2].count("\n") == 1, error


def test_wrong_input_that_a_run_meets_is_exit_code_2(cartoon, monkeypatch, capsys):
    class Process:
        returncode = 2

        def __init__(self, *_, **__) -> None:
            pass

        def wait(self, timeout: float) -> None:
            pass

    monkeypatch.setattr(subprocess, "Popen", Process)
    for code, words in ((2, "l1 met wrong input, named above"), (1, "l1 did not end; start the same command again")):
        Process.returncode = code
        assert cartoon("--runs", "l1") == code
        assert words in capsys.readouterr().err


def test_the_card_says_where_the_model_is_better_as_its_own_table_has_it(cartoon, repository):
    from pix2pix_cartoon_report import findings

    results = read_results(repository / "model_cards" / "pix2pix-cartoon2photo")
    assert results["limits"][:2] == findings(results["tables"][0], "bilateral")
    columns = ["model", "cartoons", "PSNR (dB)", "SSIM"]
    table = {
        "columns": columns,
        "rows": [["the cartoon itself", "palette", 20.0, 0.7], ["ours", "palette", 19.0, 0.6]],
    }
    assert findings(table, "ours") == ["Beside the cartoon itself this checkpoint is better in no figure."]
