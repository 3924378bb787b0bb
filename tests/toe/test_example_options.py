"""Wrong options of `examples/toe_benchmark.py` and `examples/toe_finetune_vit.py` stop before anything is measured."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("script", "work", "options", "message"),
    [
        ("toe_benchmark", "measure", "--batch-size 0", "--batch-size must be at least 1, got 0."),
        ("toe_finetune_vit", "run", "--preset faster", "invalid choice: 'faster'"),
        ("toe_finetune_vit", "run", "--epochs 0", "--epochs must be at least 1, got 0."),
    ],
)
def test_wrong_options_stop_at_once(script, work, options, message, repository, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(repository / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *options.split()])
    module = importlib.import_module(script)
    monkeypatch.setattr(module, work, lambda *args, **kwargs: pytest.fail("work began"))
    with pytest.raises(SystemExit) as error:
        module.main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err
