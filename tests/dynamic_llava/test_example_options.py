"""Wrong options of the Dynamic-LLaVA examples stop before an hour of training, not after it."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("dynamic_llava_easy_vqa", "--arms lerned", "invalid choice: 'lerned'"),
        ("dynamic_llava_easy_vqa", "--arms random --card card", "--card needs the arms dense and learned: add them"),
        ("dynamic_llava_scenes", "--only dense --card card", "--card needs all runs: leave --only out."),
        ("dynamic_llava_easy_vqa", "--card mine", "--card mine holds other files, which would be deleted: name a"),
        ("dynamic_llava_scenes", "--card mine", "--card mine holds other files, which would be deleted: name a"),
        ("dynamic_llava_scenes", "--scenes 0", "--scenes must be at least 1, got 0."),
    ],
)
def test_wrong_options_stop_at_once(script, options, message, repository, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(repository / "examples")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *options.split()])
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "run_meta", lambda *args: pytest.fail("work began"))
    with pytest.raises(SystemExit) as error:
        module.main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err
