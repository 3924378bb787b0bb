"""The picture of what was kept: the right patches are bright, the right words grey, pyplot knows nothing of it."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from hf_efficient import SparsityRecord, plot_kept_tokens
from hf_efficient.dynamic_llava import figures_dynamic_llava as figures

from .conftest import TOKENS


def record(index, size, keep=()):
    keep = torch.tensor([list(keep)], dtype=torch.bool)
    generated = torch.ones(keep.shape[1], dtype=torch.bool)
    return SparsityRecord([[torch.tensor(index)]], [[size]], keep, generated, torch.zeros_like(keep).long(), keep, [1])


def render(figure):
    """Pixels of the whole figure, `(height, width, 3)` in [0, 1]."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255


def brightness(figure, shape):
    """Mean brightness of the middle of every patch."""
    pixels = render(figure)
    axes, (rows, columns) = figure.axes[0], shape
    values = np.empty(shape)
    for row in range(rows):
        for column in range(columns):
            x0, y0 = axes.transData.transform((column + 0.25, row + 0.25))
            x1, y1 = axes.transData.transform((column + 0.75, row + 0.75))
            height = len(pixels)
            values[row, column] = pixels[int(height - y0) : int(height - y1), int(x0) : int(x1)].mean()
    return values


def words_of(figure):
    """Text and colour of everything written, headings left out."""
    return [(text.get_text(), text.get_color()) for text in figure.texts if text.get_fontsize() == figures.FONT]


WHITE = Image.new("RGB", (64, 64), "white")


def test_kept_patches_are_bright_and_the_others_dimmed():
    figure = plot_kept_tokens(WHITE, record([0, 5, 7, 14], 16))
    values = brightness(figure, (4, 4))
    wanted = np.zeros(16, dtype=bool)
    wanted[[0, 5, 7, 14]] = True
    assert np.array_equal(values > 0.95, wanted.reshape(4, 4))
    assert (values[~wanted.reshape(4, 4)] < 0.6).all()
    assert figure.texts[0].get_text() == "4 of 16 image tokens kept"


def test_outline_separates_kept_from_dropped():
    """Two patches side by side have one outline, of six segments."""
    mask = np.zeros((3, 3), dtype=bool)
    mask[1, 1:] = True
    segments = {frozenset(segment) for segment in figures._outline(mask)}
    corners = [(1, 1), (2, 1), (3, 1), (3, 2), (2, 2), (1, 2)]
    assert segments == {frozenset(pair) for pair in zip(corners, corners[1:] + corners[:1])}


def test_words_have_the_colour_of_their_decision():
    figure = plot_kept_tokens(WHITE, record([1], 4, [1, 0, 0, 1]), ["a", "red", "$5", "and $6", "</s>"])
    assert words_of(figure) == [
        ("a", figures.KEPT),
        ("red", figures.DROPPED),
        ("$5", figures.DROPPED),
        ("and $6", figures.KEPT),
        ("</s>", figures.OPEN),
    ]
    assert not any(text.get_parse_math() for text in figure.texts)
    render(figure)  # dollar signs are no formula
    grey = np.array(matplotlib.colors.to_rgb(figures.DROPPED))
    assert to_hex(grey) == figures.DROPPED
    assert figures.DROPPED != figures.KEPT


def test_word_pieces_stick_together_and_long_answers_wrap():
    pieces = ["\u2581ch", "air", "\u2581two", "<0x0A>", "."]
    assert figures._split_tokens(pieces) == [
        ("ch", True),
        ("air", False),
        ("two", True),
        ("\u21b5", False),
        (".", False),
    ]
    assert figures._split_tokens(["one", "two"]) == [("one", True), ("two", True)]
    words = [f"word{i}" for i in range(120)]
    figure = plot_kept_tokens(WHITE, record([1], 4, [i % 2 for i in range(119)]), words)
    render(figure)
    width, height = figure.get_size_inches() * figure.dpi
    boxes = [text.get_window_extent() for text in figure.texts]
    assert len(boxes) == 122
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    assert len({round(box.y0) for box in boxes}) > 5
    for i, box in enumerate(boxes):  # nothing is written over something else
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_the_record_of_generate_is_drawn(make_sparse, make_batch):
    model = make_sparse()
    batch = make_batch([3, "image", 5], ["image", 2, "image", 3])
    out = model.generate(**batch, max_new_tokens=6, do_sample=False)
    tokens = [f"w{i}" for i in out[1, -6:]]
    record, kept = model.last_sparsity, model.last_sparsity.image_index[1][1]
    figure = plot_kept_tokens(WHITE, record, tokens, row=1, number=1, title="Where is w3?")
    values = brightness(figure, (4, 4)).ravel()
    assert 0 < len(kept) < TOKENS
    assert np.nonzero(values > 0.95)[0].tolist() == kept.tolist()
    colors = [figures.KEPT if keep else figures.DROPPED for keep in record.text_keep[1]]
    assert words_of(figure)[1:] == list(zip(tokens, [*colors, figures.OPEN]))  # the first is the title


def test_grids_that_are_no_square_are_given():
    with pytest.raises(ValueError, match=r"`grid` must be given for an image of 6 tokens"):
        plot_kept_tokens(WHITE, record([1], 6))
    values = brightness(plot_kept_tokens(WHITE, record([1, 5], 6), grid=(2, 3)), (2, 3))
    assert np.array_equal(values > 0.95, [[False, True, False], [False, False, True]])
    values = brightness(plot_kept_tokens(WHITE, record([0, 2], 7), grid=(2, 3)), (2, 3))
    assert np.array_equal(values > 0.95, [[False, True, False], [False, False, False]])  # a class token first
    with pytest.raises(ValueError, match=r"as many cells as the image has tokens \(6, .*got 3 x 3"):
        plot_kept_tokens(WHITE, record([1], 6), grid=(3, 3))


@pytest.mark.parametrize(("fit", "edge"), [("crop", 1.0), ("stretch", 0.0), ("pad", 0.0)])
def test_wide_pictures_are_fitted(fit, edge):
    """A white square with a black third on both sides."""
    image = np.zeros((60, 180, 3), dtype=np.uint8)
    image[:, 60:120] = 255
    picture = figures._fit_picture(image, (4, 4), fit)
    assert picture[len(picture) // 2, 2].mean() == edge
    if fit != "stretch":
        assert picture.shape[0] == picture.shape[1] == {"crop": 60, "pad": 180}[fit]


def test_pyplot_stays_as_it_was():
    before = plt.get_fignums()
    backend = matplotlib.get_backend()
    plot_kept_tokens(WHITE, record([0], 4)).savefig("/dev/null", format="png")
    assert (plt.get_fignums(), matplotlib.get_backend()) == (before, backend)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"row": 1}, r"`row` must be in \[0, 1\), got 1"),
        ({"number": 2}, r"`number` must be in \[0, 1\), got 2: row 0 has 1 images"),
        ({"fit": "zoom"}, "`fit` must be 'crop', 'pad' or 'stretch', got 'zoom'"),
        ({"answer_tokens": list("abcd")}, "at most 3 tokens, one more than were fed back, got 4"),
        ({"sparsity": None}, "must be a SparsityRecord, got NoneType"),
    ],
)
def test_wrong_input_is_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        plot_kept_tokens(**{"image": WHITE, "sparsity": record([0], 4, [1, 0]), **kwargs})


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'needs matplotlib; run pip install "hf-efficient\[quickstart\]"'):
        plot_kept_tokens(WHITE, record([0], 4))
