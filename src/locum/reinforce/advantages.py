"""Advantages of the baselines: a critic's, or what a reward is beside those of its group.

A group is the rows drawn from one prompt, R_i their rewards, mu and sd mean and standard deviation, G their number:

    GAE              delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1}, whitened      (arXiv 1707.06347)
    GroupNormalised  A_i = (R_i - mu) / (sd + eps)                                                            (arXiv 2402.03300)
    GroupCentred     A_i = R_i - mu                                                                           (arXiv 2503.20783)
    LeaveOneOut      A_i = R_i - mean of the others' = G/(G-1) (R_i - mu)                                     (arXiv 2402.14740)
    BatchCentred     A_i = R_i - mean over the batch                                                          (REINFORCE)

Group advantages are one number per row, the same for all its tokens, and exactly 0 where all rewards of a group are equal
or a row is alone. A row without a reward (nan) gets 0 and leaves its group's statistics.

Example:
    >>> import torch
    >>> from locum.reinforce import GroupCentred, GroupNormalised, LeaveOneOut
    >>> reward, group = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.long)
    >>> [stage.of_rows(reward, group).round(decimals=2).tolist() for stage in (GroupNormalised(), GroupCentred(), LeaveOneOut())]
    [[1.5, -0.5, -0.5, -0.5], [0.75, -0.25, -0.25, -0.25], [1.0, -0.33, -0.33, -0.33]]
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from locum.method import require
from locum.reinforce.base import Advantage, GroupAdvantage, PerRow, PerToken
from locum.tokens import ppo
from locum.tokens.groups import Groups
from locum.tokens.rollouts import Rollouts

__all__ = ["GAE", "BatchCentred", "GroupCentred", "GroupNormalised", "LeaveOneOut"]

INF = float("inf")


@dataclass(frozen=True)
class GroupNormalised(GroupAdvantage):
    """GRPO's: (R - mean) / (sd + eps).

    Args:
        ddof: 1 for the unbiased deviation, which verl and TRL take, 0 for the population's.
        eps: added to the deviation, >= 0; verl 1e-6, TRL 1e-4.
    """

    ddof: int = 1
    eps: float = 1e-6

    def __post_init__(self) -> None:
        require(self, "ddof", self.ddof in (0, 1), "0 or 1")
        require(self, "eps", 0 <= self.eps < INF, "finite and >= 0")

    def degrees(self) -> int:
        return self.ddof

    def value(self, reward: PerRow, stats: Groups) -> PerRow:
        return (reward - stats.mean) / (stats.sd + self.eps)


@dataclass(frozen=True)
class GroupCentred(GroupAdvantage):
    """Dr.GRPO's: R - mean, so that hard and easy prompts are not blown up."""

    def value(self, reward: PerRow, stats: Groups) -> PerRow:
        return reward - stats.mean


@dataclass(frozen=True)
class LeaveOneOut(GroupCentred):
    """RLOO's: R minus the mean of the other rows."""

    def value(self, reward: PerRow, stats: Groups) -> PerRow:
        return stats.count / (stats.count - 1).clamp(min=1) * (reward - stats.mean)


@dataclass(frozen=True)
class BatchCentred(Advantage):
    """REINFORCE with the batch's mean reward as the baseline."""

    def __call__(self, rollouts: Rollouts) -> PerToken:
        known = ~rollouts.reward.isnan()
        value = rollouts.reward - rollouts.reward.nanmean()
        return torch.where(known, value, 0.0)[:, None] * rollouts.mask


@dataclass(frozen=True)
class GAE(Advantage):
    """PPO's: generalised advantage estimates of a critic, whitened over the batch. The reward lies on the last token.

    Args:
        gamma: discount, in [0, 1]. For texts 1.
        lam: 1 trusts the rewards, 0 the critic; in [0, 1].
        kl: weight of log old/ref, taken off each token's reward; >= 0.
        vf: weight of the critic's loss, >= 0.
        clip_value: how far the critic may move from its old values in an update, > 0.
    """

    gamma: float = 1.0
    lam: float = 0.95
    kl: float = 0.0
    vf: float = 0.1
    clip_value: float = 0.2

    def __post_init__(self) -> None:
        require(self, "gamma", 0 <= self.gamma <= 1, "in [0, 1]")
        require(self, "lam", 0 <= self.lam <= 1, "in [0, 1]")
        require(self, "kl", 0 <= self.kl < INF, "finite and >= 0")
        require(self, "vf", 0 <= self.vf < INF, "finite and >= 0")
        require(self, "clip_value", self.clip_value > 0, "> 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"value"} | ({"old_logp", "ref_logp"} if self.kl else set()))

    def estimates(self, rollouts: Rollouts) -> tuple[PerToken, PerToken]:
        """Advantages, not yet whitened, and the returns that the critic is trained towards."""
        columns, mask = rollouts.columns, rollouts.mask
        reward = ppo.at_last(rollouts.reward.nan_to_num(0.0), mask)
        if self.kl:
            reward = reward - self.kl * (columns["old_logp"] - columns["ref_logp"])
        return ppo.gae(reward, columns["value"], mask, self.gamma, self.lam)

    def __call__(self, rollouts: Rollouts) -> PerToken:
        known = rollouts.mask & ~rollouts.reward.isnan()[:, None]
        return ppo.whiten(self.estimates(rollouts)[0], known)

    def targets(self, rollouts: Rollouts) -> dict[str, PerToken]:
        return {"returns": self.estimates(rollouts)[1]}

    def beside(self, columns: Mapping[str, PerToken], rollouts: Rollouts) -> PerToken:
        known = rollouts.mask & ~rollouts.reward.isnan()[:, None]
        old, returns = rollouts.columns["value"], rollouts.columns["returns"]
        loss = ppo.clipped_value(columns["value"], old, returns, self.clip_value)
        return self.vf * torch.where(known, loss, 0.0)
