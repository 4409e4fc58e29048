"""Token-level Direct Preference Optimization

Expensive: RLHF under a KL limit at every token, with a reward model, a value model and fresh samples.
Stands in: DPO's margin plus the KL from reference to policy at each position, on pairs that already exist.
Check: with the KL term off the loss is DPO to rounding, and the token reward has mean zero under the reference.

The token MDP (deterministic, undiscounted) is optimised state by state,

    max_pi  E_{a ~ pi(.|s)} A_ref(s, a) - beta KL(pi(.|s) || ref(.|s))

and at the optimum the advantage is a log-ratio plus a *forward* KL, since log Z cancels between Q and its mean:

    A_ref(s, a) = beta log pi*(a|s)/ref(a|s) + beta KL(ref(.|s) || pi*(.|s))

Bradley-Terry over summed advantages gives the loss. Per response token t, d_t = log pi/ref (y_t|s_t) and
k_t = KL(ref(.|s_t) || pi(.|s_t)); D and K are their sums over a response, w the chosen, l the rejected one:

    TDPO1    L = -log sigmoid( beta [ (D_w - D_l) -       (K_l - K_w)     ] )
    TDPO2    L = -log sigmoid( beta [ (D_w - D_l) - alpha (K_l - sg(K_w)) ] )

The stop-gradient sg removes TDPO1's push of the policy away from the reference on chosen responses. The gradients, with
c = beta sigmoid(-z): TDPO1 -c [dD_w + dK_w - dD_l - dK_l], TDPO2 -c [dD_w - dD_l - alpha dK_l], where
dd_t/dlogits = onehot(y_t) - pi and dk_t/dlogits = pi - ref.

Shapes: d, k and mask [2B, L-1], chosen rows first, nats. Cost: DPO's two forwards and one more pass over a tile of the
vocabulary; a per-sequence cache of the reference is not enough for k_t.

Traps. The KL is KL(ref || pi); the other direction trains something else. At equal steps TDPO1 has drifted further from
the reference than DPO: compare at equal KL. The authors advise TDPO1 at low learning rates and TDPO2 at high ones.

Example:
    >>> import torch
    >>> from locum.align import DPO, TDPO2, TokenStats
    >>> d = torch.tensor([[0.4700, 0.0], [0.4055, 0.0]])
    >>> k = torch.tensor([[0.2231, 0.0], [0.1438, 0.0]])
    >>> s = TokenStats(d, torch.ones(2, 2, dtype=torch.bool), k)
    >>> [round(loss(s)[0].item(), 4) for loss in (DPO(beta=1.0), TDPO2(beta=1.0))]
    [0.6614, 0.6424]

Authors: Zeng, Liu, Ma, Yang, Zhang, Wang
Year: 2024
Venue: ICML 2024
arXiv: 2404.11999
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from locum.align.base import AlignLoss, PerToken, TokenStats
from locum.method import require

__all__ = ["TDPO2", "TDPO1"]  # noqa: RUF022 - the first is the paper's


@dataclass(frozen=True)
class TDPO1(AlignLoss):
    """TDPO1: DPO's margin minus the difference of both responses' sequential KL, all of it with gradient.

    Args:
        beta: pull towards the reference, > 0. Paper 0.1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"kl"})

    def score(self, s: TokenStats) -> PerToken:
        assert s.d is not None
        assert s.k is not None
        return s.d + s.k


@dataclass(frozen=True)
class TDPO2(AlignLoss):
    """TDPO2: the KL term weighted by alpha, and without gradient on the chosen response.

    Args:
        beta: pull towards the reference, > 0. Paper 0.1.
        alpha: weight of the sequential KL, >= 0; 0 is DPO. Paper 0.5.
    """

    alpha: float = 0.5
    needs: ClassVar[frozenset[str]] = frozenset({"kl"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "alpha", 0 <= self.alpha < float("inf"), "finite and >= 0")

    def score(self, s: TokenStats) -> PerToken:
        assert s.d is not None
        assert s.k is not None
        return s.d + self.alpha * torch.where(s.is_chosen, s.k.detach(), s.k)
