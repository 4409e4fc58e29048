"""Sequential Monte Carlo over texts: particles that grow token by token, weighted, and resampled when weights
degenerate.

The particles are nodes of one tree over the shared prompt. A round is one forward of the nodes that differ; resampling
copies pointers, no cache. With properly weighted tokens (E[w f(x)] = sum of p(x) f(x) over allowed x) the mean final
weight is an unbiased estimate of the probability that the model's text is valid, and the normalised weights are a
posterior over texts.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int64
from numpy.random import Generator

from locum.decode.constraints.base import State
from locum.decode.constraints.gate import Gate
from locum.models import Session
from locum.tokens.sampling import Sampling

__all__ = ["Branches", "Completion", "Draw", "Samples", "effective_size", "smc", "stratified"]

LogProbs = Float64[np.ndarray, " vocab"]
Laws = Float64[np.ndarray, "nodes vocab"]
Accept = Callable[[int], bool]


class Draw(NamedTuple):
    """A properly weighted token: None with weight 0 if nothing is allowed. `checks` counts the different tokens asked
    for."""

    token: int | None
    log_weight: float
    checks: int


Proposal = Callable[[LogProbs, Accept, Generator], Draw]


@runtime_checkable
class Branches(Protocol):
    """A language model as a tree of laws. Nodes are numbered in order of feeding; -1 is the prompt."""

    def root(self) -> LogProbs: ...
    def extend(self, tokens: Sequence[int], parents: Sequence[int]) -> Laws: ...
    def keep(self, nodes: Sequence[int]) -> dict[int, int]: ...


class SessionBranches:
    """A session of a real model as `Branches`: the law of the next token after temperature and filters, in float64."""

    def __init__(self, session: Session, prompt: Sequence[int], sampling: Sampling) -> None:
        self.session, self.prompt, self.sampling = session, prompt, sampling

    def root(self) -> LogProbs:
        return np.asarray(self.sampling.law(self.session.prefill(self.prompt)).log().cpu())

    def extend(self, tokens: Sequence[int], parents: Sequence[int]) -> Laws:
        return np.asarray(self.sampling.law(self.session.extend(tokens, parents)).log().cpu())

    def keep(self, nodes: Sequence[int]) -> dict[int, int]:
        return self.session.keep(nodes)


@dataclass(frozen=True)
class Completion:
    """One particle at its end.

    Args:
        text: what its tokens spell; ids: those tokens, without the one that ends the text.
        weight: its share of all weights; log_weight: the natural log of the weight itself.
        finish: "eos"; "length" if it was ended at the limit of tokens; "dead" if it had no allowed token (weight 0).
    """

    text: str
    ids: tuple[int, ...]
    weight: float
    log_weight: float
    finish: str


@dataclass(frozen=True)
class Samples:
    """What a run found.

    Args:
        completions: one per particle, dead ones included.
        log_normaliser: log of an unbiased estimate of the probability that a text is valid (and not longer than
        allowed);
            -inf if every particle died, None for samples without weights.
        tokens: tokens drawn, ends of text included, over all particles.
        checks: questions put to the constraint, each token once per draw; answered: those that were not remembered.
        forwards: forwards of the model after the prompt. seconds: wall clock.
    """

    completions: tuple[Completion, ...]
    log_normaliser: float | None
    tokens: int
    checks: int
    answered: int
    forwards: int
    seconds: float

    @property
    def posterior(self) -> dict[str, float]:
        """Text -> probability, likeliest first; equal texts are added up. Empty if every particle died."""
        shares: dict[str, float] = {}
        for c in self.completions:
            if c.weight > 0:
                shares[c.text] = shares.get(c.text, 0.0) + c.weight
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    @property
    def checks_per_token(self) -> float:
        return self.checks / max(self.tokens, 1)


@dataclass
class _Particle:
    node: int
    logp: LogProbs
    state: State
    rng: Generator
    ids: tuple[int, ...] = ()
    finish: str | None = None


def log_sum(logs: LogProbs) -> float:
    """log of the sum of exp(logs); -inf if all are. scipy's does more, and takes twenty times as long on short vectors."""
    top = float(logs.max())
    return top + math.log(float(np.exp(logs - top).sum())) if top > -math.inf else top


def effective_size(log_weights: Float64[np.ndarray, " particles"]) -> float:
    """(sum W)^2 / sum W^2 over all particles, the dead and the finished included; 0 if all are dead."""
    top = log_weights.max()
    if top == -np.inf:
        return 0.0
    w = np.exp(log_weights - top)
    return float(w.sum() ** 2 / (w**2).sum())


def stratified(log_weights: Float64[np.ndarray, " particles"], rng: Generator) -> Int64[np.ndarray, " particles"]:
    """Ancestors in proportion to the weights, one uniform draw in each of n equal strata; n_i is never off by 2 or
    more."""
    n = len(log_weights)
    edges = np.cumsum(np.exp(log_weights - log_weights.max()))
    found = np.searchsorted(edges, (np.arange(n) + rng.random(n)) / n * edges[-1], side="right")
    return np.minimum(found, np.flatnonzero(log_weights > -np.inf)[-1])  # rounding must not pick the dead


def smc(
    branches: Branches,
    gate: Gate,
    propose: Proposal,
    *,
    particles: int,
    tau: float,
    weighted: bool,
    lookahead: bool,
    max_new_tokens: int,
    rng: Generator,
) -> Samples:
    """Grow the particles until all have stopped.

    A particle that reaches `max_new_tokens` is ended there with the weight p(end) if its text is complete and 0 if not,
    which targets the law of texts that are no longer. Each particle draws from a stream of its own; copies get new
    ones.
    """
    began, answered = time.perf_counter(), gate.answered
    root = branches.root()
    cloud = [_Particle(-1, root, gate.start, stream) for stream in rng.spawn(particles)]
    logw = np.zeros(particles)
    tokens = checks = forwards = 0
    for _ in range(max_new_tokens):
        for i, p in enumerate(cloud):
            if p.finish is not None:
                continue
            state = p.state
            draw = propose(gate.prune(state, p.logp, lookahead), partial(gate.accept, state), p.rng)
            tokens, checks = tokens + 1, checks + draw.checks
            logw[i] += draw.log_weight if weighted or draw.token is None else 0.0
            if draw.token is None:
                p.finish = "dead"
            elif draw.token in gate.eos_ids:
                p.finish = "eos"
            else:
                p.ids, p.state = (*p.ids, draw.token), gate.after(state, draw.token)
        if all(p.finish for p in cloud):
            break
        if weighted and effective_size(logw) < tau * particles:
            cloud = _copy([cloud[i] for i in stratified(logw, rng)])
            logw[:] = log_sum(logw) - np.log(particles)
        live = [p for p in cloud if p.finish is None]
        if not live:
            break
        renumbered = branches.keep(sorted({p.node for p in live if p.node >= 0}))
        _feed(branches, live, renumbered)
        forwards += 1
    for i, p in enumerate(cloud):
        if p.finish is None:
            p.finish, done = "length", gate.constraint.complete(p.state)
            end = log_sum(p.logp[list(gate.eos_ids)]) if weighted else 0.0
            logw[i] += end if done else -np.inf
    total = log_sum(logw)
    shares = np.exp(logw - total) if total > -np.inf else np.zeros(particles)
    return Samples(
        completions=tuple(
            Completion(_text(gate, p.ids), p.ids, float(shares[i]), float(logw[i]), p.finish or "dead")
            for i, p in enumerate(cloud)
        ),
        log_normaliser=total - float(np.log(particles)) if weighted else None,
        tokens=tokens,
        checks=checks,
        answered=gate.answered - answered,
        forwards=forwards,
        seconds=time.perf_counter() - began,
    )


def _copy(chosen: list[_Particle]) -> list[_Particle]:
    """Copies of particles; one that is chosen more than once hands each copy a stream of its own."""
    times = Counter(id(p) for p in chosen)
    once = {id(p): p for p in chosen}
    streams = {key: [p.rng] if times[key] == 1 else p.rng.spawn(times[key]) for key, p in once.items()}
    return [replace(p, rng=streams[id(p)].pop()) for p in chosen]


def _feed(branches: Branches, live: list[_Particle], renumbered: dict[int, int]) -> None:
    """One forward of the last tokens of the live particles; particles with the same text share a node."""
    new: dict[tuple[int, int], int] = {}
    for p in live:
        new.setdefault((renumbered.get(p.node, -1), p.ids[-1]), len(new))
    laws = branches.extend([token for _, token in new], [parent for parent, _ in new])
    first = len(renumbered)
    for p in live:
        k = new[renumbered.get(p.node, -1), p.ids[-1]]
        p.node, p.logp = first + k, laws[k]


def _text(gate: Gate, ids: tuple[int, ...]) -> str:
    return gate.vocabulary.text(ids).decode(errors="replace")
