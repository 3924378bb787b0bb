"""The sparse cache: exact contents, exact memory, every operation that `generate` uses."""

import pytest
import torch

from hf_efficient import SparseCache
from hf_efficient.dynamic_llava.cache_dynamic_llava import GROWTH


HEADS, WIDTH = 2, 4


class Driver:
    """Feeds random states through a cache as the model does and keeps the expected contents in plain lists."""

    def __init__(self, config, batch: int) -> None:
        self.cache = SparseCache(config)
        self.layers, self.first = config.text_config.num_hidden_layers, config.sparse_layer
        self.expected = [[[] for _ in range(batch)] for _ in range(self.layers)]
        self.kept = [[] for _ in range(batch)]
        self.generator = torch.Generator().manual_seed(0)

    def feed(self, stored: list[list[bool]], generated: bool) -> list[torch.Tensor]:
        stored = torch.tensor(stored)
        batch, new = stored.shape
        positions = torch.arange(new).expand(batch, -1)
        returned = []
        for layer in range(self.layers):
            keys = torch.randn(batch, HEADS, new, WIDTH, generator=self.generator)
            if layer == self.first:
                self.cache.stage(stored, positions, bool(stored.all()))
            returned.append(self.cache.update(keys, keys + 1, layer))
            for row in range(batch):
                for column in range(new):
                    if layer < self.first or stored[row, column]:
                        self.expected[layer][row].append(keys[row, :, column])
        self.cache.commit(stored, new if generated else 0)
        for row in range(batch):
            self.kept[row] += stored[row].tolist()
        return returned

    def check(self) -> None:
        for number, layer in enumerate(self.cache.layers):
            lengths = [len(row) for row in self.expected[number]]
            assert self.cache.get_seq_length(number) == layer.keys.shape[2] == max(lengths)
            for row, tokens in enumerate(self.expected[number]):
                torch.testing.assert_close(
                    layer.keys[row, :, : lengths[row]], torch.stack(tokens, dim=1), rtol=0, atol=0
                )
                torch.testing.assert_close(
                    layer.values[row, :, : lengths[row]], torch.stack(tokens, dim=1) + 1, rtol=0, atol=0
                )


@pytest.fixture
def driver(make_sparse):
    config = make_sparse().config
    return lambda batch: Driver(config, batch)


def test_random_steps_hold_exactly_the_kept_tokens(driver):
    run = driver(3)
    run.feed([[True] * 5, [True, False, True, True, True], [False, False, True, True, True]], generated=False)
    run.check()
    generator = torch.Generator().manual_seed(1)
    for step in range(60):
        stored = (torch.rand(3, 1 if step % 7 else 3, generator=generator) > 0.5).tolist()
        run.feed(stored, generated=True)
        run.check()
    record = run.cache.sparsity
    assert [row.tolist() for row in record.text_keep] == [row[5:] for row in run.kept]
    assert record.layer_tokens[0] == len(run.kept[0])


def test_a_dropped_token_sees_itself_and_nobody_sees_it_later(driver):
    run = driver(1)
    run.feed([[True, True]], generated=False)
    returned = run.feed([[False]], generated=True)
    assert [keys.shape[2] for keys, _ in returned] == [3, 3, 3, 3]
    returned = run.feed([[True]], generated=True)
    assert [keys.shape[2] for keys, _ in returned] == [4, 4, 3, 3]
    run.check()


def test_memory_is_that_of_the_kept_tokens(driver):
    run = driver(1)
    run.feed([[True] * 40 + [False] * 60], generated=False)
    for step in range(500):
        run.feed([[step % 2 == 0]], generated=True)
    token = 2 * HEADS * WIDTH * 4  # keys and values in float32
    exact = sum(len(rows[0]) for rows in run.expected) * token
    assert exact <= run.cache.allocated_bytes() <= exact + len(run.cache) * GROWTH * token
    assert run.cache.allocated_bytes() < 1.05 * exact


def test_crop_forgets_the_last_tokens_fed(driver):
    run = driver(2)
    run.feed([[True, True, True], [False, True, True]], generated=False)
    run.feed([[True, False, True, False], [False, False, True, True]], generated=True)
    before = run.cache.sparsity
    run.cache.crop(-3)
    for layer in range(4):
        for row in range(2):
            drop = 3 if layer < 2 else sum(run.kept[row][-3:])
            del run.expected[layer][row][len(run.expected[layer][row]) - drop :]
    run.check()
    assert [row.tolist() for row in run.cache.sparsity.text_keep] == [[True], [False]]
    assert [row.numel() for row in before.text_keep] == [4, 4], "an earlier record keeps what it told"
    run.kept = [row[:-3] for row in run.kept]
    run.feed([[True], [True]], generated=True)
    run.check()
    with pytest.raises(ValueError, match=r"`tokens_to_remove` must be 0 or negative, got 2"):
        run.cache.crop(2)
    run.cache.crop(0)
    run.check()


@pytest.mark.parametrize("operation", ["reorder", "repeat", "select", "mask"])
def test_rows_move_together(driver, operation):
    run = driver(2)
    run.feed([[True, True, True], [False, True, True]], generated=False)
    run.feed([[True], [False]], generated=True)
    run.cache.image_index = [[torch.tensor([0])], [torch.tensor([1])]]
    run.cache.image_sizes = [[4], [4]]
    order = {"reorder": [1, 1], "repeat": [0, 0, 1, 1], "select": [1], "mask": [1]}[operation]
    if operation == "reorder":
        run.cache.reorder_cache(torch.tensor(order))
    elif operation == "repeat":
        run.cache.batch_repeat_interleave(2)
    elif operation == "select":
        run.cache.batch_select_indices(torch.tensor(order))
    else:
        run.cache.batch_select_indices(torch.tensor([False, True]))
    run.expected = [[list(layer[row]) for row in order] for layer in run.expected]
    run.kept = [list(run.kept[row]) for row in order]
    run.check()
    assert [int(row[0]) for row in run.cache.sparsity.image_index] == order
    run.feed([[True]] * len(order), generated=True)
    run.check()


def test_reset_frees_everything(driver):
    run = driver(1)
    run.feed([[True] * 20], generated=False)
    assert run.cache.allocated_bytes()
    run.cache.reset()
    assert run.cache.allocated_bytes() == 0
    assert run.cache.sparsity is None
    assert [run.cache.get_seq_length(layer) for layer in range(4)] == [0] * 4
    run.expected = [[[]] for _ in run.expected]
    run.feed([[True] * 3], generated=False)
    run.check()


def test_kept_positions_are_right_aligned(driver):
    run = driver(2)
    run.feed([[True, False, True], [False, True, True]], generated=False)
    run.feed([[False], [True]], generated=True)
    assert run.cache.sparsity.kept_positions.tolist() == [[-1, 0, 2], [1, 2, 0]]
    assert "kept text tokens=['0/1', '1/1']" in repr(run.cache.sparsity)
