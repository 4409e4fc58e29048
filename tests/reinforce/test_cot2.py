"""CoT2: targets and losses by hand, ratios by hand, and chains of mixtures as rollouts of the family's pipeline."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.errors import UserError
from locum.models.continuous import ContinuousPolicy
from locum.reinforce import (
    D3S,
    KL,
    MTS,
    Autoregressive,
    Clip,
    CoT2,
    Dirichlet,
    GroupNormalised,
    Informative,
    Plan,
    Recipe,
    Run,
    SequenceMean,
)  # fmt: skip
from locum.reinforce.cot2 import csft, csft_loss, csft_targets, log_dirichlet
from locum.reinforce.learner import Learner, Problem, Settings
from locum.tasks.mnns import MNNS, small_model
from locum.tokens.rollouts import Rollouts, pad_left, uniforms

TASK = MNNS(length=3)
DIGITS = torch.tensor([[2, 1, 4], [1, 1, 1], [9, 3, 5], [7, 7, 2]])
PROMPTS = TASK.prompts(DIGITS).tolist()
STEPS, COPIES = 3, 4
MODES = [MTS(1), MTS(3), MTS(3, "logits"), Dirichlet(), Dirichlet(3.0)]


def policy(seed=0, dtype=torch.float64, sharp=20.0):
    """An untrained one whose laws are far from uniform."""
    model = small_model(TASK, 8, 1, 2, seed).to(dtype)
    with torch.no_grad():
        model.transformer.wte.weight *= sharp
    return ContinuousPolicy(model, STEPS)


def rollouts(stage, of=None, seed=0, prompts=PROMPTS, reward=None):
    """Chains of a stage's mode; rewards alternate unless given."""
    of = of or policy()
    rows = len(prompts) * COPIES
    draws = uniforms(seed, torch.arange(rows), STEPS)
    made = of.generate(prompts, COPIES, [STEPS] * len(prompts), draws, mode=stage.mode)
    group = torch.arange(len(prompts)).repeat_interleave(COPIES)
    if reward is None:
        reward = (torch.arange(rows) % 3 == 0).double()
    return Rollouts.of([p for p in prompts for _ in range(COPIES)], made, group, reward)


def logp(stage, of, rows):
    return stage.columns(of, rows, frozenset({"logp"}))["logp"]


def loss(recipe, of, rows, old=None):
    recipe = Recipe.read(recipe) if isinstance(recipe, str) else recipe
    if old is not None:
        rows = rows.with_columns(old_logp=old)
    return recipe.loss(recipe.prepare(rows), recipe.likelihood.columns(of, rows, frozenset({"logp"})))[0]


def gradient(value, of):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(of.parameters()))])


# Supervised.


def test_targets_by_hand():
    targets, there = csft_targets(TASK.traces(DIGITS), TASK.answers(DIGITS), TASK.vocab_size)
    assert there.all()
    law = {TASK.total(i): p for i, p in enumerate(targets[0, 1].tolist()) if p}
    assert law == {3: 0.25, 1: 0.25, -1: 0.25, -3: 0.25}
    assert targets[0, 2].argmax() == TASK.token(1)
    assert torch.allclose(targets, TASK.frontier(DIGITS), atol=1e-6)
    assert torch.allclose(targets.sum(-1), torch.ones(4, 3), atol=1e-6)
    two, one = MNNS(length=2), torch.tensor([[1, 1]])
    first, last = csft_targets(two.traces(one), two.answers(one), two.vocab_size)[0][0]
    assert first[two.token(1)] == first[two.token(-1)] == 0.5
    assert last[two.token(0)] == 1


def test_targets_of_the_traces_kept():
    best = TASK.best(DIGITS, 6)
    kept = best.kept.clone()
    kept[1] = False  # a problem without a trace is left out
    targets, there = csft_targets(best.ids, best.answers, TASK.vocab_size, kept)
    assert there.tolist() == [True, False, True, True]
    assert targets.shape == (3, 3, TASK.vocab_size)
    for row, n in zip(targets, kept[there].sum(1).tolist(), strict=True):
        assert n < 6
        assert torch.allclose(row.sum(-1), torch.ones(3), atol=1e-6)
        assert (row[:2] * n).round().allclose(row[:2] * n, atol=1e-5)  # shares of n


def test_one_trace_is_plain_cross_entropy():
    best, of = TASK.best(DIGITS, 1), policy()
    targets, _ = csft_targets(best.ids, best.answers, TASK.vocab_size)
    assert ((targets == 0) | (targets == 1)).all()
    prefix, real = pad_left(PROMPTS)
    value = csft(of, prefix, real, targets)
    texts = torch.cat([prefix, best.ids[:, 0, :-1]], 1)
    logits = of.model(input_ids=texts).logits[:, -3:]
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), best.ids[:, 0].flatten(), reduction="sum") / 4
    assert value.item() == pytest.approx(plain.item(), abs=1e-6)
    assert torch.allclose(gradient(value, of), gradient(plain, of), atol=1e-6)


@pytest.mark.parametrize("feed", ["teacher", "self"])
def test_kl_is_cross_entropy_less_what_the_targets_cannot_lose(feed):
    of, targets = policy(), TASK.frontier(DIGITS).double()
    prefix, real = pad_left(PROMPTS)
    kl, ce = (csft(of, prefix, real, targets, feed, form) for form in ("kl", "ce"))
    entropy = torch.special.entr(targets).sum((1, 2)).mean()
    assert kl.item() == pytest.approx((ce - entropy).item(), abs=1e-6)
    assert torch.allclose(gradient(kl, of), gradient(ce, of), atol=1e-6)
    exact = csft_loss(targets.log(), targets)
    assert exact.item() == pytest.approx(0, abs=1e-6)


def test_teacher_and_self_see_different_thoughts_after_the_first():
    of, targets = policy(), TASK.frontier(DIGITS).double()
    prefix, real = pad_left(PROMPTS)
    with torch.no_grad():
        teacher, own = of(prefix, real, of.mix(targets[:, :-1])), of(prefix, real)
    assert torch.allclose(teacher[:, 0], own[:, 0], atol=1e-10)
    assert not torch.allclose(teacher[:, 1], own[:, 1], atol=1e-3)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: csft_loss(torch.zeros(1, 2, 3), torch.tensor([[[1.0, 0, 0], [0.5, 0.4, 0]]])), "step 1 of problem 0 sums"),
        (lambda: csft_loss(torch.zeros(1, 1, 2), torch.tensor([[[1.5, -0.5]]])), "step 0 of problem 0 sums"),
        (lambda: csft_loss(torch.full((1, 1, 2), torch.nan), torch.tensor([[[1.0, 0]]])), "logits of step 0 of problem 0"),
        (lambda: csft_loss(torch.zeros(1, 1, 2), torch.tensor([[[1.0, 0]]]), "l2"), "form must be 'kl' or 'ce'"),
        (lambda: csft(policy(), *pad_left(PROMPTS), TASK.frontier(DIGITS), "both"), "feed must be 'teacher' or 'self'"),
        (lambda: csft(policy(), *pad_left(PROMPTS), TASK.frontier(DIGITS)[:, 1:]), "3 outputs, and the targets 2 steps"),
    ],
)  # fmt: skip
def test_bad_targets(call, match):
    with pytest.raises(UserError, match=match):
        call()


# Ratios.


def ratio_of(stage, new, old, thought, weights=None):
    """Of one thought under two laws."""
    ids = torch.tensor([thought])
    weights = torch.ones(ids.shape) if weights is None else torch.tensor([weights])
    no, token = torch.tensor([False]), ids[:, 0]
    a, b = (stage.log_prob(torch.tensor([law]).log(), ids, weights, token, no) for law in (new, old))
    return (a - b).exp().item()


def test_ratios_of_tokens_by_hand():
    assert ratio_of(MTS(2), [0.5, 0.5], [0.8, 0.2], [0, 1]) == pytest.approx(1.25)
    assert ratio_of(MTS(1), [0.5, 0.5], [0.8, 0.2], [1]) == pytest.approx(2.5)
    old = torch.tensor([0.8, 0.2]).sqrt()  # softmax(logits/2)
    old = old / old.sum()
    assert ratio_of(MTS(2, "logits"), [0.5, 0.5], [0.8, 0.2], [0, 1]) == pytest.approx(0.25 / old.prod().item())


def test_dirichlet_densities_by_hand():
    a = torch.tensor([[0.2, 0.3, 0.5], [0.98, 0.01, 0.01]])
    assert torch.allclose(log_dirichlet(torch.ones(2, 3), a), torch.full((2,), math.log(2)))
    assert log_dirichlet(torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.5])).item() == pytest.approx(0)
    some = torch.tensor([True, False, True])
    inside = log_dirichlet(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([0.5, 0.0, 0.5]), some)
    assert inside.item() == pytest.approx(0)
    from scipy.stats import dirichlet

    c, x = [0.3, 0.5, 0.2], [0.1, 0.6, 0.3]
    assert log_dirichlet(torch.tensor(c), torch.tensor(x)).item() == pytest.approx(dirichlet(c).logpdf(x), rel=1e-5)
    expected = math.exp(dirichlet([0.5, 0.5]).logpdf([0.3, 0.7]) - dirichlet([0.8, 0.2]).logpdf([0.3, 0.7]))
    assert ratio_of(Dirichlet(), [0.5, 0.5], [0.8, 0.2], [0, 1], [0.3, 0.7]) == pytest.approx(expected, rel=1e-5)


def test_dirichlet_laws_live_where_the_sampler_had_a_share():
    z = torch.tensor([[0.7, 0.2999, 1e-4]]).log()  # the last is below the floor but was drawn
    given = (
        torch.tensor([[0, 1, 2]]),
        torch.tensor([[0.6, 0.4 - 1e-12, 1e-12]]),
        torch.tensor([0]),
        torch.tensor([False]),
    )
    c = torch.tensor([0.7, 0.2999, 1e-3])
    expected = log_dirichlet(c / c.sum(), given[1][0])
    assert Dirichlet().log_prob(z, *given).item() == pytest.approx(expected.item(), rel=1e-5)
    z.requires_grad_()
    Dirichlet().log_prob(z, *given).sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("stage", MODES)
def test_the_last_column_is_a_token(stage):
    of = policy()
    rows = rollouts(stage, of)
    last = of.scores(rows).hidden.view(len(rows), STEPS, -1)[:, -1].log_softmax(-1)
    assert torch.allclose(logp(stage, of, rows)[:, -1], last.gather(-1, rows.ids[:, -1:])[:, 0], atol=1e-10)


def test_a_thought_is_as_likely_as_its_tokens_on_average():
    of = policy()
    rows = rollouts(MTS(3), of)
    laws = of.scores(rows).hidden.view(len(rows), STEPS, -1).log_softmax(-1)
    mean = laws[:, :-1].gather(-1, rows.facts["thoughts"]).mean(-1)
    assert torch.allclose(logp(MTS(3), of, rows)[:, :-1], mean, atol=1e-10)


def test_one_token_is_drawn_and_scored_alike_under_both_normalisations():
    of = policy()
    assert MTS(1).mode == MTS(1, "logits").mode
    assert torch.equal(logp(MTS(1), of, rollouts(MTS(1), of)), logp(MTS(1, "logits"), of, rollouts(MTS(1), of)))


def test_entropy_is_of_the_laws():
    of = policy()
    rows = rollouts(MTS(2), of)
    found = MTS(2).columns(of, rows, frozenset({"logp", "entropy"}))
    laws = of.scores(rows).hidden.softmax(-1)
    assert torch.allclose(found["entropy"].flatten(), torch.special.entr(laws).sum(-1))


# Learning.


@pytest.mark.parametrize("stage", MODES)
def test_at_the_old_policy_all_ratios_are_one(stage):
    of = policy()
    rows = rollouts(stage, of)
    recipe = Recipe("grpo", (*CoT2().setting, stage))
    value = loss(recipe, of, rows, logp(stage, of, rows).detach())
    assert value.item() == pytest.approx(0, abs=1e-12)
    advantage = recipe.prepare(rows).advantages
    plain = -(advantage * logp(stage, of, rows)).sum() / (len(rows) * STEPS)
    assert torch.allclose(gradient(value, of), gradient(plain, of), atol=1e-10)


@pytest.mark.parametrize("stage", MODES)
def test_gradients_by_finite_differences(stage):
    """Thoughts stay as they are, their embeddings move with the table."""
    of, other = policy(sharp=10.0), policy(1, sharp=10.0)
    rows = rollouts(stage, other)
    old = logp(stage, other, rows).detach()
    recipe = Recipe("grpo", (GroupNormalised(ddof=0, eps=0.0), Clip(math.inf, math.inf), stage))
    slope = gradient(loss(recipe, of, rows, old), of)
    direction = torch.randn(len(slope), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = direction.split([p.numel() for p in of.parameters()])
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for p, d in zip(of.parameters(), parts, strict=True):
                p.add_(d.view_as(p), alpha=step)
            values.append(loss(recipe, of, rows, old).item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(slope @ direction), rel=1e-4)


@pytest.mark.parametrize("stage", MODES)
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_equal_rewards_teach_nothing(stage, reward):
    of = policy()
    rows = rollouts(stage, of, reward=torch.full((16,), reward, dtype=torch.float64))
    value = loss(Recipe("grpo", (*CoT2().setting, stage)), of, rows)
    assert value.item() == 0
    assert not gradient(value, of).any()


def test_one_token_a_step_is_grpo():
    of = policy()
    rows = rollouts(MTS(1), of)
    old = logp(MTS(1), policy(1), rows).detach()
    mine = Recipe.read("cot2(tokens=1)")
    host = Recipe("grpo", CoT2().setting)
    assert isinstance(host.likelihood, Autoregressive)
    a, b = loss(mine, of, rows, old), loss(host, of, rows, old)
    assert a.item() == pytest.approx(b.item(), abs=1e-12)
    assert torch.allclose(gradient(a, of), gradient(b, of), atol=1e-10)


def test_the_objective_of_the_paper_by_hand():
    of = policy()
    rows = rollouts(MTS(3), of)
    old = logp(MTS(3), policy(1), rows).detach()
    r = (logp(MTS(3), of, rows) - old).exp()
    reward = rows.reward.view(4, COPIES)
    a = ((reward - reward.mean(1, keepdim=True)) / reward.std(1, correction=0, keepdim=True)).view(-1, 1)
    j = torch.minimum(r * a, r.clamp(0.9, 1.1) * a).sum() / (COPIES * STEPS) / 4
    assert loss("cot2", of, rows, old).item() == pytest.approx(-j.item(), abs=1e-10)


def test_kl_to_a_reference_is_of_the_same_thoughts():
    of = policy()
    for stage in (MTS(3), Dirichlet()):
        rows = rollouts(stage, of)
        ref = logp(stage, policy(1), rows).detach()
        rows = rows.with_columns(ref_logp=ref)
        recipe = Recipe("grpo", (stage, KL(0.1), *CoT2().setting))
        gap = (ref - logp(stage, of, rows)).clamp(-20, 20)
        expected = 0.1 * (gap.exp() - gap - 1).mean()
        assert loss(recipe, of, rows).item() == pytest.approx(expected.item(), abs=1e-8)


@settings(max_examples=6)
@given(st.permutations(range(16)), st.integers(0, 3), st.sampled_from(MODES))
def test_order_and_padding_change_nothing(order, more, stage):
    of = policy()
    rows = rollouts(stage, of, prompts=PROMPTS)
    old = logp(stage, policy(1), rows).detach()
    recipe = Recipe("grpo", (*CoT2().setting, stage))
    value = loss(recipe, of, rows, old)
    pad = torch.zeros(16, more, dtype=torch.long)
    wide = Rollouts(
        torch.cat([pad, rows.prefix], 1), torch.cat([pad.bool(), rows.prefix_mask], 1), rows.ids, rows.mask, rows.group,
        rows.reward, {"old_logp": old}, rows.facts,
    )  # fmt: skip
    for same in (wide[torch.tensor(order)], wide.trimmed()):
        assert loss(recipe, of, same).item() == pytest.approx(value.item(), rel=1e-9, abs=1e-9)


def learner(recipe, of, seed=0, **settings):
    def reward(problems, completions):
        return torch.tensor([float(c[-1] % 2 == p.row) for p, c in zip(problems, completions, strict=True)])

    options = Settings(**{"rows_per_forward": 20, "rows_per_pass": 9} | settings)
    optimizer = torch.optim.Adam(of.parameters(), 1e-3)
    recipe = Recipe.read(recipe) if isinstance(recipe, str) else recipe
    return Learner(recipe, of, optimizer, reward, Run(total=4, room=STEPS), seed=seed, settings=options)


PROBLEMS = [Problem(p, i % 2) for i, p in enumerate(PROMPTS)]  # the answer's token is to be even, or odd


@pytest.mark.parametrize(
    "recipe", ["cot2", "cot2(mode='dirichlet')", "cot2 + d3s", "cot2 + hapo.clip + hapo.redistribute"]
)
def test_a_learner_carries_the_thoughts(recipe):
    teacher = learner(recipe, policy(dtype=torch.float32), epochs=2, minibatches=2)
    before = [p.clone() for p in teacher.policy.parameters()]
    rows, _ = teacher.collect(lambda batch: PROBLEMS)
    assert rows.facts["thoughts"].shape[:2] == (32, STEPS - 1)
    for _ in range(2):
        figures = teacher.step(PROBLEMS)
        assert figures["sampled_tokens"] == 32 * STEPS
        assert math.isfinite(figures["loss"])
    assert any(not torch.equal(a, b) for a, b in zip(before, teacher.policy.parameters(), strict=True))


def test_a_step_does_not_depend_on_how_rows_are_batched():
    ends = []
    for rows in (7, 100):
        teacher = learner("cot2", policy(), max_grad_norm=None)
        teacher.policy.batch_rows = rows
        teacher.settings = Settings(rows_per_forward=rows, rows_per_pass=rows, max_grad_norm=None)
        teacher.optimizer = torch.optim.SGD(teacher.policy.parameters(), 1e-3)
        teacher.step(PROBLEMS)
        ends.append(torch.cat([p.detach().flatten() for p in teacher.policy.parameters()]))
    assert torch.allclose(*ends, atol=1e-9)


def test_training_on_the_answer_makes_it_likelier():
    of = policy(dtype=torch.float32, sharp=5.0)
    teacher = learner("cot2(tokens=2)", of, rows_per_forward=32, rows_per_pass=32)
    teacher.optimizer = torch.optim.Adam(of.parameters(), 1e-2)
    even = [Problem(p, 0) for p in PROMPTS]
    rewards = [teacher.step(even)["reward"] for _ in range(30)]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1


def test_recipes_of_the_paper():
    recipe = Recipe.read("cot2")
    assert recipe.likelihood == MTS(3)
    assert recipe.advantage == GroupNormalised(ddof=0, eps=0.0)
    assert recipe.clip == Clip(0.1, 0.1)
    assert recipe.aggregate == SequenceMean()
    assert recipe.sample.group_size == 8
    assert Recipe.read("cot2(mode='dirichlet', gamma=2.0) + clip(low=0.3)").likelihood == Dirichlet(2.0)
    assert Recipe.read("cot2(mode='dirichlet', floor=0.02)").likelihood == Dirichlet(floor=0.02)
    assert Recipe.read("dapo + cot2").filter == Informative()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: CoT2(mode="base"), r"CoT2.mode 'base' is deterministic: .* no ratio"),
        (lambda: CoT2(mode="soft"), "CoT2.mode must be"),
        (lambda: CoT2(tokens=0), "MTS.tokens must be >= 1, got 0"),
        (lambda: CoT2(gamma=0.0), "Dirichlet.gamma must be finite and > 0, got 0.0"),
        (lambda: CoT2(gamma=math.nan), "Dirichlet.gamma"),
        (lambda: Dirichlet(floor=0.0), r"Dirichlet.floor must be in \(0, 1\)"),
        (lambda: MTS(normalization="none"), "MTS.normalization must be"),
        (lambda: Recipe.read("cot2 + thr"), "THR needs .*, which neither MTS nor Flat can tell"),
        (lambda: Recipe("ppo", (MTS(),)), "GAE needs 'value', which neither MTS"),
    ],
)
def test_bad_pieces(make, match):
    with pytest.raises(UserError, match=match):
        make()


def test_policies_and_rollouts_of_another_kind():
    from locum.tasks.digit_chain import ChainPolicy, DigitChain

    with pytest.raises(UserError, match=r"MTS asks a policy that thinks in mixtures, got ChainPolicy: wrap the model"):
        learner("cot2", ChainPolicy(DigitChain())).step(PROBLEMS)
    rows = rollouts(MTS(1))
    plain = Rollouts(rows.prefix, rows.prefix_mask, rows.ids, rows.mask, rows.group, rows.reward)
    with pytest.raises(UserError, match="Dirichlet reads the thoughts of a chain, and these rollouts have none"):
        Dirichlet().columns(policy(), plain, frozenset({"logp"}))


def test_rows_that_are_left_out_take_their_thoughts_along():
    rows = rollouts(MTS(2))
    recipe = Recipe("grpo", (MTS(2), D3S(rows=(0.5, 0.5), tokens=(1.0, 1.0))))
    plan = recipe.prepare(rows)
    assert isinstance(plan, Plan)
    assert 0 < len(plan) < len(rows)
    assert len(plan.rollouts.facts["thoughts"]) == len(plan)
