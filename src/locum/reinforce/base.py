"""One pipeline, and the slots that papers fill:

    sample -> reward -> group filter -> advantage -> weigh and select -> [per minibatch: adapt -> ratio -> clip -> aggregate]

A stage is a frozen dataclass that fills one slot; a recipe (`locum.reinforce.recipe`) is a stage for each. What makes any
two papers' stages go together:

- A stage says what it `needs` of the old policy ("entropy", "ref_logp", "value"), and may `observe` the policy's scores
  itself; one pass without gradient makes the union of all that, for whole groups.
- Advantages are computed on complete groups, before anything is selected, and never normalised again after it.
- Static stages (`Weigh`) see the whole batch: their weights multiply, their selections intersect, and rows of which no
  token is left are dropped last. Weights stay out of the denominators.
- Stages that look at the current ratio (`Adapt`) get it without gradient, in every minibatch.
- Nothing but the log-probabilities carries a gradient.

Notation: rows i, completion tokens t, mask m[i,t], kept tokens k[i,t] (m and all selections), weights w[i,t], advantages
A[i,t], ratio r[i,t] = pi/old. Logarithms are natural.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locum.errors import UserError
from locum.method import require
from locum.tokens.groups import Groups, group_stats
from locum.tokens.rollouts import Generated, PerToken, Rollouts
from locum.tokens.sampling import Sampling
from locum.tokens.tiles import Scores

__all__ = [
    "Adapt",
    "Advantage",
    "Aggregate",
    "Asked",
    "Choice",
    "Composed",
    "Filter",
    "GroupAdvantage",
    "Heat",
    "Likelihood",
    "Normalise",
    "Penalty",
    "PerRow",
    "PerToken",
    "Piece",
    "Pieces",
    "Policy",
    "Ratio",
    "Run",
    "Sample",
    "Shape",
    "Stage",
    "Temperature",
    "Weigh",
]

Mask = Bool[Tensor, "rows tokens"]
PerRow = Float[Tensor, " rows"]
Heat = Callable[[Float[Tensor, "r V"]], Float[Tensor, " r"]]  # logits about to be sampled -> a temperature per row
Memory = dict[str, Any]  # plain data and tensors
Bound = float | PerToken


@runtime_checkable
class Policy(Protocol):
    """What the pipeline asks of a model that writes from left to right."""

    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        copies: int,
        room: Sequence[int],
        draws: Float[Tensor, "rows T"],
        heat: Heat | None = None,
        sampling: Sampling = ...,
    ) -> Generated:
        """`copies` completions of each prefix, adjacent; at most room[i] tokens for prefix i; draws pick the tokens."""

    def scores(self, rollouts: Rollouts) -> Scores:
        """The scores that completion tokens were drawn from, row by row, with gradient."""


@dataclass
class Run:
    """Where a run stands: what stages may know beside the batch.

    Args:
        step, total: optimisation steps (batches of rollouts) done, and how many there will be.
        room: most tokens of a completion.
        memory: what stages keep from one step to the next, by name.
    """

    step: int = 0
    total: int = 1
    room: int = 256
    memory: dict[str, Memory] = field(default_factory=dict)

    @property
    def progress(self) -> float:
        """0 at the beginning, 1 at the end."""
        return min(1.0, max(0.0, self.step / max(self.total, 1)))


@runtime_checkable
class Composed(Protocol):
    """What a stage can see of the recipe that it is part of."""

    @property
    def stages(self) -> tuple["Stage", ...]:
        """All of them, in the pipeline's order."""

    @property
    def likelihood(self) -> "Likelihood":
        """How the policy is asked."""

    @property
    def sample(self) -> "Sample":
        """Where rows come from."""

    @property
    def advantage(self) -> "Advantage":
        """The advantage estimator."""


@dataclass(frozen=True)
class Piece(ABC):
    """What a recipe is put together from: a stage, or several under one name.

    `host` is the baseline that a paper builds on, `setting` what it changes of it beside its own idea; both hold when the
    piece is the first of a recipe, and give way to other pieces.
    """

    host: ClassVar[str] = "grpo"

    @property
    def setting(self) -> tuple["Stage", ...]:
        """Stages of the host that the paper sets otherwise."""
        return ()

    @abstractmethod
    def stages(self) -> tuple["Stage", ...]:
        """The stages it brings."""

    def __or__(self, other: "Piece") -> "Pieces":
        """Both, on the host of the first: ``D3S() | HAPOClip()``."""
        return Pieces((*_items(self), *_items(other)))


@dataclass(frozen=True)
class Pieces(Piece):
    """Several pieces as one.

    Args:
        items: at least one; the first says which host.
    """

    items: tuple[Piece, ...] = ()

    @property
    def setting(self) -> tuple["Stage", ...]:
        return self.items[0].setting

    def stages(self) -> tuple["Stage", ...]:
        return tuple(stage for piece in self.items for stage in piece.stages())


def _items(piece: Piece) -> tuple[Piece, ...]:
    return piece.items if isinstance(piece, Pieces) else (piece,)


@dataclass(frozen=True)
class Stage(Piece):
    """One stage of the pipeline. Class variables say where it stands and what it must be given."""

    slot: ClassVar[str]
    single: ClassVar[bool] = True  # a recipe has one stage in this slot, not several

    def stages(self) -> tuple["Stage", ...]:
        return (self,)

    @property
    def needs(self) -> frozenset[str]:
        """Columns of the old policy that it reads: "old_logp", "entropy", "ref_logp", "value", "scores" (to observe)."""
        return frozenset()

    def refuses(self, recipe: "Composed") -> str:
        """Why it cannot be part of this recipe, as the rest of a sentence that begins with its name; "" if it can."""
        return ""

    def observe(self, scores: Scores, rollouts: Rollouts) -> dict[str, PerToken]:
        """Columns of its own, from the old policy's scores at the completions of whole groups. Rewards are known by then."""
        return {}

    def figures(self, rollouts: Rollouts, run: Run) -> dict[str, float]:
        """Figures to log of the whole batch, with its signals in the columns and in `run` what was kept of earlier ones."""
        return {}

    def remember(self, rollouts: Rollouts, memory: Memory) -> Memory:
        """What it keeps for the next step: plain data and tensors, given the whole batch and what it kept before."""
        return memory


@dataclass(frozen=True)
class Likelihood(Stage):
    """How a policy is asked what it says and how likely that was. Columns of a batch are what has a likelihood.

    `provides` is what it can tell beside the log-probabilities ("entropy", "scores", "segments": continuing a text).
    """

    slot: ClassVar[str] = "likelihood"
    provides: ClassVar[frozenset[str]] = frozenset()
    redraws: ClassVar[bool] = False  # its log-probabilities are estimates, drawn by the facts "number" and "epoch"

    def policy(self, lm: Any, engine: Any = None) -> Any:
        """What it asks, made of a language model; `engine` samples in the model's place.

        Raises: UserError where that cannot be.
        """
        raise UserError(
            f"{type(self).__name__} asks another kind of policy than a language model that writes from left to right: "
            "make one and give it to the Trainer"
        )

    @abstractmethod
    def generate(
        self,
        policy: Any,
        prefixes: Sequence[Sequence[int]],
        copies: int,
        room: Sequence[int],
        draws: Float[Tensor, "rows T"],
        heat: Heat | None,
        sampling: Sampling,
    ) -> Generated:
        """Completions, as `Policy.generate` does."""

    @abstractmethod
    def columns(self, policy: Any, rollouts: Rollouts, want: frozenset[str]) -> dict[str, PerToken]:
        """ "logp", with gradient, and of "entropy" and "value" what is wanted."""


@dataclass(frozen=True, eq=False)
class Asked:
    """What a sampler may ask for.

    Args:
        generate: ``(prefixes, copies, room, numbers) -> Generated``; numbers tell one row's draws from another's.
        reward: ``(prompt of each row, completions) -> reward per row``, nan where there is none.
        columns: ``(rollouts, want) -> columns`` under the policy as it is, without gradient.
        room: most tokens of a completion.
        numbers: one per prompt, all different over the run: what draws depend on.
    """

    generate: Callable[[Sequence[Sequence[int]], int, Sequence[int], Int[Tensor, " rows"]], Generated]
    reward: Callable[[Sequence[int], Sequence[Sequence[int]]], Float[Tensor, " rows"]]
    columns: Callable[[Rollouts, frozenset[str]], dict[str, PerToken]]
    room: int
    numbers: Int[Tensor, " prompts"]


@dataclass(frozen=True)
class Sample(Stage):
    """Where the rows of a batch come from. Facts that every row has: "prompt" (its number in the call) and "ended"."""

    slot: ClassVar[str] = "sample"
    makes: ClassVar[frozenset[str]] = frozenset()  # columns and facts that other stages may need of it

    @abstractmethod
    def __call__(self, ask: Asked, prompts: Sequence[Sequence[int]]) -> tuple[Rollouts, dict[str, float]]:
        """Rollouts of these prompts with their rewards, and figures to log ("sampled_tokens" among them)."""


@dataclass(frozen=True)
class Temperature(Stage):
    """A temperature per row and step of sampling, from the law that is about to be sampled."""

    slot: ClassVar[str] = "temperature"

    @abstractmethod
    def heat(self, memory: Memory) -> Heat | None:
        """The function, or None where there is nothing to go by yet."""


@dataclass(frozen=True)
class Shape(Stage):
    """What is added to the rewards of whole texts."""

    slot: ClassVar[str] = "shape"
    single: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, rollouts: Rollouts) -> Float[Tensor, " rows"]:
        """What each row's reward is changed by."""


@dataclass(frozen=True)
class Filter(Stage):
    """Which groups are worth training on; more prompts are sampled in the place of others.

    Args:
        max_batches: how many batches of prompts are sampled at most for one step, >= 1.
    """

    slot: ClassVar[str] = "filter"
    max_batches: int = 4

    def __post_init__(self) -> None:
        require(self, "max_batches", self.max_batches >= 1, ">= 1")

    @abstractmethod
    def __call__(self, rollouts: Rollouts) -> Bool[Tensor, " rows"]:
        """True in the rows of groups that stay."""


@dataclass(frozen=True)
class Advantage(Stage):
    """What a token was worth beyond what was expected of it."""

    slot: ClassVar[str] = "advantage"

    @abstractmethod
    def __call__(self, rollouts: Rollouts) -> PerToken:
        """A[i,t]; rows without a reward get 0."""

    def targets(self, rollouts: Rollouts) -> dict[str, PerToken]:
        """Columns that what it stands on is trained towards."""
        return {}

    def beside(self, columns: Mapping[str, PerToken], rollouts: Rollouts) -> PerToken | None:
        """A loss per token beside the policy's, with gradient into the current columns: a critic's."""
        return None


class GroupAdvantage(Advantage):
    """One number per row, from the rewards of its group."""

    def degrees(self) -> int:
        """What is taken off the count in the deviation."""
        return 0

    @abstractmethod
    def value(self, reward: PerRow, stats: Groups) -> PerRow:
        """The advantage of a row among its group."""

    def of_rows(self, reward: PerRow, group: Int[Tensor, " rows"], weight: PerRow | None = None) -> PerRow:
        """A_i; 0 in level groups, for a row that is alone, and for one without a reward. Weights: what each row counts."""
        stats = group_stats(reward, group, self.degrees(), weight)
        if bool(((stats.count == 1) & stats.known).any()):
            warnings.warn("a group has one row only: its advantage is 0", stacklevel=2)
        silent = stats.level | ~stats.known | (stats.count < 2)
        return torch.where(silent, 0.0, self.value(reward, stats))

    def __call__(self, rollouts: Rollouts) -> PerToken:
        return self.of_rows(rollouts.reward, rollouts.group)[:, None] * rollouts.mask


@dataclass(frozen=True, eq=False)
class Choice:
    """What a static stage says of the batch: a weight per token, which tokens stay, or both; None is 1 and all."""

    weight: PerToken | None = None
    keep: Mask | None = None
    logs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Weigh(Stage):
    """Weights and selections that are fixed for a batch."""

    slot: ClassVar[str] = "weigh"
    single: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, rollouts: Rollouts, advantages: PerToken, run: Run) -> Choice:
        """The whole batch, before anything is dropped."""


@dataclass(frozen=True)
class Normalise(Stage):
    """What is done to the advantages of an optimiser's batch at the end, over its kept tokens."""

    slot: ClassVar[str] = "normalise"

    @abstractmethod
    def __call__(self, advantages: PerToken, keep: Mask) -> PerToken:
        """The advantages that enter the loss."""


@dataclass(frozen=True)
class Adapt(Stage):
    """Weights and clipping bounds that follow the current ratio.

    `signals` is computed once from the old policy's batch. With `live` it is computed in every minibatch instead, from the
    current policy's columns of those names.
    """

    slot: ClassVar[str] = "adapt"
    single: ClassVar[bool] = False

    @property
    def live(self) -> frozenset[str]:
        """Columns of the current policy that the signals are made of; empty for those of the old one."""
        return frozenset()

    def signals(self, rollouts: Rollouts) -> dict[str, PerToken]:
        """Columns that `weight` and `bounds` read."""
        return {}

    def weight(self, ratio: PerToken, rollouts: Rollouts, low: float, high: float) -> PerToken | None:
        """A factor on the advantages, >= 0, given the ratio without gradient and the clip's own bounds; None is 1."""
        return None

    def bounds(self, rollouts: Rollouts, low: Bound, high: Bound) -> tuple[Bound, Bound]:
        """How far a ratio may go down and up."""
        return low, high

    def sums(
        self, rollouts: Rollouts, keep: Mask, factor: PerToken | None, below: Mask, above: Mask
    ) -> dict[str, Tensor]:
        """Figures to log of a minibatch, as sums over kept tokens; they are shown per token.

        Args:
            factor: what `weight` said.
            below, above: the kept tokens that were clipped at their lower and at their upper bound.
        """
        return {}


@dataclass(frozen=True)
class Ratio(Stage):
    """pi/old, of tokens or of whole completions."""

    slot: ClassVar[str] = "ratio"

    @abstractmethod
    def __call__(self, logp: PerToken, old_logp: PerToken, mask: Mask) -> PerToken:
        """The ratio per token, with gradient; anything outside the mask."""


@dataclass(frozen=True)
class Aggregate(Stage):
    """How token losses become one number: sum over rows of `rows`, divided by the sum of `count` over the optimiser's batch.

    Args:
        denominator: what is counted: "kept" tokens, or "all" of the completions.
        renormalise: count each token with its (static) weight instead of 1.
    """

    slot: ClassVar[str] = "aggregate"
    denominator: str = "kept"
    renormalise: bool = False

    def __post_init__(self) -> None:
        require(self, "denominator", self.denominator in ("kept", "all"), '"kept" or "all"')

    def counted(self, keep: Mask, mask: Mask, weight: PerToken) -> PerToken:
        """What each token counts in a denominator."""
        chosen = keep if self.denominator == "kept" else mask
        return chosen * weight if self.renormalise else chosen.to(weight.dtype)

    @abstractmethod
    def rows(self, loss: PerToken, counted: PerToken) -> Float[Tensor, " rows"]:
        """What each row adds to the numerator; the loss is weighted, and 0 where a token is not kept."""

    @abstractmethod
    def count(self, counted: PerToken, run: Run) -> Float[Tensor, " rows"]:
        """What each row adds to the denominator."""


@dataclass(frozen=True)
class Penalty(Stage):
    """What is added to the loss of a token."""

    slot: ClassVar[str] = "penalty"

    @abstractmethod
    def __call__(self, logp: PerToken, ratio: PerToken, rollouts: Rollouts) -> PerToken:
        """Per token, with gradient, its coefficient included."""
