"""SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks

Expensive: labels that say which words of an answer carry the preference.
Stands in: non-negative token masks on the reward and KL terms, computed or learned from the reference's hidden states.
Check: masks of one give TDPO1, a zero KL mask gives DPO, and learned masks are larger where the preference lies.

TDPO's objective per token with beta replaced by beta m(y_t), so that a token may be held close to the reference or let
go. For response tokens t, d_t = log pi/ref (y_t|s_t) and k_t = KL(ref(.|s_t) || pi(.|s_t)), both with gradient, and two
masks m_u, m_d >= 0 (w chosen, l rejected):

    z = beta [ sum_w (m_u d + m_d k) - sum_l (m_u d + m_d k) ]
    L = -log sigmoid(z) + lambda_u sum_{w,l} m_u + lambda_d sum_{w,l} m_d

with sums over tokens and the mean over pairs. The masks' own gradient: dL/dm_u,t = -beta sigmoid(-z) d_t on chosen, + on
rejected; the same with k_t for m_d, so that it can only grow on chosen and only shrink on rejected responses. Where masks
come from:

    mapo         per place in the reference its mean activation a_t, rescaled over the response,
                 (a_t - min) / (max - min); averaged over places and over kinds of places
    common       m = ReLU(sum_l v_l ReLU(W_l LN(h_t^l) + b_l)), learned along; m_u = m_d = m.
                 h_t^l: hidden state of layer l at the position that predicts y_t; one LN for all
    independent  two such networks, one for m_u and one for m_d
    binary       1 where such a network, untrained, is above 0: no gradient passes a sign
    random       U(0, 1), drawn anew for every batch

The last two are ablations. With one mask for both terms lambda_u and lambda_d are halved, since it is counted twice. Mask
networks exist in training only: the trained policy is a plain model. They have an optimizer group of their own.

Shapes: d, k and masks [2B, L-1], chosen rows first; d and k in nats, masks without unit. Cost: TDPO's two forwards, and for
learned masks the reference's hidden states at response tokens, n x Lr x H in its own precision; MaPO keeps their means only.

Traps. A ReLU mask is a free temperature: it can grow and lower the loss without any alignment, so keep `mask_lr` small or
lambda above 0 and watch "mask/mean_u". Faithful initial masks are about 0.02, half of them 0: compare methods at equal beta
times mean mask, or start with `mask_init="ones"`, which is TDPO1. A mask that is 0 everywhere trains nothing any more; that
ends in an error. It can come early: at the first step d = k = 0, so that lambda alone moves the masks, downwards. MaPO sees
the whole response through its rescaling, and is 1 for a response of one token. Its places are what any Hugging Face model
shows; the authors' own model code has more of them inside each layer. For any other mask override `signal` and return a
`locum.align.masks.FunctionMask`.

Example:
    >>> import torch
    >>> from locum.align import DPO, SparsePO, TDPO1, TokenStats
    >>> d = torch.tensor([[0.4, -0.2], [0.1, 0.3]])
    >>> k = torch.tensor([[0.05, 0.10], [0.20, 0.01]])
    >>> m = torch.tensor([[1.0, 0.5], [0.0, 2.0]])
    >>> mask = torch.ones(2, 2, dtype=torch.bool)
    >>> def loss(method, m_u, m_d):
    ...     return round(method(TokenStats(d, mask, k, columns={"mask_u": m_u, "mask_d": m_d}))[0].item(), 6)
    >>> loss(SparsePO(beta=0.8), m, m), loss(SparsePO(beta=0.8, lambda_u=0.001, lambda_d=0.001), m, m)
    (0.785014, 0.788514)
    >>> one = torch.ones(2, 2)
    >>> loss(SparsePO(beta=0.8), one, one) == loss(TDPO1(beta=0.8), one, one)
    True
    >>> loss(SparsePO(beta=0.8), one, 0 * one) == loss(DPO(beta=0.8), one, one)
    True

Authors: Christopoulou, Cardenas, Lampouras, Bou-Ammar, Wang
Year: 2025
Venue: Findings of EMNLP 2025
arXiv: 2410.05102
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from locum.align.base import AlignLoss, Logs, PerToken, Signal, TokenStats
from locum.align.masks import PLACES, LearnedMask, MaPO, MaskNetwork, RandomMask
from locum.errors import UserError
from locum.method import require

__all__ = ["SparsePO"]

Mask = Literal["common", "independent", "mapo", "binary", "random"]
On = Literal["both", "reward", "kl"]
Init = Literal["paper", "torch", "ones"]
Layers = Literal["all", "last"]


@dataclass(frozen=True)
class SparsePO(AlignLoss):
    """DPO's and TDPO's terms weighed token by token with masks from the reference model.

    Args:
        beta: pull towards the reference, > 0. Paper 0.8 on IMDb and TL;DR, 0.1 on HH.
        mask: where m_u and m_d come from: "common" or "independent" (learned, SparsePO), "mapo" (computed), "binary" or
            "random" (ablations).
        on: what is masked: "both" terms, the "reward" (m_d = 1), or the "kl" (m_u = 1).
        lambda_u: weight of the L1 norm of learned m_u, >= 0. Paper 0, on HH 0.001.
        lambda_d: weight of the L1 norm of learned m_d, >= 0. Paper 0, on HH 0.001.
        mask_lr: learning rate of the mask networks, > 0; None for the policy's, as in the paper.
        mask_weight_decay: of the mask networks' matrices, >= 0. Paper 0.01.
        mask_dropout: in the mask networks, in [0, 1). The authors' code sets 0.01 and then switches all dropout off: 0.
        mask_init: "paper" N(0, 0.02) with biases 0, "torch" PyTorch's default, "ones" m = 1 everywhere.
        mask_layers: hidden states of "all" layers or of the "last" one.
        mask_width: width of a linear hidden layer in the mask networks; 0 for none, as in the paper; its ablation 200.
        places: MaPO's kinds of places, each as heavy as the others.
        dead_after: steps in a row with a reward mask of 0 everywhere that end in an error; 0 for never.
    """

    beta: float = 0.8
    mask: Mask = "common"
    on: On = "both"
    lambda_u: float = 0.0
    lambda_d: float = 0.0
    mask_lr: float | None = None
    mask_weight_decay: float = 0.01
    mask_dropout: float = 0.0
    mask_init: Init = "paper"
    mask_layers: Layers = "all"
    mask_width: int = 0
    places: tuple[str, ...] = PLACES
    dead_after: int = 20
    needs: ClassVar[frozenset[str]] = frozenset({"kl"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kinds in (("mask", Mask), ("on", On), ("mask_init", Init), ("mask_layers", Layers)):
            require(self, name, getattr(self, name) in get_args(kinds), f"one of {', '.join(get_args(kinds))}")
        require(self, "on", self.on == "both" or self.mask != "independent", "both for independent masks")
        for name, unused in (("lambda_u", "kl"), ("lambda_d", "reward")):
            weight, counts = getattr(self, name), self.learned and self.on != unused
            require(self, name, 0 <= weight < float("inf"), "finite and >= 0")
            require(self, name, counts or weight == 0, f"0 for mask={self.mask!r} and on={self.on!r}")
        require(self, "mask_lr", self.mask_lr is None or 0 < self.mask_lr < float("inf"), "finite and > 0, or None")
        require(self, "mask_weight_decay", 0 <= self.mask_weight_decay < float("inf"), "finite and >= 0")
        require(self, "mask_dropout", 0 <= self.mask_dropout < 1, "in [0, 1)")
        require(self, "mask_width", self.mask_width >= 0, ">= 0")
        known = bool(self.places) and set(self.places) <= set(PLACES) and len(set(self.places)) == len(self.places)
        require(self, "places", known, f"some of {', '.join(PLACES)}, none twice")
        require(self, "dead_after", self.dead_after >= 0, ">= 0")

    @property
    def learned(self) -> bool:
        """Whether the masks are trained."""
        return self.mask in ("common", "independent")

    def signal(self, layers: int, hidden_size: int) -> Signal:
        if self.mask == "mapo":
            return MaPO(self.places)
        if self.mask == "random":
            return RandomMask()
        depth = layers if self.mask_layers == "all" else 1
        networks = [
            MaskNetwork(depth, hidden_size, self.mask_width, self.mask_dropout, self.mask_init)
            for _ in range(2 if self.mask == "independent" else 1)
        ]
        return LearnedMask(
            *networks,
            tap="residual" if self.mask_layers == "all" else "last",
            binary=self.mask == "binary",
            lr=self.mask_lr,
            weight_decay=self.mask_weight_decay,
            dead_after=self.dead_after if self.on != "kl" else 0,
        )

    def score(self, s: TokenStats) -> PerToken:
        assert s.d is not None
        assert s.k is not None
        m_u, m_d = self._masks(s)
        return (s.d if m_u is None else m_u * s.d) + (s.k if m_d is None else m_d * s.k)

    def extra(self, s: TokenStats, z: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"] | float:
        once = 0.5 if self.on == "both" and self.mask != "independent" else 1.0  # a common mask is counted twice
        total: Tensor | float = 0.0
        for weight, m in zip((self.lambda_u, self.lambda_d), self._masks(s), strict=True):
            if weight and m is not None:
                total = total + once * weight * sum(s.sums(m))
        return total

    def logs(self, s: TokenStats) -> Logs:
        """Mean masks and the share of tokens where they are 0, per block; the KL as it is weighed."""
        found: Logs = {}
        for kind, m in zip("ud", self._masks(s), strict=True):
            if m is None:
                continue
            parts = zip(self.blocks, s.sums(m), s.sums((m == 0).to(m.dtype)), s.sums(torch.ones_like(m)), strict=True)
            for block, total, zeros, tokens in parts:
                found[f"mask/mean_{kind}/{block}"] = total.sum() / tokens.sum()
                found[f"mask/zeros_{kind}/{block}"] = zeros.sum() / tokens.sum()
            if kind == "d" and s.k is not None:
                found |= {f"kl/masked/{b}": x.mean() for b, x in zip(self.blocks, s.sums(m * s.k), strict=True)}
        return found

    def _masks(self, s: TokenStats) -> tuple[PerToken | None, PerToken | None]:
        """m_u and m_d; None for a term that is not masked."""
        if missing := {"mask_u", "mask_d"} - s.columns.keys():
            raise UserError(f"SparsePO needs {min(missing)!r} per token: give `statistics` what its `signal` makes")
        return (
            s.columns["mask_u"] if self.on != "kl" else None,
            s.columns["mask_d"] if self.on != "reward" else None,
        )
