"""Random numbers that take every value there is, and models given as a function of the text: for laws without sampling error.

The code under test is run as it is. Whenever it asks for chance, the answer says how likely it was, and the run is repeated
until every way that it can go has been gone.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import torch
from scipy.stats import chisquare
from torch import Tensor

from locum.models import LM, Session


class Chance(np.random.Generator):
    """Follows a script of choices and notes how likely each was; beyond the script it takes the first possible one."""

    def __init__(self, script: tuple[int, ...] = ()) -> None:
        super().__init__(np.random.PCG64(0))
        self.script, self.probability = script, 1.0
        self.taken: list[int] = []
        self.options: list[int] = []

    def pick(self, weights: Sequence[float]) -> int:
        """Which of several cases, of these probabilities, is the one; impossible cases are never taken."""
        possible = np.flatnonzero(np.asarray(weights) > 0)
        at = len(self.taken)
        k = self.script[at] if at < len(self.script) else 0
        self.taken.append(k)
        self.options.append(len(possible))
        self.probability *= float(weights[possible[k]])
        return int(possible[k])

    def random(self) -> "Uniform":
        return Uniform(self)

    def choice(self, a: int, size: int, p: np.ndarray) -> np.ndarray:
        """`size` independent draws from a law, in no particular order."""
        counts = _counts(a, size)
        weights = [
            math.factorial(size) * math.prod(p[i] ** n / math.factorial(n) for i, n in enumerate(c)) for c in counts
        ]
        return np.repeat(np.arange(a), counts[self.pick(weights)])

    def permutation(self, x: np.ndarray) -> np.ndarray:
        orders = _arrangements(tuple(x.tolist()))
        return np.array(orders[self.pick([1 / len(orders)] * len(orders))])

    def standard_exponential(self, size: int) -> "Clocks":
        return Clocks(self, size)


@dataclass(frozen=True)
class Uniform:
    """A number between 0 and `scale` that is decided only as far as somebody asks."""

    chance: Chance
    scale: float = 1.0

    def __mul__(self, factor: float) -> "Uniform":
        return Uniform(self.chance, self.scale * float(factor))

    def __lt__(self, bound: float) -> bool:
        below = min(1.0, float(bound) / self.scale) if self.scale > 0 else float(bound > 0)
        return self.chance.pick([below, 1 - below]) == 0

    def __ge__(self, bound: float) -> bool:
        return not self < bound

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> int:
        assert func is np.searchsorted
        return self.chance.pick(np.diff(args[0], prepend=0.0) / self.scale)


@dataclass(frozen=True)
class Clocks:
    """Exponential clocks: divided by their rates, they ring in the order of draws without replacement."""

    chance: Chance
    size: int

    def __truediv__(self, rates: np.ndarray) -> np.ndarray:
        orders = list(permutations(range(self.size)))
        order = orders[self.chance.pick([without_replacement(rates / rates.sum(), o) for o in orders])]
        return np.argsort(order).astype(float)


def without_replacement(law: np.ndarray, order: Sequence[int]) -> float:
    """The probability that successive draws without replacement begin with `order`."""
    return math.prod(law[x] / (1 - sum(law[y] for y in order[:i])) if i else law[x] for i, x in enumerate(order))


@cache
def _counts(cells: int, total: int) -> list[tuple[int, ...]]:
    if cells == 1:
        return [(total,)]
    return [(n, *rest) for n in range(total + 1) for rest in _counts(cells - 1, total - n)]


@cache
def _arrangements(items: tuple[int, ...]) -> list[tuple[int, ...]]:
    return sorted(set(permutations(items)))


def outcomes(run: Callable[[Chance], Any]) -> Iterator[tuple[float, Any]]:
    """(probability, result) of every way that `run(chance)` can go."""
    scripts: list[tuple[int, ...]] = [()]
    while scripts:
        chance = Chance(scripts.pop())
        result = run(chance)
        yield chance.probability, result
        for i in range(len(chance.script), len(chance.taken)):
            scripts += [(*chance.taken[:i], k) for k in range(1, chance.options[i])]


def law_of_outcomes(run: Callable[[Chance], Any]) -> dict[Any, float]:
    """The probability of every result that `run(chance)` can have."""
    law: dict[Any, float] = defaultdict(float)
    for probability, result in outcomes(run):
        law[result] += probability
    return law


Logits = Callable[[tuple[int, ...]], Tensor]


class TextSession(Session):
    """A session without a cache: the logits `[vocab]` after every text are asked for anew."""

    def __init__(self, logits: Logits) -> None:
        self.logits, self.ids = logits, []
        self._clear()

    def prefill(self, ids: Sequence[int], observe: Any = None) -> Tensor:
        self.ids += ids
        return self.logits(tuple(self.ids))

    def extend(self, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        self.tokens += tokens
        self.parents += parents
        return torch.stack(
            [self.logits((*self.ids, *self._path(n))) for n in range(self.size - len(tokens), self.size)]
        )

    def _path(self, node: int) -> list[int]:
        return [*self._path(self.parents[node]), self.tokens[node]] if node >= 0 else []

    def commit(self, path: Sequence[int]) -> None:
        self.ids += [self.tokens[n] for n in path]
        self._clear()

    def resume(self, ids: Sequence[int]) -> Tensor:
        self.rewind(0)
        return self.prefill(ids)

    def rewind(self, length: int) -> None:
        self.ids = self.ids[:length]
        self._clear()


@dataclass(frozen=True, eq=False)
class TextLM(LM):
    """A model whose every logit is the one of a whole forward over the text, without a cache; kept if `remember`."""

    remember: bool = False

    def session(self, capacity: int = 1024) -> Session:
        return TextSession(_remembered(self) if self.remember else self.whole)

    @torch.inference_mode()
    def whole(self, ids: tuple[int, ...]) -> Tensor:
        return self.model(input_ids=torch.tensor([ids])).logits[0, -1]


@cache
def _remembered(lm: TextLM) -> Logits:
    return cache(lm.whole)


def markov(table: np.ndarray) -> Logits:
    """Logits of a text whose next token depends on the last one alone, by the row of its law."""
    rows = torch.tensor(table).log()
    return lambda ids: rows[ids[-1]]


def chi_square(counts: Counter, law: dict[Any, float]) -> float:
    """The p-value of counts under a law; cells with fewer than five expected are one cell."""
    n = counts.total()
    common = [x for x in law if n * law[x] >= 5]
    seen, expected = [counts[x] for x in common], [n * law[x] for x in common]
    if n - sum(expected) > 1e-6 * n:
        seen, expected = [*seen, n - sum(seen)], [*expected, n - sum(expected)]
    assert sum(seen) == n, "something came out that cannot"
    return float(chisquare(seen, np.array(expected) * n / sum(expected)).pvalue)
