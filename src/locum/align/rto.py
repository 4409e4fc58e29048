"""DPO Meets PPO: Reinforced Token Optimization for RLHF

Expensive: a reward for each token, from people or from a trained process reward model.
Stands in: the log-ratio of a DPO-trained model to its reference at each sampled token, handed to PPO.
Check: sums and optimal policies agree with a hidden dense reward in small decision processes, and learning is faster
    than with the same total paid last.

A response is a walk through a token MDP: state s_h = (x, y_<h), action y_h, and the next state is known. With a dense
reward r and a pull beta to the reference, the best policy has, along every response of H tokens,

    sum_h beta log pi*(y_h|s_h)/ref(y_h|s_h) = sum_h r(s_h, y_h) - V*(s_1)

and each summand is r(s_h, y_h) + V*(s_{h+1}) - V*(s_h): the dense reward, shaped by a potential, so it has the same
best policy. V*(s_1) belongs to the prompt and cancels in a pair: what DPO fits to pairs of whole responses is pi*, and
its log-ratio may stand for the reward that nobody labelled. With pi_old the policy that sampled y (eq. 4.7):

    d_h = beta_1 log(pi_dpo/ref)(y_h|s_h)
    r_h = d_h - beta_2 log(pi_old/ref)(y_h|s_h) + [h = H] beta_3 r_MLE(x, y)

r_MLE is a score for the whole response, in standard deviations; beta_3 = 0 drops it. d_h may be paid elsewhere; "token",
"sentence" and "eos" pay the same in total, "shaped" and "none" what plain PPO pays:

    placement    where d_h goes
    "token"      to its own token                                  the method, RTO
    "sentence"   to the end of its sentence                        Semi-RTO
    "eos"        to the last token                                 DDPO
    "shaped"     to its own token, minus the sum on the last one   RS-PPO
    "none"       nowhere                                           PPO

Then PPO: advantages by GAE with a critic V (without: the discounted reward to go), whitened over all tokens of the
round; and with rho_t = pi/pi_old

    L = mean over rows of means over tokens of  -min(rho A, clip(rho, 1 +- clip_eps) A) + l_V
    l_V = max((V - R)^2, (clip(V, V_old +- value_clip) - R)^2)/2

Shapes: all of these [rows, tokens], nats; scores [rows]. Cost of a round: sampling, one forward each of policy, reference
and DPO model (one more than PPO), and the scorer. A batch of the loss needs the policy alone, with a critic the
reference's hidden states too. No forward keeps logits of more than a tile of tokens.

Traps. The reference in d_h is the one that the DPO model was trained against; where the policy starts elsewhere, give it as
"dpo_ref". A response that was cut has its terminal reward on its last token all the same; the share of such is logged. The
penalty is a signed estimate, never an absolute value. Log-probabilities are those of temperature 1, at which the round
samples. A limit on the norm of all gradients together would let the critic slow the policy down.

Example:
    >>> import torch
    >>> from locum.align.rto import token_rewards
    >>> logp = {"dpo": [-1.0, -0.5, -0.2], "ref": [-1.2, -0.4, -0.2], "old": [-1.1, -0.6, -0.1]}
    >>> dpo, ref, old = (torch.tensor([x]) for x in logp.values())
    >>> for placement in ("token", "eos", "none"):
    ...     r = token_rewards(dpo, ref, old, torch.ones(1, 3).bool(), torch.tensor([0.7]), placement=placement)
    ...     print(placement, [round(x, 3) for x in r[0].tolist()])
    token [0.009, -0.003, 0.699]
    eos [-0.001, 0.002, 0.704]
    none [-0.001, 0.002, 0.699]

Authors: Zhong, Shan, Feng, Xiong, Cheng, Zhao, He, Bian, Wang
Year: 2025
Venue: ICML 2025
arXiv: 2404.18922
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from locum.align.base import Example, Logs, Method, PerToken, TokenStats
from locum.align.critics import Critic
from locum.align.rounds import Online, Round
from locum.errors import UserError
from locum.method import require
from locum.models.vocabulary import Vocabulary
from locum.tokens import ppo
from locum.tokens.logprobs import log_ratio, masked_mean, masked_sum

__all__ = ["RTO", "sentence_ends", "token_rewards"]

Placement = Literal["token", "sentence", "eos", "shaped", "none"]
Given = Float[Tensor, "_ _"]  # what `token_rewards` compares itself, to name both shapes


@dataclass(frozen=True)
class RTO(Method, Online):
    """PPO whose reward has the implicit token reward of a DPO-trained model in it.

    Args:
        placement: where the implicit reward is paid: "token", "sentence", "eos", "shaped", or "none" for plain PPO.
        beta_1: weight of the implicit reward, >= 0. Paper 0.05; 0.1 for summaries.
        beta_2: penalty for leaving the reference, >= 0. Paper 0.01; 0.05 for summaries.
        beta_3: weight of the score of the whole response, >= 0; 0 asks for none. Paper 1.
        clip: limit of a token's implicit reward, after its weight, > 0; None for none, as in the paper. The authors' script 0.05.
        clip_eps: how far the ratio to the sampling policy may go and still be rewarded, > 0. Paper 0.2.
        value_clip: how far a value may go from the old one and still be rewarded, > 0. Paper 0.2.
        lam: of GAE, in [0, 1]. Paper 0.95.
        gamma: what a token's reward is worth one token earlier, in [0, 1]. Paper 1.
        critic: whether a critic is trained; without, the advantage is the reward to go.
        critic_lr: learning rate of the critic, > 0. The paper's 9e-6 is for a critic as large as the policy; here it is a
            small head on the reference.
        delimiters: token ids that end a sentence (`sentence_ends`), for the placement "sentence".
        reward_mean: the scores' mean on samples of the reference; it is taken from them.
        reward_std: their standard deviation there, > 0; they are divided by it.
        reward_limit: limit of a score after that, > 0. Reference code 10.
        dpo_ref: whether the DPO model was trained against another model than the policy's reference; it is then given as the
            frozen model "dpo_ref".
    """

    placement: Placement = "token"
    beta_1: float = 0.05
    beta_2: float = 0.01
    beta_3: float = 1.0
    clip: float | None = None
    clip_eps: float = 0.2
    value_clip: float = 0.2
    lam: float = 0.95
    gamma: float = 1.0
    critic: bool = True
    critic_lr: float = 1e-3
    delimiters: tuple[int, ...] = ()
    reward_mean: float = 0.0
    reward_std: float = 1.0
    reward_limit: float = 10.0
    dpo_ref: bool = False
    blocks: ClassVar[tuple[str, ...]] = ("response",)
    columns: ClassVar[tuple[str, ...]] = ("old_logp", "advantage", "return", "old_value")

    def __post_init__(self) -> None:
        require(self, "placement", self.placement in get_args(Placement), f"one of {', '.join(get_args(Placement))}")
        for name in ("beta_1", "beta_2", "beta_3"):
            require(self, name, 0 <= getattr(self, name) < math.inf, "finite and >= 0")
        require(self, "clip", self.clip is None or self.clip > 0, "None or > 0")
        for name in ("clip_eps", "value_clip", "reward_limit"):
            require(self, name, getattr(self, name) > 0, "> 0")
        for name in ("lam", "gamma"):
            require(self, name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name in ("critic_lr", "reward_std"):
            require(self, name, 0 < getattr(self, name) < math.inf, "finite and > 0")
        require(self, "reward_mean", math.isfinite(self.reward_mean), "finite")
        named = self.placement != "sentence" or len(self.delimiters) > 0
        require(self, "delimiters", named, 'at least one token id for placement="sentence" (see sentence_ends)')

    @classmethod
    def released(cls, **changes: Any) -> "RTO":
        """The settings of the authors' training script, which holds each token's implicit reward within 0.05."""
        return cls(**{"clip": 0.05, **changes})

    @property
    def frozen(self) -> tuple[str, ...]:
        dense = () if self.placement == "none" else ("dpo", "dpo_ref") if self.dpo_ref else ("dpo",)
        return ("ref", *dense)

    @property
    def scored(self) -> tuple[str, ...]:
        return ("ref",) if self.critic else ()

    def signal(self, layers: int, hidden_size: int) -> Critic | None:
        return Critic(hidden_size, self.critic_lr) if self.critic else None

    @property
    def needs_labeller(self) -> bool:
        return self.beta_3 > 0

    def collect(self, round: Round, prompts: Sequence[Example]) -> list[Example]:
        """One response of the policy per prompt, with what the loss needs of the round; `round.logs` says how it went.

        Raises: UserError for a labeller, a critic or a model that is missing, a score that is no number, or what
            `token_rewards` refuses.
        """
        self._check(round)
        examples = round.sample(prompts)
        score = self._scores(round, examples)
        found = round.signals(examples) if self.critic else []
        asked = ["policy", *(name for name in self.frozen if not found or name != "ref")]
        logp = {name: _padded(round.log_probs(name, examples)) for name in asked}
        logp |= {"ref": _padded([row["logp_ref"] for row in found])} if found else {}
        ids = [torch.as_tensor(e["response_ids"], dtype=torch.long) for e in examples]
        mask = _padded([torch.ones(len(y), dtype=torch.bool) for y in ids])
        reward = token_rewards(
            logp.get("dpo"),
            logp["ref"],
            logp["policy"],
            mask,
            score,
            placement=self.placement,
            beta_1=self.beta_1,
            beta_2=self.beta_2,
            beta_3=self.beta_3,
            clip=self.clip,
            ends=torch.isin(_padded(ids), torch.tensor(self.delimiters, dtype=torch.long)),
            logp_dpo_ref=logp.get("dpo_ref"),
        )
        value = _padded([row["value"] for row in found]) if found else torch.zeros_like(reward)
        advantage, returns = ppo.gae(reward, value, mask, self.gamma, self.lam if self.critic else 1.0)
        made = {
            "old_logp": logp["policy"],
            "logp_ref": logp["ref"],
            "advantage": ppo.whiten(advantage, mask),
            "return": returns,
            "old_value": value,
        }
        kl = masked_sum(log_ratio(logp["policy"], logp["ref"]), mask)
        round.logs.update(
            {
                "reward": float(reward.sum(-1).mean()),
                "kl": float(kl.mean()),
                "length": float(mask.sum(-1).double().mean()),
                "truncated": sum(bool(e.get("truncated")) for e in examples) / len(examples),
            }
            | ({} if score is None else {"score": float(score.mean())})
        )
        return [
            {**e, **{f"response_{name}": x[i, : len(ids[i])] for name, x in made.items()}}
            for i, e in enumerate(examples)
        ]

    def __call__(self, s: TokenStats) -> tuple[Float[Tensor, ""], Logs]:
        assert s.logp is not None
        ratio = ppo.ratio(s.logp, s.columns["old_logp"])
        gain = ppo.clipped_policy(ratio, s.columns["advantage"], self.clip_eps, self.clip_eps)
        loss = masked_mean(gain, s.mask).mean()
        with torch.no_grad():
            beyond = ((ratio - 1).abs() > self.clip_eps).to(ratio.dtype)
            logs = {"loss/policy": loss, "ratio/clipped": masked_mean(beyond, s.mask).mean()}
            logs["kl/old"] = masked_mean(ratio - 1 - ratio.log(), s.mask).mean()
            if s.d is not None:
                logs["kl/ref"] = masked_sum(s.d, s.mask).mean()
        if self.critic:
            error = ppo.clipped_value(s.columns["value"], s.columns["old_value"], s.columns["return"], self.value_clip)
            logs["loss/value"] = masked_mean(error, s.mask).mean()
            loss = loss + logs["loss/value"]
        return loss, {name: x.detach() for name, x in logs.items()}

    def _check(self, round: Round) -> None:
        if self.beta_3 > 0 and round.labeller is None:
            raise UserError(f"RTO with beta_3={self.beta_3} scores whole responses: give a labeller, or set beta_3=0")
        if self.critic and round.signal is None:
            raise UserError(
                "RTO with a critic needs the critic in the round, and there is none: give it, or set critic=False"
            )
        if missing := [name for name in self.frozen if name not in round.scorers]:
            raise UserError(f"RTO needs the model {missing[0]!r} beside the policy; none was given")

    def _scores(self, round: Round, examples: Sequence[Example]) -> Float[Tensor, " rows"] | None:
        if self.beta_3 == 0 or round.labeller is None:
            return None
        score = torch.as_tensor(round.labeller(examples), dtype=torch.float32)
        if score.isnan().any():
            raise UserError(
                f"the labeller gave nan to response {int(score.isnan().nonzero()[0])}; a score must be a number"
            )
        return ((score - self.reward_mean) / self.reward_std).clamp(-self.reward_limit, self.reward_limit)


@torch.no_grad()
def token_rewards(
    logp_dpo: Given | None,
    logp_ref: Given,
    logp_old: Given,
    mask: Bool[Tensor, "rows tokens"],
    score: Float[Tensor, " rows"] | None = None,
    *,
    placement: Placement = "token",
    beta_1: float = 0.05,
    beta_2: float = 0.01,
    beta_3: float = 1.0,
    clip: float | None = None,
    ends: Bool[Tensor, "rows tokens"] | None = None,
    logp_dpo_ref: Given | None = None,
) -> PerToken:
    """r_h of every token (eq. 4.7), 0 outside the mask: fit for any trainer that takes rewards per token.

    Args:
        logp_dpo, logp_ref, logp_old: log-probability of each token under the DPO model, the reference and the policy that
            sampled; [rows, tokens]. The first may be None for placement "none".
        mask: true on response tokens, the end of sequence too; padding on either side.
        score: one per response, paid on its last token; None pays nothing.
        placement, beta_1, beta_2, beta_3, clip: as `RTO`'s.
        ends: true on tokens that end a sentence, for placement "sentence"; what follows the last such goes to the last token.
        logp_dpo_ref: the reference of the DPO model, where it is another one.

    Raises: UserError for shapes that differ, a response without a token, a weight < 0, and log-probabilities that are not
        finite, with their place; with `clip` only nan is refused, a token that one model rules out counts as the limit.
    """
    given = {"DPO model": logp_dpo, "reference": logp_ref, "sampling policy": logp_old, "DPO reference": logp_dpo_ref}
    _refuse({who: x for who, x in given.items() if x is not None}, mask, clip is not None)
    for name, weight in (("beta_1", beta_1), ("beta_2", beta_2), ("beta_3", beta_3)):
        if not weight >= 0:
            raise UserError(f"{name} must be >= 0, got {weight}")
    penalty = beta_2 * log_ratio(logp_old, logp_ref)
    if clip is not None:
        penalty = penalty.nan_to_num(nan=0.0, posinf=clip, neginf=-clip)
    reward = -penalty
    if placement != "none":
        if logp_dpo is None:
            raise UserError(
                f"placement {placement!r} pays the DPO model's reward, and no log-probabilities of it were given"
            )
        dense = beta_1 * log_ratio(logp_dpo, logp_ref if logp_dpo_ref is None else logp_dpo_ref)
        if clip is not None:
            dense = dense.nan_to_num(nan=0.0).clamp(-clip, clip)
        reward = reward + _placed(torch.where(mask, dense, 0.0), mask, placement, ends)
    if score is not None:
        reward = reward + ppo.at_last(beta_3 * score, mask)
    return torch.where(mask, reward, 0.0)


def _placed(dense: PerToken, mask: Tensor, placement: Placement, ends: Tensor | None) -> PerToken:
    if placement == "token":
        return dense
    if placement != "sentence":
        whole = ppo.at_last(dense.sum(-1), mask)
        return whole if placement == "eos" else dense - whole
    if ends is None:
        raise UserError("placement 'sentence' needs `ends`: which tokens end a sentence")
    closes = (ends & mask) | ppo.is_last(mask)
    number = closes.cumsum(-1) - closes.long()  # of the sentence that a token is in
    sums = torch.zeros_like(dense).scatter_add(-1, number, dense)
    return torch.where(closes, sums.gather(-1, number), 0.0)


def _refuse(logps: Mapping[str, Tensor], mask: Tensor, limited: bool) -> None:
    for who, x in logps.items():
        if x.shape != mask.shape:
            raise UserError(
                f"the {who}'s log-probabilities have shape {list(x.shape)} and the mask has {list(mask.shape)}; they must be the same"
            )
        bad = mask & ((x.isnan() | (x == math.inf)) if limited else ~x.isfinite())
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            token = int(mask[row, :column].sum())
            raise UserError(
                f"the {who} gives response token {token} of row {row} the log-probability {x[row, column].item()}; it must be "
                + ("a number" if limited else "finite, or `clip` set")
            )
    if not mask.any(-1).all():
        raise UserError(f"row {int((~mask.any(-1)).nonzero()[0])} has no response token")


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(rows), batch_first=True)


def sentence_ends(tokenizer: Any, marks: str = ".!?\n") -> tuple[int, ...]:
    """The ids of all tokens that end with one of the marks, quotes, brackets and blanks after it aside."""
    ends = tuple(mark.encode() for mark in marks)
    tokens = Vocabulary.of(tokenizer, len(tokenizer)).tokens
    return tuple(i for i, text in enumerate(tokens) if text and text.rstrip(b" \"')]").endswith(ends))
