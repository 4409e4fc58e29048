"""The exact solvers satisfy the identities of arXiv 2404.12358 on a worked tree, random trees and the table form."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.errors import UserError
from locum.tasks.token_mdp import TableMDP, along_paths, inverse_bellman, solve_tree, tied, tree_value

F64 = torch.float64


def random_tree(seed, A=3, H=4):
    g = torch.Generator().manual_seed(seed)
    reward = [torch.randn(A**t, A, generator=g, dtype=F64) for t in range(H)]
    logref = [torch.randn(A**t, A, generator=g, dtype=F64).log_softmax(-1) for t in range(H)]
    return reward, logref


def test_worked_tree():
    reward = [torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [0.5, 0.5]])]
    logref = [torch.full((1, 2), -math.log(2), dtype=F64), torch.full((2, 2), -math.log(2), dtype=F64)]
    s = solve_tree(reward, logref, 0.5)
    assert s.V[1].tolist() == pytest.approx([0.7168904152, 0.5], abs=1e-9)
    assert s.V[0].item() == pytest.approx(0.6201145070, abs=1e-9)
    assert s.logpi[0][0].exp().tolist() == pytest.approx([0.6067761335, 0.3932238665], abs=1e-9)
    assert s.logpi[1][0].exp().tolist() == pytest.approx([0.8807970780, 0.1192029220], abs=1e-9)
    joint = along_paths(s.logpi).sum(-1).exp()
    assert joint[0].item() == pytest.approx(0.5344466454, abs=1e-9)
    credit = along_paths([0.5 * (p - r) for p, r in zip(s.logpi, logref, strict=True)])
    assert credit[0].tolist() == pytest.approx([0.0967759083, 0.2831095848], abs=1e-9)
    assert credit[1].tolist() == pytest.approx([0.0967759083, -0.7168904152], abs=1e-9)
    for leaf in (2, 3):
        assert credit[leaf].tolist() == pytest.approx([-0.1201145070, 0.0], abs=1e-9)
    assert credit[0].sum().item() == pytest.approx(0.3798854930, abs=1e-9)
    assert credit[0].sum().item() == pytest.approx(1 - s.V[0].item(), abs=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("eos", [None, 2])
def test_random_trees(seed, beta, eos):
    reward, logref = random_tree(seed)
    s = solve_tree(reward, logref, beta, eos)
    for logpi in s.logpi:
        torch.testing.assert_close(logpi.logsumexp(-1), torch.zeros(len(logpi), dtype=F64), atol=1e-12, rtol=0)
    r, lr, lp = (along_paths(x, eos) for x in (reward, logref, s.logpi))
    A, H = 3, 4
    leaf = torch.arange(A**H)
    v0 = s.V[0]
    # eq. 6: the total reward is V(s_0) plus the summed credit, for every leaf
    torch.testing.assert_close(r.sum(-1), v0 + beta * (lp - lr).sum(-1), atol=1e-8, rtol=0)
    over = torch.zeros(A**H, dtype=torch.bool)
    for K in range(H):
        here, there = s.V[K][leaf // A ** (H - K)], s.V[K + 1][leaf // A ** (H - 1 - K)]
        token = leaf // A ** (H - 1 - K) % A
        ended = over | (token == eos) if eos is not None else over
        here, there = torch.where(over, 0.0, here), torch.where(ended, 0.0, there)
        # eq. 8: token by token
        torch.testing.assert_close(beta * (lp - lr)[:, K], r[:, K] + there - here, atol=1e-8, rtol=0)
        # eq. 9, with + V(s_0): a K+1-step expansion with a value at its end ranks as likelihood does
        torch.testing.assert_close(
            (r + beta * lr)[:, : K + 1].sum(-1) + there, v0 + beta * lp[:, : K + 1].sum(-1), atol=1e-8, rtol=0
        )
        over = ended
    if eos is None:  # one leaf per text: pi* is the Boltzmann law of the reference
        boltzmann = lr.sum(-1) + r.sum(-1) / beta
        torch.testing.assert_close(beta * boltzmann.logsumexp(0), v0[0], atol=1e-8, rtol=0)
        torch.testing.assert_close(lp.sum(-1), boltzmann.log_softmax(0), atol=1e-8, rtol=0)


@pytest.mark.parametrize("eos", [None, 0])
def test_value_of_the_optimum_is_v0_and_no_policy_beats_it(eos):
    reward, logref = random_tree(7)
    s = solve_tree(reward, logref, 0.5, eos)
    assert tree_value(reward, logref, s.logpi, 0.5, eos) == pytest.approx(s.V[0].item(), abs=1e-10)
    for seed in range(20):
        _, other = random_tree(100 + seed)
        assert tree_value(reward, logref, other, 0.5, eos) < s.V[0].item()
    if eos is None:
        paths = along_paths(other).sum(-1).exp()
        gain = along_paths(reward).sum(-1) - 0.5 * (along_paths(other) - along_paths(logref)).sum(-1)
        assert tree_value(reward, logref, other, 0.5) == pytest.approx(float(paths @ gain), abs=1e-10)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("eos", [None, 1])
def test_bijection(beta, eos):
    reward, logref = random_tree(3)
    Q, _ = random_tree(4)
    back = inverse_bellman(solve_tree(reward, logref, beta, eos).Q, logref, beta, eos)
    forth = solve_tree(inverse_bellman(Q, logref, beta, eos), logref, beta, eos).Q
    for a, b, c, d in zip(back, reward, forth, Q, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0)
        torch.testing.assert_close(c, d, atol=1e-8, rtol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.1, 0.5, 2.0]))
def test_shift_of_logits_is_shaping(seed, beta):
    """Logits z and z + Phi(s): one policy, one credit; the reward of Q = beta z moves by beta (Phi(s) - Phi(s'))."""
    z, logref = random_tree(seed)
    phi = [torch.randn(3**t, generator=torch.Generator().manual_seed(seed + t), dtype=F64) for t in range(4)]
    shifted = [a + p[:, None] for a, p in zip(z, phi, strict=True)]
    for a, b in zip(z, shifted, strict=True):
        torch.testing.assert_close(a.log_softmax(-1), b.log_softmax(-1), atol=1e-10, rtol=0)
    r, r2 = (inverse_bellman([beta * a for a in x], logref, beta) for x in (z, shifted))
    after = [p.view(-1, 3) for p in phi[1:]] + [torch.zeros(27, 3, dtype=F64)]
    for t in range(4):
        torch.testing.assert_close(r2[t] - r[t], beta * (phi[t][:, None] - after[t]), atol=1e-8, rtol=0)
    # along a path the terms telescope to beta Phi(s_0), the same for both of a pair: preferences do not move
    gap = along_paths(r2).sum(-1) - along_paths(r).sum(-1)
    torch.testing.assert_close(gap, (beta * phi[0]).expand(81), atol=1e-8, rtol=0)


def test_a_reference_that_forbids_a_token():
    reward, logref = random_tree(5)
    logref[1][0] = torch.tensor([0.0, -math.inf, -math.inf], dtype=F64)
    s = solve_tree(reward, logref, 0.5)
    assert s.logpi[1][0].tolist() == [0.0, -math.inf, -math.inf]
    assert tree_value(reward, logref, s.logpi, 0.5) == pytest.approx(s.V[0].item(), abs=1e-10)


@pytest.mark.parametrize(
    ("A", "H", "beta", "message"),
    [
        (10, 7, 1.0, "a tree of 10 actions and 7 steps has 10000000 leaves; at most 1000000"),
        (2, 2, 0.0, "beta must be > 0, got 0.0"),
        (2, 2, math.nan, "beta must be > 0, got nan"),
    ],
)
def test_bad_input(A, H, beta, message):
    levels = [torch.zeros(1, A).expand(A ** min(t, 2), A) for t in range(H)]
    with pytest.raises(UserError, match=message):
        solve_tree(levels, levels, beta)


def test_a_level_of_the_wrong_shape_is_named():
    with pytest.raises(UserError, match=r"level 1 .* must have shape \[2, 2\], got \[3, 2\]"):
        solve_tree([torch.zeros(1, 2), torch.zeros(3, 2)], [torch.zeros(1, 2), torch.zeros(2, 2)], 1.0)


def as_tree(mdp, table, prompt):
    """The levels of a tree that hold, for every text, what the table says."""
    levels = [table[prompt, 0, :1]]
    for t in range(1, mdp.length):
        levels.append(table[prompt, t, torch.arange(mdp.vocab**t) % mdp.vocab])
    return levels


def test_table_equals_tree():
    mdp = TableMDP.random(1, prompts=2, vocab=3, length=5)
    Q, V, logpi = mdp.solve(0.7)
    logref = mdp.ref_logits.log_softmax(-1)
    value = mdp.value(logpi)
    for p in range(2):
        s = solve_tree(as_tree(mdp, mdp.reward, p), as_tree(mdp, logref, p), 0.7)
        assert s.V[0].item() == pytest.approx(V[p, 0, 0].item(), abs=1e-10)
        for a, b in zip(s.logpi, as_tree(mdp, logpi, p), strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
        reward = along_paths(as_tree(mdp, mdp.reward, p)).sum(-1)
        assert float(along_paths(s.logpi).sum(-1).exp() @ reward) == pytest.approx(value[p].item(), abs=1e-10)
    assert Q.shape == mdp.reward.shape


def test_sampling_and_pairs_follow_their_laws():
    mdp = TableMDP.random(2)
    g = torch.Generator().manual_seed(0)
    prompt = torch.arange(4).repeat_interleave(5000)
    y = mdp.sample(mdp.ref_logits, prompt, g)
    got = mdp.along(mdp.reward, prompt, y).sum(-1).view(4, -1)
    error = got.std(-1) / 5000**0.5
    assert ((got.mean(-1) - mdp.value(mdp.ref_logits)).abs() < 5 * error).all()
    pairs = mdp.pairs(20_000, g)
    gap = (mdp.along(mdp.reward, pairs.prompt, pairs.chosen) - mdp.along(mdp.reward, pairs.prompt, pairs.rejected)).sum(
        -1
    )
    assert (gap > 0).double().mean().item() == pytest.approx(gap.abs().sigmoid().mean().item(), abs=0.02)


def test_dpo_from_the_reference_moves_towards_the_optimum():
    mdp = TableMDP.random(3)
    pairs = mdp.pairs(2000, torch.Generator().manual_seed(0))
    before, best = mdp.value(mdp.ref_logits).mean(), mdp.value(mdp.solve(1.0)[2]).mean()
    after = mdp.value(mdp.fit_dpo(pairs, beta=1.0)).mean()
    assert before + 0.5 * (best - before) < after
    assert torch.equal(mdp.fit_dpo(pairs, beta=1.0, steps=0), mdp.ref_logits)
    lik = [
        mdp.along(z.log_softmax(-1), pairs.prompt, pairs.chosen).mean() for z in (mdp.ref_logits, mdp.fit_sft(pairs))
    ]
    assert lik[1] > lik[0]


def test_a_reward_fitted_to_pairs_ranks_responses_by_their_sums():
    mdp, g = TableMDP.random(4), torch.Generator().manual_seed(0)
    found = mdp.fit_reward(mdp.pairs(4000, g), steps=30)
    prompt = torch.zeros(500, dtype=torch.long)  # constants per prompt cannot be known from pairs
    y = mdp.sample(mdp.ref_logits, prompt, g)
    sums = torch.stack([mdp.along(table, prompt, y).sum(-1) for table in (found, mdp.reward)])
    assert torch.corrcoef(sums)[0, 1] > 0.8
    assert (mdp.fit_reward(mdp.pairs(10, g), steps=0) == 0).all()


def every_response(mdp):
    """All V^H responses [V^H, H]."""
    return torch.cartesian_prod(*[torch.arange(mdp.vocab)] * mdp.length)


@pytest.mark.parametrize("table", ["random", "tied"])
def test_measures_equal_enumeration(table):
    """Reward, KL, entropy and any other expectation: the sum over all 4^4 responses, each with its probability."""
    mdp = TableMDP.random(0, prompts=2, vocab=4, length=4)
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(mdp.ref_logits.shape, generator=g, dtype=F64)
    if table == "tied":
        logits = tied(torch.randn(2, 5, 4, generator=g, dtype=F64), 4)
    other = torch.randn(mdp.ref_logits.shape, generator=g, dtype=F64)
    y = every_response(mdp)
    reward, kl, entropy = mdp.measure(logits)
    expected, reach = mdp.expect(logits, other), mdp.occupancy(logits)
    for p in range(2):
        prompt = torch.full((len(y),), p)
        logp, logref = (mdp.along(z.log_softmax(-1), prompt, y).sum(-1) for z in (logits, mdp.ref_logits))
        law = logp.exp()
        assert law.sum().item() == pytest.approx(1, abs=1e-12)
        assert float(law @ mdp.along(mdp.reward, prompt, y).sum(-1)) == pytest.approx(reward[p].item(), abs=1e-12)
        assert float(law @ (logp - logref)) == pytest.approx(kl[p].item(), abs=1e-12)
        assert float(law @ -logp) == pytest.approx(entropy[p].item(), abs=1e-12)
        assert float(law @ mdp.along(other, prompt, y).sum(-1)) == pytest.approx(expected[p].item(), abs=1e-12)
        assert reach[p, 0].tolist() == [1, 0, 0, 0]
        for t in range(1, 4):
            met = torch.zeros(4, dtype=F64).index_add(0, y[:, t - 1], law)
            torch.testing.assert_close(reach[p, t], met, atol=1e-12, rtol=0)
    assert torch.equal(mdp.value(logits), reward)


def test_of_the_reference_itself():
    mdp = TableMDP.scored(3)
    reward, kl, entropy = mdp.measure(mdp.ref_logits)
    assert kl.abs().max() < 1e-12
    assert ((entropy > 0) & (entropy < 8 * math.log(16))).all()
    assert torch.equal(reward, mdp.value(mdp.ref_logits))
    torch.testing.assert_close(mdp.occupancy(mdp.ref_logits).sum(-1), torch.ones(4, 8, dtype=F64), atol=1e-12, rtol=0)


def test_measures_have_the_gradient_of_their_expectation():
    """d/dz of the mean reward is what central differences say."""
    mdp = TableMDP.random(0, prompts=1, vocab=3, length=3)
    z = mdp.ref_logits.clone().requires_grad_()
    sum(x.sum() for x in mdp.measure(z)).backward()
    for at in [(0, 0, 0, 1), (0, 1, 2, 0), (0, 2, 1, 2)]:
        step = torch.zeros_like(mdp.ref_logits)
        step[at] = 1e-5
        high, low = (sum(x.sum() for x in mdp.measure(mdp.ref_logits + s)) for s in (step, -step))
        assert ((high - low) / 2e-5).item() == pytest.approx(z.grad[at].item(), abs=1e-8)


def test_a_tied_table_repeats_its_rows():
    """At position 0 the last row stands at every previous token; later row = previous token, whatever the width."""
    rows = torch.arange(2 * 4 * 5, dtype=F64).view(2, 4, 5).requires_grad_()
    table = tied(rows, 3)
    assert table.shape == (2, 3, 3, 5)
    for p in range(2):
        for previous in range(3):
            assert torch.equal(table[p, 0, previous], rows[p, 3])
            assert torch.equal(table[p, 1, previous], rows[p, previous])
            assert torch.equal(table[p, 2, previous], rows[p, previous])
    table.sum().backward()
    assert rows.grad.tolist() == [[[2.0] * 5] * 3 + [[3.0] * 5]] * 2


def test_the_scored_task_has_one_rule():
    mdp = TableMDP.scored(0, prompts=3, vocab=10, length=5, shy=2.0)
    assert (mdp.prompts, mdp.length, mdp.vocab) == (3, 5, 10)
    score = [1.0] * 4 + [-1.0] * 4 + [0.0] * 2
    assert torch.equal(mdp.reward, torch.tensor(score, dtype=F64).expand(3, 5, 10, 10))
    assert torch.equal(mdp.ref_logits[:, 1:], mdp.ref_logits[:, 1:2].expand(-1, 4, -1, -1))
    bold = TableMDP.scored(0, prompts=3, vocab=10, length=5, shy=0.0)
    gap = bold.ref_logits - mdp.ref_logits
    torch.testing.assert_close(gap[..., :4], torch.full((3, 5, 10, 4), 2.0, dtype=F64), atol=1e-12, rtol=0)
    assert (gap[..., 4:] == 0).all()
    y = torch.tensor([[0, 4, 9, 1, 1]])
    assert mdp.along(mdp.reward, torch.tensor([2]), y).tolist() == [[1, -1, 0, 1, 1]]
    other = TableMDP.scored(1, prompts=3, vocab=10, length=5)
    assert not torch.equal(other.ref_logits, mdp.ref_logits)
    assert torch.equal(other.reward, mdp.reward)
