"""A language model that is a table: the law of the next token depends on the last one alone, and is known exactly."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import chi2
from torch import Tensor

from locum.models import LM, Session
from locum.tokens import Sampling


class TableSession(Session):
    """A session over a table `[vocab, vocab]` of logits: everything but the forward, and the cache that it needs, is the real one."""

    def __init__(self, table: Tensor):
        self.table, self.ids, self.forwards = table, [], 0
        self.cache = SimpleNamespace(gather=lambda start, entries: None, cut=lambda length: None)
        self.tokens, self.parents = [], []

    def _clear(self) -> None:
        self.tokens, self.parents = [], []

    def prefill(self, ids: Sequence[int], observe: Callable | None = None) -> Tensor:
        self.ids += ids
        if observe is not None:
            observe(ids, self.table[list(ids)])
        return self.table[ids[-1]]

    def extend(self, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        self.tokens, self.parents = self.tokens + list(tokens), self.parents + list(parents)
        return self.table[list(tokens)]


class TableLM(LM):
    """The model of a table, as a target or a draft."""

    def session(self, capacity: int = 1024) -> Session:
        return TableSession(self.model.table)


def table_lm(vocab: int, seed: int, scale: float = 1.0, like: LM | None = None) -> LM:
    """A random table; `like` another one, plus noise of the given scale."""
    table = scale * torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed))
    if like is not None:
        table = table + like.model.table
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=None))
    model = SimpleNamespace(
        table=table,
        config=config,
        device=table.device,
        dtype=table.dtype,
        generation_config=None,
        get_output_embeddings=lambda: SimpleNamespace(weight=table),
    )
    return TableLM(model, name=f"table-{seed}")


def window_p_value(lm: LM, sampling: Sampling, texts: Sequence[Sequence[int]], start: int) -> float:
    """Chi-square of texts after the token `start` against the table's law.

    Counted are pairs of tokens (b, c) given the token a before them, in disjoint windows.
    The windows stand at fixed places of the text, so drafts begin and end anywhere inside them. Cells that the law forbids must be
    empty (p = 0 if one is not); those with an expected count below 5 are put together.
    """
    law: Float[np.ndarray, "vocab vocab"] = sampling.law(lm.model.table).numpy()
    seen = np.zeros((len(law),) * 3)
    for ids in texts:
        text = [start, *ids]
        for a, b, c in zip(text[0::2], text[1::2], text[2::2], strict=False):
            seen[a, b, c] += 1
    expected = seen.sum((1, 2))[:, None, None] * law[:, :, None] * law[None]
    if (seen[expected == 0] > 0).any():
        return 0.0
    statistic, freedom = 0.0, 0
    for observed, wanted in zip(seen, expected, strict=True):
        few = (wanted > 0) & (wanted < 5)
        cells = [(observed[wanted >= 5], wanted[wanted >= 5])]
        if wanted[few].sum() >= 5:
            cells.append((observed[few].sum(keepdims=True), wanted[few].sum(keepdims=True)))
        o, e = (np.concatenate(x) for x in zip(*cells, strict=True))
        if len(o) > 1:
            statistic += float(((o - e) ** 2 / e).sum())
            freedom += len(o) - 1
    return float(chi2.sf(statistic, freedom)) if freedom else 1.0
