"""DPO, the baseline of the family: every token counts the same (arXiv 2305.18290, eq. 7).

    z = beta [ sum_t d_t (chosen) - sum_t d_t (rejected) ],    L = mean over pairs of -log sigmoid(z)

It is no paper of the catalogue; all of the family's methods are this one when their own part is switched off.
"""

from dataclasses import dataclass

from locum.align.base import AlignLoss, PerToken, TokenStats

__all__ = ["DPO"]


@dataclass(frozen=True)
class DPO(AlignLoss):
    """Direct preference optimisation.

    Args:
        beta: pull towards the reference, > 0. Paper 0.1.
    """

    def score(self, s: TokenStats) -> PerToken:
        assert s.d is not None
        return s.d
