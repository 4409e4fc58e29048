"""T-REG: Preference Optimization with Token-Level Reward Regularization

Expensive: Marking every token by hand, or training a model that assigns credit.
Stands in: The reference model under two opposite rewriting prompts; the squashed log-ratio steers DPO's token rewards.
Check: Weight zero is DPO, equal prompts give a reward of exactly zero, and a shuffled reward loses the gain.

An instruct model e (the reference) is asked to rewrite the response y so that it becomes better, and, once more, so that
it becomes worse; the answer is y itself, and each of its tokens is worth what the two requests make of it:

    r_t = sigmoid( log e(y_t | x_better, y_<t) - log e(y_t | x_worse, y_<t) ) - 1/2  =  1/2 tanh(gap / 2)     no gradient

Training is DPO, z = beta (sum_t d_t (w) - sum_t d_t (l)) with d_t = log pi/ref (y_t), w chosen and l rejected, plus a
language-model loss that moves tokens of high worth up and of low worth down in *both* responses, as strongly as DPO still
moves the pair (sg stops the gradient):

    R(y) = - sum_t beta r_t log pi(y_t|s_t)
    L    = -log sigmoid(z) + alpha sg( sigmoid(-z) ) ( R(w) + R(l) )
    dL   = -beta sigmoid(-z) [ sum_t (1 + alpha r_t) dlog pi (w) - sum_t (1 - alpha r_t) dlog pi (l) ]

so tokens get the factors of TGDPO (`locum.align.tgdpo`, which reads the same column "r_hat") and pairs the weight of
plain DPO. Without a reference, `SimPOReg` has (beta/|y|) sum_t log pi in the place of beta sum_t d_t, a margin gamma to
be ahead by, and beta/|y| in R: the normalisation for which the gradient has the same form.

Shapes: d, log pi, r and mask [2B, L-1], chosen rows first; logs natural; r without unit, in [-1/2, 1/2]. Cost: once per
data set two forwards per response of about prompt and twice the response; in training DPO's.

Traps. R has the same sign for both responses; 1 - alpha r comes out of the gradient only. beta stands in R and in z: without
it in R alpha is 1/beta times as strong. Where log pi is unbounded so is R: look at "loss/preference", not at the loss.
The response's ids are appended to the requests as they are in training, never made from text again. Look at the rewards
before training on them: a small model that sees a wrong answer copies it the more readily the better it is told to be.
SmolLM2-135M-Instruct gives right answers lower rewards than wrong ones, and higher ones if it does not see them (`UNSEEN`).

Example:
    >>> import torch
    >>> from locum.align import DPO, TREG, TokenStats
    >>> logp = torch.tensor([[-1.0, -1.2], [-0.9, -1.1]])  # chosen, rejected
    >>> d = torch.tensor([[0.4, -0.2], [0.1, 0.3]])
    >>> r_hat = torch.tensor([[0.2311, -0.1225], [-0.2311, 0.0]])
    >>> s = TokenStats(d, torch.ones(2, 2, dtype=torch.bool), logp=logp, columns={"r_hat": r_hat})
    >>> [round(loss(s)[0].item(), 4) for loss in (DPO(beta=0.5), TREG(beta=0.5))]
    [0.7444, 0.7363]

Authors: Zhou, Zhang, Zhao, Meng
Year: 2025
Venue: ACL 2025
arXiv: 2412.02685
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from string import Formatter
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from locum.align.base import AlignLoss, Example, Logs, PerToken, TokenStats
from locum.align.signals import R_HAT, TokenSignal, bounded
from locum.align.statistics import ModelScorer, token_log_probs
from locum.errors import UserError
from locum.method import require
from locum.models import LM, require_same_vocabulary

__all__ = ["TREG", "UNSEEN", "RewriteReward", "SimPOReg", "squashed"]

log = logging.getLogger(__name__)

TEMPLATE = """Rewrite the response to the instruction below so that it becomes {quality}.

### Instruction:
{instruction}

### Response:
{response}"""
UNSEEN = """Answer the instruction below with a response that is {quality}.

### Instruction:
{instruction}"""
OPENING = "\n\n### Rewritten response:\n"  # opens the answer where no chat template does


@dataclass(frozen=True)
class TREG(AlignLoss):
    """DPO with a regulariser on the policy's log-probabilities per token. Reads the column "r_hat".

    Args:
        beta: pull towards the reference, > 0.
        alpha: weight of the regulariser, >= 0; 0 is DPO. Paper: the best of 0.1, 0.25 and 0.5.
        weight: of a pair's regulariser: "detached" sigmoid(-z), the same with its gradient ("attached"), or 1 ("one").
            Paper "detached", and "one" as an ablation.
    """

    alpha: float = 0.25
    weight: Literal["detached", "attached", "one"] = "detached"
    columns: ClassVar[tuple[str, ...]] = (R_HAT,)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "alpha", 0 <= self.alpha < inf, "finite and >= 0")
        known = ("detached", "attached", "one")
        require(self, "weight", self.weight in known, f"one of {', '.join(known)}")

    def said(self, s: TokenStats) -> PerToken:
        """The policy's part of a token's score, which is what the regulariser moves."""
        assert s.logp is not None
        return s.logp

    def score(self, s: TokenStats) -> PerToken:
        assert s.d is not None
        return s.d

    def extra(self, s: TokenStats, z: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        said = self.said(s)
        r = bounded(s, R_HAT, -0.5, 0.5).detach().to(said.dtype)
        chosen, rejected, *_ = (-self.beta * x for x in s.sums(r * said))
        w = torch.ones_like(z) if self.weight == "one" else torch.sigmoid(-z)
        return self.alpha * (w if self.weight == "attached" else w.detach()) * (chosen + rejected)

    def logs(self, s: TokenStats) -> Logs:
        r, (chosen, rejected) = s.columns[R_HAT], (m & (s.mask) for m in (s.is_chosen, ~s.is_chosen))
        given, implied = (x[s.mask].float() for x in (r, self.score(s)))
        return {
            "r_hat/size": given.abs().mean(),
            "r_hat/positive_chosen": (r[chosen] > 0).float().mean(),
            "r_hat/positive_rejected": (r[rejected] > 0).float().mean(),
            "r_hat/correlation": F.cosine_similarity(given - given.mean(), implied - implied.mean(), dim=0),
        }


@dataclass(frozen=True)
class SimPOReg(TREG):
    """T-REG on SimPO: no reference, mean log-probabilities, and a margin. alpha = 0 is SimPO.

    Args:
        beta: scale of the mean log-probability, > 0. SimPO's paper 2 to 10.
        alpha: weight of the regulariser, >= 0. Paper: the best of 0.1, 0.25 and 0.5.
        weight: of a pair's regulariser, as in `TREG`. Paper "detached".
        gamma: what the chosen response must be ahead by, >= 0. SimPO's paper about 0.3 beta and more.
    """

    beta: float = 10.0
    gamma: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "gamma", 0 <= self.gamma < inf, "finite and >= 0")

    @property
    def frozen(self) -> tuple[str, ...]:
        return ()

    def target(self) -> float:
        return self.gamma

    def said(self, s: TokenStats) -> PerToken:
        assert s.logp is not None
        return s.logp / s.mask.sum(-1, keepdim=True).clamp(min=1)

    def score(self, s: TokenStats) -> PerToken:
        return self.said(s)


def squashed(better: Float[Tensor, " n"], worse: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """sigmoid(better - worse) - 1/2 of log-probabilities: in [-1/2, 1/2], and exactly 0 where they are equal."""
    return 0.5 * torch.tanh((better - worse) / 2)


@dataclass(frozen=True, eq=False)
class RewriteReward(TokenSignal):
    """r of response tokens from a model under two opposite requests to rewrite: the column "r_hat".

    A request shows the instruction and the response as text: those of the example ("prompt", "<block>") where it has
    them, else its ids decoded. An instruction that is too long for the model is cut at its beginning. A response that
    does not fit even so gets rewards of 0, and so does a token that is impossible under both requests; a warning is
    logged that says how many.

    Args:
        lm: an instruct model, the reference as a rule.
        better, worse: what the response shall become.
        template: of a request, with {quality}, {instruction} and, if the model shall see it, {response}. Paper: it sees
            it; `UNSEEN` is a template without.
        max_length: tokens of request and response, > 0; None is what the model can take.
        batch_size: responses scored at a time.
        policy: the model to be trained, where it is another one: both must have one vocabulary.
    """

    lm: LM
    better: str = "more helpful, correct, coherent, and concise"
    worse: str = "unhelpful, incorrect, incoherent, and verbose"
    template: str = field(default=TEMPLATE, repr=False)
    max_length: int | None = None
    batch_size: int = 8
    policy: LM | None = None
    column: ClassVar[str] = R_HAT

    def __post_init__(self) -> None:
        names = [name for _, name, _, _ in Formatter().parse(self.template) if name is not None]
        known = {"quality", "instruction", "response"}
        good = {"quality", "instruction"} <= set(names) <= known
        require(
            self, "template", good, "a text with {quality}, {instruction} and maybe {response}, and no other braces"
        )
        require(self, "max_length", self.max_length is None or self.max_length > 0, "None or > 0")
        if self.policy is not None:
            require_same_vocabulary(self.policy, self.lm, "evaluator")

    def values(self, examples: Sequence[Example], block: str) -> list[Float[Tensor, " _"]]:
        requests = {i: self.requests(example, block, i) for i, example in enumerate(examples)}
        fit = {i: pair for i, pair in requests.items() if pair is not None}
        scorer, device = ModelScorer(self.lm.model), self.lm.device

        def log_probs(side: int) -> list[Float[Tensor, " _"]]:
            texts = [{"prompt_ids": pair[side], "response_ids": examples[i][f"{block}_ids"]} for i, pair in fit.items()]
            return token_log_probs(scorer, texts, batch_size=self.batch_size, move=lambda batch: batch.to(device))

        rewards = [torch.zeros(len(example[f"{block}_ids"])) for example in examples]
        impossible = 0
        for i, better, worse in zip(fit, log_probs(0), log_probs(1), strict=True):
            r = squashed(better, worse)
            impossible += int(r.isnan().sum())
            rewards[i] = r.nan_to_num(0.0)
        for count, of, what in (
            (len(examples) - len(fit), len(examples), f"{block} responses do not fit into {self._room()} tokens"),
            (impossible, sum(map(len, rewards)), f"tokens of {block} responses are impossible under both requests"),
        ):
            if count:
                log.warning("%d of %d %s: their rewards are 0", count, of, what)
        return rewards

    def requests(self, example: Example, block: str, number: int = 0) -> tuple[list[int], list[int]] | None:
        """Ids of the better and the worse request, up to where the response's ids follow; None if it cannot fit."""
        ids = list(example[f"{block}_ids"])
        if not ids:
            raise UserError(f"example {number} has an empty {block} response")
        if max(ids) >= self.lm.vocab_size:
            raise UserError(
                f"example {number} has the token {max(ids)} in {block}_ids, and {self.lm.name!r} knows ids below "
                f"{self.lm.vocab_size}: they were made by another tokenizer"
            )
        instruction, response = self._text(example, "prompt"), self._text(example, block)
        whole, cut = self.lm.encode(instruction), 0
        while True:
            better, worse = (self._request(quality, instruction, response) for quality in (self.better, self.worse))
            over = max(len(better), len(worse)) + len(ids) - self._room()
            if over <= 0:
                return better, worse
            if not instruction:
                return None
            cut += int(over)
            instruction = self.lm.decode(whole[cut:])

    def _request(self, quality: str, instruction: str, response: str) -> list[int]:
        text = self.template.format(quality=quality, instruction=instruction, response=response)
        return self.lm.chat(text if getattr(self.lm.tokenizer, "chat_template", None) else text + OPENING)

    def _room(self) -> float:
        most = getattr(self.lm.model.config.get_text_config(), "max_position_embeddings", None)
        return min(most or inf, self.max_length or inf)

    def _text(self, example: Example, name: str) -> str:
        text = example.get(name)
        return text if isinstance(text, str) else self.lm.decode(example[f"{name}_ids"])
