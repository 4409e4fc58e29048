"""How a thought is made of the law of an output: the law itself, its likeliest token, tokens drawn from it, or weights drawn around it.

With the vocabulary's input embeddings e_i and alpha the law of an output, what is fed back in the place of a token is

    base         z = sum_i alpha[i] e_i                                                    the same every time
    mts          z = (1/K) sum_r e_{i_r},  i_1 .. i_K drawn from alpha, with replacement      K = 1: plain sampling
    dirichlet    z = sum_i a[i] e_i,       a drawn from Dirichlet(gamma alpha)
    discrete     z = e_i,                  i = argmax alpha

Draws are made of numbers that belong to a row, so that a chain is drawn the same whatever is drawn beside it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn import functional as F

from locum.errors import unknown
from locum.method import require

__all__ = ["MODES", "Base", "Greedy", "Mode", "Thought", "Tokens", "Weights", "concentration", "mode", "picked"]

SMALLEST = 1e-12  # a drawn weight below it is taken as it: its logarithm stays finite
TRIES = 8  # of a rejection sampler that accepts 95 % at least

Law = Float64[Tensor, "rows V"]
Numbers = Callable[
    ..., Float[Tensor, "rows n"]
]  # (n, part = 0): n uniform numbers per row; those of other parts are others


@dataclass(frozen=True, eq=False)
class Thought:
    """What a thought is a mixture of.

    Args:
        ids: token ids; None for the whole vocabulary.
        weights: of each of them; None for equal weights.
        first: a token that stands for the thought where one is shown: the first drawn, or the heaviest.
    """

    ids: Int[Tensor, "rows S"] | None
    weights: Float[Tensor, "rows S"] | None
    first: Int[Tensor, " rows"]


class Mode(ABC):
    """How a thought is made; `draws` says whether by chance, `temperature` what the logits of thoughts are divided by."""

    draws: ClassVar[bool] = True

    @property
    def temperature(self) -> float:
        return 1.0

    @abstractmethod
    def __call__(self, law: Law, numbers: Numbers) -> Thought:
        """A thought per row."""


@dataclass(frozen=True)
class Base(Mode):
    """The law itself."""

    draws: ClassVar[bool] = False

    def __call__(self, law: Law, numbers: Numbers) -> Thought:
        return Thought(None, law, law.argmax(-1))


@dataclass(frozen=True)
class Greedy(Mode):
    """The likeliest token."""

    draws: ClassVar[bool] = False

    def __call__(self, law: Law, numbers: Numbers) -> Thought:
        ids = law.argmax(-1)
        return Thought(ids[:, None], None, ids)


@dataclass(frozen=True)
class Tokens(Mode):
    """The average of tokens drawn from the law.

    Args:
        many: K, how many are drawn, with replacement; >= 1.
        heat: what the logits are divided by before; > 0.
    """

    many: int = 1
    heat: float = 1.0

    def __post_init__(self) -> None:
        require(self, "many", self.many >= 1, ">= 1")
        require(self, "heat", 0 < self.heat < float("inf"), "finite and > 0")

    @property
    def temperature(self) -> float:
        return self.heat

    def __call__(self, law: Law, numbers: Numbers) -> Thought:
        ids = picked(law, numbers(self.many))
        return Thought(ids, None, ids[:, 0])


@dataclass(frozen=True)
class Weights(Mode):
    """Weights drawn from a Dirichlet law around the law, over the tokens that have a share in it.

    Args:
        gamma: how near they stay, > 0: mean alpha, covariance (diag(alpha) - alpha alpha^T)/(gamma + 1).
        floor: tokens less likely are left out, in (0, 1); the likeliest stays always.
    """

    gamma: float = 1.0
    floor: float = 1e-3

    def __post_init__(self) -> None:
        require(self, "gamma", 0 < self.gamma < float("inf"), "finite and > 0")
        require(self, "floor", 0 < self.floor < 1, "in (0, 1)")

    def __call__(self, law: Law, numbers: Numbers) -> Thought:
        p, ids = law.topk(min(law.shape[-1], int(1 / self.floor + 1e-9)), -1)  # no more can reach the floor
        support = p >= self.floor
        support[:, 0] = True
        c = concentration(p, support, self.gamma, self.floor)
        used = int(support.sum(-1).max())  # of the tokens in order of their shares: the rest is in no row's support
        drawn = _dirichlet(c[:, :used], support[:, :used], numbers).clamp(min=SMALLEST)
        weights = F.pad(torch.where(support[:, :used], drawn, 0.0), (0, ids.shape[-1] - used))
        return Thought(ids, weights, ids.gather(-1, weights.argmax(-1, keepdim=True))[:, 0])


MODES: dict[str, type[Mode]] = {"base": Base, "mts": Tokens, "dirichlet": Weights, "discrete": Greedy}


def mode(name: str | Mode) -> Mode:
    """The mode of that name with its defaults, or the mode itself."""
    if isinstance(name, Mode):
        return name
    if name not in MODES:
        raise unknown("mode of a chain", name, MODES)
    return MODES[name]()


def concentration(
    p: Float[Tensor, "*n S"], support: Bool[Tensor, "*n S"], gamma: float, floor: float
) -> Float[Tensor, "*n S"]:
    """gamma times p on its support, where it is lifted to the floor and sums to 1 again; 0 elsewhere."""
    p = torch.where(support, p.clamp(min=floor), 0.0)
    return gamma * p / p.sum(-1, keepdim=True)


def picked(law: Law, u: Float[Tensor, "rows n"]) -> Int[Tensor, "rows n"]:
    """For each number the first token, in order of ids, whose cumulated probability exceeds it."""
    rising = law.cumsum(-1)
    return torch.searchsorted(rising, u.double() * rising[:, -1:], right=True).clamp(max=law.shape[-1] - 1)


def _dirichlet(
    c: Float64[Tensor, "rows S"], support: Bool[Tensor, "rows S"], numbers: Numbers
) -> Float64[Tensor, "rows S"]:
    """Draws from Dirichlet(c) that depend on their row's numbers alone, not on a generator that rows share.

    Weights are gamma variates over their sum. G(c) = G(c + 1) U^(1/c) is made in logarithms, since small c underflow;
    G(c + 1) by the squeeze of Marsaglia and Tsang (2000).
    """
    c = torch.where(support, c, 1.0)
    d = c + 2 / 3
    log_g, done = torch.zeros_like(c), ~support
    for part in range(1, 1 + TRIES):
        # A token's numbers are at the same places however many tokens the widest row of the batch has.
        x, accept = _open(numbers(2 * c.shape[-1], part)).view(*c.shape, 2).unbind(-1)
        x = torch.special.ndtri(x)
        v = (1 + x / (9 * d).sqrt()).clamp(min=1e-9) ** 3
        log_g = torch.where(done, log_g, (d * v).log())
        done = done | ((v > 1e-26) & (accept.log() < x.square() / 2 + d * (1 - v + v.log())))
        if bool(done.all()):
            break
    log_g = log_g + _open(numbers(c.shape[-1])).log() / c
    return torch.where(support, log_g, -torch.inf).softmax(-1)


def _open(u: Float[Tensor, "rows n"]) -> Float64[Tensor, "rows n"]:
    """From multiples of 2^-24 in [0, 1) to the middles between them, so that 0 does not come."""
    return u.double() + 2.0**-25
