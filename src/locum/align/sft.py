"""Plain maximum likelihood on responses, the way that the family's positive, negative and starting models are made.

    L = - mean over the batch's response tokens of log pi(y_t|s_t)

It is no paper of the catalogue. Beside preference pairs it is the baseline that imitates the chosen responses only.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from locum.align.base import Logs, Method, TokenStats

__all__ = ["SFT"]


@dataclass(frozen=True)
class SFT(Method):
    """Supervised fine-tuning on examples with "prompt_ids" and "response_ids". It has no parameter and no reference."""

    blocks: ClassVar[tuple[str, ...]] = ("response",)

    @property
    def frozen(self) -> tuple[str, ...]:
        return ()

    def __call__(self, s: TokenStats) -> tuple[Float[Tensor, ""], Logs]:
        assert s.logp is not None
        loss = -s.logp[s.mask].mean()
        return loss, {"perplexity": loss.detach().exp()}
