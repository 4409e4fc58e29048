"""How a policy is asked: from left to right, token by token. And the one pass that tells all that stages want to know."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from locum.method import require
from locum.reinforce.base import Heat, Likelihood, PerToken
from locum.tokens.groups import index
from locum.tokens.rollouts import Generated, Rollouts
from locum.tokens.sampling import Sampling
from locum.tokens.tiles import Scores, Tile, log_prob, over_tiles, tile_entropy

if TYPE_CHECKING:
    from locum.reinforce.recipe import Recipe

__all__ = ["Autoregressive", "old_policy"]


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


@torch.no_grad()
def old_policy(
    recipe: "Recipe",
    policy: Any,
    rollouts: Rollouts,
    want: frozenset[str],
    rows: int = 64,
    reference: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Rollouts:
    """The rollouts with all that the recipe's stages need of the policy as it is, in one pass without gradient.

    Args:
        want: of "old_logp", "entropy", "value", "ref_logp"; what stages observe themselves comes with it.
        rows: completions of one forward; groups are not split where a stage observes them.
        reference: opens a context whose value is the reference policy; for "ref_logp".
    """
    observers = [stage for stage in recipe.stages if "scores" in stage.needs]
    own = (want & {"entropy", "value"}) | ({"logp"} if "old_logp" in want else set())
    parts: list[dict[str, Tensor]] = []
    chunks = _whole_groups(rollouts, rows) if observers else torch.arange(len(rollouts)).split(rows)
    for chunk in chunks:
        part = rollouts[chunk.to(rollouts.device)].trimmed()
        found: dict[str, Tensor] = {}
        if observers:
            assert isinstance(recipe.likelihood, Autoregressive)  # the recipe was refused otherwise
            scores = policy.scores(part)
            found |= recipe.likelihood.of_scores(policy, scores, part, frozenset(own)) if own else {}
            for stage in observers:
                found |= stage.observe(scores, part)
        elif own:
            found |= recipe.likelihood.columns(policy, part, frozenset(own))
        if "ref_logp" in want and reference is not None:
            with reference() as other:
                found["ref_logp"] = recipe.likelihood.columns(other, part, frozenset({"logp"}))["logp"]
        parts.append(found)
    return rollouts.with_columns(**_joined(rollouts, list(chunks), parts))


def _whole_groups(rollouts: Rollouts, rows: int) -> list[Tensor]:
    """Row numbers in chunks of about so many rows, each of whole groups."""
    inverse, n = index(rollouts.group)
    order = inverse.argsort(stable=True).cpu()
    sizes = torch.bincount(inverse, minlength=n).tolist()
    lengths, now = [], 0
    for size in sizes:
        if now and now + size > rows:
            lengths.append(now)
            now = 0
        now += size
    return list(order.split([*lengths, now]))


def _joined(rollouts: Rollouts, chunks: Sequence[Tensor], parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The chunks' columns, put back at their rows."""
    columns: dict[str, Tensor] = {}
    for chunk, found in zip(chunks, parts, strict=True):
        for name, x in found.items():
            name = "old_logp" if name == "logp" else name
            whole = columns.setdefault(name, torch.zeros(rollouts.mask.shape, dtype=x.dtype, device=x.device))
            whole[chunk.to(x.device), : x.shape[1]] = x
    return columns
