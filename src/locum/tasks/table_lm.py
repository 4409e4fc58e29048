"""A language model of four tokens whose texts can all be summed up: what constrained sampling is held against.

Tokens a, b, c and the end; the law of the next token depends on the last one. Asked for "abc" or a word of b and c, it is
led astray by masking: "a" is likely and has one dear way on, so locally constrained decoding says "abc" in 63 % of its
texts, though it has 1.3 % of the valid mass.
"""

import re
from collections.abc import Sequence
from itertools import product

import numpy as np
from jaxtyping import Float64

__all__ = ["END", "LIMIT", "PATTERN", "TableLM", "distance", "exact"]

END = 3
LIMIT = 6
PATTERN = "abc|[bc]+"
_FIRST = (0.60, 0.10, 0.25, 0.05)
_AFTER = ((0.05, 0.05, 0.05, 0.85), (0.3, 0.2, 0.3, 0.2), (0.3, 0.3, 0.2, 0.2))


class TableLM:
    """The model as a tree of laws: nodes are numbered in order of feeding, -1 is the empty text."""

    def __init__(self) -> None:
        self.size = 0

    def root(self) -> Float64[np.ndarray, " vocab"]:
        return np.log(_FIRST)

    def extend(self, tokens: Sequence[int], parents: Sequence[int]) -> Float64[np.ndarray, "nodes vocab"]:
        if not all(-1 <= parent < self.size for parent in parents):
            raise ValueError(f"parents must be nodes fed before, got {parents}")
        self.size += len(tokens)
        return np.log([_AFTER[t] for t in tokens])

    def keep(self, nodes: Sequence[int]) -> dict[int, int]:
        # The law depends on the last token alone, so ancestors need not stay.
        self.size = len(nodes)
        return {node: i for i, node in enumerate(nodes)}


def exact() -> tuple[dict[str, float], dict[str, float]]:
    """Over all valid texts of at most `LIMIT` tokens: p(text and its end), and the law of locally constrained decoding.

    Every text is tried; nothing but Python's `re` says which are valid. A text at the limit is ended there.
    """
    texts = ["".join(t) for n in range(LIMIT + 1) for t in product("abc", repeat=n)]
    valid = {t for t in texts if re.fullmatch(PATTERN, t)}
    # Beyond the limit every word of b and c goes on, as the constraint, which knows no limit, believes too.
    hopeful = {t[:n] for t in valid for n in range(len(t) + 1)} | {t + x for t in valid if "a" not in t for x in "bc"}
    joint: dict[str, float] = {}
    local: dict[str, float] = {}
    for text in valid:
        p = q = 1.0
        for n in range(len(text) + 1):
            law = _AFTER["abc".index(text[n - 1])] if n else _FIRST
            chosen = law["abc".index(text[n])] if n < len(text) else law[END]
            z = sum(law[i] for i in range(3) if text[:n] + "abc"[i] in hopeful) + (law[END] if text[:n] in valid else 0)
            p *= chosen
            q *= 1.0 if n == LIMIT else chosen / z
        joint[text], local[text] = p, q
    return joint, local


def distance(p: dict[str, float], q: dict[str, float]) -> float:
    """Total variation between two laws of texts, each scaled to sum to 1."""
    a, b = sum(p.values()), sum(q.values())
    return 0.5 * sum(abs(p.get(k, 0.0) / a - q.get(k, 0.0) / b) for k in p.keys() | q.keys())
