"""The family's methods on a table MDP: a policy whose reward, KL and entropy are known exactly at every step.

A policy is a tensor of logits, so a method's whole training takes seconds, and what it claims can be measured without
sampling. Everything goes the way that a language model's batch goes: `PairBatch`, `statistics`, the method's loss.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float64, Int
from torch import Tensor
from torch.nn import functional as F

from locum.align.base import Example, Method, PairBatch, Signal
from locum.align.rounds import Labeller, Round
from locum.align.statistics import Scorer, statistics
from locum.models.scoring import Reduce
from locum.tasks.token_mdp import Pairs, TableMDP, tied
from locum.tokens.tiles import Scores

__all__ = ["Curve", "TableScorer", "Tied", "at_kl", "fit", "response_batch", "table_round", "train"]

Table = Float64[Tensor, "P H V V"]


@dataclass(frozen=True, eq=False)
class TableScorer:
    """A table policy as a scorer; `features`, one [P, H, V, F] per layer, stand for hidden states."""

    logits: Table
    features: tuple[Tensor, ...] = ()

    def __call__(self, batch: PairBatch, taps: Mapping[str, Reduce] | None = None) -> Scores:
        def rows(table: Tensor) -> Tensor:
            return met(table, batch.ids[:, 0], batch.ids[:, 1:])[batch.mask]

        heard = {kind: [reduce(rows(f)) for f in self.features] for kind, reduce in (taps or {}).items()}
        return Scores(rows(self.logits), taps=heard)


def met(table: Tensor, prompt: Int[Tensor, " N"], y: Int[Tensor, "N H"]) -> Float64[Tensor, "N H V"]:
    """The rows of a table that responses meet: its entries at (prompt, position, previous token)."""
    previous = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)
    return table[prompt[:, None], torch.arange(y.shape[1]), previous]


def response_batch(
    prompt: Int[Tensor, " N"], *blocks: Int[Tensor, "N H"], columns: Mapping[str, Tensor] | None = None
) -> PairBatch:
    """Responses as a batch, block by block; the text's first token is its prompt's number. Columns are [rows, H]."""
    ids = torch.cat([torch.cat([prompt[:, None], y], 1) for y in blocks])
    real = torch.ones_like(ids)
    done = real.bool()
    done[:, 0] = False
    return PairBatch(ids, real, done, len(blocks), columns or {})


def table_round(
    mdp: TableMDP,
    logits: Table,
    generator: torch.Generator,
    labeller: Labeller | None = None,
    *,
    index: int = 0,
    frozen: Mapping[str, Scorer] | None = None,
    signal: Signal | None = None,
    features: tuple[Tensor, ...] = (),
) -> Round:
    """A round of the policy `logits` with the MDP's reference; a prompt's one token is its number."""

    def sample(examples: Sequence[Example], temperature: float, g: torch.Generator) -> list[Example]:
        greedy = F.one_hot(logits.argmax(-1), mdp.vocab).log().to(logits.dtype)
        sharp = greedy if temperature == 0 else logits / temperature
        prompt = torch.tensor([e["prompt_ids"][0] for e in examples])
        y = mdp.sample(sharp, prompt, g).tolist()
        return [{**e, "response_ids": ids, "truncated": False} for e, ids in zip(examples, y, strict=True)]

    scorers = {"policy": TableScorer(logits), "ref": TableScorer(mdp.ref_logits, features), **(frozen or {})}
    return Round(index, scorers, sample, labeller, generator, signal)


@dataclass(frozen=True, eq=False)
class Tied:
    """Parameters of a policy with one table for all positions: row = previous token, the last row for none."""

    rows: Float64[Tensor, "P V1 V"]
    length: int

    @classmethod
    def of(cls, mdp: TableMDP) -> "Tied":
        """The reference of `TableMDP.scored`, whose table is the same at all positions."""
        first, rest = mdp.ref_logits[:, :1, 0], mdp.ref_logits[:, 1]
        return cls(torch.cat([rest, first], 1).clone(), mdp.length)

    def table(self) -> Table:
        return tied(self.rows, self.length)


@dataclass(frozen=True, eq=False)
class Curve:
    """What a training passed through, step 0 first: exact means over prompts.

    Args:
        reward, kl, entropy: of whole responses; kl is KL(pi || ref) in nats.
        logs: what the loss logged, per step.
        logits: the policy at the end.
    """

    reward: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def fit(
    method: Method,
    mdp: TableMDP,
    pairs: Pairs,
    *,
    columns: Mapping[str, Tensor] | None = None,
    frozen: Mapping[str, Scorer] | None = None,
    signal: Signal | None = None,
    features: tuple[Tensor, ...] = (),
    tie: bool = True,
    steps: int = 400,
    batch_size: int = 64,
    lr: float = 0.02,
    signal_lr: float = 1e-3,
    seed: int = 0,
    measure_every: int = 1,
) -> Curve:
    """Train a policy on pairs with Adam, from the reference.

    Args:
        columns: per token, [2N, H], chosen rows first.
        frozen: models beside the reference, by name.
        signal: what `method.signal` gave, trained along; `features` stand for the reference's hidden states.
        tie: one table for all positions (the reference must be such a one).
        seed: of the order of the pairs.
        measure_every: steps between exact evaluations; the last step is always one.
    """
    g = torch.Generator().manual_seed(seed)
    N = len(pairs.prompt)

    def batches() -> Iterator[PairBatch]:
        while True:
            order = torch.randperm(N, generator=g)
            for rows in order.split(min(batch_size, N)):
                if len(rows) == min(batch_size, N):
                    both = torch.cat([rows, rows + N])
                    chosen = {name: x[both] for name, x in (columns or {}).items()}
                    yield response_batch(pairs.prompt[rows], pairs.chosen[rows], pairs.rejected[rows], columns=chosen)

    source = batches()
    return train(
        method,
        mdp,
        lambda step, logits: next(source),
        frozen=frozen,
        signal=signal,
        features=features,
        tie=tie,
        steps=steps,
        lr=lr,
        signal_lr=signal_lr,
        measure_every=measure_every,
    )


def train(
    method: Method,
    mdp: TableMDP,
    batch_of: Callable[[int, Table], PairBatch],
    *,
    frozen: Mapping[str, Scorer] | None = None,
    signal: Signal | None = None,
    features: tuple[Tensor, ...] = (),
    tie: bool = True,
    steps: int = 400,
    lr: float = 0.02,
    signal_lr: float = 1e-3,
    measure_every: int = 1,
) -> Curve:
    """Adam on batches that ``batch_of(step, logits)`` makes, from the policy as it is then; arguments as `fit`."""
    start = Tied.of(mdp).rows if tie else mdp.ref_logits.clone()
    z = start.requires_grad_()
    groups: list[dict[str, object]] = [{"params": [z], "lr": lr}]
    if signal is not None:
        groups += signal.groups(signal_lr)
    adam = torch.optim.Adam(groups)
    beside: dict[str, Scorer] = {"ref": TableScorer(mdp.ref_logits, features), **(frozen or {})}
    curve = Curve()

    def table() -> Table:
        return tied(z, mdp.length) if tie else z

    def note() -> None:
        with torch.no_grad():
            for into, value in zip((curve.reward, curve.kl, curve.entropy), mdp.measure(table()), strict=True):
                into.append(value.mean().item())

    note()
    for step in range(steps):
        batch = batch_of(step, table().detach())
        loss, logs = method(statistics(method, batch, TableScorer(table()), beside, signal))
        adam.zero_grad()
        loss.backward()
        adam.step()
        curve.logs.append({name: float(value) for name, value in logs.items()} | {"loss": loss.item()})
        if (step + 1) % measure_every == 0 or step + 1 == steps:
            note()
    return Curve(curve.reward, curve.kl, curve.entropy, curve.logs, table().detach())


def at_kl(curve: Curve, levels: Sequence[float]) -> list[float | None]:
    """The reward when KL(pi || ref) first reached each level, interpolated between two evaluations; None if it never did."""
    found: list[float | None] = []
    for level in levels:
        after = next((i for i, kl in enumerate(curve.kl) if kl >= level), None)
        if not after:
            found.append(curve.reward[0] if after == 0 else None)
            continue
        low, high = curve.kl[after - 1], curve.kl[after]
        share = (level - low) / (high - low)
        found.append(curve.reward[after - 1] + share * (curve.reward[after] - curve.reward[after - 1]))
    return found
