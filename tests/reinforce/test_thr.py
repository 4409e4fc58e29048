"""Token Hidden Reward: the hand case, one step on the output layer, its forms, its threshold, and what it leaves alone."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from locum.errors import UserError
from locum.reinforce import THR, Autoregressive, Recipe, Run
from locum.reinforce import thr as module
from locum.reinforce.advantages import GroupNormalised
from locum.reinforce.base import Choice
from locum.reinforce.old_policy import old_policy
from locum.reinforce.recipe import of
from locum.reinforce.thr import by_pairs, by_slices, influence
from locum.tasks.digit_chain import DigitChain, pretrained
from locum.tokens.logprobs import of_hidden
from locum.tokens.rollouts import Generated, Rollouts, uniforms
from locum.tokens.tiles import Scores

D, V = 5, 7
ddof0 = GroupNormalised(ddof=0, eps=0.0)


def rollouts(
    lengths: Sequence[int], reward: Sequence[float], group: Sequence[int], ids: Tensor, pad: int = 0
) -> Rollouts:
    mask = torch.arange(max(lengths) + pad) < torch.tensor(lengths)[:, None]
    made = Generated(torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, ids), mask, mask[:, 0])
    rows = torch.tensor(group)
    return Rollouts.of([[1]] * len(lengths), made, rows, torch.tensor(reward, dtype=torch.float64))


def example(
    seed: int = 0, lengths: Sequence[int] = (3, 2, 4, 1), reward: Sequence[float] = (1, 0, 1, 0)
) -> tuple[Rollouts, Scores]:
    """One group, with hidden states and head in float64."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    h, w = (torch.randn(k, D, generator=g, dtype=torch.float64) for k in (n, V))
    return rollouts(lengths, reward, [0] * len(lengths), torch.randint(V, (n,), generator=g)), Scores(h, w)


def observed(stage: THR, rows: Rollouts, scores: Scores) -> Rollouts:
    return rows.with_columns(**stage.observe(scores, rows))


def called(stage: THR, rows: Rollouts, scores: Scores) -> tuple[Choice, Tensor, Tensor]:
    """What it says, the advantages, and s."""
    rows = observed(stage, rows, scores)
    a = ddof0(rows)
    return stage(rows, a, Run()), a, rows.columns["thr_influence"]


def one_token(first: int, second: int, h: Sequence[Sequence[float]] = ((1, 0), (1, 0))) -> tuple[Rollouts, Scores]:
    """A right and a wrong row of one token each, three tokens that are as likely."""
    rows = rollouts([1, 1], [1, 0], [0, 0], torch.tensor([first, second]))
    return rows, Scores(torch.tensor(h, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64))


def slope(scores: Scores, rows: Rollouts, weight: Tensor, eta: float = 1e-6) -> float:
    """What a step along sum weight log pi on the head does to the right rows' log-likelihood, by step size."""
    assert scores.head is not None
    right = (rows.reward > 0.5)[:, None].expand_as(rows.mask)[rows.mask]
    w = scores.head.clone().requires_grad_()
    (of_hidden(scores.hidden, w, rows.targets) * weight[rows.mask]).sum().backward()
    up, down = (of_hidden(scores.hidden, scores.head + x * w.grad, rows.targets)[right].sum() for x in (eta, -eta))
    return float(up - down) / (2 * eta)


# (a) exact properties.


@pytest.mark.parametrize(
    ("ids", "h", "s", "thr"),
    [
        ((0, 1), ((1, 0), (1, 0)), (2 / 3, -1 / 3), (2 / 3, 1 / 3)),
        ((0, 0), ((1, 0), (1, 0)), (2 / 3, 2 / 3), (2 / 3, -2 / 3)),
        ((0, 1), ((1, 0), (0, 1)), (2 / 3, 0), (2 / 3, 0)),  # states that have nothing to do with each other
    ],
)
@pytest.mark.filterwarnings("ignore:THR.beta")
def test_hand_case(
    ids: tuple[int, int], h: Sequence[Sequence[float]], s: Sequence[float], thr: Sequence[float]
) -> None:
    rows, scores = one_token(*ids, h)
    _, a, found = called(THR(), rows, scores)
    assert a[:, 0].tolist() == pytest.approx([1, -1], abs=1e-12)
    assert found[:, 0].tolist() == pytest.approx(s, abs=1e-12)
    assert (a * found)[:, 0].tolist() == pytest.approx(thr, abs=1e-12)
    assert slope(scores, rows, a) == pytest.approx(sum(thr), abs=1e-5)


def test_in_the_hand_case_nothing_exceeds_the_threshold() -> None:
    rows, scores = one_token(0, 1)
    stage = THR()
    seen = observed(stage, rows, scores)
    tau = stage.tau(seen.columns["thr_influence"], rows.mask, rows.reward > 0, rows.group)
    assert tau.tolist() == pytest.approx([2 / 3, 2 / 3], abs=1e-12)
    with pytest.warns(UserWarning, match="keeps no token"):
        choice = stage(seen, ddof0(seen), Run())
    assert choice.keep is not None
    assert not choice.keep.any()  # |s| > tau is strict
    assert choice.logs["thr/empty_groups"] == 1
    choice, _, _ = called(THR(beta=0.75), rows, scores)
    assert choice.keep is not None
    assert choice.keep[:, 0].tolist() == [True, False]  # 2/3 > 1/2 > 1/3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("p", [-0.5, 0.0, 0.3])
def test_one_step_on_the_output_layer_does_what_the_scores_say(seed: int, p: float) -> None:
    rows, scores = example(seed)
    choice, a, s = called(THR(p=p, mask=False) if p else THR(p=p), rows, scores)
    assert choice.weight is not None
    thr = a * s
    expected = float(thr.sum() + p * thr.abs().sum())
    assert slope(scores, rows, choice.weight * a) == pytest.approx(expected, rel=1e-5)


def test_the_slope_grows_with_p() -> None:
    rows, scores = example()
    slopes = []
    for p in (-0.9, -0.2, 0.1, 0.9):
        choice, a, _ = called(THR(p=p, mask=False), rows, scores)
        assert choice.weight is not None
        slopes.append(slope(scores, rows, choice.weight * a))
    assert slopes == sorted(slopes)
    assert len(set(slopes)) == 4


@pytest.mark.parametrize("small", [False, True])
def test_the_two_forms_agree(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when buffers hold only a few columns and tokens at a time; and both are the sum that is written down."""
    if small:
        monkeypatch.setattr(module, "BUFFER", 45)  # three columns, two tokens
    rows, scores = example(1)
    assert scores.head is not None
    scores = Scores(scores.hidden, scores.head, torch.linspace(-1, 1, V, dtype=torch.float64))
    right = (rows.reward > 0)[:, None].expand_as(rows.mask)[rows.mask]
    g = torch.nn.functional.one_hot(rows.targets, V) - scores.logits(scores.hidden).softmax(-1)
    pairs = (g @ g.T) * (scores.hidden @ scores.hidden.T)
    expected = pairs[:, right].sum(-1).tolist()
    for form in (by_pairs, by_slices):
        assert form(scores, rows.targets, right).tolist() == pytest.approx(expected, abs=1e-10)
    assert influence(scores, rows.targets, right).tolist() == pytest.approx(expected, abs=1e-10)


def test_in_single_precision_they_agree_to_1e_4() -> None:
    g = torch.Generator().manual_seed(3)
    scores = Scores(torch.randn(300, 32, generator=g), torch.randn(500, 32, generator=g))
    ids, right = torch.randint(500, (300,), generator=g), torch.rand(300, generator=g) < 0.4
    a, b = by_pairs(scores, ids, right), by_slices(scores, ids, right)
    assert a.dtype == torch.float32
    assert (a - b).norm() / a.norm() < 1e-4
    wide = by_pairs(Scores(scores.hidden.double(), scores.head.double()), ids, right)
    assert (a - wide).norm() / wide.norm() < 1e-4


@pytest.mark.parametrize("form", [by_pairs, by_slices])
def test_half_precision_is_summed_wide(form: Callable[..., Tensor]) -> None:
    g = torch.Generator().manual_seed(3)
    h, w = torch.randn(40, 8, generator=g).bfloat16(), torch.randn(9, 8, generator=g).bfloat16()
    ids, right = torch.randint(9, (40,), generator=g), torch.arange(40) < 20
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = form(Scores(h, w), ids, right)
    z = torch.nn.functional.linear(h, w).double()
    e = torch.nn.functional.one_hot(ids, 9) - z.softmax(-1)
    expected = ((e @ e[right].T) * (h.double() @ h.double()[right].T)).sum(-1)
    assert s.dtype == torch.float32
    assert (s - expected).norm() / expected.norm() < 1e-5


def test_the_answers_tokens_are_all_that_counts_where_there_are_no_others() -> None:
    rows, scores = example(2)
    ids = torch.arange(10) % V  # all of them occur
    rows = replace(rows, ids=torch.zeros_like(rows.ids).masked_scatter(rows.mask, ids))
    everything, answers = (THR(vocab=v).observe(scores, rows)["thr_influence"] for v in ("all", "answers"))
    assert torch.allclose(everything, answers, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", [by_pairs, by_slices])
def test_of_the_vocabulary_the_answers_columns_only_and_not_renormalised(form: Callable[..., Tensor]) -> None:
    _, scores = example(2)
    ids = torch.tensor([4, 1, 4, 6, 1, 1, 6, 6, 4, 4])
    right = torch.arange(10) < 5
    g = (torch.nn.functional.one_hot(ids, V) - scores.logits(scores.hidden).softmax(-1))[:, [1, 4, 6]]
    expected = ((g @ g[right].T) * (scores.hidden @ scores.hidden[right].T)).sum(-1).tolist()
    assert form(scores, ids, right, ids.unique()).tolist() == pytest.approx(expected, abs=1e-12)
    assert influence(scores, ids, right, "answers").tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("reward", [(1, 0, 1, 0), (0, 0, 1, 0)])
def test_right_rows_influence_themselves_by_a_square(seed: int, reward: Sequence[float]) -> None:
    rows, scores = example(seed, reward=reward)
    _, _, s = called(THR(beta=0.0), rows, scores)
    right = (rows.reward > 0)[:, None].expand_as(rows.mask)[rows.mask]
    g = torch.nn.functional.one_hot(rows.targets, V) - scores.logits(scores.hidden).softmax(-1)
    m = g[right].T @ scores.hidden[right]
    assert float(s[rows.mask][right].sum()) == pytest.approx(float(m.square().sum()), rel=1e-6)


def test_neutral_is_the_host() -> None:
    """p = 0 without the mask: the loss and the gradient of the host to the bit, and nothing is asked of the policy."""
    rows, _ = example()
    stage = THR(p=0.0, mask=False)
    assert stage.needs == frozenset()
    recipe = of(stage)
    host = Recipe("dapo", stage.setting)
    g = torch.Generator().manual_seed(1)
    found = []
    for r in (recipe, host):
        logp = (torch.randn(rows.mask.shape, generator=g.manual_seed(1), dtype=torch.float64) * 0.3).requires_grad_()
        plan = r.prepare(rows.with_columns(old_logp=torch.zeros_like(logp).detach()))
        loss, _ = r.loss(plan, {"logp": logp})
        loss.backward()
        found.append((loss, logp.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].abs().sum() > 0


def test_weights_are_one_and_one_more_or_less() -> None:
    rows, scores = example(4)
    choice, a, s = called(THR(p=0.25, mask=False), rows, scores)
    assert choice.keep is None
    assert choice.weight is not None
    assert torch.equal(choice.weight, 1 + 0.25 * (a * s).sign())
    assert choice.logs["thr/one_sign_groups"] == 0
    assert choice.logs["thr/raising_tokens"] == int((a * s > 0).sum()) / 10
    tau = THR().tau(s, rows.mask, rows.reward > 0, rows.group)[:, None]
    assert choice.logs["thr/dominant_tokens"] == int((s.abs() > tau).sum()) / 10
    rows, scores = one_token(0, 1, ((1, 0), (0, 1)))
    choice, _, _ = called(THR(p=0.25, mask=False), rows, scores)
    assert choice.weight is not None
    assert choice.weight[:, 0].tolist() == [1.25, 1.0]  # no influence, no weight


@settings(max_examples=30)
@given(seed=st.integers(0, 20), c=st.floats(0.01, 100))
def test_the_scale_of_states_changes_neither_mask_nor_signs(seed: int, c: float) -> None:
    """The head is scaled the other way, so that the law is the same."""
    rows, scores = example(seed)
    assert scores.head is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, _, s = called(THR(beta=0.9), rows, scores)
        two, _, t = called(THR(beta=0.9), rows, Scores(c * scores.hidden, scores.head / c))
    assert torch.allclose(t, c * c * s, rtol=1e-6, atol=1e-9 * c * c)
    assert torch.equal(one.keep, two.keep)
    assert torch.equal(one.weight, two.weight)


@settings(max_examples=30)
@given(seed=st.integers(0, 20), order=st.permutations(range(7)), pad=st.integers(0, 3))
def test_rows_prompts_and_padding(seed: int, order: list[int], pad: int) -> None:
    """Groups lie mixed; each one's result is what it is alone, wherever its rows lie and however far they are padded."""
    parts = [example(seed), example(seed + 100, (2, 5, 3), (0, 1, 1))]
    stage = THR(p=0.2, beta=0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = [called(stage, *part) for part in parts]
        lengths = torch.cat([p[0].lengths for p in parts])
        starts = (lengths.cumsum(0) - lengths)[order]
        lengths = lengths[order]
        at = torch.cat([torch.arange(s, s + n) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)])
        ids = torch.cat([p[0].targets for p in parts])[at]
        hidden = torch.cat([p[1].hidden for p in parts])[at]
        # One head serves both: the second group has its own laws, so it is put beside the first in a larger space.
        heads = [p[1].head for p in parts]
        both = torch.zeros(len(hidden), 2 * D, dtype=torch.float64)
        second = (torch.tensor(order) >= 4).repeat_interleave(lengths)
        both[~second, :D], both[second, D:] = hidden[~second], hidden[second]
        reward = torch.cat([p[0].reward for p in parts])[order].tolist()
        group = [5 if i < 4 else 2 for i in order]
        mixed = rollouts(lengths.tolist(), reward, group, ids, pad)
        choice, _, s = called(stage, mixed, Scores(both, torch.cat(heads, 1)))
    assert choice.keep is not None
    assert choice.weight is not None
    assert not choice.keep[~mixed.mask].any()
    assert not s[~mixed.mask].any()
    for where, i in enumerate(order):
        g, r = (0, i) if i < 4 else (1, i - 4)
        n = int(lengths[where])
        one, _, t = alone[g]
        assert torch.allclose(s[where, :n], t[r, :n], rtol=1e-9, atol=1e-12)
        assert torch.equal(choice.keep[where, :n], one.keep[r, :n])
        assert torch.equal(choice.weight[where, :n], one.weight[r, :n])


def test_weights_are_constants_of_the_gradient() -> None:
    """The loss's gradient is that with weights frozen: finite differences in the current log-probabilities."""
    rows, scores = example()
    assert scores.head is not None
    live = Scores(scores.hidden.clone().requires_grad_(), scores.head.clone().requires_grad_())
    recipe = of(THR(p=0.3, beta=0.5))
    old = -torch.ones(rows.mask.shape, dtype=torch.float64)
    plan = recipe.prepare(observed(THR(p=0.3, beta=0.5), rows, live).with_columns(old_logp=old))
    assert not plan.weight.requires_grad
    noise = torch.randn(plan.keep.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logp = (-1 + 0.05 * noise).requires_grad_()
    torch.autograd.gradcheck(lambda x: recipe.loss(plan, {"logp": x})[0], (logp,), eps=1e-6, atol=1e-8)
    loss, _ = recipe.loss(plan, {"logp": logp})
    loss.backward()
    assert logp.grad is not None
    expected = -plan.weight * plan.advantages * (logp + 1).exp() * plan.keep / 10  # all ten tokens are counted
    assert torch.allclose(logp.grad, expected.detach(), atol=1e-12)
    assert live.hidden.grad is None


# The threshold, one-sided groups, NTHR, and what counts as right.


def test_a_negative_threshold_is_zero() -> None:
    """Two right rows that oppose each other: the second's mean influence is below 0."""
    rows = rollouts([1, 1, 1], [1, 1, 0], [0, 0, 0], torch.tensor([0, 0, 1]))
    h = torch.tensor([[3.0, 0], [-1.0, 0], [0.5, 0]], dtype=torch.float64)
    scores = Scores(h, torch.zeros(3, 2, dtype=torch.float64))
    stage = THR()
    seen = observed(stage, rows, scores)
    s = seen.columns["thr_influence"]
    assert s[1, 0] < 0
    assert stage.tau(s, rows.mask, rows.reward > 0, rows.group).tolist() == [0, 0, 0]
    choice = stage(seen, ddof0(seen), Run())
    assert choice.keep is not None
    assert choice.keep.all()


@pytest.mark.parametrize(("beta", "kept"), [(-math.inf, 10), (math.inf, 0), (0.0, 10)])
@pytest.mark.filterwarnings("ignore:THR.beta")
def test_extremes_of_beta(beta: float, kept: int) -> None:
    choice, _, _ = called(THR(beta=beta), *example())
    assert choice.keep is not None
    assert int(choice.keep.sum()) == kept


@pytest.mark.parametrize("reward", [(1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 0.0), (1.0, math.nan, 1.0, 1.0)])
@pytest.mark.parametrize("variant", ["thr", "nthr"])
def test_groups_of_one_sign_are_left_alone_and_counted(reward: Sequence[float], variant: str) -> None:
    rows, scores = example(reward=reward)
    choice, _, _ = called(THR(variant=variant), rows, scores)
    assert choice.weight is not None
    assert (choice.weight == 1).all()
    assert choice.keep is None or torch.equal(choice.keep, rows.mask)
    assert choice.logs["thr/one_sign_groups"] == 1
    assert choice.logs.get("thr/empty_groups", 0) == 0


def test_a_row_without_a_reward_is_neither_right_nor_wrong() -> None:
    rows, scores = example(reward=(1, 0, math.nan, 0))
    _, a, s = called(THR(beta=0.5), rows, scores)
    without = torch.tensor([0, 1, 3])
    tokens = (torch.arange(4)[:, None].expand_as(rows.mask)[rows.mask] != 2).nonzero()[:, 0]
    assert scores.head is not None
    _, b, t = called(THR(beta=0.5), rows[without], Scores(scores.hidden[tokens], scores.head))
    assert torch.allclose(s[without], t, atol=1e-12)
    assert torch.allclose(a[without], b)
    assert not a[2].any()


def test_what_is_right_was_decided_before_rewards_were_changed() -> None:
    """A price on length takes a right row below the threshold."""
    rows, scores = example()
    seen = observed(THR(p=0.2), rows, scores)
    a = ddof0(seen)
    changed = replace(seen, reward=seen.reward - torch.tensor([0.9, 0.0, 0.0, 0.0]))
    one, two = (THR(p=0.2)(x, a, Run()) for x in (seen, changed))
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.keep, two.keep)


def test_right_by_threshold_or_by_advantage() -> None:
    rows, _ = example(reward=(0.9, 0.2, 0.4, 0.0))
    assert THR().right(rows).tolist() == [True, False, False, False]
    assert THR(threshold=0.1).right(rows).tolist() == [True, True, True, False]
    assert THR(positives="advantage").right(rows).tolist() == [True, False, True, False]  # the mean is 0.375
    level = replace(rows, reward=torch.full_like(rows.reward, 0.3))
    assert not THR(positives="advantage").right(level).any()


def test_nthr_weakens_wrong_rows_only() -> None:
    rows, scores = example(5, reward=(1, 0, 0, 0))
    choice, _, s = called(THR(variant="nthr", beta=0.3), rows, scores)
    stage = THR(beta=0.3)
    tau = stage.tau(s, rows.mask, rows.reward > 0, rows.group)[:, None]
    pushed = rows.mask & (rows.reward == 0)[:, None] & (s > tau)
    assert pushed.any()
    assert not pushed[rows.mask & (rows.reward == 0)[:, None]].all()
    assert choice.keep is None
    assert torch.equal(choice.weight, torch.where(pushed, 0.5, 1.0).double())
    assert choice.logs["thr/weakened_tokens"] == pytest.approx(int(pushed.sum()) / 10)


# Recipes, the learner's pass, and bad input.


def test_the_paper_s_recipe() -> None:
    recipe = Recipe.read("thr(p=-0.1)")
    assert recipe.host == "dapo"
    assert (recipe.clip.low, recipe.clip.high, recipe.aggregate.denominator) == (0.2, 0.2, "all")
    assert recipe.needs == {"scores"}
    assert Recipe.read("gspo + thr + d3s").needs == {"scores", "entropy"}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_sees_the_law_that_is_trained(temperature: float) -> None:
    """On the digit chain, from the learner's own pass: the slope of the right answers' log-likelihood under the training law."""
    task = DigitChain(3, warm_steps=30)
    policy = pretrained(0, task).double()
    prompts = task.prompts(1, torch.Generator().manual_seed(0)).tolist()
    made = policy.generate(prompts, 8, [6], uniforms(0, torch.arange(8), 6))
    rows = Rollouts.of(prompts * 8, made, torch.zeros(8, dtype=torch.long))
    rows = rows.with_reward((torch.arange(8) % 3 == 0).double())
    recipe = Recipe("grpo", (Autoregressive(temperature), THR(mask=False)))
    seen = old_policy(recipe, policy, rows, frozenset())
    a = ddof0(rows)
    scores = policy.scores(rows)
    h, w = scores.hidden.detach() / temperature, policy.lm_head.weight.detach()
    assert float((a * seen.columns["thr_influence"]).sum()) == pytest.approx(slope(Scores(h, w), rows, a), rel=1e-5)
    plan = recipe.prepare(seen)
    assert set(plan.weight[plan.keep].unique().tolist()) <= {0.9, 1.0, 1.1}


def test_logits_alone_are_not_enough() -> None:
    rows, scores = example()
    with pytest.raises(UserError, match=r"THR reads the hidden states .* Scores\(hidden, head\)"):
        THR().observe(Scores(scores.logits(scores.hidden)), rows)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("p", 1.0),
        ("p", -1.0),
        ("p", math.nan),
        ("beta", math.nan),
        ("beta", -0.1),
        ("positives", "wrong"),
        ("threshold", math.inf),
        ("threshold", math.nan),
        ("vocab", "half"),
        ("variant", "nth"),
    ],
)
def test_a_bad_value_is_named(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"THR\.{field} must be .*, got {value!r}"):
        THR(**{field: value})
