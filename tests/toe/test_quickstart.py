import pytest

from hf_efficient.toe import quickstart_toe


@pytest.mark.slow
def test_digits_with_and_without(tmp_path):
    part = quickstart_toe.run(tmp_path, tmp_path)
    without, with_ = part["summary"][0][1:]
    assert with_ < without  # CPU seconds
    assert all(row[3] > 30 for row in part["table"]["rows"])  # ten classes: it has learned something
    assert part["table"]["rows"][1][1] == "32 -> 48 -> 64"
    assert (tmp_path / part["pictures"][0]["file"]).stat().st_size > 1000
