"""A key-value cache with room to spare: written in place, cut back by moving a number, never concatenated.

A layer of transformers' `DynamicCache` copies the whole prefix at every step. Here each layer holds one buffer per tensor with a
capacity; a step writes behind the entries in use, and dropping rejected tokens gathers only the entries that stay.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from locum.errors import UserError

KeyValue = Float[Tensor, "batch kv_heads new head_dim"]
Entries = Float[Tensor, "batch kv_heads used head_dim"]


class BufferLayer(DynamicLayer):
    """One layer's keys and values: `[batch, kv_heads, capacity, head_dim]`, of which the first `used` entries count."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.used = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: KeyValue, value_states: KeyValue, *args: Any, **kwargs: Any
    ) -> tuple[Entries, Entries]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.used = self.used, self.used + key_states.shape[2]
        if self.used > self.keys.shape[2]:
            self._grow(max(self.used, 2 * self.keys.shape[2]))
        self.keys[:, :, start : self.used] = key_states
        self.values[:, :, start : self.used] = value_states
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def _grow(self, capacity: int) -> None:
        self.capacity = capacity
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def get_seq_length(self) -> int:
        return self.used

    def gather(self, start: int, entries: Tensor) -> None:
        """Keep the first `start` entries and, behind them, those at the given positions; forget the rest."""
        self.used = start + len(entries)
        for x in (self.keys, self.values):
            x[:, :, start : self.used] = x[
                :, :, entries
            ]  # the right side is copied first: source and target may overlap

    def reorder_cache(self, beam_idx: Int[Tensor, " rows"]) -> None:
        """Keep these rows of the batch, in this order; a row may come several times. Entries in use are copied, no others."""
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(len(beam_idx), *old.shape[1:])
            new[:, :, : self.used] = old[:, :, : self.used].index_select(0, beam_idx)
            setattr(self, name, new)

    batch_select_indices = reorder_cache


class TreeCache(Cache):
    """The cache of a whole model: a committed prefix and, behind it, whatever a tree forward appended."""

    def __init__(self, layers: int, capacity: int):
        super().__init__(layers=[BufferLayer(capacity) for _ in range(layers)])

    @property
    def used(self) -> int:
        return self.layers[0].used

    def cut(self, length: int) -> None:
        for layer in self.layers:
            layer.used = length

    def gather(self, start: int, entries: list[int]) -> None:
        """Keep `start` entries and then those at absolute positions `entries`, in that order."""
        if entries == list(range(start, start + len(entries))):
            return self.cut(start + len(entries))
        index = torch.tensor(entries, device=self.layers[0].keys.device)
        for layer in self.layers:
            layer.gather(start, index)
        return None


def require_tree_cache(model: Any, name: str) -> None:
    """Refuse a model whose state cannot be cut back to a path of a token tree.

    Raises: UserError naming the layers that cannot: a sliding window forgets entries, a recurrent state cannot be rewound.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if not kinds and window is not None:
        kinds = {"sliding_attention"}
    recurrent = getattr(model, "_is_stateful", False) or getattr(config, "num_hidden_layers", None) is None
    wrong = kinds - {"full_attention"}
    if wrong or recurrent:
        what = ", ".join(sorted(wrong)) or "a recurrent state"
        raise UserError(
            f"model {name!r} keeps {what} in its cache, which cannot be cut back to an accepted path; "
            "only models with full attention in every layer can be decoded here"
        )
