"""HAPO: hand numbers of the signal and of each part, what is neutral, what carries no gradient, and what is refused."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locum.errors import UserError
from locum.reinforce import (
    HAPO,
    Autoregressive,
    Clip,
    Flat,
    GroupNormalised,
    HAPOAdvantage,
    HAPOClip,
    HAPORedistribute,
    HAPOTemperature,
    Recipe,
    Run,
)
from locum.reinforce.hapo import Scale, signal
from locum.reinforce.learner import Learner, Problem, Settings
from locum.tasks.digit_chain import DigitChain, pretrained
from locum.tokens.rollouts import Rollouts
from locum.tokens.tiles import tile_entropy

F64 = torch.float64
approx = pytest.approx
NEUTRAL = (HAPOTemperature(tau=0), HAPORedistribute(adv_beta=0), HAPOClip(alpha=0))


def row(*x):
    return torch.tensor([x], dtype=F64)


def full(x):
    return torch.ones_like(x, dtype=torch.bool)


def batch(lengths, rewards, group=None, seed=0):
    """Rollouts of these lengths; old log-probabilities and entropies are random, in float64."""
    g, width = torch.Generator().manual_seed(seed), max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    old, entropy = torch.randn(2, *mask.shape, generator=g, dtype=F64).exp() * mask
    none = torch.zeros(len(lengths), 1, dtype=torch.long)
    group = torch.zeros(len(lengths), dtype=torch.long) if group is None else torch.tensor(group)
    rewards = torch.tensor(rewards, dtype=F64)
    return Rollouts(none, none == 0, mask.long(), mask, group, rewards, {"old_logp": -old, "entropy": entropy})


EIGHT = batch([5, 3, 4, 6, 2, 6, 1, 4], [1, 0, 0, 1, 1, 0, 1, 0], [0, 1, 0, 1, 1, 0, 0, 1])


def moved(rollouts, by=0.4, seed=1):
    """Log-probabilities near the old ones, with gradient; ratios lie on both sides of all bounds."""
    g = torch.Generator().manual_seed(seed)
    step = torch.randn(rollouts.mask.shape, generator=g, dtype=F64) * by
    return (rollouts.columns["old_logp"] + step).requires_grad_()


def loss_and_gradient(recipe, rollouts, logp, **columns):
    plan = recipe.prepare(rollouts)
    loss, _ = recipe.loss(plan, {"logp": logp, **columns})
    return loss, torch.autograd.grad(loss, logp)[0]


# The signal.


@pytest.mark.parametrize(
    ("rho", "expected"), [(0.8, (-1, -0.75, -0.5, -0.25, 0, 1)), (0.5, (-1, -0.5, 0, 1 / 3, 2 / 3, 1))]
)
def test_signal_of_six_tokens(rho, expected):  # rho .5: number round(2.5) = 2
    entropy = row(-4, -3, -2, -1, 0, 1).exp()
    assert signal(entropy, full(entropy), rho)[0].tolist() == approx(expected, abs=1e-12)


def test_sign_of_the_papers_code():
    entropy = row(-4, -3, -2, -1, 0, 1).exp()
    s = signal(entropy, full(entropy), 0.8, reference_sign=True)
    assert s[0].tolist() == approx((1, 0.75, 0.5, 0.25, 0, 1), abs=1e-12)
    assert HAPOClip().widened(s, 0.2, 0.28)[0][0].tolist() == approx([0.2] * 6)  # never wider to the left


def test_spread_is_around_the_quantile():
    scale = Scale.of(row(-4, -3, -2, -1, 0, 1).exp(), full(row(*range(6))), 0.8)
    assert float(scale.pivot) == approx(0, abs=1e-12)
    assert float(scale.spread) == approx(math.sqrt(31 / 6), abs=1e-12)  # (16 + 9 + 4 + 1 + 0 + 1) / 6
    assert (float(scale.top), float(scale.bottom)) == approx((1 / math.sqrt(31 / 6), -4 / math.sqrt(31 / 6)))


LOGS = st.lists(st.floats(-4, 1), min_size=1, max_size=30)


@given(LOGS, st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]))
def test_signal_is_bounded_and_grows_with_entropy(u, rho):
    entropy = row(*sorted(u)).exp()
    s = signal(entropy, full(entropy), rho)
    assert s.abs().max() <= 1
    assert (s.diff() >= 0).all()
    assert (s == 0).any()


@given(LOGS, st.floats(0.3, 2))
def test_signal_is_of_log_entropies_on_any_scale(u, power):
    u = [round(x, 3) for x in u]  # what differs, differs by more than rounding
    entropy = row(*u).exp()
    a, b = signal(entropy, full(entropy)), signal(entropy**power, full(entropy))
    assert torch.allclose(a, b, atol=1e-6)


@given(LOGS, st.integers(0, 3), st.integers(0, 3))
def test_padding_changes_nothing(u, columns, rows):
    entropy = row(*u).exp()
    padded = torch.nn.functional.pad(entropy, (0, columns, 0, rows))
    mask = torch.nn.functional.pad(full(entropy), (0, columns, 0, rows))
    s = signal(padded, mask)
    assert torch.equal(s[:1, : len(u)], signal(entropy, full(entropy)))
    assert not s[~mask].any()


def test_level_entropies_and_certain_tokens():
    for entropy in (row(0.7, 0.7, 0.7), row(0.7), row(0, 0)):
        assert not signal(entropy, full(entropy)).any()
    entropy = row(0, 0.1, 0.5, 0.9, 1.0)
    assert signal(entropy, full(entropy))[0, 0] == -1
    assert float(Scale.of(entropy, full(entropy), 0).pivot) == approx(math.log(1e-8))


# A, the temperature.


def scale(pivot=-1.0, spread=0.5, top=2.0, bottom=-4.0):
    return Scale(pivot, spread, top, bottom)


@pytest.mark.parametrize("mode", ["zscore", "minmax"])
def test_temperature_grows_with_entropy_from_one_at_the_quantile(mode):
    stage = HAPOTemperature(tau=0.1, mode=mode)
    at = torch.linspace(-3, 0, 31, dtype=F64)
    factor = stage.factor(at.exp(), scale())
    assert factor[20].item() == approx(1, abs=1e-12)  # log H = Q = -1
    assert (factor.diff() > 0).all()
    hand = {"zscore": 1 + 0.1 * (0 + 1) / 0.5, "minmax": 1 + 0.1 * (0 + 1) / 0.5 / 2}
    assert factor[-1].item() == approx(hand[mode], abs=1e-12)


@given(st.floats(-18, 8), st.floats(0.001, 0.5))
def test_temperature_stays_in_its_bounds(u, tau):
    h = torch.tensor([u], dtype=F64).exp()
    assert 0.25 <= HAPOTemperature(tau=tau).factor(h, scale()).item() <= 4
    assert abs(HAPOTemperature(tau=tau, mode="minmax").factor(h, scale()).item() - 1) <= tau + 1e-12


def test_temperature_of_the_papers_code_heats_routine():
    cold = torch.tensor([-3.0]).exp()
    assert HAPOTemperature(mode="minmax").factor(cold, scale()) < 1
    assert HAPOTemperature(mode="minmax", reference_sign=True).factor(cold, scale()) > 1


def test_heat_takes_the_entropy_of_the_logits():
    flat = torch.zeros(1, 4)
    assert tile_entropy(flat).item() == approx(math.log(4), abs=1e-6)
    memory = {"pivot": math.log(math.log(4)), "spread": 0.5, "top": 1.0, "bottom": -1.0}
    heat = HAPOTemperature().heat(memory)
    factor = heat(torch.cat([flat, torch.tensor([[9.0, 0, 0, 0]]), torch.tensor([[1.0, 0, 0, 0]]).log()]))
    assert factor[0].item() == approx(1, abs=1e-6)
    assert 0.25 <= factor[2] <= factor[1] < 1  # a certain token is cold, not frozen
    assert HAPOTemperature(base=2.0).heat(memory)(torch.tensor([[2.0, 0]])).item() == approx(
        heat(torch.tensor([[1.0, 0]])).item()
    )


def test_statistics_of_the_last_step_are_kept():
    stage, rollouts = HAPOTemperature(rho=0.5), EIGHT
    assert stage.heat({}) is None
    kept = stage.remember(rollouts, {})
    assert json.loads(json.dumps(kept)) == kept
    assert kept == {k: float(x) for k, x in vars(Scale.of(rollouts.columns["entropy"], rollouts.mask, 0.5)).items()}
    assert HAPOTemperature(tau=0).heat(kept) is None
    assert HAPOTemperature(tau=0).remember(rollouts, {}) == {}


# B, the advantage.


def test_advantages_of_one_and_three_tokens():
    got = HAPOAdvantage()(batch([1, 3], [1, 0]))
    assert got[0].tolist() == approx([1.7321, 0, 0], abs=1e-4)
    assert got[1].tolist() == approx([-0.57735] * 3, abs=1e-5)
    assert got.sum().item() == approx(0, abs=1e-6)
    assert GroupNormalised()(batch([1, 3], [1, 0]))[:, 0].tolist() == approx([0.7071, -0.7071], abs=1e-4)


def test_equal_lengths_are_grpo_with_the_populations_deviation():
    rollouts = batch([4] * 6, [1, 0, 0, 0.5, 0, 1], [0, 1, 0, 1, 1, 0])
    assert torch.allclose(HAPOAdvantage()(rollouts), GroupNormalised(ddof=0)(rollouts), atol=1e-12)


@pytest.mark.filterwarnings("ignore:a group has one row")
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(0, 2), st.sampled_from([0.0, 0.3, 1.0])), min_size=3, max_size=20
    )
)
def test_all_tokens_of_a_group_sum_to_zero(rows):
    lengths, group, rewards = zip(*rows, strict=True)
    rollouts = batch(list(lengths), list(rewards), list(group))
    got = HAPOAdvantage(fallback=None)(rollouts)
    for g in set(group):
        at = rollouts.group == g
        assert got[at].sum().item() == approx(0, abs=1e-5)
        if len(set(rollouts.reward[at].tolist())) == 1:
            assert not got[at].any()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(HAPOAdvantage(fallback=None)(rollouts[order]), got[order], atol=1e-9)


def test_huge_advantages_fall_back_on_grpo_in_their_group_alone():
    lengths, rewards = [3, 100, 100, 100], [1, 0, 0, 0]
    raw = HAPOAdvantage(fallback=None)(batch(lengths, rewards))[:, 0]
    assert raw.tolist() == approx([10.0, -0.1, -0.1, -0.1], abs=1e-3)
    both = batch([*lengths, 1, 3], [*rewards, 1, 0], [7, 7, 7, 7, 2, 2])
    assert HAPOAdvantage()(both)[:, 0].tolist() == approx([1.5, -0.5, -0.5, -0.5, 1.7321, -0.57735], abs=1e-4)


def test_rows_without_a_reward_are_left_out():
    got = HAPOAdvantage()(batch([1, 3, 9], [1, 0, math.nan]))
    assert not got[2].any()
    assert torch.equal(got[:2, :3], HAPOAdvantage()(batch([1, 3], [1, 0])))


# C, the redistribution; D, the bounds.


def test_redistribution_by_hand():
    got = HAPORedistribute().factor(row(0.5, 0.5, -0.5, -0.5), row(1, 1.3, 1, 1.3), 0.2, 0.28)
    assert got[0].tolist() == approx([1, 1.5, 0.5, 1], abs=1e-12)
    half = HAPORedistribute(adv_beta=0.5).factor(row(0.5, -0.5), row(0.8, 0.95), 0.2, 0.28)
    assert half[0].tolist() == approx([1.25, 0.75], abs=1e-12)


@given(st.floats(-1, 1), st.floats(0, 5), st.floats(0, 1))
def test_no_advantage_changes_its_sign(s, ratio, beta):
    assert HAPORedistribute(adv_beta=beta).factor(row(s), row(ratio), 0.2, 0.28).item() >= 0


def test_bounds_by_hand():
    low, high = HAPOClip().widened(row(-1, -0.5, 0, 1), 0.2, 0.28)
    assert low[0].tolist() == approx([0.4, 0.3, 0.2, 0.2], abs=1e-12)
    assert high[0].tolist() == approx([0.28, 0.28, 0.28, 0.56], abs=1e-12)
    tensors = HAPOClip().widened(row(-1, 1), row(0.1, 0.1), row(0.3, 0.3))  # of another stage
    assert tensors[0][0].tolist() == approx([0.2, 0.1])
    assert tensors[1][0].tolist() == approx([0.3, 0.6])


def test_the_lower_bound_stays_above_zero():
    assert HAPOClip().widened(row(-1, -0.5), 0.6, 0.6)[0][0].tolist() == approx([0.999, 0.9])
    low, high = HAPOClip().widened(row(-1, 0, 1), math.inf, math.inf)
    assert low.isinf().all()
    assert high.isinf().all()


def test_the_first_minibatch_quietens_routine_alone():
    recipe, rollouts = Recipe("dapo", (HAPORedistribute(), HAPOClip())), EIGHT
    logp = rollouts.columns["old_logp"].clone().requires_grad_()
    plan = recipe.prepare(rollouts)
    _, got = loss_and_gradient(recipe, rollouts, logp)
    _, host = loss_and_gradient(Recipe("dapo"), rollouts, logp)
    s = plan.rollouts.columns["hapo/0.8"]
    assert torch.allclose(got, host * torch.where(s > 0, 1, 1 + s), atol=1e-12)
    assert not got[s == -1].any()
    assert host[s == -1].all()


# In a recipe.


def test_neutral_parts_are_the_host():
    logp = moved(EIGHT)
    host, neutral = (loss_and_gradient(Recipe("dapo", pieces), EIGHT, logp) for pieces in ((), NEUTRAL))
    assert torch.equal(host[0], neutral[0])
    assert torch.equal(host[1], neutral[1])
    live = [type(stage)(**{"stats": "minibatch", stage.strength: 0}) for stage in NEUTRAL[1:]]
    assert Recipe("dapo", NEUTRAL).needs == Recipe("dapo", tuple(live)).live == frozenset()


@pytest.mark.parametrize("stats", ["batch", "minibatch"])
def test_the_loss_is_dapos_with_signal_bounds_and_weights_as_constants(stats):
    """Against the equations written out, autograd, and differences with the constants frozen."""
    recipe, rollouts, logp = Recipe("dapo", (HAPO(tau=0, stats=stats), Clip(0.2, 0.28))), EIGHT, moved(EIGHT)
    now = (logp * -1).exp()  # an entropy that would carry a gradient
    columns = {"entropy": now} if stats == "minibatch" else {}
    loss, gradient = loss_and_gradient(recipe, rollouts, logp, **columns)

    mask, old = rollouts.mask, rollouts.columns["old_logp"]
    with torch.no_grad():
        s = signal(now if stats == "minibatch" else rollouts.columns["entropy"], mask)
        r = (logp - old).exp()
        inside = (r >= 0.9) & (r <= 1.14)
        weight = torch.where(((s > 0) & ~inside) | ((s <= 0) & inside), 1 + s, 1)
        low, high = 0.2 * (1 - s.clamp(max=0)), 0.28 * (1 + s.clamp(min=0))
        advantages = HAPOAdvantage()(rollouts) * weight

    def written_out(x):
        r = (x - old).exp()
        return -(torch.minimum(r * advantages, r.clamp(1 - low, 1 + high) * advantages) * mask).sum() / mask.sum()

    assert loss.item() == approx(written_out(logp).item(), abs=1e-12)
    eps, flat = 1e-6, logp.detach()
    for i, t in mask.nonzero().tolist():
        bump = torch.zeros_like(flat)
        bump[i, t] = eps
        slope = (written_out(flat + bump) - written_out(flat - bump)) / (2 * eps)
        assert gradient[i, t].item() == approx(slope.item(), abs=1e-6)
    assert not gradient[~mask].any()


def test_row_order_and_padding_leave_the_loss_alone():
    recipe, logp = Recipe("dapo", (HAPO(),)), moved(EIGHT).detach()

    def value(rollouts, logp):
        return recipe.loss(recipe.prepare(rollouts), {"logp": logp})[0].item()

    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    wide = Rollouts.join([EIGHT, batch([9], [math.nan], [5])])[: len(EIGHT)]
    assert value(EIGHT[order], logp[order]) == approx(value(EIGHT, logp), abs=1e-12)
    assert value(wide, logp) == approx(value(EIGHT, logp), abs=1e-12)  # a plan is trimmed to its tokens


def test_stages_with_unlike_quantiles_read_their_own_signal():
    one, other = HAPORedistribute(rho=0.5), HAPOClip(rho=0.9)
    plan = Recipe("dapo", (one, other)).prepare(EIGHT)
    for stage in (one, other):
        expected = signal(EIGHT.columns["entropy"], EIGHT.mask, stage.rho)
        assert torch.equal(plan.rollouts.columns[stage.column], expected)


@pytest.mark.parametrize("stats", ["batch", "minibatch"])
def test_figures(stats):
    """Tokens that were strengthened, quietened and clipped, counted by hand; temperatures by the kept statistics."""
    recipe, rollouts, logp = Recipe("dapo", (HAPO(stats=stats),)), EIGHT, moved(EIGHT)
    kept = {"pivot": -1.0, "spread": 0.5, "top": 2.0, "bottom": -4.0}
    plan = recipe.prepare(rollouts, Run(1, 2, memory={"temperature": kept}))
    factor = HAPOTemperature().factor(rollouts.columns["entropy"][rollouts.mask], Scale(**kept))
    got = [plan.logs[f"hapo/{name}"] for name in ("coldest", "temperature", "hottest")]
    assert got == approx([factor.min().item(), factor.mean().item(), factor.max().item()])
    assert "hapo/hottest" not in recipe.prepare(rollouts).logs  # the first step

    now, mask = rollouts.columns["entropy"].flip(0).flip(1) + rollouts.mask, rollouts.mask
    _, logs = recipe.loss(plan, {"logp": logp, "entropy": now})
    s = signal(now if stats == "minibatch" else rollouts.columns["entropy"], mask)
    r, a = (logp - rollouts.columns["old_logp"]).exp(), plan.advantages
    factor = HAPORedistribute().factor(s, r, 0.2, 0.28)
    low, high = HAPOClip().widened(s, 0.2, 0.28)
    counts = {
        "strengthened": factor > 1,
        "quietened": factor < 1,
        "clipped_low_decision": (r < 1 - low) & (a < 0) & (s > 0),
        "clipped_low_routine": (r < 1 - low) & (a < 0) & (s <= 0),
        "clipped_high_decision": (r > 1 + high) & (a > 0) & (s > 0),
        "clipped_high_routine": (r > 1 + high) & (a > 0) & (s <= 0),
    }
    assert {name: logs[f"hapo/{name}"].item() for name in counts} == {
        n: (x & mask).sum().item() for n, x in counts.items()
    }
    assert sum(x.any() for x in counts.values()) >= 4
    if stats == "batch":
        ordered = s[mask].sort().values
        assert plan.logs["hapo/signal_p90"] == ordered[round(0.9 * (len(ordered) - 1))].item()


def test_recipes():
    assert Recipe.read("hapo") == Recipe("dapo", (HAPO(),))
    assert [type(s).__name__ for s in Recipe.read("dapo + hapo.clip + d3s").stages if "HAPO" in type(s).__name__] == [
        "HAPOClip"
    ]
    assert Recipe.read("gspo + hapo.clip(alpha=0.5)").clip == Clip(3e-4, 4e-4)
    parts = HAPO(rho=0.7, tau=0.05, mode="minmax", adv_beta=0.5, alpha=2.0, fallback=None, stats="minibatch").stages()
    assert parts == (
        HAPOTemperature(tau=0.05, mode="minmax", rho=0.7),
        HAPOAdvantage(fallback=None),
        HAPORedistribute(rho=0.7, stats="minibatch", adv_beta=0.5),
        HAPOClip(rho=0.7, stats="minibatch", alpha=2.0),
    )
    assert Recipe.read("hapo").needs == frozenset({"entropy", "heat"})


# In a run.


def learner(*pieces, seed=0):
    task = DigitChain(length=3, warm_steps=20)
    policy = pretrained(seed, task)

    def reward(problems, completions):
        return torch.tensor([task.score(p.ids, c) for p, c in zip(problems, completions, strict=True)])

    optimizer = torch.optim.Adam(policy.parameters(), 1e-3)
    settings = Settings(epochs=2)
    made = Learner(
        Recipe("dapo", pieces), policy, optimizer, reward, Run(0, 3, room=task.limit), seed, settings=settings
    )
    prompts = task.prompts(24, torch.Generator().manual_seed(seed)).view(3, 8, -1)
    return made, [[Problem(p) for p in step] for step in prompts.tolist()]


def test_a_neutral_run_is_the_hosts():
    def trained(*pieces):
        made, steps = learner(*pieces)
        losses = [made.step(problems)["loss"] for problems in steps]
        return losses, made.policy.lm_head.weight.detach()

    (a, x), (b, y) = trained(), trained(*NEUTRAL)
    assert a == b
    assert torch.equal(x, y)


def test_the_first_step_samples_as_the_host_and_later_ones_by_the_last_ones_statistics():
    host, heated = learner(), learner(HAPOTemperature(tau=2.0))
    texts = []
    for made, steps in (host, heated):
        for _ in range(2):
            rollouts, _ = made.collect(lambda batch, steps=steps, made=made: steps[made.run.step])
            texts.append(rollouts.ids)
            made.run.step += 1
            made.run.memory["temperature"] = HAPOTemperature().remember(
                rollouts.with_columns(entropy=rollouts.mask * 0.1), {}
            )
    assert torch.equal(texts[0], texts[2])
    assert texts[1].shape != texts[3].shape or not torch.equal(texts[1], texts[3])
    made, steps = learner(HAPO())
    figures = [made.step(problems) for problems in steps]
    assert figures[1]["hapo/coldest"] < figures[1]["hapo/hottest"]
    assert 0 < figures[1]["hapo/quietened"] < 1
    assert set(made.run.memory["temperature"]) == {"pivot", "spread", "top", "bottom"}
    assert all(math.isfinite(f["loss"]) for f in figures)


# What is refused.


@pytest.mark.parametrize(
    ("stage", "field", "value"),
    [
        (HAPOTemperature, "tau", -0.1),
        (HAPOTemperature, "tau", math.nan),
        (HAPOTemperature, "mode", "max"),
        (HAPOTemperature, "rho", 1.5),
        (HAPOTemperature, "base", 0.0),
        (HAPOAdvantage, "eps", -1.0),
        (HAPOAdvantage, "fallback", 0.0),
        (HAPORedistribute, "adv_beta", 1.5),
        (HAPORedistribute, "rho", -0.1),
        (HAPORedistribute, "stats", "row"),
        (HAPOClip, "alpha", math.inf),
        (HAPOClip, "rho", math.nan),
    ],
)
def test_a_bad_value_is_named(stage, field, value):
    with pytest.raises(UserError, match=rf"{stage.__name__}\.{field} must be .*, got {value!r}"):
        stage(**{field: value})
    if field != "eps":
        with pytest.raises(UserError, match=rf"\.{field} must be .*, got {value!r}"):
            HAPO(**{field: value})


def test_bad_entropies():
    entropy, nothing = row(1, math.nan, math.inf), torch.zeros(1, 3, dtype=torch.bool)
    with pytest.raises(UserError, match="there is none"):
        signal(entropy, nothing)
    with pytest.raises(UserError, match="the entropy of token 1 of row 0 is nan"):
        signal(entropy, full(entropy))
    with pytest.raises(UserError, match=r"rho must be in \[0, 1\], got 1.1"):
        signal(entropy, full(entropy), 1.1)


@dataclass(frozen=True)
class Silent(Autoregressive):
    """A likelihood that cannot be heated and tells no entropies."""

    provides: ClassVar[frozenset[str]] = frozenset({"value"})


def test_recipes_that_are_refused():
    with pytest.raises(UserError, match="HAPOClip is in this recipe twice"):
        Recipe("dapo", (HAPO(), HAPOClip()))
    with pytest.raises(UserError, match=r"HAPOTemperature has base 1.0, and tokens are scored at temperature 0.6"):
        Recipe("dapo", (HAPO(), Autoregressive(0.6)))
    assert Recipe("dapo", (HAPO(base=0.6), Autoregressive(0.6)))
    assert Recipe("dapo", (HAPO(tau=0), Autoregressive(0.6)))
    for stage in (HAPOTemperature(), HAPOClip(), HAPOClip(stats="minibatch")):
        with pytest.raises(UserError, match=f"{type(stage).__name__} needs 'entropy'"):
            Recipe("dapo", (stage, Silent()))
    with pytest.raises(UserError, match=r"Flat.group_size is 1"):
        Recipe("grpo", (HAPOAdvantage(), Flat(1)))
