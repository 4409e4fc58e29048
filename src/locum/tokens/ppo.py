"""Policy gradients on per-token quantities: where a reward lies, what it is worth from each token on, and the clipped losses.

All tensors are [rows, tokens], a row is a response, and a mask says which tokens are its own: the others may lie on
either side, or between. They neither count nor change what counts, and are 0 in every result. With r_t the reward of
token t, V_t the value of the state that the token was said in, and t + 1 the row's next token that counts:

    reward to go   G_t = r_t + gamma G_{t+1}                                              (0 after the last token)
    GAE            A_t = delta_t + gamma lam A_{t+1},   delta_t = r_t + gamma V_{t+1} - V_t,   returns = A + V
    policy         l_t = -min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t),   rho_t = pi(y_t|s_t)/old(y_t|s_t)
    value          l_t = max((V_t - G_t)^2, (clip(V_t, old V_t - c, old V_t + c) - G_t)^2)/2

(arXiv 1506.02438, eq. 16; arXiv 1707.06347, eq. 7). The losses are per token; how they are averaged is a choice of each
method (`locum.tokens.logprobs.masked_mean`). Nothing here stops gradients: advantages and returns that come from a
network in training must be detached by who calls.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from locum.tokens.logprobs import masked_sum

__all__ = ["at_last", "clipped_policy", "clipped_value", "gae", "is_last", "ratio", "reward_to_go", "whiten"]

PerToken = Float[Tensor, "rows tokens"]
Mask = Bool[Tensor, "rows tokens"]

FARTHEST = 20.0  # nats: a token's log-ratio beyond this is cut, so that the ratio stays finite


def is_last(mask: Mask) -> Mask:
    """True at each row's last token that counts."""
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)


def at_last(values: Float[Tensor, " rows"], mask: Mask) -> PerToken:
    """A number per row, put on its last token: how a reward for a whole response is paid."""
    return torch.where(is_last(mask), values[:, None], 0.0)


def reward_to_go(reward: PerToken, mask: Mask, gamma: float = 1.0) -> PerToken:
    """G_t = r_t + gamma G_{t+1}, in log2(tokens) steps: spans that are summed already are joined two by two."""
    total = torch.where(mask, reward, 0.0)
    decay = torch.where(mask, torch.full_like(total, gamma), 1.0)  # what a sum is worth one token earlier
    span = 1
    while span < mask.shape[-1]:
        total = total + decay * _later(total, span)
        decay = decay * _later(decay, span)
        span *= 2
    return torch.where(mask, total, 0.0)


def gae(
    reward: PerToken, value: PerToken, mask: Mask, gamma: float = 1.0, lam: float = 0.95
) -> tuple[PerToken, PerToken]:
    """Generalised advantage estimates and the returns A + V that the value is trained towards.

    lam = 1 gives returns that are the rewards to go, lam = 0 the one-step error.
    """
    value = torch.where(mask, value, 0.0)
    advantage = reward_to_go(reward + gamma * _next(value, mask) - value, mask, gamma * lam)
    return advantage, advantage + value


def whiten(x: PerToken, mask: Mask, eps: float = 1e-8) -> PerToken:
    """Mean 0 and variance 1 over all tokens that count, of all rows together; a variance below eps is taken as eps."""
    n = mask.sum().clamp(min=1)
    centred = x - masked_sum(x, mask).sum() / n
    variance = masked_sum(centred.square(), mask).sum() / n
    return torch.where(mask, centred * variance.clamp(min=eps).rsqrt(), 0.0)


def ratio(logp: PerToken, old_logp: PerToken) -> PerToken:
    """pi/old of the token that came."""
    return (logp - old_logp).clamp(-FARTHEST, FARTHEST).exp()


def clipped_policy(
    ratio: PerToken, advantage: PerToken, low: float | PerToken = 0.2, high: float | PerToken = 0.2
) -> PerToken:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) per token: no gain beyond the bounds, so no gradient there either.

    Args:
        ratio: pi/old, with gradient.
        advantage: without.
        low, high: how far a ratio may go down and up; numbers, or one per token.
    """
    least, most = (torch.as_tensor(x, dtype=ratio.dtype, device=ratio.device) for x in (1 - low, 1 + high))
    return -torch.minimum(ratio * advantage, ratio.clamp(least, most) * advantage)


def clipped_value(value: PerToken, old_value: PerToken, returns: PerToken, clip: float = 0.2) -> PerToken:
    """Half the squared error per token, of the value or of the value held within `clip` of the old one: the larger."""
    held = old_value + (value - old_value).clamp(-clip, clip)
    return torch.maximum((value - returns).square(), (held - returns).square()) / 2


def _later(x: Tensor, span: int) -> Tensor:
    """x at t + span, 0 beyond the end."""
    return F.pad(x[:, span:], (0, span))


def _next(x: Tensor, mask: Tensor) -> Tensor:
    """x at the row's next token that counts, 0 after the last."""
    n = mask.shape[-1]
    here = torch.where(mask, torch.arange(n, device=mask.device), n)
    after = F.pad(here.flip(-1).cummin(-1).values.flip(-1)[:, 1:], (0, 1), value=n)
    return F.pad(x, (0, 1)).gather(-1, after)
