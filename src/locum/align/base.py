"""What a method of preference optimisation is: per-token statistics in, a scalar out.

A batch holds blocks of responses, all of one block first: chosen, then rejected, and for some methods a third. For the
token y_t of a response, at the state s_t that predicts it, a method sees

    d_t = log pi(y_t|s_t) - log ref(y_t|s_t)        the gradient flows through pi only
    k_t = KL(ref(.|s_t) || pi(.|s_t))               over the whole vocabulary, if it asks for it

and whatever columns it declares. Most methods are one formula, `AlignLoss`,

    z = beta [ sum_chosen (a_t d_t + b_t k_t) - sum_rejected (a_t d_t + b_t k_t) ],    L = mean of -log sigmoid(z) + extra

and say only what a and b are. Sums run over response tokens, end of sequence included; never means.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from locum.errors import UserError
from locum.method import require
from locum.tokens import tiles
from locum.tokens.logprobs import masked_sum
from locum.tokens.tiles import Tile

__all__ = ["AlignLoss", "Example", "Logs", "Method", "PairBatch", "PerToken", "TokenStats"]

PerToken = Float[Tensor, "rows tokens"]
Logs = dict[str, Tensor]
Example = Mapping[
    str, Any
]  # "prompt_ids", "<block>_ids" per block, and "<block>_<column>": one number per response token


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Texts of a batch, block after block, all padded to one width on either side.

    Args:
        ids, attention_mask: [rows, L]; attention_mask 0 is padding.
        completion_mask: true on response tokens, their end of sequence included.
        blocks: how many blocks of responses the rows are; row i of each belongs to the same prompt.
        columns: what the data knows per token, [rows, L - 1]: entry t belongs to the token ids[:, t + 1]; 0 elsewhere.
    """

    ids: Int[Tensor, "rows L"]
    attention_mask: Shaped[Tensor, "rows L"]
    completion_mask: Bool[Tensor, "rows L"]
    blocks: int = 2
    columns: Mapping[str, Float[Tensor, "rows _"]] = field(default_factory=dict)

    @property
    def mask(self) -> Bool[Tensor, "rows _"]:
        """True where a response token is predicted, [rows, L - 1]."""
        return self.completion_mask[:, 1:]

    @property
    def targets(self) -> Int[Tensor, " n"]:
        """The response tokens, row by row."""
        return self.ids[:, 1:][self.mask]

    def to(self, device: torch.device | str) -> "PairBatch":
        """The batch on a device."""
        ids, real, done = (x.to(device) for x in (self.ids, self.attention_mask, self.completion_mask))
        return PairBatch(ids, real, done, self.blocks, {name: x.to(device) for name, x in self.columns.items()})

    def spread(self, values: Float[Tensor, " n"]) -> Float[Tensor, "rows _"]:
        """Numbers of the response tokens, row by row, put at their places [rows, L - 1]; 0 elsewhere."""
        return torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device).masked_scatter(self.mask, values)


@dataclass(frozen=True, eq=False)
class TokenStats:
    """What a loss sees: rows are responses, block after block; a column predicts one token. Natural logs.

    Args:
        d: log pi/ref of the token that came; gradient through pi. None for a method without a reference.
        mask: true on response tokens, the end of sequence too.
        k: KL(ref || pi) at that state, for methods that need "kl".
        logp: log pi of the token.
        blocks: how many blocks the rows are.
        columns: what else belongs to a token, by name.
    """

    d: PerToken | None
    mask: Bool[Tensor, "rows tokens"]
    k: PerToken | None = None
    logp: PerToken | None = None
    blocks: int = 2
    columns: Mapping[str, PerToken] = field(default_factory=dict)

    @property
    def is_chosen(self) -> Bool[Tensor, "rows 1"]:
        """True in the first block's rows."""
        rows = torch.arange(len(self.mask), device=self.mask.device)
        return (rows < len(self.mask) // self.blocks)[:, None]

    def sums(self, x: PerToken) -> tuple[Float[Tensor, " pairs"], ...]:
        """Sum over each response's tokens, block by block."""
        return masked_sum(x, self.mask).chunk(self.blocks)

    def per_block(self, x: PerToken) -> tuple[Float[Tensor, "pairs tokens"], ...]:
        """The rows of each block."""
        return x.chunk(self.blocks)


@dataclass(frozen=True)
class Method(ABC):
    """A way to train on responses. Class variables say what it must be given; all have a default that asks for nothing.

    `needs`: statistics beyond log-probabilities ("kl"). `columns`: numbers per response token that come with the data.
    `blocks`: the responses of an example. `frozen`: the models beside the policy, "ref" first where there is one.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    columns: ClassVar[tuple[str, ...]] = ()
    blocks: ClassVar[tuple[str, ...]] = ("chosen", "rejected")

    @property
    def frozen(self) -> tuple[str, ...]:
        """The models beside the policy."""
        return ("ref",)

    @property
    def scored(self) -> tuple[str, ...]:
        """Those of them that the loss needs in every batch: fewer where they were asked before, when the data was made."""
        return self.frozen

    @abstractmethod
    def __call__(self, s: TokenStats) -> tuple[Float[Tensor, ""], Logs]:
        """The loss, and what is logged beside it (detached)."""

    def per_token(self, z: Mapping[str, Tile], ids: Int[Tensor, " r"]) -> Logs:
        """What is made of one tile of logits [r, V] per model: "logp", "logp_ref", "k", or a column of `TokenStats`."""
        out = {"logp": tiles.log_prob(z["policy"], ids)}
        if "ref" in z:
            out["logp_ref"] = tiles.log_prob(z["ref"], ids)
        if "kl" in self.needs:
            out["k"] = tiles.divergence(z["ref"], z["policy"])
        return out

    def signal(self, layers: int, hidden_size: int) -> "Signal | None":
        """Token columns that are made from the reference's forward, batch by batch; None for methods without."""
        return None


class Signal(nn.Module, ABC):
    """Token columns from inside the reference's forward: a mask network, a critic. It may have parameters; they are trained.

    `taps` is what to listen to in the reference (`locum.models.scoring.score`).
    """

    taps: Mapping[str, Any] = {}

    @abstractmethod
    def forward(self, ref: tiles.Scores, batch: PairBatch) -> dict[str, Float[Tensor, " n"]]:
        """Columns at the response tokens, row by row, from the reference's scores there."""

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Its parameters as groups of an optimizer; `lr` is the policy's."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr, "weight_decay": 0.0}]


@dataclass(frozen=True)
class AlignLoss(Method):
    """The shared formula. A method says what a token scores, and what is added to the loss.

    Args:
        beta: pull towards the reference, > 0.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        require(self, "beta", 0 < self.beta < float("inf"), "finite and > 0")

    @abstractmethod
    def score(self, s: TokenStats) -> PerToken:
        """a_t d_t + b_t k_t, in nats; masked and summed over the response below, and refused where that is not finite."""

    def extra(self, s: TokenStats, z: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"] | float:
        """What is added to each pair's loss; z is the margin."""
        return 0.0

    def target(self) -> float:
        """What the chosen response's sum must be ahead by; it is taken off z."""
        return 0.0

    def logs(self, s: TokenStats) -> Logs:
        """More to log, detached."""
        return {}

    def __call__(self, s: TokenStats) -> tuple[Float[Tensor, ""], Logs]:
        chosen, rejected, *_ = (self.beta * x for x in s.sums(self.score(s)))
        z = chosen - rejected - self.target()
        if not torch.isfinite(z).all():
            pair = int((~torch.isfinite(z)).nonzero()[0])
            raise UserError(
                f"pair {pair} of the batch has the margin {z[pair].item()}: a response token is impossible under the policy "
                "or the reference, the policy rules out what the reference says, or logits or a column are not finite"
            )
        preference, extra = -F.logsigmoid(z), self.extra(s, z)
        loss = (preference + extra).mean()
        with torch.no_grad():
            logs = {
                "rewards/chosen": chosen.mean(),
                "rewards/rejected": rejected.mean(),
                "rewards/margins": (chosen - rejected).mean(),
                "rewards/accuracies": (chosen > rejected).to(z.dtype).mean(),
            }
            if isinstance(extra, Tensor):
                logs |= {"loss/preference": preference.mean(), "loss/extra": extra.mean()}
            if s.k is not None:
                logs |= {f"kl/{name}": x.mean() for name, x in zip(self.blocks, s.sums(s.k), strict=True)}
            logs |= self.logs(s)
        return loss, {name: value.detach() for name, value in logs.items()}
