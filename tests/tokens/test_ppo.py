"""Advantages, returns and clipped losses equal their definitions token by token, wherever the padding lies."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.tokens import ppo
from locum.tokens.logprobs import masked_mean

F64 = torch.float64
MASKS = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4)


def row(*x, dtype=F64):
    return torch.tensor([x], dtype=dtype)


def drawn(mask, seed, n=2):
    return torch.randn(n, *mask.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def by_hand(reward, value, mask, gamma, lam):
    """GAE, token by token from the right, as the recursion is written."""
    advantage = torch.zeros_like(reward)
    for i in range(len(reward)):
        a = v = 0.0
        for t in reversed(range(reward.shape[1])):
            if mask[i, t]:
                a = reward[i, t] + gamma * v - value[i, t] + gamma * lam * a
                v = value[i, t]
                advantage[i, t] = a
    return advantage


@settings(max_examples=60)
@given(MASKS, st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_gae_is_its_recursion_for_any_mask(mask, gamma, lam, seed):
    mask = torch.tensor(mask)
    reward, value = drawn(mask, seed)
    advantage, returns = ppo.gae(reward, value, mask, gamma, lam)
    torch.testing.assert_close(advantage, by_hand(reward, value, mask, gamma, lam), atol=1e-12, rtol=0)
    torch.testing.assert_close(returns, torch.where(mask, advantage + value, 0.0), atol=1e-12, rtol=0)
    to_go = by_hand(reward, torch.zeros_like(value), mask, gamma, 1.0)
    torch.testing.assert_close(ppo.reward_to_go(reward, mask, gamma), to_go, atol=1e-12, rtol=0)


def test_gae_by_hand():
    """deltas .109, .047, .049; times .95 and summed from the right."""
    reward, value, mask = row(0.009, -0.003, 0.699), row(0.5, 0.6, 0.65), torch.ones(1, 3, dtype=torch.bool)
    advantage, returns = ppo.gae(reward, value, mask, 1.0, 0.95)
    assert advantage[0].tolist() == pytest.approx([0.19787250, 0.09355, 0.049], abs=1e-12)
    assert returns[0].tolist() == pytest.approx([0.69787250, 0.69355, 0.699], abs=1e-12)


def test_no_value_and_lambda_one_is_the_reward_to_go():
    mask = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) < 0.7
    reward = drawn(mask, 1)[0]
    advantage, returns = ppo.gae(reward, torch.zeros_like(reward), mask, 1.0, 1.0)
    torch.testing.assert_close(advantage, ppo.reward_to_go(reward, mask), atol=1e-12, rtol=0)
    torch.testing.assert_close(returns, advantage)


@given(st.integers(0, 5), st.integers(0, 5), st.integers(1, 9))
def test_padding_on_either_side_changes_nothing(left, right, n):
    g = torch.Generator().manual_seed(n)
    reward, value = torch.randn(2, 3, n, generator=g)
    mask = torch.ones(3, n, dtype=torch.bool)

    def padded(x, fill=math.nan):
        return torch.nn.functional.pad(x.float(), (left, right), value=fill)

    wide = padded(mask, 0.0).bool()
    advantage, returns = ppo.gae(reward, value, mask, 0.9, 0.8)
    a, r = ppo.gae(padded(reward), padded(value), wide, 0.9, 0.8)
    torch.testing.assert_close(a, padded(advantage, 0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(r, padded(returns, 0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(ppo.whiten(a, wide), padded(ppo.whiten(advantage, mask), 0.0), atol=1e-5, rtol=0)
    assert (padded(ppo.is_last(mask), 0.0).bool() == ppo.is_last(wide)).all()


def test_long_rows_keep_their_sums():
    reward, mask = torch.ones(1, 2000), torch.ones(1, 2000, dtype=torch.bool)
    assert ppo.reward_to_go(reward, mask)[0].tolist() == [float(2000 - t) for t in range(2000)]
    far = ppo.reward_to_go(reward, mask, 0.5)
    assert far[0, 0].item() == pytest.approx(2.0)
    assert far[0, -2:].tolist() == [1.5, 1.0]


def test_the_last_token_and_what_is_paid_there():
    mask = torch.tensor([[False, True, True], [True, False, False], [True, False, True]])
    assert ppo.is_last(mask).tolist() == [[False, False, True], [True, False, False], [False, False, True]]
    paid = ppo.at_last(torch.tensor([1.0, 2.0, 3.0]), mask)
    assert paid.tolist() == [[0, 0, 1], [2, 0, 0], [0, 0, 3]]


def test_whitened_over_all_rows_together():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.tensor([[1.0, 3.0, 99.0], [5.0, math.nan, math.inf]], dtype=F64)
    s = math.sqrt(8 / 3)  # mean 3, variance (4 + 0 + 4)/3
    assert ppo.whiten(x, mask)[mask].tolist() == pytest.approx([-2 / s, 0.0, 2 / s], abs=1e-12)
    assert (ppo.whiten(x, mask)[~mask] == 0).all()
    assert (ppo.whiten(torch.ones(2, 3), mask) == 0).all()
    assert (ppo.whiten(torch.ones(2, 3), torch.zeros_like(mask)) == 0).all()


@pytest.mark.parametrize(
    ("rho", "advantage", "loss", "slope"),
    [(1.5, 1, -1.2, 0), (1.5, -1, 1.5, 1.5), (0.5, 1, -0.5, -0.5), (0.5, -1, 0.8, 0), (1.1, 2, -2.2, -2.2)],
)
def test_clipped_policy_by_hand(rho, advantage, loss, slope):
    logp = row(math.log(rho)).requires_grad_()
    found = ppo.clipped_policy(ppo.ratio(logp, row(0.0)), row(advantage), 0.2, 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss, abs=1e-12)
    assert logp.grad.item() == pytest.approx(slope, abs=1e-12)


def test_bounds_may_differ_between_tokens_and_sides():
    rho, a = row(1.5, 1.5, 0.5), row(1.0, 1.0, -1.0)
    assert ppo.clipped_policy(rho, a, 0.2, row(0.1, 0.4, 0.1))[0].tolist() == pytest.approx([-1.1, -1.4, 0.8])
    assert ppo.clipped_policy(rho, a, row(0.1, 0.1, 0.3), 0.2)[0].tolist() == pytest.approx([-1.2, -1.2, 0.7])
    assert ppo.clipped_policy(rho, a, math.inf, math.inf)[0].tolist() == pytest.approx([-1.5, -1.5, 0.5])


def test_a_ratio_stays_finite():
    assert torch.isfinite(ppo.ratio(row(0.0, -500.0), row(-500.0, 0.0))).all()


@pytest.mark.parametrize(
    ("value", "loss", "slope"), [(0.1, 0.405, -0.9), (0.5, 0.32, 0), (1.5, 0.32, 0), (2.5, 1.125, 1.5)]
)
def test_clipped_value_by_hand(value, loss, slope):
    """Return 1, old value 0, clip .2: held within [-.2, .2], and the larger of both errors counts."""
    v = row(value).requires_grad_()
    found = ppo.clipped_value(v, row(0.0), row(1.0), 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss, abs=1e-12)
    assert v.grad.item() == pytest.approx(slope, abs=1e-12)


def test_at_ratio_one_the_gradient_is_reinforce():
    """Whatever the bounds: d loss/d logp_t = -A_t/(rows x tokens of the row)."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantage, logp = drawn(mask, 3)
    logp.requires_grad_()
    loss = masked_mean(ppo.clipped_policy(ppo.ratio(logp, logp.detach()), advantage, 0.2, 0.2), mask).mean()
    loss.backward()
    want = torch.where(mask, -advantage / mask.sum(-1, keepdim=True) / len(mask), 0.0)
    torch.testing.assert_close(logp.grad, want, atol=1e-12, rtol=0)
