"""Beam search on one tree of tokens.

The k beams are k nodes of the tree beyond the committed prompt. A step is one forward of k new nodes, each attending to
the prompt and to its own ancestors; the prompt is stored once, not k times, and no cache is reordered: a beam that
survives is a pointer. When dead branches outnumber the living ones the tree is compacted.

The score of a text is its raw sum of log-probabilities over len^length_penalty. With length_penalty 0 that is the
search under a policy's own value (arXiv 2404.12358, eq. 9), and the rule to stop is exact, because log-probabilities
only fall: stop when k texts are finished and no live beam can still beat the worst of them. Equal to transformers'
`generate(num_beams=k, length_penalty=..., early_stopping=False)`; its default length_penalty is 1.0, which divides by
the length.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from locum.errors import UserError

__all__ = ["BeamSession", "Hypothesis", "beam_search"]


@runtime_checkable
class BeamSession(Protocol):
    """What the search needs of `locum.models.Session`: a prefix, a tree beyond it, and compaction."""

    @property
    def size(self) -> int: ...
    def prefill(self, ids: Sequence[int], /) -> Any: ...
    def extend(self, tokens: Sequence[int], parents: Sequence[int], /) -> Any: ...
    def keep(self, nodes: Sequence[int], /) -> dict[int, int]: ...


@dataclass(frozen=True)
class Hypothesis:
    """A text found by the search.

    Args:
        ids: its tokens, without the prompt, the end-of-sequence token included.
        logp: raw sum of their log-probabilities, in nats.
        score: logp / len(ids)^length_penalty; what the search ranks by.
        finished: whether it ended by itself; otherwise it was cut at the token limit.
    """

    ids: tuple[int, ...]
    logp: float
    score: float
    finished: bool


@torch.inference_mode()
def beam_search(
    session: BeamSession,
    prompt: Sequence[int],
    *,
    beams: int = 5,
    max_new_tokens: int = 128,
    length_penalty: float = 0.0,
    eos_ids: Collection[int] = (),
) -> list[Hypothesis]:
    """The best texts that a beam of width `beams` finds, best first; at most `beams` of them.

    Deterministic: equal scores go to the lower beam, then the lower token id. Fewer beams than asked live where there
    are fewer texts, as at the first step of a vocabulary smaller than `beams`.

    Args:
        session: empty; the prompt is read into it, and it must not be used for another text afterwards.
        prompt: one or more token ids.
        beams: live texts per step, >= 1; 1 is greedy decoding.
        length_penalty: power of the length in the score; 0 ranks by raw sums.
        eos_ids: tokens that end a text.

    Raises: UserError for beams < 1 or max_new_tokens < 1.
    """
    for name, value in (("beams", beams), ("max_new_tokens", max_new_tokens)):
        if not value >= 1:
            raise UserError(f"{name} must be >= 1, got {value}")
    ends = torch.tensor(sorted(eos_ids), dtype=torch.long)
    logits = session.prefill(prompt)[None]
    live: list[tuple[int, ...]] = [()]
    nodes, sums = [-1], torch.zeros(1, dtype=torch.float64, device=logits.device)
    pool: list[Hypothesis] = []
    compacted = 0  # size of the tree when it was last compacted
    for length in range(1, max_new_tokens + 1):
        V = logits.shape[-1]
        total = (sums[:, None] + logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)).flatten()
        # An end-of-sequence token per beam at most takes each of the best places, so this many hold `beams` that go on.
        best = _top(total, beams * (1 + len(ends)))
        values, picked = total[best].tolist(), best.tolist()
        ending = torch.isin(best % V, ends.to(best.device)).tolist()
        at_limit = length == max_new_tokens
        for value, index, end in list(zip(values, picked, ending, strict=True))[:beams]:
            if end or at_limit:
                ids = (*live[index // V], index % V)
                pool.append(Hypothesis(ids, value, value / length**length_penalty, end))
        pool = sorted(pool, key=lambda h: -h.score)[:beams]
        onward = [(v, i) for v, i, end in zip(values, picked, ending, strict=True) if not end][:beams]
        if at_limit or not onward:
            break
        if len(pool) == beams and onward[0][0] / length**length_penalty <= pool[-1].score:
            break
        tokens, parents = [i % V for _, i in onward], [nodes[i // V] for _, i in onward]
        live = [(*live[i // V], i % V) for _, i in onward]
        if session.size > 2 * compacted + 8 * beams:
            moved = session.keep(sorted({p for p in parents if p >= 0}))
            parents = [moved[p] if p >= 0 else -1 for p in parents]
            compacted = session.size
        nodes = list(range(session.size, session.size + len(tokens)))
        logits = session.extend(tokens, parents)
        sums = torch.tensor([v for v, _ in onward], dtype=torch.float64, device=logits.device)
    return pool


def _top(values: Float64[Tensor, " n"], k: int) -> Int[Tensor, " k"]:
    """Indices of the k largest finite values, largest first, the lower index among equals (`topk` keeps no order)."""
    k = min(k, len(values))
    least = values.topk(k).values[-1]
    among = (values >= least).nonzero()[:, 0]
    among = among[values[among].argsort(descending=True, stable=True)][:k]
    return among[values[among] > -torch.inf]
