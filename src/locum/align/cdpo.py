"""Critical Tokens Matter: Token-Level Contrastive Estimation Enhances LLM's Reasoning Capability

Expensive: many rollouts from every prefix of a wrong solution, to find the token that dooms it.
Stands in: two small fine-tunes, on right and on wrong solutions, and one forward pass of each.
Check: low scores fall on the dooming token where it is known, and scores of zero give DPO exactly.

A wrong solution often goes wrong at one token: before it samples still reach the right answer, after it none do. Rollouts
find that token (`locum.align.critical`). Contrastive estimation guesses it: fine-tune the model once on right solutions
(p) and once on wrong ones (n); with their logits z_p, z_n over the whole vocabulary a response token y_t has the score

    s_t = softmax( (1 + b) z_p[t] - b z_n[t] )[y_t]        in (0, 1], low = critical
    log s_t = (1 + b) log p(y_t) - b log n(y_t) - log Z_t

A shift of either model's logits cancels; b = 0 or p = n give s = p. In the preference loss the chosen response counts as
in DPO, the rejected one where it is critical. With d_t = log pi/ref (y_t), w chosen, l rejected:

    z = beta [ sum_t d_t (w) - sum_t (1 - s_t) d_t (l) ],        L = -log sigmoid(z)
    dL/dlog pi(w_t) = -beta sigmoid(-z),    dL/dlog pi(l_t) = beta sigmoid(-z) (1 - s_t)

The end of the sequence has s = 0 in a rejected response: it counts whole. Steps, from a model and problems with a
verifier: sample and check many responses per problem; `build_ce_data`; `SFT` twice (two adapters on one base will do);
`ContrastiveEstimation.annotate` on the pairs; train with `CDPO`.

Shapes: s, d and mask [2B, L-1], chosen rows first; d in nats, s without unit. Cost: once per rejected response a forward
pass of each of the two models, logits for one tile of positions only; in training DPO's.

Traps. The weight is 1 - s, not s: a low score is a high penalty. s is made before training and never gets a gradient.
p and n need one tokenizer, and prompt and response are token ids, tokenised as in training. With most weights near 0 and
beta 0.1 the margin is small, so that the learning rate is higher than DPO's (4e-5 to 2e-5 in the paper). The authors'
code takes one sigmoid per position of the padded batch instead of one per pair (`aggregation="token"`): it ties token t
of one response to token t of the other, and the prompt and the padding each add log 2, so that padding changes the loss.
Permute a response's scores over its tokens before believing that their place is what helps.

Example:
    >>> import torch
    >>> from locum.align import CDPO, DPO, TokenStats
    >>> d = torch.tensor([[0.1, 0.2], [0.2, -0.4]])  # chosen, rejected
    >>> ce = torch.tensor([[0.0, 0.0], [1 / 9, 8 / 9]])
    >>> s = TokenStats(d, torch.ones(2, 2, dtype=torch.bool), columns={"ce": ce})
    >>> [round(loss(s)[0].item(), 4) for loss in (DPO(beta=1.0), CDPO(beta=1.0))]
    [0.4741, 0.6133]

Authors: Lin, Liang, Xu, Liu, Wang, Luo, Shi, Li, Yang, Tu
Year: 2025
Venue: ICML 2025
arXiv: 2411.19943
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from locum.align.base import AlignLoss, Example, Logs, PairBatch, PerToken, TokenStats
from locum.align.signals import TokenSignal
from locum.align.statistics import Scorer, token_values
from locum.errors import UserError
from locum.method import require
from locum.tokens.tiles import Tile

__all__ = ["CDPO", "CEData", "ContrastiveEstimation", "Sampled", "build_ce_data", "contrastive"]


@dataclass(frozen=True)
class CDPO(AlignLoss):
    """DPO that penalises a rejected response where contrastive estimation finds it critical. Reads the column "ce".

    Args:
        beta: pull towards the reference, > 0. Paper 1.0 (`CDPO.paper()`), its code 0.1.
        aggregation: "sequence", one sigmoid per pair, or "token", one per position of the padded batch. Paper "sequence",
            its code "token" (`CDPO.code()`).
        label_smoothing: how likely a pair is taken to be the wrong way round, 0 to 0.5, 0.5 left out. Paper 0.
        weight_chosen: weigh chosen tokens by their s; needs `ContrastiveEstimation(chosen=True)`. Paper false.
    """

    aggregation: Literal["sequence", "token"] = "sequence"
    label_smoothing: float = 0.0
    weight_chosen: bool = False
    columns: ClassVar[tuple[str, ...]] = ("ce",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "aggregation", self.aggregation in ("sequence", "token"), "'sequence' or 'token'")
        require(self, "label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")

    @classmethod
    def paper(cls) -> "CDPO":
        """The paper's equation and strength."""
        return cls(beta=1.0)

    @classmethod
    def code(cls) -> "CDPO":
        """What the authors' code trains: one sigmoid per position."""
        return cls(beta=0.1, aggregation="token")

    def score(self, s: TokenStats) -> PerToken:
        assert s.d is not None
        ce = s.columns["ce"].detach().to(s.d.dtype)
        _check_scores(ce, s, self.weight_chosen)
        chosen = ce if self.weight_chosen else torch.ones_like(ce)
        return torch.where(s.is_chosen, chosen, 1 - ce) * s.d

    def extra(self, s: TokenStats, z: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"] | float:
        # (1 - e) f(z) + e f(-z) = f(z) + e z for f = -log sigmoid
        return self.label_smoothing * z if self.label_smoothing else 0.0

    def __call__(self, s: TokenStats) -> tuple[Float[Tensor, ""], Logs]:
        loss, logs = super().__call__(s)
        if self.aggregation == "token":
            chosen, rejected = s.per_block(torch.where(s.mask, self.beta * self.score(s), 0.0))
            z = chosen - rejected
            loss = (-F.logsigmoid(z) + self.extra(s, z)).mean()
            logs = {name: value for name, value in logs.items() if not name.startswith("loss/")}  # the pairs' parts
        return loss, logs


def _check_scores(ce: PerToken, s: TokenStats, weight_chosen: bool) -> None:
    bad = s.mask & ~((ce >= 0) & (ce <= 1))
    if bad.any():
        row, at = bad.nonzero()[0].tolist()
        raise UserError(f"the column 'ce' must lie in [0, 1]; row {row} of the batch has {ce[row, at].item()} at {at}")
    if weight_chosen and bool((s.is_chosen[:, 0] & ~((ce > 0) & s.mask).any(-1)).any()):
        raise UserError("CDPO.weight_chosen needs scores of the chosen responses: ContrastiveEstimation(chosen=True)")


def contrastive(positive: Tile, negative: Tile, ids: Int[Tensor, " r"], b: float = 1.0) -> Float[Tensor, " r"]:
    """The score of each token: softmax((1 + b) positive - b negative)[ids], from logits or log-probabilities [r, V]."""
    z = torch.lerp(negative, positive, 1 + b)
    return (z.gather(-1, ids[:, None])[:, 0] - z.logsumexp(-1)).exp()


@dataclass(frozen=True, eq=False)
class ContrastiveEstimation(TokenSignal):
    """Scores s_t of response tokens from a positive and a negative model: the column "ce" of `CDPO`.

    Args:
        positive, negative: models fine-tuned on right and on wrong responses, e.g. two adapters of one model.
        b: how far to go from negative to positive, >= 0. Paper 1.0.
        chosen: score chosen responses too; their column is 0 otherwise, and the two passes over them are saved.
        eos_ids: tokens that end a response. They count whole: s = 0 in a rejected response, 1 in a chosen one.
        pad_id, batch_size, move: how responses are batched (`token_values`).
    """

    positive: Scorer
    negative: Scorer
    b: float = 1.0
    chosen: bool = False
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    batch_size: int = 16
    move: Callable[[PairBatch], PairBatch] = lambda batch: batch
    column: ClassVar[str] = "ce"

    def __post_init__(self) -> None:
        require(self, "b", 0 <= self.b < math.inf, "finite and >= 0")

    def values(self, examples: Sequence[Example], block: str) -> list[Float[Tensor, " _"]]:
        if block == "chosen" and not self.chosen:
            return [torch.zeros(len(example["chosen_ids"])) for example in examples]
        score = partial(contrastive, b=self.b)
        models = [self.positive, self.negative]
        found = token_values(score, models, examples, block, self.pad_id, self.batch_size, self.move)
        ends, whole = torch.tensor(self.eos_ids, dtype=torch.long), 1.0 if block == "chosen" else 0.0
        ids = [torch.as_tensor(example[f"{block}_ids"]) for example in examples]
        return [row.masked_fill(torch.isin(y, ends), whole) for row, y in zip(found, ids, strict=True)]


@dataclass(frozen=True)
class Sampled:
    """A problem and its sampled, verified responses.

    Args:
        prompt_ids: the problem.
        responses: token ids of each response, end of sequence included.
        answers: what each response answers; "" where it gives no answer.
        correct: whether that answer is right.
    """

    prompt_ids: Sequence[int]
    responses: Sequence[Sequence[int]]
    answers: Sequence[str]
    correct: Sequence[bool]


@dataclass(frozen=True)
class CEData:
    """What contrastive estimation and cDPO train on.

    Args:
        positive, negative: examples with "response_ids", for `SFT` of the positive and the negative model.
        pairs: examples with "chosen_ids" and "rejected_ids".
        without_right, without_wrong: problems that gave no pair because no response, or every response, was right.
    """

    positive: list[Example] = field(default_factory=list)
    negative: list[Example] = field(default_factory=list)
    pairs: list[Example] = field(default_factory=list)
    without_right: int = 0
    without_wrong: int = 0


def build_ce_data(problems: Sequence[Sampled], share: float = 0.5, generator: torch.Generator | None = None) -> CEData:
    """Choose what to fine-tune on, and the preference pairs, from sampled responses.

    Responses without an answer are left out, the others are grouped by answer. A problem gives the positive model one
    response of its most frequent right answer; the negative model one response of each wrong answer, the most frequent
    first, until these answers cover `share` of the wrong responses (beyond the first, only answers that came more than
    once); and a pair of the most frequent right and the most frequent wrong answer.

    Raises: UserError for lists of unequal length, a share outside (0, 1], or when no problem gives a pair.
    """
    if not 0 < share <= 1:
        raise UserError(f"build_ce_data: share must be in (0, 1], got {share}")
    data, without_right, without_wrong = CEData(), 0, 0

    def one(group: list[Sequence[int]]) -> list[int]:
        return list(group[int(torch.randint(len(group), (), generator=generator))])

    for number, problem in enumerate(problems):
        right, wrong = _by_answer(number, problem)
        prompt = {"prompt_ids": list(problem.prompt_ids)}
        data.positive.extend(prompt | {"response_ids": one(group)} for group in right[:1])
        need = math.ceil(share * sum(map(len, wrong)))
        for rank, group in enumerate(wrong):
            if need <= 0 or (rank and len(group) == 1):
                break
            need -= len(group)
            data.negative.append(prompt | {"response_ids": one(group)})
        if right and wrong:
            data.pairs.append(prompt | {"chosen_ids": one(right[0]), "rejected_ids": one(wrong[0])})
        without_right += not right
        without_wrong += bool(right) and not wrong
    if not data.pairs:
        raise UserError(
            f"no pairs: of {len(problems)} problems {without_right} have no right response and {without_wrong} no wrong one; "
            "sample more responses, or at another temperature"
        )
    return CEData(data.positive, data.negative, data.pairs, without_right, without_wrong)


def _by_answer(number: int, problem: Sampled) -> tuple[list[list[Sequence[int]]], list[list[Sequence[int]]]]:
    """Responses with right and with wrong answers, one group per answer, the largest groups first."""
    sizes = len(problem.responses), len(problem.answers), len(problem.correct)
    if len(set(sizes)) > 1:
        raise UserError(f"problem {number} has {sizes[0]} responses, {sizes[1]} answers and {sizes[2]} verdicts")
    groups: dict[tuple[bool, str], list[Sequence[int]]] = {}
    for response, answer, correct in zip(problem.responses, problem.answers, problem.correct, strict=True):
        if answer != "":
            groups.setdefault((bool(correct), answer), []).append(response)
    ranked = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [g for (ok, _), g in ranked if ok], [g for (ok, _), g in ranked if not ok]
