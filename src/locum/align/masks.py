"""Masks over response tokens, read off a reference model: one number >= 0 per token, for a method to weigh its terms with.

A mask is a `Signal` that gives the columns "mask_u" (the log-ratio's weight) and "mask_d" (the KL's). Some are computed
(`MaPO`, `RandomMask`, a `FunctionMask` of one's own), some are learned along with the policy (`LearnedMask`). The number
of token y_t is made at the position that predicts it, from the prefix alone; only MaPO's rescaling looks at the whole
response. `locum.align.statistics.token_signals` shows what a mask says of texts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from locum.align.base import PairBatch, Signal
from locum.errors import UserError
from locum.tokens.tiles import Scores, over_tiles

__all__ = ["ComputedMask", "FunctionMask", "LearnedMask", "MaPO", "MaskNetwork", "RandomMask", "rescaled"]

PLACES = ("mlp", "attention", "residual", "logits")
PerToken = Float[Tensor, " n"]


class ComputedMask(Signal, ABC):
    """One mask for both terms, without parameters."""

    @abstractmethod
    def mask(self, ref: Scores, batch: PairBatch) -> Tensor:
        """One number >= 0 per response token, row by row, [n]."""

    def forward(self, ref: Scores, batch: PairBatch) -> dict[str, PerToken]:
        m, n = self.mask(ref, batch), len(ref)
        if m.shape != (n,):
            raise UserError(f"a mask must have one number per response token, shape [{n}], got {list(m.shape)}")
        if not bool((ok := (m >= 0) & m.isfinite()).all()):
            at = int((~ok).nonzero()[0])
            raise UserError(f"a mask must be finite and >= 0, got {m[at].item()} at response token {at} of the batch")
        return {"mask_u": m, "mask_d": m}


class FunctionMask(ComputedMask):
    """A mask of one's own.

    Args:
        function: of the reference's scores at the n response tokens of a batch (with what the taps kept) and the batch.
        taps: what to listen to in the reference, `locum.models.scoring.score`.
    """

    def __init__(
        self,
        function: Callable[[Scores, PairBatch], Tensor],
        taps: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.function, self.taps = function, taps or {}

    def mask(self, ref: Scores, batch: PairBatch) -> Tensor:
        return self.function(ref, batch)


class RandomMask(ComputedMask):
    """A number from U(0, 1) per token, drawn anew for every batch: the control."""

    def mask(self, ref: Scores, batch: PairBatch) -> Tensor:
        return torch.rand(len(ref), device=ref.hidden.device)


class MaPO(ComputedMask):
    """The reference's mean activation at each token, rescaled over the response and averaged over places of the model.

    Args:
        places: kinds of places, each as heavy as the others: "mlp", "attention" (what these add to the residual stream, every
            layer), "residual" (the stream after every layer), "logits" (one place).
    """

    def __init__(self, places: Sequence[str] = PLACES) -> None:
        super().__init__()
        self.places = tuple(places)
        self.taps = {place: _mean for place in self.places if place != "logits"}

    def mask(self, ref: Scores, batch: PairBatch) -> Tensor:
        kinds = []
        for place in self.places:
            means = over_tiles(_mean, [ref]) if place == "logits" else ref.taps[place]
            kinds.append(rescaled(torch.stack(tuple(means)), batch.mask).mean(0))
        return torch.stack(kinds).mean(0)


def rescaled(values: Float[Tensor, "places n"], mask: Bool[Tensor, "rows T"]) -> Float[Tensor, "places n"]:
    """Each place's numbers moved to [0, 1] within a row's tokens, (a - min)/(max - min); 1 where all of a row are equal."""
    rows = values.new_zeros((len(values), *mask.shape))
    rows[:, mask] = values
    low = rows.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
    high = rows.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    return torch.where(high > low, (rows - low) / (high - low), 1.0)[:, mask]


class MaskNetwork(nn.Module):
    """One number >= 0 per token from hidden states h_l, with a layer norm LN that all layers share:

        m_l = ReLU(W_l LN(h_l) + b_l),    m = ReLU(sum_l v_l m_l)

    Args:
        layers: how many; 1 has no mixer v.
        hidden_size: of the reference.
        width: of a linear hidden layer in each W_l; 0 for none.
        dropout: of m_l and m, in training.
        init: "paper" N(0, 0.02) and biases 0; "torch" PyTorch's; "ones" m = 1 everywhere.
    """

    def __init__(
        self,
        layers: int,
        hidden_size: int,
        width: int = 0,
        dropout: float = 0.0,
        init: Literal["paper", "torch", "ones"] = "paper",
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.ends = nn.ModuleList(nn.Linear(width or hidden_size, 1) for _ in range(layers))
        self.starts = nn.ModuleList(nn.Linear(hidden_size, width) for _ in range(layers)) if width else None
        self.mixer = nn.Linear(layers, 1, bias=False) if layers > 1 else None
        self.dropout = nn.Dropout(dropout)
        if init != "torch":
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        if init == "ones":
            for end in self.ends:
                nn.init.zeros_(end.weight)  # type: ignore[arg-type]
                nn.init.ones_(end.bias)  # type: ignore[arg-type]
            if self.mixer is not None:
                nn.init.constant_(self.mixer.weight, 1 / layers)

    def forward(self, hidden: Sequence[Float[Tensor, "n H"]]) -> PerToken:
        if len(hidden) != len(self.ends):
            raise UserError(f"the mask network was made for {len(self.ends)} layers; the reference shows {len(hidden)}")
        with torch.autocast(hidden[0].device.type, enabled=False):
            layers = [
                # only h, in the reference's own precision, is kept for the backward pass
                checkpoint(self._layer, at, h, use_reentrant=False) if torch.is_grad_enabled() else self._layer(at, h)
                for at, h in enumerate(hidden)
            ]
            m = torch.cat(layers, -1)
            return (m if self.mixer is None else self.dropout(self.mixer(m).relu()))[:, 0]

    def _layer(self, at: int, h: Float[Tensor, "n H"]) -> Float[Tensor, "n 1"]:
        x = self.norm(h.to(self.norm.weight.dtype))
        if self.starts is not None:
            x = self.dropout(self.starts[at](x))
        return self.dropout(self.ends[at](x).relu())


class LearnedMask(Signal):
    """Masks that are trained together with the policy.

    Args:
        reward: makes the log-ratio's mask.
        kl: makes the KL's mask; None for the same one.
        tap: "residual" for the hidden states of all layers, "last" for the last one.
        binary: 1 where the network is above 0. No gradient passes, so the network stays as it was made.
        lr: None for the policy's.
        weight_decay: of matrices; norms and biases have none.
        dead_after: training steps in a row without any reward mask above 0 that end in an error; 0 for never.
    """

    def __init__(
        self,
        reward: MaskNetwork,
        kl: MaskNetwork | None = None,
        *,
        tap: Literal["residual", "last"] = "residual",
        binary: bool = False,
        lr: float | None = None,
        weight_decay: float = 0.01,
        dead_after: int = 20,
    ) -> None:
        super().__init__()
        self.reward, self.kl, self.tap, self.binary = reward, kl, tap, binary
        self.lr, self.weight_decay, self.dead_after = lr, weight_decay, dead_after
        self.taps, self.idle = {tap: _all}, 0
        self.requires_grad_(not binary)

    def forward(self, ref: Scores, batch: PairBatch) -> dict[str, PerToken]:
        hidden = ref.taps[self.tap][-1:] if self.tap == "last" else ref.taps[self.tap]
        masks = [network(hidden) for network in (self.reward, self.kl) if network is not None]
        if self.binary:
            masks = [(m > 0).to(m.dtype) for m in masks]
        if self.dead_after and self.training and torch.is_grad_enabled():
            self._watch(masks[0])
        return {"mask_u": masks[0], "mask_d": masks[-1]}

    def _watch(self, mask: PerToken) -> None:
        """A ReLU that is 0 everywhere passes no gradient, to the policy or to itself: such a run never recovers."""
        self.idle = 0 if bool((mask > 0).any()) else self.idle + 1
        if self.idle >= self.dead_after:
            raise UserError(
                f"the mask was 0 on every token of {self.idle} steps in a row, so nothing is trained any more: "
                "use mask_init='ones', a smaller mask_lr, or smaller lambda_u and lambda_d"
            )

    def groups(self, lr: float) -> list[dict[str, Any]]:
        trained = [p for p in self.parameters() if p.requires_grad]
        matrices, others = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
        rate = lr if self.lr is None else self.lr
        both = [(matrices, self.weight_decay), (others, 0.0)]
        return [{"params": params, "lr": rate, "weight_decay": decay} for params, decay in both if params]


def _mean(x: Float[Tensor, "n D"]) -> PerToken:
    return x.mean(-1, dtype=torch.promote_types(x.dtype, torch.float32))


def _all(x: Tensor) -> Tensor:
    return x
