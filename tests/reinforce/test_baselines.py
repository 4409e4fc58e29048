"""The baselines' exact properties: advantages, ratios, clipping, averages, and what a batch may be split into."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from locum.errors import UserError
from locum.reinforce import (
    GAE,
    HOSTS,
    KL,
    BatchCentred,
    Clip,
    Constant,
    Flat,
    GroupCentred,
    GroupNormalised,
    Informative,
    LeaveOneOut,
    Overlong,
    Recipe,
    Run,
    SequenceMean,
    SequenceRatio,
    SequenceSum,
    TokenMean,
    TokenRatio,
)
from locum.reinforce.base import Choice, GroupAdvantage, Weigh
from locum.reinforce.plan import Plan
from locum.tokens.rollouts import Generated, Rollouts

F64 = torch.float64
GROUPED = [h for h in HOSTS if h not in ("ppo", "reinforce")]
RUN = Run(0, 1, room=8)


def batch(
    reward: Sequence[float], group: Sequence[int], lengths: Sequence[int], seed: int = 0, pad: int = 0
) -> Rollouts:
    """Random log-probabilities: columns old_logp, now (near them), ref_logp, value."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths) + pad) < torch.tensor(lengths)[:, None]
    made = Generated(mask.long(), mask, mask[:, 0])
    rows = Rollouts.of([[1]] * len(reward), made, torch.tensor(group), torch.tensor(reward, dtype=F64))
    old, near, ref, value = (torch.randn((4, len(lengths), max(lengths)), generator=g, dtype=F64)).unbind()
    columns = {"old_logp": old - 2, "now": old - 2 + 0.4 * near, "ref_logp": ref - 2, "value": value}
    wide = {k: torch.nn.functional.pad(x, (0, pad)) * mask for k, x in columns.items()}
    return rows.with_columns(**wide, entropy=wide["value"].abs())


def usual(seed: int = 0, pad: int = 0) -> Rollouts:
    """Two groups of unequal size, not adjacent, with lengths of 1 to 5."""
    return batch([1, 0, 0.5, 0, 1, 0, 1], [3, 8, 3, 8, 8, 3, 8], [3, 1, 5, 2, 4, 4, 2], seed, pad)


def lossy(recipe: Recipe, plan: Plan, total: Tensor | None = None) -> tuple[float, Tensor]:
    """Loss, and gradient with respect to the log-probabilities "now"."""
    logp = plan.rollouts.columns["now"].clone().requires_grad_()
    value = plan.rollouts.columns["value"].clone()
    loss, _ = recipe.loss(plan, {"logp": logp, "value": value}, total)
    loss.backward()
    return loss.item(), torch.zeros_like(logp) if logp.grad is None else logp.grad


# Advantages.

ONE_RIGHT = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=F64)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (GroupNormalised(ddof=1, eps=0.0), [1.5, -0.5, -0.5, -0.5]),
        (GroupNormalised(ddof=0, eps=0.0), [math.sqrt(3), *[-1 / math.sqrt(3)] * 3]),
        (GroupCentred(), [0.75, -0.25, -0.25, -0.25]),
        (LeaveOneOut(), [1.0, -1 / 3, -1 / 3, -1 / 3]),
    ],
)
def test_one_right_of_four(stage: GroupAdvantage, expected: list[float]) -> None:
    a = stage.of_rows(ONE_RIGHT, torch.zeros(4, dtype=torch.long))
    assert a.tolist() == pytest.approx(expected, abs=1e-12)
    assert a.sum().item() == pytest.approx(0, abs=1e-6)


def test_the_deviation_is_unbiased_unless_told_otherwise() -> None:
    assert GroupNormalised() == GroupNormalised(ddof=1, eps=1e-6)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-5, 5)), min_size=2, max_size=12),
    st.floats(0.1, 50),
    st.floats(-9, 9),
)
@settings(max_examples=20)
@pytest.mark.filterwarnings("ignore:a group has one row")
def test_sums_are_0_and_rewards_may_be_scaled_and_shifted(rows: list[tuple[int, int]], a: float, b: float) -> None:
    group, reward = torch.tensor([g for g, _ in rows]), torch.tensor([float(r) for _, r in rows], dtype=F64)
    for stage, scale in ((GroupNormalised(eps=0.0), 1.0), (GroupCentred(), a), (LeaveOneOut(), a)):
        before, after = stage.of_rows(reward, group), stage.of_rows(a * reward + b, group)
        assert torch.allclose(after, scale * before, rtol=1e-9, atol=1e-9)
        assert torch.zeros(4, dtype=F64).index_add(0, group, before).abs().max() < 1e-9


@pytest.mark.parametrize("stage", [GroupNormalised(eps=0.0), GroupNormalised(), GroupCentred(), LeaveOneOut()])
def test_level_groups_are_exactly_0(stage: GroupAdvantage) -> None:
    reward = torch.tensor([0.1, 0.1, 0.1, 1.0, 0.0], dtype=torch.float32)
    a = stage.of_rows(reward, torch.tensor([0, 0, 0, 1, 1]))
    assert (a[:3] == 0).all()
    assert (a[3:] != 0).all()


@pytest.mark.parametrize("stage", [GroupNormalised(), GroupCentred(), LeaveOneOut()])
def test_a_row_that_is_alone_has_advantage_0_with_a_warning(stage: GroupAdvantage) -> None:
    """Of one text, whatever the row: Python shows it once."""
    said = set()
    for group in ([0, 1, 1], [5, 1, 1]):
        with pytest.warns(UserWarning, match="one row only") as found:
            assert stage.of_rows(torch.tensor([5.0, 1.0, 0.0]), torch.tensor(group))[0] == 0
        said |= {str(w.message) for w in found}
    assert said == {"a group has one row only: its advantage is 0"}


def test_a_row_without_a_reward_gets_0_and_leaves_the_statistics() -> None:
    reward = torch.tensor([1.0, torch.nan, 0.0, 0.0, 0.0], dtype=F64)
    group = torch.zeros(5, dtype=torch.long)
    for stage in (GroupNormalised(eps=0.0), GroupCentred(), LeaveOneOut()):
        a = stage.of_rows(reward, group)
        assert a[1] == 0
        assert torch.equal(a[[0, 2, 3, 4]], stage.of_rows(ONE_RIGHT, group[:4]))
    rows = batch(reward.tolist(), [0] * 5, [2, 3, 1, 1, 2])
    assert BatchCentred()(rows)[:, 0].tolist() == [0.75, 0, -0.25, -0.25, -0.25]
    assert (GAE()(rows)[1] == 0).all()
    for host in HOSTS:
        loss, grad = lossy(
            recipe := Recipe(host, ((Flat(5),) if host in ("ppo", "reinforce") else ())), recipe.prepare(rows, RUN)
        )
        assert math.isfinite(loss)
        assert (grad[1] == 0).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_an_infinite_reward_is_refused(bad: float) -> None:
    with pytest.raises(UserError, match=r"the reward of row 2 is -?inf; rewards must be finite"):
        Recipe("grpo").prepare(batch([1, 0, bad, 0], [0] * 4, [1] * 4))


def test_gae_with_lam_1_and_no_critic_is_the_reward_to_go() -> None:
    rows = batch([1, -2], [0, 1], [3, 2])
    a, returns = GAE(lam=1.0).estimates(rows.with_columns(value=torch.zeros(2, 3, dtype=F64)))
    assert a.tolist() == returns.tolist() == [[1, 1, 1], [-2, -2, 0]]


def test_gae_by_hand() -> None:
    rows = batch([1], [0], [2]).with_columns(value=torch.tensor([[0.5, 0.25]], dtype=F64))
    a, returns = GAE(gamma=0.5, lam=0.5).estimates(rows)
    last = 1 - 0.25
    assert a[0].tolist() == pytest.approx([0.5 * 0.25 - 0.5 + 0.25 * last, last], abs=1e-12)
    assert returns[0].tolist() == pytest.approx([a[0, 0].item() + 0.5, 1.0], abs=1e-12)


def test_gae_takes_the_kl_off_each_token() -> None:
    rows = batch([1], [0], [2]).with_columns(value=torch.zeros(1, 2, dtype=F64))
    rows = rows.with_columns(
        old_logp=torch.tensor([[-1.0, -2.0]], dtype=F64), ref_logp=torch.tensor([[-3.0, -1.0]], dtype=F64)
    )
    a, _ = GAE(lam=1.0, kl=0.1).estimates(rows)
    assert a[0].tolist() == pytest.approx([1 - 0.2 + 0.1, 1 + 0.1], abs=1e-12)


def test_gae_is_whitened_over_all_tokens() -> None:
    rows = usual()
    a = GAE()(rows)[rows.mask]
    assert a.mean().item() == pytest.approx(0, abs=1e-12)
    assert a.var(correction=0).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("length", "expected"), [(1, 0.0), (16, 0.0), (17, -0.25), (18, -0.5), (20, -1.0), (21, -1.0)])
def test_overlong(length: int, expected: float) -> None:
    rows = batch([0], [0], [length])
    assert Overlong(20, 4)(rows).tolist() == [expected]
    assert Recipe("grpo", (Overlong(20, 4),)).shaped(rows).reward.tolist() == [expected]


def test_informative_groups_are_those_whose_rewards_differ() -> None:
    rows = batch([1, 1, 0, 1, 0.5, torch.nan, 1, torch.nan], [0, 0, 1, 1, 2, 2, 3, 3], [1] * 8)
    assert Informative()(rows).tolist() == [False, False, True, True, False, False, False, False]


# Ratio and clipping.


def clipped(ratio: float, a: float, stage: Clip) -> tuple[float, float]:
    """The loss of a token and its derivative with respect to the log-probability."""
    logp = torch.tensor([[math.log(ratio)]], dtype=F64, requires_grad=True)
    r = TokenRatio()(logp, torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=torch.bool))
    loss = stage(r, torch.full((1, 1), a, dtype=F64), stage.low, stage.high)
    loss.sum().backward()
    return loss.item(), logp.grad.item()


@pytest.mark.parametrize(
    ("ratio", "a", "loss", "slope"),
    [(1.5, 1, -1.2, 0), (1.5, -1, 1.5, 1.5), (0.5, 1, -0.5, -0.5), (0.5, -1, 0.8, 0), (1.1, 2, -2.2, -2.2)],
)
def test_clip(ratio: float, a: float, loss: float, slope: float) -> None:
    assert clipped(ratio, a, Clip(0.2, 0.2)) == pytest.approx((loss, slope), abs=1e-12)


def test_dual_clip() -> None:
    assert clipped(5, -1, Clip(0.2, 0.2, dual=3.0)) == pytest.approx((3, 0), abs=1e-12)
    assert clipped(2, -1, Clip(0.2, 0.2, dual=3.0)) == pytest.approx((2, 2), abs=1e-12)
    assert clipped(5, 1, Clip(0.2, 0.2, dual=3.0)) == pytest.approx((-1.2, 0), abs=1e-12)


def test_a_log_ratio_is_cut_at_20() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    for stage in (TokenRatio(), SequenceRatio()):
        for gap, expected in ((1000.0, math.exp(20)), (-1000.0, math.exp(-20))):
            ratio = stage(torch.full((1, 1), gap, dtype=F64), torch.zeros(1, 1, dtype=F64), mask)
            assert ratio.item() == pytest.approx(expected)


def sequence(bound: float) -> tuple[float, list[float], Tensor]:
    logp = torch.tensor([[0.1, 0.3, 5.0]], dtype=F64, requires_grad=True)  # the last one is padding
    mask = torch.tensor([[True, True, False]])
    s = SequenceRatio()(logp, torch.zeros(1, 3, dtype=F64), mask)
    loss = Clip(bound, bound)(s, torch.ones(1, 3, dtype=F64), bound, bound)
    value = (loss * mask).sum() / 2
    value.backward()
    return value.item(), logp.grad[0].tolist(), s.detach()[0, :2]


def test_sequence_ratio() -> None:
    value, grad, s = sequence(0.2)
    assert s.tolist() == pytest.approx([math.exp(0.2)] * 2, abs=1e-12)
    assert (value, grad) == (pytest.approx(-1.2, abs=1e-12), [0, 0, 0])
    value, grad, s = sequence(1.0)
    assert value == pytest.approx(-math.exp(0.2), abs=1e-12)
    assert grad == pytest.approx([-math.exp(0.2) / 2] * 2 + [0], abs=1e-12)


def test_with_one_advantage_per_row_it_is_the_ratio_of_whole_texts() -> None:
    """The same value and gradient as exp(mean log-ratio) A, one number per row."""
    rows = usual()
    recipe = Recipe("gspo", (Clip(math.inf, math.inf),))
    plan = recipe.prepare(rows, RUN)
    logp = plan.rollouts.columns["now"].clone().requires_grad_()
    n = plan.rollouts.mask.sum(-1)
    s = (((logp - plan.rollouts.columns["old_logp"]) * plan.rollouts.mask).sum(-1) / n).exp()
    whole = -(s * plan.advantages[:, 0]).mean()
    (grad,) = torch.autograd.grad(whole, logp)
    found, slope = lossy(recipe, plan)
    assert found == pytest.approx(whole.item(), abs=1e-12)
    assert torch.allclose(slope, grad, rtol=0, atol=1e-12)


# From token losses to a number.

TWO = torch.tensor([[1.0, 0.0, 0.0], [2.0, 2.0, 2.0]], dtype=F64)
TWO_MASK = torch.tensor([[True, False, False], [True, True, True]])


@pytest.mark.parametrize(
    ("stage", "expected"),
    [(SequenceMean(), 1.5), (TokenMean(), 1.75), (Constant(length=4), 0.875), (SequenceSum(), 3.5)],
)
def test_averages(stage: SequenceMean | TokenMean | Constant | SequenceSum, expected: float) -> None:
    counted = stage.counted(TWO_MASK, TWO_MASK, torch.ones_like(TWO))
    assert (stage.rows(TWO, counted).sum() / stage.count(counted, RUN).sum()).item() == pytest.approx(
        expected, abs=1e-12
    )


def test_a_constant_is_the_runs_room_unless_told() -> None:
    counted = Constant().counted(TWO_MASK, TWO_MASK, torch.ones_like(TWO))
    assert Constant().count(counted, Run(room=4)).tolist() == [4.0, 4.0]


class _Fixed(Weigh):
    """Weights and a mask that a test sets."""

    weight = keep = None

    def __call__(self, rollouts: Rollouts, advantages: Tensor, run: Run) -> Choice:
        return Choice(self.weight, self.keep)


def fixed(weight: Tensor | None = None, keep: Tensor | None = None) -> _Fixed:
    stage = _Fixed()
    object.__setattr__(stage, "weight", weight)
    object.__setattr__(stage, "keep", keep)
    return stage


AVERAGES = (SequenceMean, TokenMean, Constant, SequenceSum)


@pytest.mark.parametrize("cls", AVERAGES)
def test_weights_stay_out_of_the_denominator(cls: type) -> None:
    rows = usual()
    weight = torch.rand(rows.mask.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    bare, weighed = (Recipe("grpo", (cls(), *more)) for more in ((), (fixed(weight),)))
    plan, other = bare.prepare(rows, RUN), weighed.prepare(rows, RUN)
    assert torch.equal(plan.count, other.count)
    twice, _ = lossy(r := Recipe("grpo", (cls(), fixed(2 * torch.ones_like(weight)))), r.prepare(rows, RUN))
    assert twice == pytest.approx(2 * lossy(bare, plan)[0], rel=1e-12)


@pytest.mark.parametrize("cls", [SequenceMean, TokenMean])
def test_renormalised_they_are_in_it(cls: type) -> None:
    rows = usual()
    weight = torch.rand(rows.mask.shape, generator=torch.Generator().manual_seed(1), dtype=F64) + 0.1
    found = []
    for c in (1.0, 3.0):
        recipe = Recipe("grpo", (cls(renormalise=True), fixed(c * weight)))
        found.append(lossy(recipe, recipe.prepare(rows, RUN))[0])
    assert found[0] == pytest.approx(found[1], rel=1e-12)  # the weights' scale is divided out
    recipe = Recipe("grpo", (TokenMean(renormalise=True), fixed(weight)))
    assert recipe.prepare(rows, RUN).count.sum().item() == pytest.approx((weight * rows.mask).sum().item(), rel=1e-12)


@pytest.mark.parametrize("denominator", ["kept", "all"])
def test_what_is_counted(denominator: str) -> None:
    """By hand, with ratio 1: two rows of 2 and 4 tokens, of which 1 and 2 are kept, and a third of which none is."""
    rows = batch([1, 0, 0], [0, 0, 0], [2, 4, 3])
    rows = rows.with_columns(now=rows.columns["old_logp"])
    keep = torch.tensor([[True, False, False, False], [True, False, True, False], [False] * 4])
    sums, n = {"kept": ([1, 2], 3), "all": ([2, 4], 9)}[denominator]
    a = [2 / 3, -1 / 3]
    by_row = [-a[0] * 1, -a[1] * 2]
    expected = {
        TokenMean: sum(by_row) / n,
        SequenceMean: (by_row[0] / sums[0] + by_row[1] / sums[1]) / (2 if denominator == "kept" else 3),
        SequenceSum: sum(by_row) / (2 if denominator == "kept" else 3),
        Constant: sum(by_row) / (8 * (2 if denominator == "kept" else 3)),
    }
    for cls, value in expected.items():
        recipe = Recipe("dr_grpo", (cls(denominator=denominator), fixed(keep=keep)))
        plan = recipe.prepare(rows, RUN)
        assert len(plan) == 2  # rows without a kept token do not go through the model
        assert lossy(recipe, plan)[0] == pytest.approx(value, rel=1e-12)


def test_all_rows_left_out() -> None:
    rows = usual()
    for host in GROUPED:
        for denominator in ("kept", "all"):
            aggregate = replace(Recipe(host).aggregate, denominator=denominator)
            recipe = Recipe(host, (aggregate, fixed(keep=torch.zeros_like(rows.mask))))
            plan = recipe.prepare(rows, RUN)
            assert len(plan) == 0
            loss, grad = lossy(recipe, plan)
            assert loss == 0
            assert grad.numel() == 0


# Loss and gradient of whole recipes.


@pytest.mark.parametrize("host", GROUPED)
def test_at_ratio_1_it_is_reinforce_with_a_baseline(host: str) -> None:
    """-(1/Z) sum A log pi, whatever the bounds."""
    rows = usual()
    rows = rows.with_columns(now=rows.columns["old_logp"])
    for clip in ((), (Clip(0.0, 0.0),), (Clip(math.inf, math.inf),)):
        recipe = Recipe(host, clip)
        plan = recipe.prepare(rows, RUN)
        a, mask = plan.advantages, plan.rollouts.mask
        z = {
            "token": mask.sum(),
            "sequence": mask.sum(-1, keepdim=True) * len(plan),
            "constant": torch.tensor(len(plan) * RUN.room),
        }[{"dapo": "token", "rloo": "token", "dr_grpo": "constant"}.get(host, "sequence")]
        slope = lossy(recipe, plan)[1]
        if clip and clip[0].low == 0:
            continue  # at the kink the derivative is one of two: checked for the others
        assert torch.allclose(slope, -a * mask / z, rtol=0, atol=1e-12)


def test_without_bounds_it_is_importance_weighted() -> None:
    recipe = Recipe("grpo", (Clip(math.inf, math.inf), TokenMean()))
    plan = recipe.prepare(usual(), RUN)
    ratio = (plan.rollouts.columns["now"] - plan.rollouts.columns["old_logp"]).exp()
    expected = -(ratio * plan.advantages * plan.keep).sum() / plan.keep.sum()
    assert lossy(recipe, plan)[0] == pytest.approx(expected.item(), rel=1e-12)


RECIPES = [
    *(Recipe(h) for h in GROUPED),
    Recipe("ppo", (Flat(4),)),
    Recipe("reinforce", (Flat(4),)),
    Recipe("grpo", (KL(0.04),)),
    Recipe("grpo", (KL(0.3, corrected=True), Clip(0.2, 0.2, dual=3.0))),
    Recipe("dapo", (Overlong(6, 4),)),
]
NAMES = [str(r) for r in RECIPES]


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_finite_differences(recipe: Recipe) -> None:
    """Each derivative to 1e-6 of the largest: the draws lie away from the kinks."""
    plan = recipe.prepare(usual(3), RUN)
    gspo = isinstance(recipe._one("ratio"), SequenceRatio)
    _, slope = lossy(recipe, plan)
    at, step = plan.rollouts.mask.nonzero()[::2], 1e-6

    def moved(i: int, t: int, by: float) -> float:
        now = plan.rollouts.columns["now"].clone()
        now[i, t] += by
        return lossy(recipe, replace(plan, rollouts=plan.rollouts.with_columns(now=now)))[0]

    for i, t in at.tolist():
        found = (moved(i, t, step) - moved(i, t, -step)) / (2 * step)
        if gspo:  # the value of every token moves, each with 1/n of the gradient: their sum is the same
            assert found == pytest.approx(slope[i, t].item(), abs=1e-6 * slope.abs().max().clamp(min=1e-3).item())
        else:
            assert found == pytest.approx(slope[i, t].item(), abs=1e-6 * slope.abs().max().item())


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_neither_the_order_of_rows_nor_padding_matters(recipe: Recipe) -> None:
    loss, slope = lossy(recipe, recipe.prepare(usual(), RUN))
    wide, _ = lossy(recipe, recipe.prepare(usual(pad=3), RUN))
    order = torch.tensor([4, 1, 6, 0, 2, 5, 3])
    mixed, other = lossy(recipe, recipe.prepare(usual()[order], RUN))
    assert wide == pytest.approx(loss, rel=1e-12, abs=1e-12)
    assert mixed == pytest.approx(loss, rel=1e-12, abs=1e-12)
    assert torch.allclose(other, slope[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_parts_with_the_whole_batchs_denominator_add_up_to_it(recipe: Recipe) -> None:
    plan = recipe.prepare(usual(), RUN)
    loss, slope = lossy(recipe, plan)
    total, parts, grads = plan.count.sum(), 0.0, torch.zeros_like(slope)
    for rows in torch.arange(len(plan)).split(2):
        part = plan[rows].trimmed()
        one, grad = lossy(recipe, part, total)
        parts += one
        grads[rows, : grad.shape[1]] += grad
    assert parts == pytest.approx(loss, rel=1e-12)
    assert torch.allclose(grads, slope, rtol=0, atol=1e-12)


@pytest.mark.parametrize("host", GROUPED)
def test_all_advantages_0(host: str) -> None:
    rows = batch([1, 1, 0, 0], [0, 0, 1, 1], [2, 3, 1, 4])
    recipe = Recipe(host)
    loss, grad = lossy(recipe, recipe.prepare(rows, RUN))
    assert loss == 0
    assert not grad.any()


@pytest.mark.parametrize("host", GROUPED)
def test_the_scale_of_rewards_matters_to_centred_advantages_alone(host: str) -> None:
    rows = usual()
    recipe = Recipe(host, (GroupNormalised(eps=0.0),) if host in ("grpo", "dapo", "gspo") else ())
    loss, _ = lossy(recipe, recipe.prepare(rows, RUN))
    scaled, _ = lossy(recipe, recipe.prepare(rows.with_reward(3 * rows.reward + 1), RUN))
    assert scaled == pytest.approx(loss * (3 if host in ("dr_grpo", "rloo") else 1), rel=1e-9)


def test_kl_by_hand() -> None:
    """k3 = exp(d) - d - 1, d = ref - logp; 0 where they agree, and never negative."""
    rows = usual()
    logp, ref = rows.columns["now"], rows.columns["ref_logp"]
    one = torch.ones_like(logp)
    found = KL(0.5)(logp, one, rows)
    assert torch.allclose(found, 0.5 * ((ref - logp).exp() - (ref - logp) - 1), rtol=0, atol=1e-12)
    assert (found >= 0).all()
    assert not KL(0.5)(ref, one, rows).any()
    assert not KL(0.0)(logp, one, rows).any()
    assert torch.allclose(KL(0.5, corrected=True)(logp, 2 * one, rows), 2 * found, rtol=0, atol=1e-12)
    assert KL(0.0).needs == frozenset()


def test_the_corrected_penalty_has_the_gradient_of_the_divergence() -> None:
    """On average over the policy itself: three tokens, their laws known."""
    ref = torch.tensor([0.5, 0.3, 0.2], dtype=F64).log()
    z = torch.tensor([0.1, -0.4, 0.7], dtype=F64, requires_grad=True)
    logp = z.log_softmax(-1)
    (expected,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), z, retain_graph=True)
    rows = batch([0], [0], [3]).with_columns(ref_logp=ref[None])
    ratio = (logp - logp.detach()).exp()[None]  # sampled from the policy as it is
    each = KL(1.0, corrected=True)(logp[None], ratio, rows)[0]
    (found,) = torch.autograd.grad((logp.detach().exp() * each).sum(), z)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_a_batch_that_has_run_away_is_passed_over() -> None:
    rows = usual()
    far = rows.with_columns(now=rows.columns["old_logp"] + 3)
    for recipe in (Recipe("grpo"), Recipe("grpo", (Clip(0.2, 0.2, patience=10.0),))):
        _, near = lossy(recipe, recipe.prepare(rows, RUN))
        loss, gone = lossy(recipe, recipe.prepare(far, RUN))
        assert near.any()
        assert bool(gone.any()) == (recipe.clip.patience is None)
        assert (loss == 0) == (recipe.clip.patience is not None)


def test_a_log_probability_that_is_not_finite_is_named() -> None:
    recipe = Recipe("grpo")
    plan = recipe.prepare(usual(), RUN)
    now = plan.rollouts.columns["now"].clone()
    now[2, 1] = torch.nan
    with pytest.raises(UserError, match="token 1 of row 2 has log-probability nan"):
        recipe.loss(plan, {"logp": now})


def test_a_critic_is_trained_beside() -> None:
    """vf/2 times the squared error at old values, over all tokens."""
    recipe = Recipe("ppo", (Flat(4), GAE(vf=0.1)))
    assert recipe.live == {"value"}
    plan = recipe.prepare(usual(), RUN)
    old = plan.rollouts.columns["old_logp"]
    value = plan.rollouts.columns["value"].clone().requires_grad_()
    loss, _ = recipe.loss(plan, {"logp": old, "value": value})
    loss.backward()
    error = value.detach() - plan.rollouts.columns["returns"]
    expected = 0.1 * error * plan.keep / plan.keep.sum()
    assert torch.allclose(value.grad, expected, rtol=0, atol=1e-12)


# Settings.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupNormalised(ddof=2), "GroupNormalised.ddof must be 0 or 1, got 2"),
        (lambda: GroupNormalised(eps=math.nan), "GroupNormalised.eps must be finite"),
        (lambda: GAE(lam=1.5), r"GAE.lam must be in \[0, 1\]"),
        (lambda: GAE(gamma=-0.1), "GAE.gamma"),
        (lambda: GAE(kl=math.nan), "GAE.kl"),
        (lambda: GAE(clip_value=0.0), "GAE.clip_value"),
        (lambda: Clip(low=-0.1), "Clip.low must be >= 0"),
        (lambda: Clip(high=math.nan), "Clip.high"),
        (lambda: Clip(dual=1.0), "Clip.dual must be > 1"),
        (lambda: Clip(patience=0.5), "Clip.patience"),
        (lambda: TokenRatio(limit=0.0), "TokenRatio.limit"),
        (lambda: SequenceRatio(limit=math.nan), "SequenceRatio.limit"),
        (lambda: Constant(length=0), "Constant.length"),
        (lambda: TokenMean(denominator="some"), "TokenMean.denominator"),
        (lambda: KL(beta=-1.0), "KL.beta"),
        (lambda: Flat(0), "Flat.group_size"),
        (lambda: Informative(max_batches=0), "Informative.max_batches"),
        (lambda: Overlong(max_length=0), "Overlong.max_length"),
        (lambda: Overlong(10, 11), r"Overlong.cache must be in 1..10"),
    ],
)
def test_bad_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]
