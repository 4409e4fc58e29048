"""The digit chain: episodes by hand, exact values against enumeration and sampling, and a policy that goes on from anywhere."""

import itertools
import math

import pytest
import torch

from locum.errors import UserError
from locum.tasks.digit_chain import (
    FILLER,
    ChainPolicy,
    DigitChain,
    exact_advantages,
    mean_entropy,
    pass_at,
    pass_at_1,
    pretrained,
    success,
    values,
)
from locum.tokens.rollouts import Generated, Rollouts, uniforms
from locum.tokens.sampling import Sampling

_ = FILLER


def texts(prefixes, completions):
    width = max(map(len, completions))
    ids = torch.tensor([[*c] + [0] * (width - len(c)) for c in completions])
    mask = torch.arange(width) < torch.tensor([len(c) for c in completions])[:, None]
    made = Generated(ids, mask, torch.ones(len(ids), dtype=torch.bool))
    return Rollouts.of(prefixes, made, torch.zeros(len(ids), dtype=torch.long))


def drawn(policy, prefixes, copies, seed=0, **options):
    """Rollouts of a policy and the numbers they were drawn with."""
    limit = policy.task.limit
    draws = uniforms(seed, torch.arange(len(prefixes) * copies), limit)
    made = policy.generate(prefixes, copies, [limit] * len(prefixes), draws, **options)
    group = torch.arange(len(prefixes)).repeat_interleave(copies)
    return Rollouts.of([p for p in prefixes for _ in range(copies)], made, group), draws


def logits(policy, rollouts):
    scores = policy.scores(rollouts)
    return scores.logits(scores.hidden)


def rough(task, seed=0, sharp=4.0):
    """A policy that was not trained, with laws far from uniform."""
    torch.manual_seed(seed)
    policy = ChainPolicy(task)
    with torch.no_grad():
        policy.lm_head.weight *= sharp * 5
    return policy


@pytest.fixture(scope="module")
def warm():
    return pretrained(0, DigitChain())


def test_rewards_by_hand():
    task = DigitChain(length=3, cap=5)
    prompt = [3, 9, 4]
    cases = [
        ([], [3, 2, 6], 1),
        ([], [3, _, 2, 6], 1),
        ([], [_, 3, 2, _, 6], 1),
        ([3, _], [2, 6], 1),
        ([3, 1], [_, 6], 1),
        ([], [3, 1, 5], 0),
        ([], [3, 6], 0),
        ([], [3, 2, _, _, _], 0),
        ([_, _, _], [3, 2, 6], 0),
        ([], [3, 2, 4], 0),
    ]
    rollouts = texts([prompt + begun for begun, *_rest in cases], [c for _b, c, _r in cases])
    assert task.reward(rollouts).tolist() == [r for *_c, r in cases]
    assert [task.score(prompt + b, c) for b, c, _r in cases] == [r for *_c, r in cases]


def test_values_equal_enumeration():
    task = DigitChain(length=2, cap=4)
    policy = rough(task)
    prompt = [3, 9]
    whole = [
        y
        for n in range(2, 5)
        for y in itertools.product(range(11), repeat=n)
        if y[-1] != FILLER and sum(t != FILLER for t in y) == 2
    ]
    rollouts = texts([prompt] * len(whole), whole)
    logp = logits(policy, rollouts).double().log_softmax(-1).gather(-1, rollouts.targets[:, None])[:, 0]
    p = rollouts.spread(logp).sum(-1).exp()
    unfinished = 1 - p.sum()
    assert 0 < unfinished < 1
    torch.testing.assert_close(success(policy, torch.tensor([prompt])), (p * task.reward(rollouts)).sum()[None])
    nats = -(p * rollouts.spread(logp).sum(-1)).sum()  # of episodes that end; the others are enumerated too
    cut = [y for y in itertools.product(range(11), repeat=4) if sum(t != FILLER for t in y) < 2]
    other = texts([prompt] * len(cut), cut)
    logq = logits(policy, other).double().log_softmax(-1).gather(-1, other.targets[:, None])[:, 0]
    q = other.spread(logq).sum(-1).exp()
    torch.testing.assert_close(q.sum(), unfinished)
    tokens = (p * rollouts.lengths).sum() + (q * other.lengths).sum()
    nats = nats - (q * other.spread(logq).sum(-1)).sum()
    assert mean_entropy(policy, torch.tensor([prompt])) == pytest.approx((nats / tokens).item(), rel=1e-5)


@pytest.mark.parametrize("cap", [None, 9])
def test_values_equal_what_sampling_finds(warm, cap):
    task = DigitChain(cap=cap)
    policy = ChainPolicy(task)
    policy.load_state_dict(warm.state_dict())
    prompts = task.prompts(4, torch.Generator().manual_seed(0))
    n = 10_000
    rollouts, _draws = drawn(policy, prompts.tolist(), n)
    share = task.reward(rollouts).view(4, n).double().mean(1)
    exact = success(policy, prompts)
    assert ((share - exact).abs() < 4 * (exact * (1 - exact) / n).sqrt()).all()
    assert pass_at_1(policy, prompts) == pytest.approx(float(exact.mean()))
    assert pass_at(policy, prompts, 5) == pytest.approx(float((1 - (1 - exact) ** 5).mean()))
    law = logits(policy, rollouts).softmax(-1)
    assert mean_entropy(policy, prompts) == pytest.approx(torch.special.entr(law).sum(-1).mean().item(), rel=0.02)
    # The advantages of an episode add up to what it earned beyond its prompt's value.
    gain = exact_advantages(policy, rollouts).sum(1)
    torch.testing.assert_close(gain, task.reward(rollouts).double() - exact.repeat_interleave(n))


def test_advantages_have_mean_zero_at_every_state(warm):
    begun = [[], [_], [3], [3, _], [3, _, _, 7, 1], [4, 1, 1, 1, 1, 1, 1], [_] * 15]
    prompt = [3, 9, 4, 0, 7, 8, 1, 2]
    rows = texts([prompt + b for b in begun for _t in range(11)], [[t] for _b in begun for t in range(11)])
    advantage = exact_advantages(warm, rows)[:, 0].view(-1, 11)
    law = logits(warm, rows).double().softmax(-1).view(-1, 11, 11)
    assert torch.equal(law, law[:, :1].expand_as(law))
    torch.testing.assert_close((law[:, 0] * advantage).sum(-1), torch.zeros(len(begun), dtype=torch.float64))
    assert (advantage[:-1].abs().amax(-1) > 1e-3).all()
    table = values(warm, torch.tensor([prompt]))[0]
    assert advantage[5, 4].item() == pytest.approx(float(table[8, 8, 4, 0] - table[7, 7, 1, 0]))
    assert table[8, 8, 4, 0] == 1
    assert (advantage[-1] == 0).all()  # no way left to end in time


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.6, top_k=3), Sampling()])
def test_scores_are_the_law_that_was_drawn_from(sampling):
    policy = rough(DigitChain(length=5, cap=12))
    prompts = policy.task.prompts(30, torch.Generator().manual_seed(0)).tolist()
    rollouts, draws = drawn(policy, prompts, 4, sampling=sampling)
    rising = sampling.law(logits(policy, rollouts)).cumsum(-1)
    u = draws[:, : rollouts.mask.shape[1]][rollouts.mask]
    assert torch.equal((rising <= u[:, None]).sum(-1), rollouts.targets)
    ended = ((rollouts.ids != FILLER) & rollouts.mask).sum(-1) == 5
    assert torch.equal(rollouts.facts["ended"], ended)
    assert (rollouts.lengths[~ended] == 12).all()
    assert (rollouts.ids[~rollouts.mask] == 0).all()


def test_heat_sees_the_logits_of_the_rows_that_run():
    policy = rough(DigitChain(length=5))
    prompts = policy.task.prompts(30, torch.Generator().manual_seed(0)).tolist()
    seen = []

    def heat(z):
        seen.append(len(z))
        return 0.5 + z.softmax(-1).amax(-1)

    rollouts, draws = drawn(policy, prompts, 4, heat=heat, sampling=Sampling(0.8))
    z = logits(policy, rollouts)
    rising = Sampling(0.8).law(z / (0.5 + z.softmax(-1).amax(-1))[:, None]).cumsum(-1)
    u = draws[:, : rollouts.mask.shape[1]][rollouts.mask]
    assert torch.equal((rising <= u[:, None]).sum(-1), rollouts.targets)
    assert seen == rollouts.mask.sum(0).tolist()
    alike, _draws = drawn(policy, prompts, 4, heat=lambda z: z.new_ones(len(z)))
    assert torch.equal(alike.ids, drawn(policy, prompts, 4)[0].ids)


def test_a_prefix_goes_on_as_the_whole_did():
    policy = rough(DigitChain(length=6, cap=9))
    prompts = policy.task.prompts(40, torch.Generator().manual_seed(0)).tolist()
    whole, draws = drawn(policy, prompts, 1)
    said = [ids[:n] for ids, n in zip(whole.ids.tolist(), whole.lengths.tolist(), strict=True)]
    for cut in (1, 3, 5):
        prefixes = [p + y[:cut] for p, y in zip(prompts, said, strict=True)]
        tail = policy.generate(prefixes, 1, [99] * 40, draws[:, cut:])
        assert tail.lists() == [y[cut:] for y in said]
        assert torch.equal(tail.ended, whole.facts["ended"])
        rows = Rollouts.of(prefixes, tail, torch.arange(40))
        assert torch.equal(policy.task.reward(rows), policy.task.reward(whole))
        after = whole.mask[:, cut:]
        torch.testing.assert_close(
            exact_advantages(policy, rows)[tail.mask], exact_advantages(policy, whole)[:, cut:][after]
        )
    short = policy.generate(prompts, 1, [2] * 40, draws)
    assert short.lists() == [y[:2] for y in said]
    assert not short.ended.any()


def test_rows_do_not_depend_on_what_is_beside_them():
    policy = rough(DigitChain())
    prompts = policy.task.prompts(20, torch.Generator().manual_seed(0)).tolist()
    prompts = [p + [4, _][: i % 3] for i, p in enumerate(prompts)]
    rollouts, draws = drawn(policy, prompts, 2)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))[:7]
    rows = torch.stack([2 * order, 2 * order + 1], -1).flatten()
    some = policy.generate([prompts[i] for i in order], 2, [16] * 7, draws[rows])
    assert some.lists() == [rollouts.ids[i, : rollouts.lengths[i]].tolist() for i in rows]
    part = rollouts[rows]
    z = torch.zeros(*rollouts.mask.shape, 11).masked_scatter(rollouts.mask[..., None], logits(policy, rollouts))
    torch.testing.assert_close(logits(policy, part), z[rows][part.mask])
    torch.testing.assert_close(exact_advantages(policy, part), exact_advantages(policy, rollouts)[rows])


def test_gradients_are_those_of_the_network_itself():
    policy = rough(DigitChain(length=3), sharp=1.0).double()
    rollouts, _draws = drawn(policy, [[1, 2, 3], [4, 5, 6]], 8)
    logits(policy, rollouts).log_softmax(-1).gather(-1, rollouts.targets[:, None]).sum().backward()
    weight = policy.lm_head.weight
    found, step = weight.grad[3, 5].item(), 1e-5
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            weight[3, 5] += sign * step
            ends.append(logits(policy, rollouts).log_softmax(-1).gather(-1, rollouts.targets[:, None]).sum().item())
            weight[3, 5] -= sign * step
    assert found == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())


@pytest.mark.parametrize(("task", "expected"), [(DigitChain(), 0.16), (DigitChain.hetero(), 0.18)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_warm_start_leaves_room(task, expected, seed):
    policy = pretrained(seed, task)
    prompts = task.prompts(500, torch.Generator().manual_seed(7))
    assert pass_at_1(policy, prompts) == pytest.approx(expected, abs=0.06)
    again = pretrained(seed, task)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        again.lm_head.weight.zero_()
    assert pretrained(seed, task).lm_head.weight.abs().sum() > 0


def test_hard_digits_are_the_uncertain_ones():
    law = pretrained(0, DigitChain.hetero()).laws(torch.tensor([[0, 7] * 4]))[0]
    entropy = torch.special.entr(law).sum(-1)[1:, :, 0].mean(1)
    assert entropy[::2].min() > 1.5 > 0.6 > entropy[1::2].max()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("length", 0),
        ("eps", 1.1),
        ("eps", math.nan),
        ("eps", (0.1,) * 9),
        ("filler", -0.1),
        ("cap", 7),
        ("warm_steps", -1),
    ],
)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(UserError, match=rf"^DigitChain\.{field} must be"):
        DigitChain(**{field: value})


def test_prefixes_that_cannot_be_gone_on_from():
    policy = ChainPolicy(DigitChain(length=2))
    draws = torch.zeros(2, 4)
    for prefixes, room, message in (
        ([[1, 2], [1]], [4, 4], "begins with the prompt's 2 digits"),
        ([[1, 2], [1, 2, 3, 4]], [4, 4], "prefix 1 .* 2 of 2 digits"),
        ([[1, 2, _, _, _, _], [1, 2]], [4, 4], "prefix 0 .* 4 of 4 tokens"),
        ([[1, 2], [1, 2]], [4, 0], "prefix 1 .* room 0"),
    ):
        with pytest.raises(UserError, match=message):
            policy.generate(prefixes, 1, room, draws)
    with pytest.raises(UserError, match="draws has 3 columns"):
        policy.generate([[1, 2]], 1, [4], draws[:1, :3])
