"""A recipe under a name of verl's: registered with what its registries take, and equal to the recipe itself.

verl is not needed: a stand-in has its registries and `agg_loss`, with the signatures of verl 0.9.1.
"""

import sys
import types

import numpy as np
import pytest
import torch

from locum.errors import MissingExtra, UserError
from locum.reinforce import Recipe
from locum.reinforce.integrations.verl import advantage, policy_loss, register

G = torch.Generator().manual_seed(0)
MASK = torch.arange(5) < torch.tensor([5, 2, 3, 1, 4, 5])[:, None]
UID = np.array(["b", "a", "b", "a", "b", "a"], dtype=object)
REWARD = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 1.0])


@pytest.fixture
def verl(monkeypatch):
    core = types.ModuleType("verl.trainer.ppo.core_algos")
    core.estimators, core.losses = {}, {}

    def into(where):
        return lambda name: lambda fn: where.setdefault(name, fn)

    def agg_loss(
        loss_mat,
        loss_mask,
        loss_agg_mode,
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
        loss_scale_factor=None,
    ):
        assert loss_agg_mode == "token-mean"
        return (loss_mat * loss_mask).sum() / (batch_num_tokens or loss_mask.sum())

    core.register_adv_est, core.register_policy_loss, core.agg_loss = into(core.estimators), into(core.losses), agg_loss
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.core_algos", core)
    sys.modules["verl.trainer.ppo"].core_algos = core
    return core


def on_last():
    return torch.zeros(MASK.shape).masked_scatter(torch.arange(5) == MASK.sum(-1)[:, None] - 1, REWARD)


def test_the_registered_pair_is_the_recipes(verl):
    recipe = Recipe.read("dapo + clip(high=0.28, dual=3.0)")
    register(recipe, "locum")
    found, returns = verl.estimators["locum"](
        token_level_rewards=on_last(), response_mask=MASK.long(), config=None, index=UID, reward_baselines=None
    )
    first = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    for rows in ([0, 2, 4], [1, 3, 5]):
        r = REWARD[rows]
        for row, a in zip(rows, ((r - r.mean()) / (r.std() + 1e-6)).tolist(), strict=True):
            first[row] = a
    assert found[:, 0].tolist() == pytest.approx(first, abs=1e-6)
    assert (found[~MASK] == 0).all()
    assert returns.shape == found.shape

    old = torch.randn(6, 5, generator=G)
    logp = (old + 0.5 * torch.randn(6, 5, generator=G)).requires_grad_()
    config = types.SimpleNamespace(global_batch_info={"dp_size": 1, "batch_num_tokens": int(MASK.sum())})
    value, metrics = verl.losses["locum"](
        old_log_prob=old,
        log_prob=logp,
        advantages=found,
        response_mask=MASK.long(),
        loss_agg_mode="token-mean",
        config=config,
        rollout_is_weights=None,
    )
    ratio = (logp - old).exp()
    by_hand = torch.minimum(ratio * found, ratio.clamp(0.8, 1.28) * found)
    by_hand = -torch.where(found < 0, by_hand.maximum(3 * found), by_hand)
    assert value.item() == pytest.approx((by_hand * MASK).sum().item() / int(MASK.sum()), abs=1e-6)
    value.backward()
    assert (logp.grad[~MASK] == 0).all()
    assert set(metrics) == {"actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl"}
    assert all(isinstance(x, float) for x in metrics.values())


def test_tokens_of_long_rows_count_in_a_papers_advantage():
    found, _ = advantage(Recipe.read("dapo + hapo.advantage"))(on_last(), MASK, UID)
    for uid in ("a", "b"):
        rows = torch.tensor([u == uid for u in UID])
        assert found[rows].sum().item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "what"), [("dapo + d3s", "D3S"), ("grpo + kl", "KL"), ("ppo", "GAE"), ("dapo + hapo.clip", "HAPOClip")]
)
def test_what_the_registries_cannot_carry_is_refused(text, what):
    with pytest.raises(UserError, match=f"cannot carry {what}"):
        policy_loss(Recipe.read(text))


def test_rows_without_their_prompt_are_refused():
    with pytest.raises(UserError, match="verl gave no uid"):
        advantage(Recipe.read("grpo"))(on_last(), MASK)


def test_without_verl_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(MissingExtra, match=r"locum\[verl\]"):
        register(Recipe.read("grpo"), "locum")
