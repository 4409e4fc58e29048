"""TW-GRPO: the hand cases, what weights do not depend on, the loss with them, partial credit, and questions turned round."""

import math
import warnings
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from locum.errors import UserError
from locum.reinforce import TWGRPO, Recipe, Run, SoftChoice
from locum.reinforce.recipe import of
from locum.reinforce.rewards import Format, Weighted
from locum.reinforce.twgrpo import Question, disagreement, invert_question, invert_questions, negated
from locum.tasks.subset_choice import SubsetChoice, warmed_up
from locum.tokens import tiles
from locum.tokens.rollouts import Generated, Rollouts, uniforms
from locum.tokens.tiles import Scores

ONE = [[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]]
OTHER = [[0.5, 0.5], [0.1, 0.9], [0.8, 0.2]]
V = 6


def rollouts(lengths: Sequence[int], group: Sequence[int], pad: int = 0) -> Rollouts:
    mask = torch.arange(max(lengths) + pad) < torch.tensor(lengths)[:, None]
    made = Generated(mask.long(), mask, mask[:, 0])
    reward = torch.arange(len(lengths), dtype=torch.float64)
    return Rollouts.of([[1]] * len(lengths), made, torch.tensor(group), reward)


def laws(p: Sequence[Sequence[Sequence[float]]]) -> Scores:
    return Scores(torch.tensor([token for row in p for token in row], dtype=torch.float64).log())


def drawn(seed: int, n: int, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(n, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weighed(stage: TWGRPO, rows: Rollouts, scores: Scores) -> Tensor:
    rows = rows.with_columns(**stage.observe(scores, rows))
    weight = stage(rows, torch.zeros(rows.mask.shape, dtype=torch.float64), Run()).weight
    assert weight is not None
    return weight


# (a) exact properties: weights.


@pytest.mark.parametrize(
    ("kind", "d", "w"),
    [("code", (0, 1.3333, 0.1345), (1, 1.7, 1.0706)), ("kl", (0, 0.3681, 0.0507), (1, 1.7, 1.0964))],
)
def test_hand_case(kind: str, d: Sequence[float], w: Sequence[float]) -> None:
    rows, scores = rollouts([3, 3], [0, 0]), laws([ONE, OTHER])
    assert disagreement(scores, rows.mask, kind).tolist() == pytest.approx(d, abs=1e-4)
    found = weighed(TWGRPO(divergence=kind), rows, scores)
    assert found.tolist() == [pytest.approx(w, abs=1e-4)] * 2


def test_hand_case_with_a_row_that_has_ended() -> None:
    rows, scores = rollouts([3, 2], [0, 0]), laws([ONE, OTHER[:2]])
    assert weighed(TWGRPO(), rows, scores).tolist() == [
        pytest.approx([1, 1.7, 1], abs=1e-6),  # the law of the third token is uniform, as is an ended row's
        pytest.approx([1, 1.7, 0], abs=1e-6),
    ]


def test_the_divergences_are_what_they_are_said_to_be() -> None:
    z = drawn(0, 3)
    p = z.softmax(-1)
    kl = sum(float((q * (q.log() - p.mean(0).log())).sum()) for q in p) / 3
    x = p.log().mean(0) - p.log()
    code = float((x.exp() - x - 1).sum()) / 3
    mask = torch.ones(3, 1, dtype=torch.bool)
    assert disagreement(Scores(z), mask, "kl").tolist() == pytest.approx([kl], abs=1e-12)
    assert disagreement(Scores(z), mask, "code").tolist() == pytest.approx([code], abs=1e-12)


def test_kl_is_at_most_the_log_of_the_rows() -> None:
    z = torch.full((4, V), -1000.0).fill_diagonal_(0)
    assert disagreement(Scores(z), torch.ones(4, 1, dtype=torch.bool), "kl").tolist() == pytest.approx([math.log(4)])


GROUPS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2)), min_size=2, max_size=7)


@settings(max_examples=40)
@given(
    rows=GROUPS, seed=st.integers(0, 99), kind=st.sampled_from(["code", "kl"]), scope=st.sampled_from(["all", "valid"])
)
@pytest.mark.filterwarnings("ignore:a group has one row")
def test_weights_lie_between_one_and_alpha(rows: list[tuple[int, int]], seed: int, kind: str, scope: str) -> None:
    batch = rollouts([n for n, _ in rows], [g for _, g in rows])
    stage = TWGRPO(1.7, kind, scope)
    seen = batch.with_columns(**stage.observe(Scores(drawn(seed, int(batch.mask.sum()))), batch))
    d, w, mask = (
        seen.columns["twgrpo_divergence"],
        weighed(stage, batch, Scores(drawn(seed, int(batch.mask.sum())))),
        batch.mask,
    )
    assert bool((d >= 0).all())
    assert not d[~mask].any()
    assert not w[~mask].any()
    for g in batch.group.unique():
        here = batch.group == g
        several = mask[here].sum(0) >= (2 if scope == "valid" else 1)
        inside = w[here][:, several][mask[here][:, several]]
        assert bool((w[here][mask[here]] >= 1).all())
        assert bool((w[here][:, ~several][mask[here][:, ~several]] == 1).all())
        if len(inside):
            assert float(inside.min()) == 1
            level = d[here][:, several].amax(0)
            assert float(inside.max()) == pytest.approx(1.0 if float(level.max() - level.min()) == 0 else 1.7, abs=1e-6)


@settings(max_examples=40)
@given(
    order=st.permutations(range(6)),
    lengths=st.lists(st.integers(1, 4), min_size=6, max_size=6),
    pad=st.integers(0, 2),
    seed=st.integers(0, 99),
    constant=st.floats(-50, 50),
)
def test_order_padding_other_groups_and_constants_do_not_matter(
    order: list[int], lengths: list[int], pad: int, seed: int, constant: float
) -> None:
    """Two groups, mixed: a row's weights are those that it has with its group alone."""
    z = drawn(seed, sum(lengths))
    parts = list(z.split(lengths))
    group = [0, 0, 0, 0, 1, 1]
    mixed = rollouts([lengths[i] for i in order], [7 - group[i] for i in order], pad)
    found = weighed(TWGRPO(), mixed, Scores(torch.cat([parts[i] for i in order]) + constant))
    for part in (slice(0, 4), slice(4, 6)):
        alone = weighed(TWGRPO(), rollouts(lengths[part], group[part]), Scores(torch.cat(parts[part])))
        for i, row in zip(range(6)[part], alone, strict=True):
            n = lengths[i]
            assert torch.allclose(found[order.index(i), :n], row[:n], atol=1e-9)


@pytest.mark.parametrize("kind", ["code", "kl"])
@pytest.mark.parametrize("size", [3, 6, 7])
def test_rows_that_are_alike_agree(kind: str, size: int) -> None:
    """Exactly, in single precision too: rounding must not be blown up by the min-max."""
    z = 5 * torch.randn(4, 2000, generator=torch.Generator().manual_seed(1))
    rows = rollouts([4] * size, [0] * size)
    assert disagreement(Scores(z.repeat(size, 1)), rows.mask, kind).tolist() == [0] * 4
    assert (weighed(TWGRPO(divergence=kind), rows, Scores(z.repeat(size, 1))) == 1).all()


def test_a_few_columns_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tile: the same numbers; and never more logits than it holds."""
    rows = rollouts([5, 3, 4], [0, 0, 0])
    g = torch.Generator().manual_seed(2)
    scores = Scores(torch.randn(12, 4, generator=g), torch.randn(V, 4, generator=g), torch.randn(V, generator=g))
    expected = disagreement(Scores(scores.logits(scores.hidden)), rows.mask)
    seen: list[int] = []
    project = Scores.project
    monkeypatch.setattr(tiles, "TILE", 2 * 3 * V)  # two columns
    monkeypatch.setattr(Scores, "project", lambda self, h: (seen.append(len(h)), project(self, h))[1])
    assert torch.allclose(disagreement(scores, rows.mask), expected, atol=1e-6)
    assert seen == [6, 5, 1]


@pytest.mark.parametrize("kind", ["code", "kl"])
def test_a_vocabulary_that_is_masked_out_is_finite(kind: str) -> None:
    z = drawn(3, 4)
    z[0, 1] = z[1, 1] = z[2, 3] = -torch.inf
    d = disagreement(Scores(z), torch.ones(2, 2, dtype=torch.bool), kind)
    assert torch.isfinite(d).all()


def test_the_last_token_of_the_longest_row() -> None:
    """Scope "all" gives it alpha and squeezes the others; scope "valid" leaves the others as they were without it."""
    common = drawn(4, 9, 0.5)
    sharp = torch.full((2, V), -20.0, dtype=torch.float64)
    sharp[:, 2] = 0
    short, long = rollouts([3, 3, 3], [0, 0, 0]), rollouts([5, 3, 3], [0, 0, 0])
    scores = Scores(torch.cat([common[:3], sharp, common[3:]]))
    everything, valid = (weighed(TWGRPO(scope=s), long, scores) for s in ("all", "valid"))
    assert everything[0, 3:].tolist() == pytest.approx([1.7, 1.7], abs=1e-6)
    assert float(everything[:, :3].max()) < 1.001
    assert valid[0, 3:].tolist() == [1, 1]
    assert torch.allclose(valid[:, :3], weighed(TWGRPO(), short, Scores(common)), atol=1e-6)
    assert float(valid[:, :3].max()) > 1.69


def test_min_rows() -> None:
    rows, scores = rollouts([4, 3, 2], [0, 0, 0]), Scores(drawn(5, 9))
    for least in (1, 2, 3, 4):
        w = weighed(TWGRPO(scope="valid", min_rows=least), rows, scores)
        assert (w[0, 4 - (least - 1) :] == 1).all()
        assert float(w.max()) == pytest.approx(1.7 if least < 4 else 1.0, abs=1e-6)
    assert torch.equal(weighed(TWGRPO(scope="valid", min_rows=1), rows, scores), weighed(TWGRPO(), rows, scores))


def test_a_row_alone_has_weight_one_and_a_warning() -> None:
    with pytest.warns(UserWarning, match="one row only"):
        w = weighed(TWGRPO(), rollouts([3, 2], [0, 1]), Scores(drawn(6, 5)))
    assert w.tolist() == [[1, 1, 1], [1, 1, 0]]


# The loss.


def losses(recipe: Recipe, rows: Rollouts, logp: Tensor) -> tuple[Tensor, Tensor]:
    logp = logp.clone().requires_grad_()
    loss, _ = recipe.loss(recipe.prepare(rows), {"logp": logp})
    loss.backward()
    assert logp.grad is not None
    return loss.detach(), logp.grad


def test_alpha_one_is_the_host() -> None:
    """DAPO's mean over tokens with GRPO's advantages: loss and gradient to the bit, and nothing is asked of the policy."""
    stage = TWGRPO(alpha=1.0)
    assert stage.needs == frozenset()
    recipe = of(stage)
    assert (recipe.clip.low, recipe.clip.high, recipe.filter) == (0.2, 0.28, None)
    assert recipe.advantage.eps == 1e-4
    rows = rollouts([3, 2, 4], [0, 0, 0]).with_columns(old_logp=torch.zeros(3, 4, dtype=torch.float64))
    logp = 0.2 * drawn(7, 3)[:, :4]
    for mine, host in zip(losses(recipe, rows, logp), losses(Recipe("grpo", stage.setting), rows, logp), strict=True):
        assert torch.equal(mine, host)
    ratio, a = logp.exp(), torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)[:, None] / (1 + 1e-4)
    plain = (-torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a) * rows.mask).sum() / 9
    assert float(losses(recipe, rows, logp)[0]) == pytest.approx(float(plain), rel=1e-12)


def test_no_gradient_flows_through_the_weights() -> None:
    """The gradient in the logits is that of the loss with the weights frozen."""
    rows, recipe = rollouts([3, 3, 2], [0, 0, 0]), of(TWGRPO())
    z = drawn(8, 8).requires_grad_()
    seen = rows.with_columns(**TWGRPO().observe(Scores(z), rows))
    assert not seen.columns["twgrpo_divergence"].requires_grad
    old = rows.spread(z.detach().log_softmax(-1)[:, 1] - 0.05)
    plan = recipe.prepare(seen.with_columns(old_logp=old))
    assert float(plan.weight.max()) > 1.69

    def loss(x: Tensor) -> Tensor:
        return recipe.loss(plan, {"logp": rows.spread(x.log_softmax(-1)[:, 1])})[0]

    assert torch.autograd.gradcheck(loss, (z,), eps=1e-6, atol=1e-8, rtol=1e-6)
    loss(z).backward()
    by_hand = z.detach().clone().requires_grad_()
    ratio = (rows.spread(by_hand.log_softmax(-1)[:, 1]) - old).exp()
    (-plan.weight * plan.advantages * ratio * rows.mask).sum().div(8).backward()
    assert torch.allclose(z.grad, by_hand.grad, atol=1e-12)


def test_where_all_laws_are_shared_alpha_has_no_effect() -> None:
    """Subset choice: a column's law does not depend on what was chosen before."""
    task = SubsetChoice(bank=32)
    policy = warmed_up(0, task, steps=5)
    prompts = [[3], [9]]
    made = policy.generate(prompts, 4, [14, 14], uniforms(0, torch.arange(8), 14))
    rows = Rollouts.of([p for p in prompts for _ in range(4)], made, torch.tensor([0] * 4 + [1] * 4))
    d = TWGRPO().observe(policy.scores(rows), rows)["twgrpo_divergence"]
    assert float(d.max()) < 1e-10
    assert torch.allclose(weighed(TWGRPO(), rows, policy.scores(rows)), torch.ones(()).double(), atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", 0.9),
        ("alpha", math.nan),
        ("alpha", math.inf),
        ("divergence", "js"),
        ("scope", "some"),
        ("min_rows", 0),
    ],
)
def test_a_bad_value_is_named(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"TWGRPO\.{field} must be .*, got {value!r}"):
        TWGRPO(**{field: value})


# Partial credit.


@pytest.mark.parametrize(
    ("text", "soft", "binary"),
    [
        ("A", 0.5, 0),
        ("A,C", 1, 1),
        ("C, A", 1, 1),
        ("A,B", 0, 0),
        ("A,B,C", 0, 0),
        ("", 0, 0),
        (",", 0, 0),
        ("A,A", 0.5, 0),
        ("<answer>A, C</answer>", 1, 1),
        ("<think>B?</think><answer>C</answer>", 0.5, 0),
        ("<answer>c</answer>", 0, 0),
    ],
)
def test_the_table_of_rewards(text: str, soft: float, binary: float) -> None:
    for answer in ("A,C", ["C", "A"]):
        assert SoftChoice()([""], [text], answer=[answer]) == [soft]
        assert SoftChoice(partial=False)([""], [text], answer=[answer]) == [binary]


def test_small_letters_and_a_verifier() -> None:
    assert SoftChoice(casefold=True)([""], ["<answer>c</answer>"], answer=["A,C"]) == [0.5]
    says: Callable[[str, Any], bool] = lambda text, answer: text == "both"  # noqa: E731
    assert SoftChoice(verifier=says)([""] * 2, ["both", "A"], answer=["A,C"] * 2) == [1, 0.5]


def test_with_the_format_it_is_the_paper_s_reward() -> None:
    reward = Weighted((SoftChoice(), Format()), (1.0, 1.0))
    texts = ["<think>Hm.</think><answer>A</answer>", "<answer>A,C</answer>", "A,B"]
    assert reward([""] * 3, texts, answer=["A,C"] * 3) == [1.5, 1.0, 0.0]


@pytest.mark.parametrize("answer", ["", " , ", []])
def test_no_right_option_is_refused(answer: object) -> None:
    with pytest.raises(UserError, match="at least one right option"):
        SoftChoice()([""], ["A"], answer=[answer])
    with pytest.raises(UserError, match="column 'answer'"):
        SoftChoice()([""], ["A"])


# Questions turned round.


@pytest.mark.parametrize(
    ("text", "turned"),
    [
        ("What did the man do?", "What didn't the man do?"),
        ("Where do they sit?", "Where don't they sit?"),
        ("What does he hold?", "What doesn't he hold?"),
        ("Who is here?", "Who isn't here?"),
        ("Which are red?", "Which aren't red?"),
        ("What was said?", "What wasn't said?"),
        ("Who Were they?", "Who weren't they?"),
        ("What happened next?", "What didn't happen next?"),
        ("Without the ball, what will collide?", "Without the ball, what won't collide?"),
        ("Which of these is red?", None),
        ("What did not happen?", None),
        ("What isn't red?", None),
        ("Why?", None),
        ("", None),
    ],
)
def test_negation(text: str, turned: str | None) -> None:
    assert negated(text) == turned


ASKED = Question("What did the cook do?", ("sang", "cooked", "slept", "left", "ran"), right=(1,))


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_an_inverted_question(seed: int) -> None:
    q = invert_question(ASKED, Random(seed), share=1.0)
    assert q.text == "What didn't the cook do?"
    k = len(q.options) - 1
    assert 1 <= k <= 4
    assert len(q.right) == k
    assert {q.options[i] for i in range(k + 1) if i not in q.right} == {"cooked"}
    assert len(set(q.options)) == k + 1
    assert set(q.options) <= set(ASKED.options)
    assert q == invert_question(ASKED, Random(seed), share=1.0)


def test_the_number_of_right_options_and_their_places_are_uniform() -> None:
    rng = Random(0)
    made = [invert_question(ASKED, rng, share=1.0) for _ in range(3000)]
    sizes = [len(q.right) for q in made]
    assert chisquare([sizes.count(k) for k in (1, 2, 3, 4)]).pvalue > 0.01
    places = [q.options.index("cooked") for q in made if len(q.options) == 5]
    assert chisquare([places.count(i) for i in range(5)]).pvalue > 0.01
    kept = [sum(option in q.options for q in made) for option in ("sang", "slept", "left", "ran")]
    assert chisquare(kept).pvalue > 0.01


def test_half_of_the_questions_stay_and_what_cannot_be_turned_is_counted() -> None:
    others = [
        Question("Which of these?", ("a", "b"), (0,)),
        Question("What did he do?", ("a",), (0,)),
        Question("What did he do?", ("a", "b", "c"), (0, 1)),
        Question("What didn't he do?", ("a", "b"), (0,)),
    ]
    made, counts = invert_questions([ASKED] * 400 + others, Random(1))
    assert made[400:] == others
    assert counts["cannot"] == 4
    assert counts["kept"] + counts["inverted"] == 400
    assert 160 < counts["kept"] < 240
    assert invert_question(ASKED, Random(0), share=0.0) is ASKED


def test_a_question_as_text() -> None:
    q = Question("Which are even?", ("1", "2", "4"), (2, 1))
    assert q.answer == "B,C"
    assert q.prompt.startswith("Which are even?\nA. 1\nB. 2\nC. 4\n")
    assert SoftChoice()([""], [f"<answer>{q.answer}</answer>"], answer=[q.answer]) == [1]
    for right in ((), (3,), (-1,)):
        with pytest.raises(UserError, match=r"Question\.right must be"):
            Question("Which?", ("1", "2", "4"), right)
    with pytest.raises(UserError, match=r"Question\.options must be at most 26"):
        Question("Which?", ("1",) * 27, (0,))


def test_a_share_is_a_probability() -> None:
    with pytest.raises(UserError, match=r"share must be in \[0, 1\], got 1.5"):
        invert_question(ASKED, Random(0), share=1.5)


def test_no_warning_without_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weighed(TWGRPO(), rollouts([3, 2], [0, 0]), Scores(drawn(6, 5)))
