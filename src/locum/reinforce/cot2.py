"""Continuous Chain of Thought Enables Parallel Exploration and Reasoning

Expensive: Sampling many separate chains of thought.
Stands in: One chain whose tokens are mixtures of embeddings and carry many traces at once.
Check: Where the next-token law is linear in the mixture, the chain gives the exact marginal of the sampled chains.

A chain has m outputs with laws alpha_1 .. alpha_m over the vocabulary (`locum.models.continuous`). The first m - 1 are thoughts:
what is fed back is a mixture of input embeddings e_i, not one of them. The last is one ordinary token, the answer.

    base         z_t = sum_i alpha_t[i] e_i
    mts          z_t = (1/K) sum_r e_{i_r},  i_1 .. i_K drawn from alpha_t
    dirichlet    z_t = sum_i a[i] e_i,       a drawn from Dirichlet(gamma alpha_t)
    discrete     z_t = e_i,                  i = argmax alpha_t

**Supervised** (`csft_targets`, `csft`). Of B traces of a problem, alpha*_t[g] is the share that says g at step t < m; alpha*_m is
the right answer. B = 1 is ordinary supervision on one trace, all traces the whole frontier of a search.

    L = sum_t KL(alpha*_t || alpha_t), summed over steps, mean over problems

With teacher forcing step t sees the mixtures of alpha*_1 .. alpha*_{t-1}: one forward. Self-fed it sees those of the model's own
laws, with gradient through the whole chain. Inference feeds itself always. Nothing is detached.

**By reinforcement** (`CoT2`). GRPO, for which a chain of a stochastic mode is a completion of m tokens, and a thought has a
likelihood. Only the answer is graded. Ratios to the policy that sampled, at the same thoughts:

    mts          r_t = (prod_r alpha_t[i_r] / old_t[i_r])^(1/K)         logp of a column: mean_r log alpha_t[i_r]
    dirichlet    r_t = f(a; gamma alpha_t) / f(a; gamma old_t)          logp: log f(a; c) = lgamma(sum c) - sum lgamma(c_i)
                                                                              + sum (c_i - 1) log a_i
    answer       r_m = alpha_m[j] / old_m[j]

so that everything behind the log-probability is the family's: with the paper's settings J = 1/(G m) sum_i sum_t min(r A, clip(r) A),
A_i = (R_i - mean)/sd of the population, clipped at .1. Other pieces join ("cot2 + d3s"). Base chains have no ratio.

Dirichlet laws live on the tokens that the sampling policy gave a share of `floor` at least, clamped there and scaled to sum to 1;
drawn weights below 1e-12 count as it. A token that rises above the floor later is not part of that law, which only matters
for several updates on one batch.

Shapes: laws and targets [n, m, V]; thoughts [rows, m - 1, S] beside their weights; logarithms natural. Cost: a step on known
thoughts is one forward of prompt + m - 1 positions, and a mixture of the vocabulary a product as large as the head's.

Why one chain can stand for many: if the next-token law is linear in the mixture, base chains have exactly the answer law that
discrete chains have on average (Assumption 1 there), and K tokens a step divide a step's variance by K. A superposition of B of v
items can be told apart in about d = B log(v/B) dimensions, so small models want fewer traces.

Traps. The mean over steps in the place of the sum changes the learning rate by m. The released code draws K tokens from
softmax(logits/K) and multiplies their ratios ("logits"); the paper takes the K-th root ("root"). The slope of log f in a small
concentration c is as 1/c, so tokens just above the floor rule the gradient: with gamma 1 and floor 1e-3 a learning rate that
suits mts makes a small model worse (`locum show cot2`). Raise floor or gamma, or learn far slower.

Example:
    >>> import torch
    >>> from locum.reinforce.cot2 import csft_loss, csft_targets
    >>> from locum.tasks.mnns import MNNS
    >>> task, digits = MNNS(length=3), torch.tensor([[2, 1, 4]])
    >>> targets, _ = csft_targets(task.traces(digits), task.answers(digits), task.vocab_size)
    >>> [{task.total(i): p for i, p in enumerate(step) if p} for step in targets[0].tolist()]
    [{-2: 0.5, 2: 0.5}, {-3: 0.25, -1: 0.25, 1: 0.25, 3: 0.25}, {1: 1.0}]
    >>> round(csft_loss(torch.zeros(1, 3, 8), torch.eye(8)[None, :3]).item(), 4)  # 3 log 8: one trace, every token as likely
    6.2383

Authors: Gozeten, Ildiz, Zhang, Harutyunyan, Rawat, Oymak
Year: 2025
Venue: ICLR 2026
arXiv: 2505.23648
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locum.errors import UserError
from locum.method import require
from locum.models.continuous import ContinuousPolicy
from locum.models.thoughts import Mode, Tokens, Weights, concentration
from locum.reinforce.advantages import GroupNormalised
from locum.reinforce.base import Heat, Likelihood, PerToken, Piece, Stage
from locum.reinforce.losses import Clip
from locum.tokens.rollouts import Generated, Rollouts
from locum.tokens.sampling import Sampling
from locum.tokens.tiles import Tile, over_tiles, tile_entropy, wide

__all__ = ["CoT2", "Dirichlet", "MTS", "csft", "csft_loss", "csft_targets", "log_dirichlet"]  # noqa: RUF022 - the first is the paper's

NORMALIZATIONS = ("root", "logits")


@dataclass(frozen=True)
class CoT2(Piece):
    """GRPO on chains whose thoughts are mixtures. The policy is a `locum.models.continuous.ContinuousPolicy`.

    Args:
        mode: "mts" or "dirichlet".
        tokens: K of mts, >= 1. Paper 2, 3 and 6.
        gamma: of dirichlet, > 0; the authors' code 1.
        normalization: of mts: "root" (the paper's) or "logits" (the authors' code).
        floor: of dirichlet, in (0, 1): tokens of a smaller share are left out; the authors' code 1e-3.
    """

    mode: str = "mts"
    tokens: int = 3
    gamma: float = 1.0
    normalization: str = "root"
    floor: float = 1e-3

    def __post_init__(self) -> None:
        if self.mode in ("base", "discrete"):
            raise UserError(
                f"CoT2.mode {self.mode!r} is deterministic: a thought has no likelihood, so there is no ratio to learn by; "
                "train with 'mts' or 'dirichlet' and answer with it afterwards"
            )
        require(self, "mode", self.mode in ("mts", "dirichlet"), '"mts" or "dirichlet"')
        MTS(self.tokens, self.normalization)
        Dirichlet(self.gamma, self.floor)

    @property
    def setting(self) -> tuple[Stage, ...]:
        return (GroupNormalised(ddof=0, eps=0.0), Clip(0.1, 0.1))

    def stages(self) -> tuple[Stage, ...]:
        dirichlet = Dirichlet(self.gamma, self.floor)
        return (MTS(self.tokens, self.normalization) if self.mode == "mts" else dirichlet,)


@dataclass(frozen=True)
class _Mixed(Likelihood):
    """What a chain of mixtures says and how likely that was: m columns, the last one the answer."""

    provides: ClassVar[frozenset[str]] = frozenset({"entropy", "heat"})

    @property
    @abstractmethod
    def mode(self) -> Mode:
        """How thoughts are drawn."""

    @abstractmethod
    def log_prob(self, z: Tile, thought: Tensor, weights: Tensor, token: Tensor, answer: Tensor) -> Float[Tensor, " r"]:
        """Log-likelihood of some outputs.

        Args:
            z: their logits [r, V].
            thought, weights: tokens of the mixture and how much of each there was, [r, S].
            token: what stands for the output, [r].
            answer: true for outputs that are that token, not a mixture.
        """

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
        if not isinstance(policy, ContinuousPolicy):
            raise UserError(
                f"{type(self).__name__} asks a policy that thinks in mixtures, got {type(policy).__name__}: wrap the model as "
                "locum.models.continuous.ContinuousPolicy(model, steps)"
            )
        return policy.generate(prefixes, copies, room, draws, heat, sampling, self.mode)

    def columns(self, policy: Any, rollouts: Rollouts, want: frozenset[str]) -> dict[str, PerToken]:
        if "thoughts" not in rollouts.facts:
            raise UserError(f"{type(self).__name__} reads the thoughts of a chain, and these rollouts have none")
        answers = torch.zeros_like(rollouts.mask)
        answers[:, -1] = True
        thoughts = rollouts.facts["thoughts"]
        weights = rollouts.facts.get("weights", torch.ones(thoughts.shape, device=thoughts.device))

        def rows(x: Tensor) -> Tensor:
            """Of outputs, row by row; the answer has no mixture, and ones in its place."""
            return torch.cat([x, x.new_ones(len(x), 1, x.shape[-1])], 1)[rollouts.mask]

        def tile(z: Tile, *given: Tensor) -> tuple[Tensor, ...]:
            logp = self.log_prob(z, *given)
            return (logp, tile_entropy(z.detach())) if "entropy" in want else (logp,)

        given = (rows(thoughts), rows(weights), rollouts.targets, answers[rollouts.mask])
        found = over_tiles(tile, [policy.scores(rollouts)], *given)
        return {name: rollouts.spread(x) for name, x in zip(("logp", "entropy"), found, strict=False)}


@dataclass(frozen=True)
class MTS(_Mixed):
    """Multi-token sampling: a thought is the average of K tokens, its ratio the geometric mean of theirs.

    Args:
        tokens: K, >= 1; 1 is ordinary sampling of one token.
        normalization: "root": the K-th root of the tokens' ratios, drawn from softmax(logits). "logits": their product, drawn
            from softmax(logits/K), as the authors' code does.
    """

    tokens: int = 3
    normalization: str = "root"

    def __post_init__(self) -> None:
        require(self, "tokens", self.tokens >= 1, ">= 1")
        require(self, "normalization", self.normalization in NORMALIZATIONS, '"root" or "logits"')

    @property
    def heat(self) -> float:
        """What the logits of a thought are divided by."""
        return float(self.tokens) if self.normalization == "logits" else 1.0

    @property
    def mode(self) -> Mode:
        return Tokens(self.tokens, self.heat)

    def log_prob(self, z: Tile, thought: Tensor, weights: Tensor, token: Tensor, answer: Tensor) -> Tensor:
        z = z / torch.where(answer, 1.0, self.heat)[:, None]
        ids = torch.where(answer[:, None], token[:, None], thought)
        mean = z.gather(-1, ids).mean(-1) - z.logsumexp(-1)
        return mean * torch.where(answer, 1.0, self.heat)  # K times the mean is the sum


@dataclass(frozen=True)
class Dirichlet(_Mixed):
    """Weights drawn from Dirichlet(gamma alpha).

    Args:
        gamma: > 0; the larger, the nearer to the law itself.
        floor: tokens of a smaller share are left out, in (0, 1).
    """

    gamma: float = 1.0
    floor: float = 1e-3

    def __post_init__(self) -> None:
        require(self, "gamma", 0 < self.gamma < float("inf"), "finite and > 0")
        require(self, "floor", 0 < self.floor < 1, "in (0, 1)")

    @property
    def mode(self) -> Mode:
        return Weights(self.gamma, self.floor)

    def log_prob(self, z: Tile, thought: Tensor, weights: Tensor, token: Tensor, answer: Tensor) -> Tensor:
        logp = z.log_softmax(-1)
        support = weights > 0
        c = concentration(logp.gather(-1, thought).exp(), support, self.gamma, self.floor)
        density = log_dirichlet(c, weights.to(c.dtype), support)
        return torch.where(answer, logp.gather(-1, token[:, None])[:, 0], density)


def log_dirichlet(
    c: Float[Tensor, "*n S"], a: Float[Tensor, "*n S"], support: Bool[Tensor, "*n S"] | None = None
) -> Float[Tensor, "*n"]:
    """log f of Dirichlet(c) at a, over the support: all of it unless given, and never none."""
    support = torch.ones_like(a, dtype=torch.bool) if support is None else support
    total = torch.where(support, c, 0.0).sum(-1)
    c, a = torch.where(support, c, 1.0), torch.where(support, a, 1.0)  # lgamma(1) = log(1) = 0
    return total.lgamma() - c.lgamma().sum(-1) + ((c - 1) * a.log()).sum(-1)


# Supervised.


def csft_targets(
    traces: Int[Tensor, "n many steps"],
    answers: Int[Tensor, " n"],
    vocab: int,
    kept: Bool[Tensor, "n many"] | None = None,
) -> tuple[Float[Tensor, "k steps V"], Bool[Tensor, " n"]]:
    """alpha*: the share of the traces that say a token at each step, and one-hot answers at the last.

    Args:
        traces: token ids; what they say at the last step does not count.
        answers: the right last token.
        vocab: V.
        kept: false for traces that are not there; all are unless given. Shares are of those kept.

    Returns:
        Targets of the problems that have a trace, and which these are.
    """
    n, _, steps = traces.shape
    if steps < 1:
        raise UserError("a trace has one step at least, got none")
    weight = torch.ones(traces.shape[:2], device=traces.device) if kept is None else kept.float()
    there = weight.sum(1) > 0
    share = (weight / weight.sum(1, keepdim=True).clamp(min=1))[:, None].expand(-1, steps, -1)
    targets = share.new_zeros(n, steps, vocab).scatter_add_(-1, traces.transpose(1, 2), share)
    targets[:, -1] = 0.0
    targets[:, -1].scatter_(-1, answers[:, None], 1.0)
    return targets[there], there


def csft_loss(
    logits: Float[Tensor, "n steps V"], targets: Float[Tensor, "n steps V"], form: str = "kl"
) -> Float[Tensor, ""]:
    """sum_t D(alpha*_t || alpha_t), mean over problems.

    Args:
        form: "kl", or "ce" for the cross-entropy: larger by the targets' entropy, of the same gradient.

    Raises: UserError for targets that do not sum to 1, naming the step, and for logits that are not a law's.
    """
    if form not in ("kl", "ce"):
        raise UserError(f"form must be 'kl' or 'ce', got {form!r}")
    off = (~((targets.sum(-1) - 1).abs() <= 1e-4) | (targets < 0).any(-1)).nonzero()
    if len(off):
        row, step = off[0].tolist()
        raise UserError(
            f"the target of step {step} of problem {row} sums to {targets[row, step].sum().item()}, not to 1"
        )
    logp = wide(logits).log_softmax(-1)
    if bool(logp.isnan().any()):
        row, step = logp.isnan().any(-1).nonzero()[0].tolist()
        raise UserError(f"the logits of step {step} of problem {row} hold NaN or no finite value")
    targets = targets.to(logp.dtype)
    total = -torch.where(targets > 0, targets * logp, 0.0).sum((1, 2))
    if form == "kl":
        total = total - torch.special.entr(targets).sum((1, 2))
    return total.mean()


def csft(
    policy: ContinuousPolicy,
    prefix: Int[Tensor, "n P"],
    prefix_mask: Bool[Tensor, "n P"],
    targets: Float[Tensor, "n steps V"],
    feed: str = "teacher",
    form: str = "kl",
) -> Float[Tensor, ""]:
    """The loss of a batch of problems, with gradient into all of the model.

    Args:
        prefix, prefix_mask: prompts, padded on the left.
        targets: as `csft_targets` makes them, one row per prompt.
        feed: "teacher": thoughts are the targets' mixtures, one forward. "self": the model's own, step by step.
        form: as `csft_loss` takes it.
    """
    if feed not in ("teacher", "self"):
        raise UserError(f"feed must be 'teacher' or 'self', got {feed!r}")
    if targets.shape[1] != policy.steps:
        raise UserError(f"chains of this policy have {policy.steps} outputs, and the targets {targets.shape[1]} steps")
    thoughts = policy.mix(targets[:, :-1]) if feed == "teacher" else None
    return csft_loss(policy(prefix, prefix_mask, thoughts), targets, form)
