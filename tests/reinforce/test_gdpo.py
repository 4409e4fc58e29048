"""The evidence bound against enumeration, what masks depend on, the objective by hand, and what the baseline cannot see."""

import contextlib
import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from locum.errors import UserError
from locum.models.diffusion import MaskedDiffusion
from locum.reinforce import GDPO, Clip, DiffuGRPO, GroupCentred, Recipe, Run, SequenceSum, TokenMean, TokenRatio
from locum.reinforce.gdpo import ELBO, FullMask, PerSequence, SequenceKL, elbo, exact_elbo
from locum.reinforce.learner import Learner, Problem, Settings
from locum.reinforce.recipe import of
from locum.reinforce.trainer import Arguments, Trainer
from locum.tasks.permutations import Permutations, untrained
from locum.tokens.rollouts import Generated, Rollouts

ALL_RULES = ["gauss-1", "gauss-2", "gauss-3", "gauss-5", "midpoint-3", "simpson", "double-mc-1", "double-mc-4"]
MASK = 2  # of the tables below, which say 0 and 1
PROMPT = [5]


class Table(nn.Module):
    """Logits of every place of a text of `length` bits, of its own for every pattern of bits and masks."""

    def __init__(self, length, scale=1.0, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        size = (3**length, length, 2)
        self.logits = nn.Parameter(scale * torch.randn(size, generator=g, dtype=torch.float64))
        self.length = length

    def forward(self, ids, attention_mask):
        seen = ids[:, -self.length :].masked_fill(attention_mask[:, -self.length :] == 0, MASK)
        logits = self.logits[(seen * 3 ** torch.arange(self.length)).sum(-1)]
        return torch.cat([logits.new_zeros(len(ids), ids.shape[1] - self.length, 2), logits], 1)

    def logp(self, text, hidden):
        """log p of each hidden bit, given the others."""
        at = sum(3**i * (MASK if i in hidden else b) for i, b in enumerate(text))
        return {i: self.logits[at, i].log_softmax(-1)[text[i]] for i in hidden}


class Level(nn.Module):
    """Every bit is as likely as the other."""

    def forward(self, ids, attention_mask):
        return torch.zeros(*ids.shape, 2, dtype=torch.float64)


def table(length, scale=1.0, seed=0):
    return MaskedDiffusion(Table(length, scale, seed), MASK)


def texts(completions, number=None, reward=None, prompt=PROMPT):
    width = max(map(len, completions))
    ids = torch.tensor([[*c] + [0] * (width - len(c)) for c in completions])
    mask = torch.arange(width) < torch.tensor([len(c) for c in completions])[:, None]
    made = Generated(ids, mask, torch.ones(len(ids), dtype=torch.bool))
    rows = Rollouts.of([prompt] * len(ids), made, torch.zeros(len(ids), dtype=torch.long))
    rows = rows.with_facts(number=torch.arange(len(ids)) * 1_000_003 if number is None else number)
    return rows if reward is None else rows.with_reward(torch.tensor(reward, dtype=torch.float64))


def subsets(n):
    return [s for k in range(1, n + 1) for s in itertools.combinations(range(n), k)]


# The bound.


def test_a_bound_of_two_bits_by_hand():
    policy = table(2, seed=3)
    p = policy.model.logp
    first = p((1, 0), (0, 1))[0] + p((1, 0), (1,))[1]
    second = p((1, 0), (0, 1))[1] + p((1, 0), (0,))[0]
    assert exact_elbo(policy, [PROMPT], [[1, 0]]).item() == pytest.approx(((first + second) / 2).item(), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_three_forms_of_the_bound_agree_and_lie_below_the_likelihood(n):
    policy, text = table(n, seed=n), [i % 3 % 2 for i in range(n)]
    told = {s: policy.model.logp(text, s) for s in subsets(n)}
    by_count = sum(
        sum(sum(told[s].values()) * n / k for s in told if len(s) == k) / math.comb(n, k) for k in range(1, n + 1)
    )
    orders = torch.stack(
        [sum(told[tuple(sorted(order[i:]))][order[i]] for i in range(n)) for order in itertools.permutations(range(n))]
    )
    exact = exact_elbo(policy, [PROMPT], [text])[0] / n * n
    assert exact.item() == pytest.approx(by_count.item() / n, abs=1e-10)
    assert exact.item() == pytest.approx(orders.mean().item(), abs=1e-10)
    assert exact <= orders.exp().mean().log() + 1e-12


def over_bernoulli_masks(policy, text, rule):
    """The quadrature, with the mean over bernoulli masks taken exactly."""
    n, total = len(text), 0.0
    for t, w in zip(*ELBO(rule).points, strict=True):
        for s in subsets(n):
            total += w * t ** len(s) * (1 - t) ** (n - len(s)) / t * sum(policy.model.logp(text, s).values()).item()
    return total


@pytest.mark.parametrize("n", [2, 4, 6])
def test_gauss_is_exact_for_short_texts_and_others_are_not(n):
    policy, text = table(n, seed=n), [1, 0, 0, 1, 1, 0][:n]
    exact = exact_elbo(policy, [PROMPT], [text]).item()
    for many in (1, 2, 3, 5):
        error = abs(over_bernoulli_masks(policy, text, f"gauss-{many}") - exact)
        assert error < 1e-10 if n <= 2 * many else error > 1e-4
    if n == 6:
        assert abs(over_bernoulli_masks(policy, text, "midpoint-3") - exact) > 1e-4


def test_points_by_hand():
    points = {rule: ELBO(rule).points for rule in ALL_RULES}
    assert points["gauss-1"] == ([0.5], [1.0])
    assert points["gauss-2"][0] == pytest.approx([0.2113249, 0.7886751], abs=1e-7)
    assert points["gauss-3"][0] == pytest.approx([0.1127017, 0.5, 0.8872983], abs=1e-7)
    assert points["gauss-3"][1] == pytest.approx([5 / 18, 8 / 18, 5 / 18], abs=1e-12)
    assert points["midpoint-3"][0] == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    for t, w in points.values():
        assert sum(w) == pytest.approx(1)
        assert len(t) == len(w)
    assert [ELBO(rule, masks=2).forwards for rule in ALL_RULES] == [2, 4, 6, 10, 6, 6, 2, 8]


@pytest.mark.parametrize("rule", ALL_RULES)
def test_count_masks_give_a_level_model_its_bound_exactly(rule):
    policy = MaskedDiffusion(Level(), MASK)
    found = elbo(policy, [PROMPT] * 3, [[0], [1] * 5, [0] * 16], ELBO(rule, masks=2))
    assert found.tolist() == pytest.approx([-n * math.log(2) for n in (1, 5, 16)], abs=1e-12)


def test_floor_masks_are_too_low_by_hand():
    policy = MaskedDiffusion(Level(), MASK)  # L = 16 at gauss-3: 1, 8 and 14 are hidden
    found = elbo(policy, [PROMPT], [[0] * 16], ELBO("gauss-3", mask="floor")).item()
    assert found == pytest.approx(-13.9587 * math.log(2), abs=1e-4)


def test_bernoulli_masks_have_the_right_mean_and_spread():
    n, rows, k = 8, 20_000, 2
    batch = texts([[0] * n], torch.tensor([0]))[torch.zeros(rows, dtype=torch.long)]
    batch = batch.with_facts(number=torch.arange(rows) * 7919)
    by = ELBO("gauss-3", k, "bernoulli")
    hidden, weight = by.drawn(batch)
    found = (weight[..., None] * hidden).sum((0, 2))  # what a model of log-probability 1 everywhere gives
    t, w = (torch.tensor(x, dtype=torch.float64) for x in by.points)
    variance = n * (w.square() * (1 - t) / t).sum().item() / k
    assert found.mean().item() == pytest.approx(n, abs=4 * math.sqrt(variance / rows))
    assert found.var().item() == pytest.approx(variance, rel=0.06)


@pytest.mark.parametrize("mask", ["count", "bernoulli"])
def test_masks_of_double_monte_carlo(mask):
    """By count the estimate is unbiased: 20 000 of them, from all 63 sums that a mask can give."""
    n, rows = 6, 20_000
    policy, text = table(n, seed=1), [1, 0, 0, 1, 1, 0]
    batch = texts([text], torch.tensor([0]))[torch.zeros(rows, dtype=torch.long)]
    batch = batch.with_facts(number=torch.arange(rows) * 7919)
    hidden, weight = ELBO("double-mc-1", mask=mask).drawn(batch)
    assert (hidden.any(-1) | (weight <= n)).all()
    if mask == "count":
        sums = torch.zeros(2**n, dtype=torch.float64)
        for s in subsets(n):
            sums[sum(2**i for i in s)] = sum(policy.model.logp(text, s).values()).detach()
        found = (weight * sums[(hidden * 2 ** torch.arange(n)).sum(-1)])[0]
        exact = exact_elbo(policy, [PROMPT], [text]).item()
        assert abs(found.mean().item() - exact) < 4 * found.std().item() / math.sqrt(rows)
        assert ELBO("double-mc-1").bound(policy, batch[:50]).tolist() == pytest.approx(found[:50].tolist())


def test_a_mask_that_hides_nothing_adds_nothing():
    batch = texts([[1]], torch.arange(1))
    policy = table(1)
    seen = {
        ELBO("gauss-1", mask="bernoulli").bound(policy, batch.with_facts(number=torch.tensor([i]))).item()
        for i in range(20)
    }
    logp = policy.model.logp((1,), (0,))[0].item()
    assert sorted(seen) == pytest.approx(sorted({2 * logp, 0.0}))


# What masks depend on.


@settings(max_examples=20)
@given(order=st.permutations(range(5)), more=st.integers(0, 3), rule=st.sampled_from(ALL_RULES))
def test_masks_are_a_rows_own(order, more, rule):
    batch = texts([[0], [1] * 4, [0] * 6, [1, 0, 1], [0, 1]])
    wide = Rollouts(
        batch.prefix,
        batch.prefix_mask,
        nn.functional.pad(batch.ids, (0, more), value=1),
        nn.functional.pad(batch.mask, (0, more)),
        batch.group,
        batch.reward,
        facts=batch.facts,
    )[torch.tensor(order)]
    for mask in ("count", "bernoulli", "floor"):
        hidden, weight = ELBO(rule, mask=mask).drawn(batch)
        other, weighs = ELBO(rule, mask=mask).drawn(wide)
        assert torch.equal(hidden[:, order], other[..., :6])
        assert torch.equal(weight[:, order], weighs)
        assert not other[..., 6:].any()


def test_epochs_and_points_have_masks_of_their_own():
    batch = texts([[0] * 12] * 4)
    first, _ = ELBO("midpoint-1", masks=2).drawn(batch)
    again, _ = ELBO("midpoint-1", masks=2).drawn(batch.with_facts(epoch=torch.zeros(4, dtype=torch.long)))
    later, _ = ELBO("midpoint-1", masks=2).drawn(batch.with_facts(epoch=torch.ones(4, dtype=torch.long)))
    assert torch.equal(first, again)
    for a, b in ((first, later), (first[:1], first[1:]), (first[:, :2], first[:, 2:])):
        assert (a != b).any(-1).all()
    with pytest.raises(UserError, match='no fact "number"'):
        ELBO().drawn(replace(batch, facts={}))


@pytest.mark.parametrize("by", [ELBO("gauss-3"), ELBO("double-mc-2", 2, "bernoulli"), ELBO("simpson"), FullMask(0.5)])
def test_shared_masks_make_the_ratio_one_and_others_do_not(by):
    policy = untrained(0, Permutations())
    batch = texts([[0, 1, 2], [5, 4, 3]], prompt=[6] * 4)
    told = by.columns(policy, batch, frozenset({"logp"}))["logp"]
    assert torch.equal(told, by.columns(policy, batch, frozenset({"logp"}))["logp"])
    later = batch.with_facts(epoch=torch.ones(2, dtype=torch.long))
    assert not torch.allclose(told, by.columns(policy, later, frozenset({"logp"}))["logp"])


@settings(max_examples=10)
@given(left=st.integers(0, 3), junk=st.integers(0, 5))
def test_padding_of_prompts_changes_nothing(left, junk):
    policy, plain = untrained(0, Permutations()), texts([[0, 1, 2], [5, 4]], prompt=[6, 6])
    wide = replace(
        plain,
        prefix=nn.functional.pad(plain.prefix, (left, 0), value=junk),
        prefix_mask=nn.functional.pad(plain.prefix_mask, (left, 0)),
        ids=plain.ids.masked_fill(~plain.mask, junk),
    )
    for by in (ELBO(), FullMask(0.5)):
        a, b = (by.columns(policy, x, frozenset({"logp"}))["logp"] for x in (plain, wide))
        assert torch.allclose(a, b, atol=1e-6)


def test_the_baseline_hides_a_share_of_the_prompt():
    shown = []

    class Spy(Level):
        def forward(self, ids, attention_mask):
            shown.append(ids)
            return super().forward(ids, attention_mask)

    batch = texts([[0, 1]] * 2000, prompt=[5] * 4)
    FullMask().columns(MaskedDiffusion(Spy(), MASK), batch, frozenset({"logp"}))
    assert (shown[0][:, 4:] == MASK).all()
    share = (shown[0][:, :4] == MASK).double().mean().item()
    assert share == pytest.approx(0.15, abs=4 * math.sqrt(0.15 * 0.85 / 8000))


# The objective.


def loss_of(recipe, policy, batch, **columns):
    """The loss of a batch, as the learner takes it."""
    recipe = Recipe.read(recipe) if isinstance(recipe, str) else recipe
    plan = recipe.prepare(batch.with_columns(**columns), Run(room=batch.mask.shape[1]))
    return recipe.loss(plan, recipe.likelihood.columns(policy, plan.rollouts, frozenset({"logp"})))


COMPLETIONS, REWARDS = [[1, 0, 1], [0, 0], [1, 1, 0], [0]], [1.0, 0.0, 0.5, 0.0]


def test_the_gradient_is_that_of_reinforce_on_the_bound():
    """Where the policy is the old one: sum_g A_g grad Lhat_g / (G L_g), and finite differences say the same."""
    policy, batch = table(3, seed=2), texts(COMPLETIONS, reward=REWARDS)
    weights = policy.model.logits

    def at(x):
        with torch.no_grad():
            before, weights[:] = weights.clone(), x
            value = (factor * ELBO().bound(policy, batch)).sum().item()
            weights[:] = before
        return value

    advantage = torch.tensor(REWARDS).double() - 0.375
    factor = advantage / (4 * torch.tensor([3, 2, 3, 1]))
    with torch.no_grad():
        old = ELBO().columns(policy, batch, frozenset({"logp"}))["logp"]
    loss, logs = loss_of("gdpo", policy, batch, old_logp=old)
    (grad,) = torch.autograd.grad(loss, weights)
    (want,) = torch.autograd.grad((factor * ELBO().bound(policy, batch)).sum(), weights)
    assert torch.allclose(grad, -want, atol=1e-12)
    assert logs["ratio"] == logs["tokens"] == 4
    assert loss.item() == pytest.approx(-factor.sum().item(), abs=1e-12)
    for index in want.abs().flatten().topk(3).indices.tolist():
        step = torch.zeros_like(weights).flatten().scatter_(0, torch.tensor(index), 1e-4).view_as(weights)
        found = (at(weights + step) - at(weights - step)) / 2e-4
        assert found == pytest.approx(want.flatten()[index].item(), abs=1e-5)


def test_equal_rewards_teach_nothing_and_a_row_without_one_neither():
    policy = table(3)
    loss, _ = loss_of("gdpo", policy, texts(COMPLETIONS, reward=[1.0] * 4))
    assert not torch.autograd.grad(loss, policy.model.logits)[0].any()
    losses = [loss_of("gdpo", policy, texts(COMPLETIONS[:n], reward=[1.0, 0.0, math.nan][:n]))[0] * n for n in (2, 3)]
    assert torch.allclose(*(torch.autograd.grad(loss, policy.model.logits)[0] for loss in losses))


@pytest.mark.parametrize("gap", [1.5, 1 / 1.5])
def test_clipping_by_hand(gap):
    """Rewards 2 and 0: advantages 1 and -1. Both rows of two tokens, so half of each ratio's term, and the mean of two."""
    policy, batch = table(2), texts([[1, 0], [0, 1]], reward=[2.0, 0.0])
    with torch.no_grad():
        told = ELBO().columns(policy, batch, frozenset({"logp"}))["logp"]
    old = told - (told != 0).double() * math.log(gap)
    loss, _ = loss_of("gdpo", policy, batch, old_logp=old)
    (grad,) = torch.autograd.grad(loss, policy.model.logits)
    alone = [torch.autograd.grad(ELBO().bound(policy, batch)[i], policy.model.logits)[0] for i in range(2)]
    if gap > 1:  # min(1.5, 1.2) - 1.5: only the second row is learnt from
        assert loss.item() == pytest.approx((-1.2 + 1.5) / 2 / 2, abs=1e-12)
        assert torch.allclose(grad, 1.5 * alone[1] / 2 / 2, atol=1e-12)
    else:  # 2/3 and -max(2/3, .8): only the first
        assert loss.item() == pytest.approx((-2 / 3 + 0.8) / 2 / 2, abs=1e-12)
        assert torch.allclose(grad, -2 / 3 * alone[0] / 2 / 2, atol=1e-12)


def test_a_far_ratio_is_cut():
    policy, batch = table(2), texts([[1, 0], [0, 1]], reward=[0.0, 2.0])
    with torch.no_grad():
        told = ELBO().columns(policy, batch, frozenset({"logp"}))["logp"]
    loss, _ = loss_of("gdpo", policy, batch, old_logp=told - (told != 0).double() * 1e4)
    assert loss.item() == pytest.approx((math.exp(20) - 1.2) / 4, rel=1e-12)


def test_completions_of_one_token_need_no_bound():
    """One token has one mask: the loss and gradient are the host's on the fully hidden completion."""
    policy, batch = table(1), texts([[1], [0], [0], [1]], reward=[1.0, 0.0, 0.5, 1.0])
    old = torch.full((4, 1), -0.5, dtype=torch.float64)
    found = [
        loss_of(recipe, policy, batch, old_logp=old)[0]
        for recipe in ("gdpo", "dr_grpo + fullmask(prompt=0.0) + sequencesum + clip")
    ]
    grads = [torch.autograd.grad(loss, policy.model.logits)[0] for loss in found]
    assert found[0].item() == pytest.approx(found[1].item(), abs=1e-12)
    assert torch.allclose(*grads, atol=1e-12)
    assert grads[0].any()


def test_the_baseline_cannot_see_what_is_right_together():
    """Two bits, right where they differ, all laws uniform: every completion once is the exact expectation."""
    every = [[0, 0], [0, 1], [1, 0], [1, 1]]
    policy = MaskedDiffusion(Table(2, scale=0.0), MASK)
    batch = texts(every, reward=[float(a != b) for a, b in every])
    loss, _ = loss_of("diffugrpo + kl(beta=0.0)", policy, batch)
    (grad,) = torch.autograd.grad(loss, policy.model.logits)
    assert grad.abs().max() < 1e-12

    exact = exact_elbo(policy, [PROMPT] * 4, every)
    objective = ((batch.reward - 0.5) * exact).sum() / 4 / 2
    (grad,) = torch.autograd.grad(objective, policy.model.logits)
    assert grad[MASK * 4].abs().max() < 1e-12  # both hidden: nothing to choose
    for other in (0, 1):
        # first bit hidden, second `other`; and the reverse
        for at, place in ((MASK + 3 * other, 0), (other + 3 * MASK, 1)):
            assert grad[at, place, 1 - other].item() == pytest.approx(1 / 32, abs=1e-12)
            assert grad[at, place, other].item() == pytest.approx(-1 / 32, abs=1e-12)


def test_the_kl_of_whole_completions():
    policy, batch = table(2), texts([[1, 0], [0, 1]], reward=[1.0, 1.0])
    with torch.no_grad():
        told = ELBO().columns(policy, batch, frozenset({"logp"}))["logp"]
    apart = (told != 0) * torch.tensor([[0.4], [-0.4]], dtype=torch.float64)
    loss, _ = loss_of("gdpo + sequencekl(beta=0.5)", policy, batch, ref_logp=told + apart, old_logp=told)
    by_hand = [math.exp(d) - d - 1 for d in (0.2, -0.2)]
    assert loss.item() == pytest.approx(0.5 * sum(by_hand) / 2, abs=1e-12)
    loss, _ = loss_of("gdpo + sequencekl(beta=0.0)", policy, batch, old_logp=told)
    assert loss.item() == 0
    assert Recipe.read("gdpo + sequencekl").needs == {"ref_logp"}


# As recipes, and in the learner.


def test_papers_as_recipes():
    gdpo, diffu = Recipe.read("gdpo"), Recipe.read("diffugrpo")
    assert gdpo == of(GDPO())
    assert (gdpo.host, diffu.host) == ("dr_grpo", "dr_grpo")
    for stage in (ELBO(), PerSequence(), GroupCentred(), SequenceSum(), Clip(0.2, 0.2), TokenRatio()):
        assert stage in gdpo.stages
    for stage in (FullMask(0.15), GroupCentred(), TokenMean(), Clip(0.5, 0.5), TokenRatio()):
        assert stage in diffu.stages
    assert diffu.needs == {"ref_logp"}
    assert of(DiffuGRPO(prompt=0.0)).likelihood == FullMask(0.0)
    assert Recipe.read("gdpo(rule='double-mc-4', mask='bernoulli')").likelihood.forwards == 4


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ("gdpo + d3s", "D3S needs 'entropy', which neither ELBO nor Flat can tell"),
        ("gdpo + thr", "THR needs"),
        ("ppo + gdpo", "GAE needs 'value'"),
        ("gdpo + kl(beta=0.1)", "ELBO tells the bound of whole completions, and KL compares tokens: take sequencekl"),
        ("grpo + persequence", "PerSequence lets the last token stand for a completion, and only ELBO"),
        ("gdpo + diffugrpo", "both gdpo and diffugrpo bring one"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(recipe, why):
    with pytest.raises(UserError, match=why):
        Recipe.read(recipe)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ELBO("gauss"),
            r"ELBO\.rule must be one of gauss-N, midpoint-N, double-mc-N, simpson with N in 1\.\.99",
        ),
        (lambda: ELBO("gauss-0"), r"ELBO\.rule must be"),
        (lambda: GDPO(rule="best-3"), r"ELBO\.rule must be"),
        (lambda: ELBO(masks=0), r"ELBO\.masks must be >= 1, got 0"),
        (lambda: GDPO(mask="all"), r"ELBO\.mask must be one of count, bernoulli, floor, got 'all'"),
        (lambda: FullMask(math.nan), r"FullMask\.prompt must be in \[0, 1\], got nan"),
        (lambda: DiffuGRPO(prompt=1.5), r"FullMask\.prompt must be in \[0, 1\], got 1\.5"),
        (lambda: SequenceKL(-1.0), r"SequenceKL\.beta must be finite and >= 0, got -1\.0"),
        (lambda: elbo(table(2), [PROMPT], [[]]), "completion 0 is empty"),
        (lambda: elbo(table(2), [PROMPT], []), "there are 1 prompts and 0 completions"),
        (lambda: elbo(table(2), [PROMPT], [[0, MASK]]), "a completion holds the mask token 2"),
        (lambda: exact_elbo(table(2), [PROMPT], [[0] * 13]), "13 tokens are too many; at most 12"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def learner(recipe, seed=0, **options):
    task = Permutations(symbols=4)
    policy = untrained(seed, task)
    optimizer = torch.optim.SGD(policy.model.parameters(), 1.0)
    made = Learner(
        Recipe.read(recipe),
        policy,
        optimizer,
        lambda problems, completions: torch.tensor([task.score(c) + 0.1 * c[0] for c in completions]),
        Run(0, 2, room=4),
        seed=seed,
        settings=Settings(max_grad_norm=None, **options),
        reference=lambda: contextlib.nullcontext(untrained(seed + 1, task)),
    )
    return made, [Problem(task.prompt)] * 3


@pytest.mark.parametrize(
    "recipe", ["gdpo", "gdpo + sequencekl", "gdpo + d3s(tokens=(1.0, 1.0))", "gspo + elbo", "diffugrpo"]
)
def test_micro_batches_change_nothing(recipe):
    weights = []
    for rows in (64, 5):
        made, problems = learner(recipe, epochs=2, rows_per_forward=rows, rows_per_pass=rows)
        figures = made.step(problems)
        weights.append(torch.cat([p.detach().flatten() for p in made.policy.model.parameters()]))
        assert math.isfinite(figures["loss"])
    assert torch.allclose(*weights, atol=1e-5)


def test_the_old_policy_is_asked_for_all_epochs_before_the_first_update():
    made, problems = learner("gdpo", epochs=3, minibatches=1)
    asked = []

    class Spy:
        def __init__(self, policy):
            self.policy = policy

        def __getattr__(self, name):
            return getattr(self.policy, name)

        def log_probs(self, rollouts, *hidden):
            before = torch.is_grad_enabled()
            weight = next(self.policy.model.parameters()).detach().clone()
            asked.append((before, int(rollouts.facts["epoch"][0]), weight))
            return self.policy.log_probs(rollouts, *hidden)

    made.policy = Spy(made.policy)
    figures = made.step(problems)
    assert [(grad, epoch) for grad, epoch, _ in asked] == [(False, i) for i in range(3)] + [(True, i) for i in range(3)]
    assert all(torch.equal(asked[0][2], weight) for _, _, weight in asked[1:4])
    assert not torch.equal(asked[0][2], asked[5][2])
    assert figures["ratio"] != 1
    assert learner("gdpo")[0].step(problems)["ratio"] == 1


def test_steps_and_seeds_have_masks_of_their_own(monkeypatch):
    numbers = []
    monkeypatch.setattr(
        ELBO, "drawn", lambda by, rows, drawn=ELBO.drawn: numbers.append(rows.facts["number"]) or drawn(by, rows)
    )
    for seed in (0, 1):
        made, problems = learner("gdpo", seed)
        for _ in range(2):
            made.step(problems)
    everything = torch.cat(numbers[::2])  # the old policy's; the current one's come after it
    assert len(everything.unique()) == len(everything) == 4 * 24
    assert all(torch.equal(a, b) for a, b in zip(numbers[::2], numbers[1::2], strict=True))


def test_the_trainer_takes_such_a_policy(tmp_path):
    task = Permutations(symbols=4)
    problems, reference = [Problem(task.prompt)] * 3, untrained(1, task)

    def reward(problems, completions):
        return torch.tensor([task.score(c) + 0.1 * c[0] for c in completions])

    def trainer(out, steps):
        settings = Settings(epochs=2, rows_per_forward=5, rows_per_pass=7)
        args = Arguments(steps, prompts=2, max_new_tokens=4, learning_rate=1e-2, settings=settings, eval_rows=3)
        policy, kept = untrained(0, task), lambda: contextlib.nullcontext(reference)
        recipe = "gdpo + sequencekl"
        made = Trainer(recipe, policy, problems, reward, out, args, eval_problems=problems, reference=kept)
        made.train()
        return made

    first, again = (trainer(tmp_path / name, 2) for name in "ab")
    weights = [torch.cat([p.flatten() for p in made.module.parameters()]) for made in (first, again)]
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], torch.cat([p.flatten() for p in untrained(0, task).model.parameters()]))
    assert first.figures["trained_tokens"] == 2 * 8 * 2  # one per completion and epoch
    assert math.isfinite(first.figures["eval/reward"])
