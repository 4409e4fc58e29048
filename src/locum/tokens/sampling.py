"""How a next token is drawn: temperature, top-k, top-p and min-p, as one law.

Everything that must be exact (speculation, constraints, importance weights) asks for the *law* that a token is drawn from, never for
a sampler that hides it. The filters apply in the order that Hugging Face's `generate` uses: temperature, top-k, top-p, min-p.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from locum.method import require


@dataclass(frozen=True)
class Sampling:
    """What is done to logits before a token is drawn.

    Args:
        temperature: divides the logits; 0 means greedy (all mass on the largest logit, the lowest id among equals).
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the smallest set of most likely tokens with mass >= top_p; in (0, 1], None keeps all.
        min_p: drop tokens less likely than min_p times the most likely one; in [0, 1], None keeps all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        require(self, "temperature", 0 <= self.temperature < float("inf"), "finite and >= 0")
        require(self, "top_k", self.top_k is None or self.top_k >= 1, ">= 1 or None")
        require(self, "top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1] or None")
        require(self, "min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1] or None")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def law(self, logits: Float[Tensor, "*rows vocab"]) -> Float64[Tensor, "*rows vocab"]:
        """The probabilities that a token is drawn from, float64 whatever the logits' type; each row sums to 1.

        Raises: ValueError if a row holds NaN or no finite logit.
        """
        z = logits.double()
        best = z.amax(-1, keepdim=True)
        if not torch.isfinite(best).all():
            raise ValueError("logits hold NaN, +inf or no finite value; a law cannot be made of them")
        if self.greedy:
            return torch.zeros_like(z).scatter_(-1, z.argmax(-1, keepdim=True), 1.0)
        z = (z - best) / self.temperature
        if self.top_k is not None and self.top_k < z.shape[-1]:
            z = z.masked_fill(z < z.topk(self.top_k, -1).values[..., -1:], -torch.inf)
        p = z.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            ordered, ids = p.sort(dim=-1, descending=True, stable=True)
            above = ordered.cumsum(-1) - ordered  # mass of the likelier tokens: a token stays while that is below top_p
            p = torch.zeros_like(p).scatter_(-1, ids, ordered.masked_fill(above >= self.top_p, 0.0))
        if self.min_p is not None:
            p = p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0.0)
        return p / p.sum(-1, keepdim=True)
