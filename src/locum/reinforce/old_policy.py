"""The one pass without gradient that tells all that the stages of a recipe want to know of the policy as it is."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from locum.reinforce.base import Likelihood
from locum.reinforce.likelihood import Autoregressive
from locum.reinforce.recipe import Recipe
from locum.tokens.groups import index
from locum.tokens.rollouts import Rollouts

__all__ = ["columns_of", "old_policy"]


@torch.no_grad()
def columns_of(
    likelihood: Likelihood, policy: Any, rollouts: Rollouts, want: frozenset[str], rows: int = 64
) -> dict[str, Tensor]:
    """Columns under the policy as it is, `rows` completions at a time."""
    chunks = _by_length(rollouts, rows)
    parts = [likelihood.columns(policy, rollouts[c.to(rollouts.device)].trimmed(), want) for c in chunks]
    return _joined(rollouts, chunks, parts)


@torch.no_grad()
def old_policy(
    recipe: Recipe,
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
    chunks = _whole_groups(rollouts, rows) if observers else _by_length(rollouts, rows)
    for chunk in chunks:
        part = rollouts[chunk.to(rollouts.device)].trimmed()
        found: dict[str, Tensor] = {}
        if observers:
            assert isinstance(recipe.likelihood, Autoregressive)  # the recipe was refused otherwise
            scores = policy.scores(part)
            found |= recipe.likelihood.of_scores(policy, scores, part, frozenset(own)) if own else {}
            law = recipe.likelihood.tempered(scores)
            for stage in observers:
                found |= stage.observe(law, part)
        elif own:
            found |= recipe.likelihood.columns(policy, part, frozenset(own))
        if "logp" in found:
            found["old_logp"] = found.pop("logp")
        if "ref_logp" in want and reference is not None:
            with reference() as other:
                found["ref_logp"] = recipe.likelihood.columns(other, part, frozenset({"logp"}))["logp"]
        parts.append(found)
    return rollouts.with_columns(**_joined(rollouts, list(chunks), parts))


def _by_length(rollouts: Rollouts, rows: int) -> list[Tensor]:
    """Row numbers in chunks of so many, rows of like length together."""
    return list(rollouts.lengths.argsort(stable=True).cpu().split(rows))


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
            whole = columns.setdefault(name, torch.zeros(rollouts.mask.shape, dtype=x.dtype, device=x.device))
            whole[chunk.to(x.device), : x.shape[1]] = x
    return columns
