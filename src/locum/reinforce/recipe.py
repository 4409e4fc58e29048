"""A recipe: one stage for each slot of the pipeline, from a baseline and the pieces that papers put in its place.

    >>> from locum.reinforce import Recipe, D3S, Clip
    >>> print(Recipe("dapo", (Clip(low=0.1), D3S())))
    dapo + clip(low=0.1) + d3s
    >>> Recipe.read("dapo + clip(low=0.1) + d3s") == Recipe("dapo", (Clip(low=0.1), D3S()))
    True

`prepare` takes a batch of rollouts to a `Plan` (advantages, weights, what is kept), `loss` a plan's rows and the current
log-probabilities to a number. Both are plain functions of tensors: they serve any training loop.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locum.errors import UserError, unknown
from locum.method import outside
from locum.reinforce.advantages import GAE, BatchCentred, GroupCentred, GroupNormalised, LeaveOneOut
from locum.reinforce.base import (
    Adapt,
    Advantage,
    Aggregate,
    Filter,
    GroupAdvantage,
    Likelihood,
    Mask,
    PerToken,
    Piece,
    Pieces,
    Run,
    Sample,
    Stage,
    Temperature,
)
from locum.reinforce.collect import Flat, Informative
from locum.reinforce.likelihood import Autoregressive
from locum.reinforce.losses import Clip, Constant, SequenceMean, SequenceRatio, TokenMean, TokenRatio
from locum.reinforce.plan import Plan
from locum.reinforce.terms import name_of, piece_of, term
from locum.tokens.rollouts import Rollouts

__all__ = ["HOSTS", "Recipe", "of"]

ORDER = {  # slot -> what it is called when a pipeline is drawn
    "likelihood": "likelihood",
    "sample": "sample",
    "temperature": "temperature",
    "shape": "reward",
    "filter": "group filter",
    "advantage": "advantage",
    "weigh": "weigh and select",
    "normalise": "normalise",
    "adapt": "adapt",
    "ratio": "ratio",
    "clip": "clip",
    "aggregate": "aggregate",
    "penalty": "penalty",
}
PER_MINIBATCH = ("adapt", "ratio", "clip", "aggregate", "penalty")
COMMON: tuple[Stage, ...] = (Autoregressive(), Flat(), GroupNormalised(), TokenRatio(), Clip(), SequenceMean())
HOSTS: dict[str, tuple[Stage, ...]] = {
    "ppo": (Flat(1), GAE(), TokenMean()),
    "reinforce": (Flat(1), BatchCentred(), Clip(float("inf"), float("inf")), TokenMean()),
    "rloo": (LeaveOneOut(), TokenMean()),
    "grpo": (),
    "dr_grpo": (GroupCentred(), Constant()),
    "dapo": (Informative(), Clip(0.2, 0.28), TokenMean()),
    "gspo": (SequenceRatio(), Clip(3e-4, 4e-4)),
}
KNOWN = frozenset({"old_logp", "ref_logp"})  # what can be had of any policy


@dataclass(frozen=True)
class Recipe:
    """A point of the pipeline: a baseline, and pieces in the place of its stages.

    Args:
        host: the baseline, one of `HOSTS`.
        pieces: stages, or papers that bring several. What a paper sets of its host beside its own idea comes before them.

    Raises: UserError when two pieces want one slot, or stages do not go together, with the reason.
    """

    host: str = "grpo"
    pieces: tuple[Piece, ...] = ()

    def __post_init__(self) -> None:
        if self.host not in HOSTS:
            raise unknown("baseline", self.host, HOSTS)
        brought: dict[str, Piece] = {}
        for piece in self.pieces:
            for stage in piece.stages():
                before = brought.setdefault(stage.slot, piece)
                if stage.single and before is not piece:
                    raise UserError(
                        f"a recipe has one {ORDER[stage.slot]} stage, and both {name_of(before)} and {name_of(piece)} bring one: "
                        "leave one of them out, or take single parts of it"
                    )
        provided = KNOWN | self.likelihood.provides | self.sample.makes
        for stage in self.stages:
            live = stage.live if isinstance(stage, Adapt) else frozenset()
            for need in sorted((stage.needs | live) - provided):
                raise UserError(
                    f"{type(stage).__name__} needs {need!r}, which neither {type(self.likelihood).__name__} nor "
                    f"{type(self.sample).__name__} can tell"
                )
            if reason := stage.refuses(self):
                raise UserError(f"{type(stage).__name__} {reason}")
        if isinstance(self.sample, Flat) and self.sample.group_size == 1:
            for compares in (self.advantage, self.filter):
                if isinstance(compares, GroupAdvantage | Informative):
                    raise UserError(
                        f"{type(compares).__name__} compares the completions of a prompt, and Flat.group_size is 1: "
                        "make it 2 at least"
                    )

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """All stages, in the pipeline's order."""
        return tuple(stage for slot in ORDER for stage in self._filled.get(slot, ()))

    @cached_property
    def _filled(self) -> dict[str, list[Stage]]:
        filled: dict[str, list[Stage]] = {}
        for layer in ((COMMON), HOSTS[self.host], [s for p in self.pieces for s in p.stages()]):
            own: dict[str, list[Stage]] = {}
            for stage in layer:
                own.setdefault(stage.slot, []).append(stage)
            filled |= own
        return filled

    def _one(self, slot: str) -> Any:
        return next(iter(self._filled.get(slot, ())), None)

    def _all(self, slot: str) -> list[Any]:
        return self._filled.get(slot, [])

    @property
    def likelihood(self) -> Likelihood:
        """How the policy is asked."""
        return self._one("likelihood")

    @property
    def sample(self) -> Sample:
        """Where rows come from."""
        return self._one("sample")

    @property
    def temperature(self) -> Temperature | None:
        """A temperature per row and step, if there is one."""
        return self._one("temperature")

    @property
    def filter(self) -> Filter | None:
        """Which groups stay, if any are left out."""
        return self._one("filter")

    @property
    def advantage(self) -> Advantage:
        """The advantage estimator."""
        return self._one("advantage")

    @property
    def clip(self) -> Clip:
        """The clipping."""
        return self._one("clip")

    @property
    def aggregate(self) -> Aggregate:
        """How token losses become a number."""
        return self._one("aggregate")

    @property
    def needs(self) -> frozenset[str]:
        """What the old policy's pass must tell, over all stages."""
        return frozenset().union(*(stage.needs for stage in self.stages))

    @property
    def live(self) -> frozenset[str]:
        """What the current policy's forward must tell beside log-probabilities."""
        critic = {"value"} if "value" in self.needs else set()
        return frozenset(critic).union(*(stage.live for stage in self._all("adapt")))

    # From rollouts to a loss.

    @torch.no_grad()
    def prepare(self, rollouts: Rollouts, run: Run | None = None) -> Plan:
        """Everything that is fixed for a batch, on all of it at once: advantages, weights, what is kept.

        Args:
            rollouts: whole groups, with rewards and with the columns that the recipe `needs`.

        Raises: UserError for a reward that is infinite, or a stage that makes something that is not finite.
        """
        run = run or Run()
        rollouts = self.shaped(rollouts)
        advantages = self._finite(self.advantage, self.advantage(rollouts), rollouts)
        rollouts = rollouts.with_columns(**self.advantage.targets(rollouts))
        weight, keep, logs = torch.ones_like(advantages), rollouts.mask, dict[str, float]()
        for stage in self._all("weigh"):
            choice = stage(rollouts, advantages, run)
            weight = weight if choice.weight is None else weight * self._finite(stage, choice.weight, rollouts)
            keep = keep if choice.keep is None else keep & choice.keep
            logs |= choice.logs
        for adapt in self._all("adapt"):
            if not adapt.live:
                rollouts = rollouts.with_columns(**adapt.signals(rollouts))
        for each in self.stages:
            logs |= each.figures(rollouts, run)
        count = self.aggregate.count(self.aggregate.counted(keep, rollouts.mask, weight), run)
        rows = keep.any(-1)
        left_out = count[~rows].sum() / rows.sum().clamp(min=1)
        logs |= {
            "kept_rows": rows.float().mean().item(),
            "kept_tokens": float(keep.sum()) / max(1, int(rollouts.mask.sum())),
        }
        return Plan(rollouts, advantages, weight, keep, count + left_out, logs)[rows].trimmed()

    def shaped(self, rollouts: Rollouts) -> Rollouts:
        """With what the reward stages add."""
        if rollouts.reward.isinf().any():
            row = int(rollouts.reward.isinf().nonzero()[0])
            raise UserError(f"the reward of row {row} is {rollouts.reward[row].item()}; rewards must be finite")
        for stage in self._all("shape"):
            rollouts = replace(rollouts, reward=rollouts.reward + stage(rollouts))
        return rollouts

    @torch.no_grad()
    def batch(self, plan: Plan, rows: Tensor | slice) -> Plan:
        """An optimiser's batch: some rows of a plan, with advantages as the recipe normalises them there."""
        part = plan[rows]
        stage = self._one("normalise")
        if stage is None or not len(part):
            return part
        return replace(part, advantages=self._finite(stage, stage(part.advantages, part.keep), part.rollouts))

    def loss(
        self,
        plan: Plan,
        columns: Mapping[str, PerToken],
        total: Float[Tensor, ""] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss of some rows of an optimiser's batch, and sums to log; both add up over the parts of a batch.

        Args:
            plan: the rows.
            columns: of the current policy, with gradient: "logp", and what `live` names.
            total: the denominator, summed over the whole optimiser's batch (of all processes); None if these rows are all of it.
                Whether a batch is passed over (`Clip.patience`) is then for the caller to say: a part of it cannot know.
        """
        rollouts, keep, logp = plan.rollouts, plan.keep, columns["logp"]
        ratio = self._one("ratio")(logp, rollouts.columns.get("old_logp", logp.detach()), rollouts.mask)
        clip, weight = self.clip, plan.weight
        low: float | PerToken = clip.low
        high: float | PerToken = clip.high
        read: list[tuple[Adapt, Rollouts, PerToken | None]] = []
        for stage in self._all("adapt"):
            seen = rollouts
            if stage.live:
                seen = rollouts.with_columns(**{name: columns[name].detach() for name in stage.live})
                seen = seen.with_columns(**stage.signals(seen))
            low, high = stage.bounds(seen, low, high)
            factor = stage.weight(ratio.detach(), seen, clip.low, clip.high)
            weight = weight if factor is None else weight * factor
            read.append((stage, seen, factor))
        loss = weight * clip(ratio, plan.advantages, low, high)
        if (penalty := self._one("penalty")) is not None:
            loss = loss + penalty(logp, ratio, rollouts)
        if (beside := self.advantage.beside(columns, rollouts)) is not None:
            loss = loss + beside
        loss = torch.where(keep, loss, 0.0)
        whole, total = total is None, plan.count.sum() if total is None else total
        counted = self.aggregate.counted(keep, rollouts.mask, plan.weight)
        value = self.aggregate.rows(loss, counted).sum() / torch.where(total == 0, 1.0, total)
        with torch.no_grad():
            below = keep & (ratio < 1 - low) & (plan.advantages < 0)
            above = keep & (ratio > 1 + high) & (plan.advantages > 0)
            logs = _logs(ratio, keep, below, above)
            for stage, seen, factor in read:
                logs |= stage.sums(seen, keep, factor, below, above)
            if clip.patience is not None and whole:
                logs["passed_over"] = (logs["ratio"] > clip.patience * logs["tokens"]).to(ratio.dtype)
        if "passed_over" in logs:
            value = value * (1.0 - logs["passed_over"])
        if not torch.isfinite(value):
            raise UserError(_not_finite(logp, loss, rollouts))
        return value, logs

    def _finite(self, stage: Stage, x: PerToken, rollouts: Rollouts) -> PerToken:
        bad = ~torch.isfinite(x) & rollouts.mask
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            raise UserError(f"{type(stage).__name__} makes {x[row, column].item()} of token {column} of row {row}")
        return torch.where(rollouts.mask, x, 0.0)

    # As text and as a picture.

    def __or__(self, other: "Piece | Recipe") -> "Recipe":
        """With one piece more; or with another recipe's pieces, if at most one of the two has a baseline other than grpo."""
        if isinstance(other, Recipe):
            hosts = {self.host, other.host} - {"grpo"}
            if len(hosts) > 1:
                raise UserError(f"a recipe has one baseline, not both {self.host} and {other.host}")
            return Recipe(next(iter(hosts), "grpo"), self.pieces + other.pieces)
        return Recipe(self.host, (*self.pieces, *_items(other)))

    def __str__(self) -> str:
        return " + ".join([self.host, *(term(p) for p in self.pieces)])

    @staticmethod
    def read(text: str) -> "Recipe":
        """The recipe that a text names: a baseline or a paper first, then pieces: "dapo + hapo.clip + d3s(k=(0.2, 1.0))".

        Raises: UserError naming the term that is not known, or cannot be read.
        """
        terms = outside(text, "+")
        if not terms[0]:
            raise UserError(f"a recipe begins with a baseline or a paper ({', '.join(HOSTS)}), got {text!r}")
        if terms[0] in HOSTS:
            return Recipe(terms[0], tuple(piece_of(t, HOSTS) for t in terms[1:]))
        first, *rest = (piece_of(t, HOSTS) for t in terms)
        return of(first, rest)

    def pipeline(self) -> list[dict[str, Any]]:
        """The stages as they follow each other: ``{"slot", "stage", "from", "each"}``, "each" batch or minibatch."""
        return [
            {
                "slot": ORDER[stage.slot],
                "stage": term(stage),
                "from": next((name_of(p) for p in self.pieces if any(s == stage for s in p.stages())), self.host),
                "each": "minibatch" if stage.slot in PER_MINIBATCH else "batch",
            }
            for stage in self.stages
        ]


def of(first: Piece, rest: Iterable[Piece] = ()) -> Recipe:
    """The recipe of a paper: its host, what it sets of it, itself; then more pieces, which what it sets gives way to."""
    items = (*_items(first), *rest)
    first, rest = items[0], items[1:]
    taken = {stage.slot for piece in (first, *rest) for stage in piece.stages() if stage.single}
    setting = tuple(s for s in first.setting if s.slot not in taken)
    return Recipe(first.host, (*setting, first, *rest))


def _items(piece: Piece) -> tuple[Piece, ...]:
    return piece.items if isinstance(piece, Pieces) else (piece,)


def _logs(ratio: PerToken, keep: Mask, below: Mask, above: Mask) -> dict[str, Tensor]:
    """Sums over kept tokens; divide by "tokens"."""
    ratio = ratio.detach()
    return {
        "tokens": keep.sum().to(ratio.dtype),
        "ratio": torch.where(keep, ratio, 0.0).sum(),
        "kl": torch.where(keep, ratio - 1 - ratio.clamp(min=1e-9).log(), 0.0).sum(),
        "clipped_low": below.sum().to(ratio.dtype),
        "clipped_high": above.sum().to(ratio.dtype),
    }


def _not_finite(logp: PerToken, loss: PerToken, rollouts: Rollouts) -> str:
    bad = ~torch.isfinite(torch.where(rollouts.mask, logp, 0.0))
    bad = bad if bad.any() else ~torch.isfinite(loss)
    if not bad.any():
        return "the loss is not finite"
    row, column = bad.nonzero()[0].tolist()
    return (
        f"the loss is not finite: token {column} of row {row} has log-probability {logp[row, column].item()}; "
        "the policy's logits are not finite, or rule out a token that was sampled"
    )
