"""AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation

Expensive: RLHF with a reward at every token, a critic and noisy policy gradients.
Stands in: Distillation towards a teacher extrapolated from the logits of two DPO models.
Check: On small trees the RLHF objective equals minus the distillation loss plus a known term.

RLHF with DPO's reward maximises, over the policy's own responses,

    J(pi) = E_{y ~ pi} sum_t [ beta_0 log dpo/ref (y_t|s_t) - beta log pi/ref (y_t|s_t) ]

With w = beta_0 / beta, a state's share of it is a divergence from a law p* that mixes logits, and a number without pi:

    J(pi) = E_{y ~ pi} sum_t [ -beta KL(pi(.|s_t) || p*(.|s_t)) + beta log Z(s_t) ]
    p*(.|s) = softmax(w z_dpo + (1-w) z_ref),    Z(s) = sum_v ref(v|s) (dpo(v|s) / ref(v|s))^w

so a policy can be distilled towards p*, with a target for every token of the vocabulary instead of one noisy number for
the token that came. At beta = beta_0, Z is 1 everywhere and p* = dpo is the optimum. Otherwise p* is the best policy
of an agent that does not look ahead to the log Z of the states its tokens lead to (the paper's theorem 1 leaves log Z
out); on random trees J(p*) lies close below the optimum and above J(dpo). The other reward is beta_0 log dpo/reverse,
where `reverse` is a DPO model of the same pairs with chosen and rejected exchanged; with dpo in ref's place as the
anchor, the teacher extrapolates. Per state, with D = 1/2 sum_v |dpo - reverse| in [0, 1] and alpha = r D + eps:

    "dpo_ref"           p* = softmax(z_ref + w     (z_dpo - z_ref))
    "contrastive"       p* = softmax(z_dpo + w     (z_dpo - z_reverse))
    "adaptive"          p* = softmax(z_dpo + alpha (z_dpo - z_reverse))     the paper's method
    "dpo_ref_adaptive"  p* = softmax(z_ref + alpha (z_dpo - z_ref))         D between dpo and ref

    L = mean over responses of 1/|y| sum_t beta_t KL(pi(.|s_t) || p*(.|s_t)),    beta_t = beta_0 / alpha_t

(where alpha is the constant w, beta_t is beta).

Responses are the data's chosen ones, or the policy's own (`OnlineAlignDistil`), whose sampling counts as constant. The
gradient in the policy's logits is beta_t pi (log pi/p* - KL) / |y|; nothing else has one.

Shapes: logits come as tiles [r, V], float32 at least; KL (nats), alpha and beta_t are [rows, L-1]. Cost per batch: the
forwards of policy and two frozen models, one backward. Logits exist for one tile of positions: about a dozen tensors of
32 MiB while it is worked on, whatever the batch.

Traps. The policy comes first in the KL. D is half the L1 distance: a factor on the whole L1 distance is r / 2. The reverse
model has its pairs exchanged, not the sign of beta. Where D is tiny, beta_t is large (beta_0 / eps) and the token is
pulled hard to dpo; `weight_by_beta` switches that off. Too large an r over-optimises: watch length and KL.

Example:
    >>> import torch
    >>> from locum.align.aligndistil import AlignDistil
    >>> up, down = torch.tensor([[1.0986, 0.0]]), torch.tensor([[0.0, 1.0986]])  # (3/4, 1/4) and (1/4, 3/4)
    >>> method = AlignDistil(r=2, eps=0)
    >>> seen = method.per_token({"policy": 0 * up, "dpo": up, "reverse": down}, torch.tensor([0]))
    >>> {name: round(seen[name].item(), 4) for name in ("alpha", "kl_dpo", "kl")}  # from (1/2, 1/2) to (27/28, 1/28)
    {'alpha': 1.0, 'kl_dpo': 0.1438, 'kl': 0.9911}

Authors: Zhang, Zhang, Zhang, Hu, Chen, Xu
Year: 2025
Venue: ACL 2025
arXiv: 2503.02832
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from locum.align.base import Example, Logs, Method, TokenStats
from locum.align.dpo import DPO
from locum.align.rounds import Online, Round
from locum.errors import UserError
from locum.method import require
from locum.tasks.token_mdp import Pairs
from locum.tokens import logprobs as lp
from locum.tokens import tiles
from locum.tokens.tiles import Tile

__all__ = ["AlignDistil", "OnlineAlignDistil", "both_ways", "swapped", "train_teachers"]

Trained = TypeVar("Trained")
Teacher = Literal["dpo_ref", "contrastive", "adaptive", "dpo_ref_adaptive"]


@dataclass(frozen=True)
class AlignDistil(Method):
    """Distillation towards the teacher on the chosen responses of the data.

    Args:
        teacher: how the teacher is made, see above. Paper "adaptive".
        beta_0: the beta that both DPO models were trained with, > 0. Paper 0.1.
        beta: KL strength of RLHF, > 0; of the two teachers that are not adaptive. Paper 0.1 and 0.05.
        r: extrapolation per unit of D, >= 0; of the adaptive teachers. The authors' code has 20 here and 30 on-policy.
        eps: the least alpha, >= 0; with 0 a state where both models agree has no finite beta_t. Paper 1e-3.
        length_norm: divide a response's sum by its length; long responses dominate otherwise.
        weight_by_beta: weight each state by beta_t, else by 1.
        temperature: divides the logits of policy and teacher in the KL, > 0. Paper 1.
    """

    teacher: Teacher = "adaptive"
    beta_0: float = 0.1
    beta: float = 0.1
    r: float = 20.0
    eps: float = 1e-3
    length_norm: bool = True
    weight_by_beta: bool = True
    temperature: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset({"laws"})
    blocks: ClassVar[tuple[str, ...]] = ("chosen",)

    def __post_init__(self) -> None:
        inf = float("inf")
        require(self, "teacher", self.teacher in get_args(Teacher), f"one of {', '.join(get_args(Teacher))}")
        for name in ("beta_0", "beta", "temperature"):
            require(self, name, 0 < getattr(self, name) < inf, "finite and > 0")
        for name in ("r", "eps"):
            require(self, name, 0 <= getattr(self, name) < inf, "finite and >= 0")

    @property
    def other(self) -> str:
        """The model that the reward compares dpo with."""
        return "ref" if self.teacher.startswith("dpo_ref") else "reverse"

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("ref", "dpo") if self.other == "ref" else ("dpo", "reverse")

    def teach(self, dpo: Tile, other: Tile) -> tuple[Tile, Float[Tensor, " r"]]:
        """The teacher's log-probabilities and alpha (or w), from log-probabilities of its two models."""
        if self.teacher in ("dpo_ref", "contrastive"):
            alpha = torch.full_like(dpo[:, 0], self.beta_0 / self.beta)
        else:
            alpha = self.r * 0.5 * (dpo.exp() - other.exp()).abs_().sum(-1) + self.eps
        return tiles.extrapolated(other if self.other == "ref" else dpo, dpo, other, alpha), alpha

    def per_token(self, z: Mapping[str, Tile], ids: Tensor) -> Logs:
        """KL from policy to teacher, "alpha", and what is watched: KL from policy to both models, log pi of the token."""
        with torch.no_grad():
            dpo, other, pi = (z[name].log_softmax(-1) for name in ("dpo", self.other, "policy"))
            target, alpha = self.teach(dpo, other)
            watched = {
                "alpha": alpha,
                "kl_dpo": tiles.kl_of(pi, dpo),
                "kl_other": tiles.kl_of(pi, other),
                "logp": pi.gather(-1, ids[:, None])[:, 0],
            }
        policy = z["policy"]
        if self.temperature != 1:
            policy, target = policy / self.temperature, (target / self.temperature).log_softmax(-1)
        return {"kl": tiles.distilled(policy, target), **watched}

    def __call__(self, s: TokenStats) -> tuple[Float[Tensor, ""], Logs]:
        kl, alpha, length = s.columns["kl"], s.columns["alpha"], s.mask.sum(-1)
        term = kl * (self.beta_0 / alpha.masked_fill(~s.mask, 1.0)) if self.weight_by_beta else kl
        rows = length > 0
        if not rows.any():
            raise UserError("no response of the batch has a token to distil at")
        if bad := int((~torch.isfinite(term) & s.mask).sum()):
            raise UserError(
                f"beta_t KL(policy || teacher) is not finite at {bad} of the batch's {int(length.sum())} response tokens: "
                "logits hold NaN, the policy says what a teacher rules out, or eps is 0 and both teachers agree"
            )
        each = lp.masked_sum(term, s.mask) / (length.clamp(min=1) if self.length_norm else 1)
        loss = each[rows].mean()
        with torch.no_grad():
            total = {name: lp.masked_sum(s.columns[name], s.mask)[rows].mean() for name in ("kl", "kl_dpo", "kl_other")}
            logs = {
                "kl/teacher": total["kl"],
                "kl/dpo": total["kl_dpo"],
                f"kl/{self.other}": total["kl_other"],
                "rewards/expected": self.beta_0 * (total["kl_other"] - total["kl_dpo"]),
                "alpha": alpha[s.mask].mean(),
                "length": length[rows].to(kl.dtype).mean(),
                "skipped": (~rows).sum().to(kl.dtype),
            }
        return loss, {name: value.detach() for name, value in logs.items()}


@dataclass(frozen=True)
class OnlineAlignDistil(AlignDistil, Online):
    """Distillation at the states of the policy's own responses: a round samples one per prompt, and uses it once.

    A round of one batch is the paper's algorithm; in a longer one the later batches are a little off-policy.

    Args:
        teacher, beta_0, beta, eps, length_norm, weight_by_beta, temperature: as `AlignDistil`.
        r: extrapolation per unit of D, >= 0; of the adaptive teachers. The authors' code has 30.
    """

    r: float = 30.0
    blocks: ClassVar[tuple[str, ...]] = ("response",)

    def collect(self, round: Round, prompts: Sequence[Example]) -> list[Example]:
        """The prompts with a response each, drawn at temperature 1; an empty one is left out and counted."""
        found = [example for example in round.sample(prompts) if len(example["response_ids"])]
        if not found:
            raise UserError(f"the policy answered none of the {len(prompts)} prompts with a token")
        round.logs["skipped"] = float(len(prompts) - len(found))
        return found


def swapped(pairs: Any) -> Any:
    """Preference pairs with chosen and rejected exchanged: `Pairs` of a table, or rows (text or token ids, with columns)."""
    if isinstance(pairs, Pairs):
        return Pairs(pairs.prompt, pairs.rejected, pairs.chosen)
    other = {"chosen": "rejected", "rejected": "chosen"}

    def name(key: str) -> str:
        block, *rest = key.split("_", 1)
        return "_".join([other.get(block, block), *rest])

    return [{name(key): value for key, value in row.items()} for row in pairs]


def both_ways(train: Callable[[str, Any], Trained], pairs: Any) -> dict[str, Trained]:
    """What ``train(name, pairs)`` makes of the pairs, as "dpo", and of the pairs swapped, as "reverse".

    On a table: ``both_ways(lambda _, pairs: TableScorer(mdp.fit_dpo(pairs, beta=0.1)), pairs)``.
    """
    return {"dpo": train("dpo", pairs), "reverse": train("reverse", swapped(pairs))}


def train_teachers(
    model: Any, pairs: Any, args: Any = None, *, beta_0: float = 0.1, **settings: Any
) -> dict[str, nn.Module | str]:
    """The DPO and the reverse DPO model of preference pairs, both from the policy as it is now; the policy stays as it is.

    Args:
        model: the start policy. Of a PEFT model, two more adapters are trained on its one base; else two copies.
        pairs, args, settings: as `locum.align.beside.train_beside`'s.
        beta_0: DPO's beta, > 0; the same in `AlignDistil`.

    Returns: what `Trainer` takes as `models` for `AlignDistil`.
    """
    from locum.align.beside import train_beside

    return both_ways(lambda name, rows: train_beside(model, name, DPO(beta=beta_0), rows, args, **settings), pairs)
