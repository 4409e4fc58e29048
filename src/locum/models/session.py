"""A session: a committed prefix inside a language model, and a tree of tokens beyond it.

One forward can score many continuations of the same prefix at once: every fed token attends to the prefix, to its ancestors in the
tree and to itself, and stands at position prefix length + depth. Its keys are then what a sequential forward would have stored, so a
path of the tree can be committed by keeping its cache entries and dropping the others.

Speculation feeds drafts as a tree and commits the accepted path; a draft model grows its own tree; the particles of a sequential
Monte Carlo sampler and the beams of a search are nodes of one tree, so copying one is copying a number.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locum.models.cache import TreeCache, require_tree_cache
from locum.models.lean import lean_forward

Logits = Float[Tensor, "nodes vocab"]


class Session:
    """A prefix and a tree in a model's cache. Batch size 1; not thread-safe.

    Args:
        model: a Hugging Face causal language model with full attention in every layer.
        capacity: cache entries to allocate at first; grows by doubling.
        chunk: tokens per forward while a prompt is read.

    Raises: UserError if the model's cache cannot be cut back (sliding window, recurrent layers).
    """

    def __init__(self, model: Any, capacity: int = 1024, chunk: int = 512, name: str = "model"):
        require_tree_cache(model, name)
        self.model, self.chunk = model, chunk
        self.device, self.dtype = model.device, model.dtype
        self.cache = TreeCache(model.config.get_text_config().num_hidden_layers, capacity)
        self.ids: list[int] = []  # committed tokens
        self.forwards = 0  # forwards of the model since the session began
        self._forward = lean_forward(model) or self._module_forward
        self._clear()

    def _clear(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._ancestors: Bool[np.ndarray, "nodes nodes"] = np.zeros((0, 0), bool)  # a node is its own ancestor

    @property
    def length(self) -> int:
        """Committed tokens."""
        return len(self.ids)

    @property
    def size(self) -> int:
        """Nodes in the tree."""
        return len(self.tokens)

    @torch.inference_mode()
    def prefill(
        self, ids: Sequence[int], observe: Callable[[Sequence[int], Logits], None] | None = None
    ) -> Float[Tensor, " vocab"]:
        """Commit `ids` behind the prefix and return the logits after the last one.

        Args:
            ids: one or more token ids; the tree must be empty.
            observe: called with each chunk of ids and their logits `[chunk, vocab]`; without it only the last row is computed.
        """
        if not len(ids):
            raise ValueError("a session needs at least one token to go on from")
        assert not self.tokens, "commit the tree before more text is read"
        for start in range(0, len(ids), self.chunk):
            part = list(ids[start : start + self.chunk])
            n, past = len(part), self.length
            mask = None
            if n > 1:
                seen = torch.ones(n, past + n, dtype=torch.bool, device=self.device).tril(past)
                mask = self._additive(seen)
            positions = torch.arange(past, past + n, device=self.device)
            logits = self._run(part, positions, mask, last_only=observe is None)
            self.ids += part
            if observe is not None:
                observe(part, logits)
        return logits[-1]

    @torch.inference_mode()
    def extend(self, tokens: Sequence[int], parents: Sequence[int]) -> Logits:
        """Feed new nodes of the tree in one forward.

        Args:
            tokens: their ids.
            parents: for each the index of its parent among all nodes of the tree, earlier than itself; -1 is the prefix.

        Returns: logits `[len(tokens), vocab]` after each node.
        """
        old, n = self.size, len(tokens)
        rows = self._ancestor_rows(np.asarray(parents), old)
        ancestors = np.zeros((old + n, old + n), bool)
        ancestors[:old, :old], ancestors[old:] = self._ancestors, rows
        mask = None
        if not rows.all():  # a single node that sees all there is needs no mask
            seen = torch.ones(n, self.length + old + n, dtype=torch.bool)
            seen[:, self.length :] = torch.from_numpy(rows)
            mask = self._additive(seen.to(self.device))
        positions = torch.from_numpy(self.length - 1 + rows.sum(1)).to(self.device)
        logits = self._run(tokens, positions, mask, last_only=False)
        self.tokens, self.parents = self.tokens + list(tokens), self.parents + list(parents)
        self._ancestors = ancestors
        return logits

    def _ancestor_rows(self, parents: np.ndarray, old: int) -> Bool[np.ndarray, "new nodes"]:
        n = len(parents)
        rows = np.zeros((n, old + n), bool)
        inner, outer = np.flatnonzero(parents >= old), np.flatnonzero((parents >= 0) & (parents < old))
        reach = np.eye(n, dtype=bool)
        reach[inner, parents[inner] - old] = True
        for _ in range(max(n - 1, 1).bit_length() if len(inner) else 0):  # paths double at each squaring
            reach = reach @ reach
        rows[:, old:] = reach
        if len(outer):
            above = np.zeros((n, old), bool)
            above[outer] = self._ancestors[parents[outer]]
            rows[:, :old] = reach @ above
        return rows

    @torch.inference_mode()
    def commit(self, path: Sequence[int]) -> None:
        """Keep the nodes of `path`, which runs down from the prefix, as part of the prefix; drop every other node."""
        assert all(self.parents[b] == a for a, b in zip([-1, *path], path, strict=False)), "not a path from the prefix"
        self.cache.gather(self.length, [self.length + node for node in path])
        self.ids += [self.tokens[node] for node in path]
        self._clear()

    @torch.inference_mode()
    def keep(self, nodes: Iterable[int]) -> dict[int, int]:
        """Drop all nodes but these and their ancestors.

        Returns: for every node that stays, its new number.
        """
        wanted = list(nodes)
        stay = np.flatnonzero(self._ancestors[wanted].any(0)).tolist() if wanted else []
        renumbered = {node: i for i, node in enumerate(stay)}
        self.cache.gather(self.length, [self.length + node for node in stay])
        self._ancestors = self._ancestors[np.ix_(stay, stay)]
        self.tokens = [self.tokens[node] for node in stay]
        self.parents = [renumbered.get(self.parents[node], -1) for node in stay]
        return renumbered

    @torch.inference_mode()
    def resume(self, ids: Sequence[int]) -> Float[Tensor, " vocab"]:
        """Move to the text `ids` and return the logits after its last token.

        Whatever the committed prefix and the tree hold of the text is used; what departs from it is dropped.
        """
        if self.ids != list(ids[: self.length]) or self.length == len(ids):
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, ids[:-1], strict=False)))
            self.rewind(same)
        path: list[int] = []
        children = {(p, t): i for i, (p, t) in enumerate(zip(self.parents, self.tokens, strict=True))}
        for token in ids[self.length : -1]:
            node = children.get((path[-1] if path else -1, token))
            if node is None:
                break
            path.append(node)
        self.commit(path)
        return self.prefill(ids[self.length :])

    def rewind(self, length: int) -> None:
        """Forget the tree and all but the first `length` committed tokens."""
        self.cache.cut(length)
        self.ids = self.ids[:length]
        self._clear()

    def _additive(self, seen: Bool[Tensor, "new entries"]) -> Float[Tensor, "1 1 new entries"]:
        # Additive, not boolean: eager attention adds whatever it is given.
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(self.dtype).min)[None, None]

    def _run(self, tokens: Sequence[int], positions: Tensor, mask: Tensor | None, last_only: bool) -> Logits:
        ids = torch.tensor([list(tokens)], device=self.device)
        self.forwards += 1
        return self._forward(ids, positions[None], mask, self.cache, last_only)

    def _module_forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: TreeCache, last_only: bool
    ) -> Logits:
        if mask is None:
            mask = torch.zeros(1, 1, ids.shape[1], cache.used + ids.shape[1], dtype=self.dtype, device=self.device)
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1 if last_only else 0,
        ).logits[0]
