"""How a policy is asked: from left to right, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from locum.method import require
from locum.reinforce.base import Heat, Likelihood, PerToken
from locum.tokens.rollouts import Generated, Rollouts
from locum.tokens.sampling import Sampling
from locum.tokens.tiles import Scores, Tile, log_prob, over_tiles, tile_entropy

__all__ = ["Autoregressive"]


@dataclass(frozen=True)
class Autoregressive(Likelihood):
    """A `Policy` that writes from left to right; every completion token has its log-probability.

    Args:
        temperature: logits are divided by it before tokens are scored, > 0; the sampling's own unless both are set apart on
            purpose.
    """

    temperature: float = 1.0
    provides: ClassVar[frozenset[str]] = frozenset({"entropy", "value", "scores", "segments", "heat"})

    def __post_init__(self) -> None:
        require(self, "temperature", 0 < self.temperature < float("inf"), "finite and > 0")

    def policy(self, lm: Any, engine: Any = None) -> Any:
        from locum.reinforce.policy import TextPolicy  # brings a model library; recipes do without

        return TextPolicy(lm, engine=engine)

    def generate(
        self,
        policy: Any,
        prefixes: Sequence[Sequence[int]],
        copies: int,
        room: Sequence[int],
        draws: Float[Tensor, "rows T"],
        heat: Heat | None,
        sampling: Sampling,
    ) -> Generated:
        return policy.generate(prefixes, copies, room, draws, heat=heat, sampling=sampling)

    def columns(self, policy: Any, rollouts: Rollouts, want: frozenset[str]) -> dict[str, PerToken]:
        return self.of_scores(policy, policy.scores(rollouts), rollouts, want)

    def of_scores(self, policy: Any, scores: Scores, rollouts: Rollouts, want: frozenset[str]) -> dict[str, PerToken]:
        """The columns, from the scores of a forward that was made already."""

        def tile(z: Tile, ids: Tensor) -> tuple[Tensor, ...]:
            z = z if self.temperature == 1 else z / self.temperature
            return (log_prob(z, ids), tile_entropy(z.detach())) if "entropy" in want else (log_prob(z, ids),)

        found = over_tiles(tile, [scores], rollouts.targets)
        columns = {name: rollouts.spread(x) for name, x in zip(("logp", "entropy"), found, strict=False)}
        if "value" in want:
            columns["value"] = rollouts.spread(policy.critic(scores.hidden))
        return columns

    def tempered(self, scores: Scores) -> Scores:
        """The scores of the law that is trained: with logits divided by the temperature."""
        if self.temperature == 1:
            return scores
        bias = None if scores.bias is None else scores.bias / self.temperature
        return Scores(scores.hidden / self.temperature, scores.head, bias, scores.taps)
