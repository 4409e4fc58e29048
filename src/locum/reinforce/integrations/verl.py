"""For people who train with verl: a recipe's advantage and its clipped loss, under names that verl's configuration knows.

    from locum.reinforce import Recipe
    from locum.reinforce.integrations.verl import register
    register(Recipe.read("dapo + hapo.advantage + clip(dual=10.0)"), "locum")

    # in verl's configuration:  algorithm.adv_estimator: locum      actor_rollout_ref.actor.policy_loss.loss_mode: locum

verl's two registries hand over rewards, masks, group ids and log-probabilities, and nothing else of the policy; rows, the
KL term and the aggregate (`loss_agg_mode`) are its own affair. So what can be carried is an advantage that needs no more than
rewards and masks, a ratio and a clip; a recipe with stages beyond that is refused, naming them. The module must be imported
in the processes that compute advantages and losses, e.g. through verl's `external_lib`.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from locum.errors import MissingExtra, UserError
from locum.reinforce.recipe import Recipe
from locum.tokens.rollouts import Rollouts

__all__ = ["advantage", "policy_loss", "register"]

CARRIED = (
    "likelihood",
    "sample",
    "filter",
    "advantage",
    "ratio",
    "clip",
    "aggregate",
)  # its own affair, or handed over
PerToken = Float[Tensor, "rows tokens"]


def register(recipe: Recipe, name: str) -> None:
    """Make a recipe's advantage and loss known to verl under a name.

    Raises: UserError for a recipe with stages that verl's registries cannot carry; MissingExtra without verl.
    """
    estimator, loss = advantage(recipe), policy_loss(recipe)
    core = _core()
    core.register_adv_est(name)(estimator)
    core.register_policy_loss(name)(loss)


def advantage(recipe: Recipe) -> Callable[..., tuple[PerToken, PerToken]]:
    """verl's advantage estimator: ``(token_level_rewards, response_mask, index, config, ...) -> (advantages, returns)``."""
    _carried(recipe)

    def estimate(
        token_level_rewards: PerToken,
        response_mask: Shaped[Tensor, "rows tokens"],
        index: Any = None,
        config: Any = None,
        **_: Any,
    ) -> tuple[PerToken, PerToken]:
        if index is None:
            raise UserError(f"{type(recipe.advantage).__name__} compares the rows of a prompt, and verl gave no uid")
        known: dict[Any, int] = {}
        group = torch.tensor([known.setdefault(i, len(known)) for i in list(index)], device=response_mask.device)
        mask = response_mask.bool()
        nothing = torch.zeros(len(mask), 0, dtype=torch.long, device=mask.device)
        reward = (token_level_rewards * mask).sum(-1)
        rollouts = Rollouts(nothing, nothing.bool(), torch.zeros_like(mask, dtype=torch.long), mask, group, reward)
        with torch.no_grad():
            found = recipe.advantage(rollouts)
        return found, found

    return estimate


def policy_loss(recipe: Recipe) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """verl's policy loss: the recipe's ratio and clip, in verl's own aggregate."""
    _carried(recipe)
    ratio_of = next(stage for stage in recipe.stages if stage.slot == "ratio")
    clip: Any = recipe.clip

    def loss(
        old_log_prob: PerToken,
        log_prob: PerToken,
        advantages: PerToken,
        response_mask: Shaped[Tensor, "rows tokens"],
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: PerToken | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        mask = response_mask.bool()
        ratio = ratio_of(log_prob, old_log_prob, mask)  # type: ignore[operator]
        each = clip(ratio, advantages, clip.low, clip.high)
        if rollout_is_weights is not None:
            each = each * rollout_is_weights
        counts = getattr(config, "global_batch_info", None) or {}
        value = _core().agg_loss(loss_mat=each, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **counts)
        with torch.no_grad():
            n = mask.sum().clamp(min=1)
            high = mask & (ratio > 1 + clip.high) & (advantages > 0)
            low = mask & (ratio < 1 - clip.low) & (advantages < 0)
            dual = mask & (advantages < 0) & (ratio > (clip.dual or torch.inf))
            kl = torch.where(mask, old_log_prob - log_prob, 0.0).sum() / n
        return value, {
            "actor/pg_clipfrac": ((high | low).sum() / n).item(),
            "actor/pg_clipfrac_lower": (dual.sum() / n).item(),
            "actor/ppo_kl": kl.item(),
        }

    return loss


def _carried(recipe: Recipe) -> None:
    for stage in recipe.stages:
        if stage.slot not in CARRIED:
            raise UserError(f"verl's registries cannot carry {type(stage).__name__}: they have no place for it")
        if stage.slot == "advantage" and stage.needs:
            raise UserError(
                f"verl's registries cannot carry {type(stage).__name__}: it needs {', '.join(sorted(stage.needs))}, and they "
                "hand over rewards and masks alone"
            )


def _core() -> Any:
    try:
        from verl.trainer.ppo import core_algos
    except ImportError:
        raise MissingExtra("locum.reinforce.integrations.verl", "verl") from None
    return core_algos
