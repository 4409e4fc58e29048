"""Self-Exploring Language Models: Active Preference Elicitation for Online Alignment

Expensive: optimistic exploration: a reward model with a bonus for the unknown, and a reinforcement problem in each round.
Stands in: one more term in iterative DPO, the log-ratio of a response drawn from the reference.
Check: weight zero is DPO, the term's mean is a known KL on small spaces, and rounds cover more responses.

Preferences are learned in rounds. In each, the policy as it is becomes the reference, answers every prompt once more
(y_r), and a labeller ranks y_r and the prompt's two other responses; the best is y_w, the worst y_l. A reward fitted to
such labels should be optimistic: among the rewards that explain them, take the one whose best policy gains most,

    max_r  -L_BT(r; data) + alpha max_pi [ E_{y~pi} r - E_{y~ref} r - beta KL(pi || ref) ]

With r = beta log pi/ref + const the inner maximum is beta KL(ref || pi) = -beta E_{y~ref} log pi/ref, so that optimism
costs one more log-ratio. D is the sum of d_t = log pi/ref over a response's tokens:

    L = -log sigmoid( beta [D_w - D_l] ) + alpha beta D_r
    dL = -beta sigmoid(-z) [dlog pi(y_w) - dlog pi(y_l)] + alpha beta dlog pi(y_r),      z = beta [D_w - D_l]

The plus sign pushes what the reference already says down, and so frees probability for what nobody has said yet; the
labels hold what is good. With the implicit reward r = beta log pi/ref, E_{y~ref} dlog pi = E_{y~pi} exp(-r / beta) dlog pi:
the push is weak where that reward is high.

Shapes: d and mask [3B, L-1], blocks chosen, rejected, reference; nats. Cost: three sequences where DPO has two, and one
generation per prompt and round, which is the longest part.

Traps. alpha beta D_r has no lower bound: alpha is small, rounds are short. At beta 0.01 and alpha 0.001 its weight is
1e-5 per nat and looks like nothing; Adam moves a parameter that no label touches at full speed for it, so that the
optimizer matters. The reference must be the sampler of y_r: keeping the first model as reference breaks the
derivation. Greedy y_r (the authors' code, and the default) make the term biased; temperature 1 is what the equation
says. A prompt whose three responses are equal is dropped, and its y_r with it. Long y_r weigh more: sums are not
normalised.

Example:
    >>> import torch
    >>> from locum.align import DPO, SELM, TokenStats
    >>> d = torch.tensor([[-0.2], [0.0], [-3.0]])  # y_w, y_l, y_r
    >>> s = TokenStats(d, torch.ones(3, 1, dtype=torch.bool), blocks=3)
    >>> [round(loss(s)[0].item(), 6) for loss in (DPO(beta=0.1), SELM(beta=0.1, alpha=0.001))]
    [0.703197, 0.702897]

Authors: Zhang, Yu, Sharma, Zhong, Liu, Yang, Wang, Hassan, Wang
Year: 2024
Venue: TMLR 2025
arXiv: 2405.19332
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locum.align.base import AlignLoss, Example, Logs, PerToken, TokenStats
from locum.align.rounds import Online, Round
from locum.errors import UserError
from locum.method import require

__all__ = ["SELM", "rank"]

MUCH = 0.1  # an alpha above this is hardly ever meant


@dataclass(frozen=True)
class SELM(AlignLoss, Online):
    """Iterative DPO that explores: alpha beta log pi/ref of one response of the reference is added to each pair's loss.

    Args:
        beta: pull towards the reference, > 0. Paper 0.01.
        alpha: weight of exploration, >= 0; 0 is iterative DPO. Paper 0.001 (Zephyr-7B, Phi-3) and 0.0001 (Llama-3-8B).
        temperature: of the reference's response, >= 0; 0 is greedy, as in the paper's code, 1 the equation's expectation.
    """

    beta: float = 0.01
    alpha: float = 0.001
    temperature: float = 0.0
    blocks: ClassVar[tuple[str, ...]] = ("chosen", "rejected", "reference")
    renews_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "alpha", 0 <= self.alpha < math.inf, "finite and >= 0")
        require(self, "temperature", 0 <= self.temperature < math.inf, "finite and >= 0")
        if self.alpha > MUCH:
            warnings.warn(f"SELM.alpha is {self.alpha}: above {MUCH} text degenerates", stacklevel=3)

    def score(self, s: TokenStats) -> PerToken:
        assert s.d is not None
        return s.d

    def extra(self, s: TokenStats, z: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        assert s.d is not None
        return self.alpha * self.beta * s.sums(s.d)[2]

    def logs(self, s: TokenStats) -> Logs:
        """log pi, log ref and their difference for the reference's response; the last estimates -KL(ref || pi)."""
        assert s.d is not None
        gap = s.sums(s.d)[2].mean()
        if s.logp is None:
            return {"explore/log_ratio": gap}
        logp = s.sums(s.logp)[2].mean()
        return {"explore/log_ratio": gap, "explore/logp": logp, "explore/logp_ref": logp - gap}

    @property
    def needs_labeller(self) -> bool:
        return True

    def collect(self, round: Round, prompts: Sequence[Example]) -> list[Example]:
        """One triple per prompt: best and worst of the prompt's pair and of the policy's response, and that response.

        The pair is what the prompt has in "chosen_ids" and "rejected_ids", labelled anew; two further responses at
        temperature 1 where it has none. A prompt gives nothing if its responses all score the same, or if the best and
        the worst are one text. `round.logs` gets the shares in which y_r was best, middle and worst, of ties and of
        prompts without use, and the mean scores.

        Raises: UserError without a labeller, for half a pair, or a score that is nan, with the prompt's number.
        """
        if round.labeller is None:
            raise UserError("SELM ranks responses in every round: it needs a labeller, and none was given")
        drawn = round.sample(prompts, self.temperature)
        candidates = [*_pairs(round, prompts), [list(e["response_ids"]) for e in drawn]]  # y_1, y_2, y_r
        asked: list[Example] = [
            {**prompt, "response_ids": ids} for row in candidates for prompt, ids in zip(prompts, row, strict=True)
        ]
        scores = torch.tensor(round.labeller(asked), dtype=torch.float64).view(3, len(prompts)).T
        if scores.isnan().any():
            number = int(scores.isnan().any(-1).nonzero()[0])
            raise UserError(f"the labeller gave nan to a response to prompt {number}; a score must be a number")
        best, worst, tied = rank(scores)
        found: list[Example] = []
        for i, (top, low) in enumerate(zip(best.tolist(), worst.tolist(), strict=True)):
            if top == low or candidates[top][i] == candidates[low][i]:
                continue
            found.append(
                {
                    "prompt_ids": list(prompts[i]["prompt_ids"]),
                    "chosen_ids": candidates[top][i],
                    "rejected_ids": candidates[low][i],
                    "reference_ids": candidates[2][i],
                    "scores": [float(scores[i, k]) for k in (top, low, 2)],
                }
            )
        shares = {"best": best == 2, "middle": (best != 2) & (worst != 2), "worst": worst == 2, "tied": tied}
        round.logs.update({f"explore/{name}": float(x.double().mean()) for name, x in shares.items()})
        round.logs["explore/dropped"] = 1 - len(found) / len(prompts)
        round.logs["score/reference"], round.logs["score/pair"] = (
            float(x.mean()) for x in (scores[:, 2], scores[:, :2])
        )
        return found


def rank(
    scores: Float[Tensor, "N candidates"],
) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"], Bool[Tensor, " N"]]:
    """The best and the worst of each row, the first of equals, and where equals had to be told apart; higher is better.

    Best and worst are one and the same only where the whole row is equal.
    """
    top, bottom = scores == scores.amax(-1, keepdim=True), scores == scores.amin(-1, keepdim=True)
    tied = (top.sum(-1) > 1) | (bottom.sum(-1) > 1)
    return top.long().argmax(-1), bottom.long().argmax(-1), tied


def _pairs(round: Round, prompts: Sequence[Example]) -> list[list[Any]]:
    """Two responses per prompt: the ones it has, or two that the policy draws."""
    names = ("chosen_ids", "rejected_ids")
    there = [sum(name in prompt for name in names) for prompt in prompts]
    if not any(there):
        return [[list(e["response_ids"]) for e in round.sample(prompts, 1.0)] for _ in names]
    for number, n in enumerate(there):
        if n < len(names):
            raise UserError(
                f"prompt {number} has {n} of {' and '.join(names)}; all prompts must have both, or none any"
            )
    return [[list(prompt[name]) for prompt in prompts] for name in names]
