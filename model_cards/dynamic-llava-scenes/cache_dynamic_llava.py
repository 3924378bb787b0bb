"""KV cache that holds only kept tokens from the sparse layer on, and the record of what was kept."""

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from .sparsity_dynamic_llava import right_align


# Buffers grow by this many slots: at most this much memory a layer is not yet filled.
GROWTH = 16


class SparsityRecord:
    """What a forward pass or a whole `generate` kept; detached, the same with and without a cache.

    Args:
        image_index (`list[list[torch.LongTensor]]`): A row's images: kept tokens, 0-based inside the image, ascending.
        image_sizes (`list[list[int]]`): Number of tokens of the same images.
        kept (`torch.BoolTensor` of shape `(batch, tokens)`): Decision for every token fed so far, False for padding.
        generated (`torch.BoolTensor` of shape `(batch, tokens)` or `(tokens,)`): True = generated (or answer) token.
        positions (`torch.LongTensor` of shape `(batch, slots)`): Position ids of the slots.
        filled (`torch.BoolTensor` of shape `(batch, slots)`): True = the slot holds a kept token.
        layer_tokens (`list[int]`): Cached tokens of each layer, longest row.
        losses (`dict[str, torch.Tensor]`, *optional*): Detached losses of a training forward.
    """

    def __init__(
        self,
        image_index: list[list[torch.Tensor]],
        image_sizes: list[list[int]],
        kept: torch.Tensor,
        generated: torch.Tensor,
        positions: torch.Tensor,
        filled: torch.Tensor,
        layer_tokens: list[int],
        losses: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self.image_index = image_index
        self.image_sizes = image_sizes
        self.layer_tokens = layer_tokens
        self.losses = losses or {}
        self._kept = kept
        self._generated = generated
        self._positions = positions
        self._filled = filled

    @property
    def text_keep(self) -> list[torch.Tensor]:
        """`list[torch.BoolTensor]`: a row's decisions, one for every generated token fed back, in order."""
        generated = self._generated.expand_as(self._kept)
        return [row[chosen] for row, chosen in zip(self._kept, generated)]

    @property
    def kept_positions(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(batch, kept)`: position ids of the kept tokens, right-aligned, -1 = pad."""
        index, valid = right_align(self._filled)
        return self._positions.expand_as(self._filled).gather(1, index).masked_fill(~valid, -1)

    @property
    def vision_keep_rate(self) -> float | None:
        """`float`: mean share of kept tokens of an image; None without an image."""
        shares = [
            len(index) / size
            for images, sizes in zip(self.image_index, self.image_sizes)
            for index, size in zip(images, sizes)
        ]
        return sum(shares) / len(shares) if shares else None

    @property
    def text_keep_rate(self) -> float | None:
        """`float`: share of kept generated tokens over all rows; None before the first one was fed back."""
        decisions = torch.cat(self.text_keep)
        return decisions.float().mean().item() if decisions.numel() else None

    def __repr__(self) -> str:
        images = [[len(index) for index in row] for row in self.image_index]
        text = [f"{int(row.sum())}/{row.numel()}" for row in self.text_keep]
        return f"SparsityRecord(kept image tokens={images}, kept text tokens={text}, layer_tokens={self.layer_tokens})"


def _writable(buffer: torch.Tensor) -> torch.Tensor:
    """The buffer, or a copy where it was made under `torch.inference_mode()`, which has ended."""
    return buffer.clone() if buffer.is_inference() and not torch.is_inference_mode_enabled() else buffer


def _grow(buffer: torch.Tensor, axis: int, slots: int) -> torch.Tensor:
    """Copy a buffer into one of at least `slots` slots along `axis`, new slots zero."""
    capacity = -(-slots // GROWTH) * GROWTH
    shape = list(buffer.shape)
    shape[axis] = capacity
    larger, filled = buffer.new_empty(shape), buffer.shape[axis]
    larger.narrow(axis, 0, filled).copy_(buffer)
    larger.narrow(axis, filled, capacity - filled).zero_()  # masked slots are read too: they must be finite
    return larger


class BufferedLayer(CacheLayerMixin):
    """Cache layer with spare slots: a new token is written in place instead of concatenated.

    `keys` and `values` are views of the filled part, of shape `(batch, kv_heads, tokens, head_dim)`.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._length = 0

    @property
    def is_initialized(self) -> bool:
        """`bool`: whether the layer ever held a token."""
        return self._buffers is not None

    @property
    def keys(self) -> torch.Tensor | None:
        """`torch.FloatTensor` of shape `(batch, kv_heads, tokens, head_dim)`: cached keys, None when empty."""
        return None if self._buffers is None else self._buffers[0][:, :, : self.get_seq_length()]

    @property
    def values(self) -> torch.Tensor | None:
        """`torch.FloatTensor` of shape `(batch, kv_heads, tokens, head_dim)`: cached values, None when empty."""
        return None if self._buffers is None else self._buffers[1][:, :, : self.get_seq_length()]

    @property
    def device(self) -> torch.device | None:
        """`torch.device`: where the layer lives, None when empty."""
        return None if self._buffers is None else self._buffers[0].device

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take batch, heads, width, dtype and device from the first states."""
        self._buffers = (key_states[:, :, :0], value_states[:, :, :0])

    def reserve(self, key_states: torch.Tensor, value_states: torch.Tensor, slots: int) -> None:
        """Make room for `slots` tokens in all."""
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
        self._buffers = (_writable(self._buffers[0]), _writable(self._buffers[1]))
        if self._buffers[0].shape[2] < slots:
            self._buffers = (_grow(self._buffers[0], 2, slots), _grow(self._buffers[1], 2, slots))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states of shape `(batch, kv_heads, new, head_dim)` and return all, as views."""
        start, end = self._length, self._length + key_states.shape[2]
        self.reserve(key_states, value_states, end)
        self._buffers[0][:, :, start:end] = key_states
        self._buffers[1][:, :, start:end] = value_states
        self._length = end
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens held (of the longest row)."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `query_length` new tokens attend to."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit: -1."""
        return -1

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self._buffers, self._length = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        self._length = max(self._length - abs(tokens_to_remove), 0)

    def _select(self, index: torch.Tensor) -> None:
        if self._buffers is not None:
            self._buffers = tuple(buffer.index_select(0, index.to(buffer.device)) for buffer in self._buffers)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows for beam search."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self._buffers is not None:
            self._buffers = tuple(buffer.repeat_interleave(repeats, dim=0) for buffer in self._buffers)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        self._select(indices)


class SlotTable:
    """Which slots of the sparse layers are filled, row by row, and where the tokens of the current step go.

    A row's kept tokens fill its slots from the left, in order; shorter rows leave slots empty on their right.
    """

    def __init__(self) -> None:
        self.counts: torch.Tensor | None = None  # (batch,)
        self.longest = 0
        self.needed = 0  # slots that the staged step writes to
        self.uniform = True  # all rows of one length: no mask needed, slots are slices
        self.positions: torch.Tensor | None = None  # (batch, slots)
        self.stored: torch.Tensor | None = None  # (batch, new) of the staged step
        self._target: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def stage(self, stored: torch.Tensor, positions: torch.Tensor, all_stored: bool) -> None:
        """Plan one step: `stored` and `positions` of shape `(batch, new)`; `all_stored` spares a device round trip."""
        batch, new = stored.shape
        if self.counts is None:
            self.counts = torch.zeros(batch, dtype=torch.long, device=stored.device)
            self.positions = positions.new_zeros(batch, 0)
        self.stored = stored
        one_slice = self.uniform and (new == 1 or all_stored)
        if one_slice:
            self._target = None
        elif new == 1:
            rows = torch.arange(batch, device=stored.device)
            self._target = (rows, torch.zeros_like(rows), self.counts)
        else:
            rows, columns = stored.nonzero(as_tuple=True)
            slots = (self.counts[:, None] + stored.long().cumsum(dim=1) - 1)[rows, columns]
            self._target = (rows, columns, slots)
        if one_slice or new == 1:
            self.needed = self.longest + new
        else:
            self.needed = int((self.counts + stored.sum(dim=1)).max())
        self.positions = _writable(self.positions)
        if self.positions.shape[1] < self.needed:
            self.positions = _grow(self.positions, 1, self.needed)
        self.write(self.positions, positions)

    def write(self, buffer: torch.Tensor, new: torch.Tensor) -> None:
        """Write a step's values, `(batch, new)` or `(batch, heads, new, width)`, to their slots."""
        axis = buffer.dim() // 2
        if self._target is None:
            buffer.narrow(axis, self.longest, new.shape[axis]).copy_(new)
            return
        rows, columns, slots = (index.to(buffer.device) for index in self._target)
        new = new.to(buffer.device)
        if axis == 1:
            buffer[rows, slots] = new[rows, columns]
        else:
            buffer[rows, :, slots] = new[rows, :, columns]

    def commit(self, kept_now: list[int] | None) -> None:
        """Count the staged tokens; `kept_now` is the number stored in each row where the host already knows it."""
        self.counts = self.counts + self.stored.sum(dim=1)
        if kept_now is not None and self.uniform and len(set(kept_now)) == 1:
            self.longest += kept_now[0]
        else:
            counts = self.counts.tolist()
            self.longest, self.uniform = max(counts), len(set(counts)) == 1
        self.stored, self._target = None, None

    def filled(self, extra: int = 0) -> torch.Tensor:
        """`torch.BoolTensor` of shape `(batch, longest + extra)`: True = slot below the row's count plus `extra`."""
        columns = torch.arange(self.longest + extra, device=self.counts.device)
        return columns < self.counts[:, None] + extra

    def map_rows(self, select) -> None:  # noqa: ANN001 - a function of a tensor
        """Apply a row selection to everything that has rows."""
        if self.counts is not None:
            self.counts, self.positions = select(self.counts), select(self.positions)
            counts = self.counts.tolist()
            self.longest, self.uniform = max(counts), len(set(counts)) == 1

    def remove(self, counts: torch.Tensor) -> None:
        """Forget the last `counts[row]` tokens of every row."""
        self.counts = self.counts - counts
        self.positions = self.positions.clone()  # records of earlier steps keep theirs
        remaining = self.counts.tolist()
        self.longest, self.uniform = max(remaining), len(set(remaining)) == 1


class SparseLayer(BufferedLayer):
    """Cache layer from the sparse layer on: the staged step decides which of the new tokens stay."""

    def __init__(self, table: SlotTable) -> None:
        super().__init__()
        self._table = table

    def get_seq_length(self) -> int:
        """Kept tokens of the longest row."""
        return self._table.longest if self._buffers is not None else 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the kept ones of the new states and return what the new tokens attend to.

        One new token is always visible to itself: it is written behind its row's kept tokens and counted only if
        kept. Several new tokens are returned behind the cached ones, in their own order.
        """
        table, new = self._table, key_states.shape[2]
        length = table.longest
        if new == 1 and length:
            self.reserve(key_states, value_states, length + 1)
            table.write(self._buffers[0], key_states)
            table.write(self._buffers[1], value_states)
            return self._buffers[0][:, :, : length + 1], self._buffers[1][:, :, : length + 1]
        keys, values = key_states, value_states
        if length:
            keys = torch.cat([self.keys, key_states], dim=2)
            values = torch.cat([self.values, value_states], dim=2)
        self.reserve(key_states, value_states, table.needed)
        table.write(self._buffers[0], key_states)
        table.write(self._buffers[1], value_states)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """The slot table forgets tokens for all sparse layers at once."""


class SparseCache(DynamicCache):
    """KV cache of a sparse LLaVA (Dynamic-LLaVA, Sec. 3.2).

    Layers below `sparse_layer` hold every token, layers from it on only kept ones, row by row. Buffers grow in steps
    of 16 slots and are rectangular, so memory follows the longest row.

    Args:
        config (`PreTrainedConfig`): Configuration of the sparse LLaVA.

    Example:
    ```python
    >>> output = model.generate(**inputs, return_dict_in_generate=True)
    >>> cache = output.past_key_values
    >>> [cache.get_seq_length(layer) for layer in range(len(cache))]  # fewer tokens from the sparse layer on
    >>> cache.allocated_bytes()
    ```
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        layers = config.get_text_config(decoder=True).num_hidden_layers
        self.sparse_layer = config.sparse_layer
        self.prompt_length: int | None = None  # set while `generate` runs: later columns are generated text
        self.end_tokens: torch.Tensor | None = None  # likewise: ids with which a row ends
        self.table = SlotTable()
        kinds = [BufferedLayer() if i < self.sparse_layer else SparseLayer(self.table) for i in range(layers)]
        super(DynamicCache, self).__init__(layers=kinds)
        self._forget()

    def _forget(self) -> None:
        self._kept: torch.Tensor | None = None  # (batch, columns), decision for every token fed
        self._generated: torch.Tensor | None = None  # (columns,)
        self._ended: torch.Tensor | None = None  # (batch, columns), True = the row's end or after it
        self._columns = 0
        self.generated_tokens = 0
        self.image_index: list[list[torch.Tensor]] = []
        self.image_sizes: list[list[int]] = []
        self.image_ends: list[list[int]] = []  # last column of each image

    def find_ended(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Which of the new generated tokens end their row, and which come after its end.

        `generate` feeds such tokens in a batch whose other rows go on; alone, the row would have stopped. The end
        itself is cached, since a next turn would feed it; what follows is padding.

        Args:
            ids (`torch.LongTensor` of shape `(batch, new)`): Generated tokens of this step.

        Returns:
            `torch.LongTensor` of shape `(batch, new)`: 0 = goes on, 1 = the end, 2 = after it; None where no end is
            known.
        """
        if self.end_tokens is None or self.prompt_length is None:
            return None
        ends = torch.isin(ids, self.end_tokens.to(ids.device)).long()
        before = ends.cumsum(dim=1) - ends
        if self._ended is not None:
            earlier = self._ended[:, self.prompt_length : self._columns].any(dim=1, keepdim=True)
            before = before + earlier.to(before.device)
        return torch.where(before > 0, 2, ends)

    def visible_slots(self, attention_mask: torch.Tensor) -> torch.Tensor | None:
        """Which slots of the sparse layers a mask over the cached tokens leaves visible.

        Args:
            attention_mask (`torch.Tensor` of shape `(batch, past)`): 0 = hidden from now on.

        Returns:
            `torch.BoolTensor` of shape `(batch, slots)`, True on empty slots too; None where nothing is hidden.
        """
        kept = self._kept[:, : self._columns]
        attended = (attention_mask != 0).to(kept.device).expand_as(kept)
        if not bool((kept & ~attended).any()):
            return None
        columns = (~kept).long().argsort(dim=1, stable=True)[:, : self.table.longest]
        return attended.gather(1, columns) | ~self.table.filled()

    def stage(self, stored: torch.Tensor, positions: torch.Tensor, all_stored: bool) -> None:
        """Tell the sparse layers which tokens of the coming step to keep.

        Args:
            stored (`torch.BoolTensor` of shape `(batch, new)`): True = keep.
            positions (`torch.LongTensor` of shape `(batch, new)`): Position ids.
            all_stored (`bool`): Whether every entry of `stored` is True.
        """
        self.table.stage(stored, positions, all_stored)

    def commit(
        self,
        kept: torch.Tensor,
        generated: int,
        kept_now: list[int] | None = None,
        images: tuple[list[list[torch.Tensor]], list[list[int]], list[list[int]]] | None = None,
        ended: torch.Tensor | None = None,
    ) -> None:
        """Close a step after its last layer.

        Args:
            kept (`torch.BoolTensor` of shape `(batch, columns)`): Decision for every token fed, dropped ones included.
            generated (`int`): How many of the last columns are generated text.
            kept_now (`list[int]`, *optional*): Number of stored tokens of each row, if known on the host.
            images (`tuple`, *optional*): Kept index, size and last column of the images of this step, row by row.
            ended (`torch.BoolTensor` of shape `(batch, generated)`, *optional*): True = the end of a row, or after it.
        """
        self.table.commit(kept_now)
        batch, columns = kept.shape
        if self._kept is None:
            self._kept = kept.new_zeros(batch, 0)
            self._ended = kept.new_zeros(batch, 0)
            self._generated = kept.new_zeros(0)
            self.image_index, self.image_sizes, self.image_ends = ([[] for _ in range(batch)] for _ in range(3))
        start, end = self._columns, self._columns + columns
        self._kept, self._ended, self._generated = map(_writable, (self._kept, self._ended, self._generated))
        if self._kept.shape[1] < end:
            self._kept, self._ended = _grow(self._kept, 1, end), _grow(self._ended, 1, end)
            self._generated = _grow(self._generated, 0, end)
        self._kept[:, start:end] = kept
        self._ended[:, start:end] = False
        if ended is not None:
            self._ended[:, end - generated : end] = ended.to(self._ended.device)
        self._generated[start:end] = False
        self._generated[end - generated : end] = True
        self._columns = end
        self.generated_tokens += generated
        if images is not None:
            self.image_index = [old + new for old, new in zip(self.image_index, images[0])]
            self.image_sizes = [old + new for old, new in zip(self.image_sizes, images[1])]
            ends = [[start + column for column in row] for row in images[2]]
            self.image_ends = [old + new for old, new in zip(self.image_ends, ends)]

    @property
    def sparsity(self) -> SparsityRecord | None:
        """[`SparsityRecord`] of everything fed so far; None while the cache is empty.

        What `generate` fed to rows that had ended is not kept, and counts as no decision.
        """
        if self._kept is None:
            return None
        return SparsityRecord(
            image_index=self.image_index,
            image_sizes=self.image_sizes,
            kept=self._kept[:, : self._columns],
            generated=self._generated[: self._columns] & ~self._ended[:, : self._columns],
            positions=self.table.positions[:, : self.table.longest],
            filled=self.table.filled(),
            layer_tokens=[layer.get_seq_length() for layer in self.layers],
        )

    def sparsity_of_prompt(self, rows: list[int]) -> SparsityRecord | None:
        """Record of the prompt alone, for beams, of whose text the cache holds other rows than those returned.

        Args:
            rows (`list[int]`): Rows of the cache, one for each row of the record.

        Returns:
            [`SparsityRecord`]: None while the cache is empty or outside of `generate`.
        """
        if self._kept is None or self.prompt_length is None:
            return None
        kept = self._kept[rows, : self.prompt_length]
        counts, below = kept.sum(dim=1), kept.shape[1]
        return SparsityRecord(
            image_index=[self.image_index[row] for row in rows],
            image_sizes=[self.image_sizes[row] for row in rows],
            kept=kept,
            generated=(self._generated & ~self._ended)[rows, : self.prompt_length],
            positions=self.table.positions[rows, : int(counts.max())],
            filled=torch.arange(int(counts.max()), device=kept.device) < counts[:, None],
            layer_tokens=[below if i < self.sparse_layer else int(counts.max()) for i in range(len(self.layers))],
        )

    def allocated_bytes(self) -> int:
        """Bytes of the storages behind keys and values, each storage counted once."""
        storages = {}
        for layer in self.layers:
            for buffer in layer._buffers or ():
                storage = buffer.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def _map_rows(self, select) -> None:  # noqa: ANN001 - a function of a tensor
        self.table.map_rows(select)
        if self._kept is not None:
            self._kept, self._ended = select(self._kept), select(self._ended)
            order = select(torch.arange(len(self.image_index), device=self._kept.device)).tolist()
            self.image_index = [self.image_index[row] for row in order]
            self.image_sizes = [self.image_sizes[row] for row in order]
            self.image_ends = [self.image_ends[row] for row in order]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows for beam search."""
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, a tensor of positions or a boolean mask."""
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        super().batch_select_indices(rows)
        self._map_rows(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens fed, kept or not.

        Raises:
            ValueError: If `tokens_to_remove` is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"`tokens_to_remove` must be 0 or negative, got {tokens_to_remove}: pass -{tokens_to_remove} to "
                "forget that many tokens."
            )
        if tokens_to_remove == 0 or self._kept is None:
            return
        super().crop(tokens_to_remove)
        start = max(self._columns + tokens_to_remove, 0)
        self.table.remove(self._kept[:, start : self._columns].sum(dim=1))
        self.generated_tokens -= int(self._generated[start : self._columns].sum())
        self._kept, self._ended = self._kept[:, :start].clone(), self._ended[:, :start].clone()
        self._generated = self._generated[:start].clone()
        self._columns = start
        whole = [[end < start for end in row] for row in self.image_ends]  # an image that is cut is gone
        self.image_index = [[x for x, stays in zip(*row) if stays] for row in zip(self.image_index, whole)]
        self.image_sizes = [[x for x, stays in zip(*row) if stays] for row in zip(self.image_sizes, whole)]
        self.image_ends = [[end for end in row if end < start] for row in self.image_ends]

    def reset(self) -> None:
        """Forget everything and free the memory."""
        super().reset()
        self.table.__init__()
        self._forget()


__all__ = ["SparseCache", "SparsityRecord"]
