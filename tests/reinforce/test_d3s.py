"""D3S: the rows are the optimum that brute force finds, the tokens those of the largest keys, and nothing else changes."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from locum.errors import UserError
from locum.reinforce import D3S, HOSTS, Recipe, Run
from locum.reinforce.d3s import densest, widest
from locum.reinforce.losses import SequenceMean
from locum.reinforce.plan import Plan
from locum.tokens.groups import group_stats
from locum.tokens.rollouts import Generated, Rollouts

ONE_RIGHT = [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]  # rewards 1 0 0 0, population deviation
START, END = Run(0, 10), Run(10, 10)
ALL = {"rows": (1.0, 1.0), "tokens": (1.0, 1.0)}


def rows_of(
    value: Sequence[float], group: Sequence[int] | None = None, lengths: Sequence[int] | None = None, pad: int = 0
) -> tuple[Rollouts, Tensor]:
    """Rows whose reward and advantage is the value, and their advantages; entropies of 1/2 to 3/2."""
    lengths = lengths or [2] * len(value)
    mask = torch.arange(max(lengths) + pad) < torch.tensor(lengths)[:, None]
    made = Generated(mask.long(), mask, mask[:, 0])
    reward = torch.tensor(value, dtype=torch.float64)
    rows = Rollouts.of([[1]] * len(value), made, torch.tensor(group or [0] * len(value)), reward)
    entropy = 0.5 + torch.rand(mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return rows.with_columns(entropy=torch.where(mask, entropy, torch.nan)), reward[:, None] * mask


def kept(stage: D3S, rows: Rollouts, advantages: Tensor, run: Run = START) -> Tensor:
    choice = stage(rows, advantages, run)
    assert choice.weight is None
    assert choice.keep is not None
    assert not (choice.keep & ~rows.mask).any()
    return choice.keep


def chosen(
    value: Sequence[float], n: float, scope: str = "batch", group: Sequence[int] | None = None, **more: object
) -> list[int]:
    """The rows that are selected, N_s = n and all tokens."""
    rows, a = rows_of(value, group)
    fields = {"rows": (n, n), "tokens": (1.0, 1.0), "scope": scope} | more
    return kept(D3S(**fields), rows, a).any(-1).nonzero()[:, 0].tolist()


def variance(value: Tensor, mask: Tensor | None = None) -> float:
    return float((value if mask is None else value[mask]).double().var(correction=0))


# Rows.


def test_equals_brute_force() -> None:
    """300 random cases of up to 12 values, with ties and zeros, and every N."""
    g = torch.Generator().manual_seed(0)
    for case in range(300):
        n = int(torch.randint(2, 9 if case % 10 else 13, (1,), generator=g))
        a = torch.randn(n, generator=g, dtype=torch.float64)
        if case % 3:
            a = (a * 2).round() / 2  # ties, and zeros
        for size in range(2, n + 1):
            found = widest(a, size)
            assert int(found.sum()) == size
            best = a[torch.tensor(list(combinations(range(n), size)))].var(-1, correction=0).max()
            assert variance(a, found) == pytest.approx(float(best), abs=1e-12)


def test_values_far_from_zero_lose_no_digits() -> None:
    a = torch.tensor([1e9, 1e9 + 1, 1e9 + 2, 1e9 + 5], dtype=torch.float64)
    assert widest(a, 2).tolist() == [True, False, False, True]
    assert widest(a, 3).tolist() == [True, True, False, True]


@pytest.mark.parametrize(("n", "expected"), [(2, 4 / 3), (3, 1.1851851851851851), (4, 1.0)])
def test_one_right_of_four(n: int, expected: float) -> None:
    a = torch.tensor(ONE_RIGHT, dtype=torch.float64)
    found = widest(a, n)
    assert found[0]
    assert int(found.sum()) == n
    assert variance(a, found) == pytest.approx(expected, abs=1e-12)


def test_two_right_of_four() -> None:
    a = torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert widest(a, 2).tolist() == [True, False, True, False]  # the first of each
    assert variance(a, widest(a, 2)) == 1.0
    assert widest(a, 3).tolist() == [True, True, True, False]  # of two splits as good the one with more positives


def test_across_groups_rows_of_advantage_0_are_the_last() -> None:
    value, group = [*ONE_RIGHT, 0, 0, 0, 0], [0] * 4 + [1] * 4
    assert chosen(value, 2, group=group) == [0, 1, 2, 3]  # N = 2 x 2 groups
    a = torch.tensor(value, dtype=torch.float64)
    assert variance(a, widest(a, 2)) == pytest.approx(4 / 3, abs=1e-12)
    assert variance(a, widest(a, 4)) == pytest.approx(1.0, abs=1e-12)
    with_zero = torch.tensor([True, True, True, False, True, False, False, False])
    assert variance(a, with_zero) == pytest.approx(0.896, abs=1e-3)
    assert chosen(value, 3, group=group) == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]  # more than there are others: zeros come in, the first ones


@given(st.lists(st.integers(-4, 4), min_size=2, max_size=10))
def test_of_the_unbiased_variance_no_size_has_less_than_the_whole(values: list[int]) -> None:
    a = torch.tensor(values, dtype=torch.float64)
    for n in range(2, len(a) + 1):
        assert a[widest(a, n)].var() >= a.var() - 1e-12


def test_of_the_population_variance_an_odd_size_can_have_less() -> None:
    a = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    assert variance(a, widest(a, 3)) == pytest.approx(8 / 9, abs=1e-12)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=9), st.integers(2, 9), st.randoms())
@settings(max_examples=50)
def test_the_values_that_are_chosen_do_not_depend_on_the_order_of_rows(
    values: list[int], n: int, random: object
) -> None:
    shuffled = values.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = (torch.tensor(v, dtype=torch.float64) for v in (values, shuffled))
    assert one[widest(one, n)].sort().values.tolist() == other[widest(other, n)].sort().values.tolist()


def test_equal_values_go_by_row_on_both_ends() -> None:
    assert widest(torch.zeros(5), 3).tolist() == [True, True, True, False, False]
    a = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    assert widest(a, 4).tolist() == [True, True, True, True, False, False]


def test_scope_group_never_mixes_groups() -> None:
    value, group = [*ONE_RIGHT, 0, 0, 0, 0, 2, -2, 0, 1], [7] * 4 + [3] * 4 + [5] * 4
    assert chosen(value, 2, "group", group) == [0, 1, 4, 5, 8, 9]  # the level group too, its first rows


def test_scope_group_and_then_the_batch() -> None:
    value, group = [*ONE_RIGHT, 0, 0, 0, 0, 2, -2, 0, 1], [0] * 4 + [1] * 4 + [2] * 4
    both = chosen(value, 3, "group+batch", group, shares=(2, 2))
    assert both == [0, 1, 2, 8, 9, 11]  # six of the three rows of each group
    assert chosen(value, 0.75, "group+batch", group, shares=(0.5, 0.5)) == both


def test_groups_need_neither_be_adjacent_nor_of_one_size() -> None:
    value, group = [1, 5, -1, 0.5, -5, 0, 2], [4, 9, 4, 4, 9, 4, 9]
    assert chosen(value, 2, "group", group) == [0, 1, 2, 4]
    assert chosen(value, 0.5, "group", group) == [0, 1, 2, 4]  # half of 4, half of 3 rounded to even
    assert len(chosen(value, 3, "batch", group)) == 6


@pytest.mark.parametrize("scope", ["batch", "group", "group+batch"])
def test_where_all_advantages_are_0_nothing_is_chosen(scope: str) -> None:
    rows, a = rows_of([0.0] * 8, [0] * 4 + [1] * 4)
    for fields in ({"rows": (2, 2)}, ALL):
        choice = D3S(**fields, scope=scope)(rows, a, START)
        assert not choice.keep.any()
        assert choice.logs["d3s/selected_rows"] == 0
        assert choice.logs["d3s/useful_rows"] == 0


def test_by_rewards_instead() -> None:
    """Rewards of two groups whose advantages are the same: only by reward is a row of each taken."""
    rows, _ = rows_of([0, 1, 10, 11], [0, 0, 1, 1])
    a = torch.tensor([-1.0, 1.0, -1.0, 1.0])[:, None] * rows.mask
    for key, expected in (("advantage", [0, 1]), ("reward", [0, 3])):
        found = kept(D3S(rows=(0.5, 0.5), tokens=(1.0, 1.0), key=key), rows, a).any(-1).nonzero()[:, 0].tolist()
        assert found == expected
    unknown = rows.with_reward(torch.tensor([0.0, torch.nan, 10.0, 11.0], dtype=torch.float64))
    assert D3S(key="reward").of_rows(unknown, a).tolist() == [0.0, 7.0, 10.0, 11.0]  # in the middle


# The value of a row whose tokens differ.


def test_row_stat() -> None:
    rows, _ = rows_of([0, 0], lengths=[4, 2])
    a = torch.tensor([[3.0, -1.0, -1.0, -3.0], [2.0, -1.0, 0.0, 0.0]])
    assert D3S().of_rows(rows, a).tolist() == [-0.5, 0.5]
    assert D3S(row_stat="size").of_rows(rows, a).tolist() == [-2.0, 1.5]


@pytest.mark.parametrize("stat", ["mean", "size"])
def test_rows_of_one_advantage_tie_whatever_their_lengths(stat: str) -> None:
    lengths = list(range(1, 40))
    rows, a = rows_of([1 / 3] * 39, lengths=lengths)
    for value in (a, a.float(), -a):
        assert len(D3S(row_stat=stat).of_rows(rows, value).unique()) == 1


def test_token_level_advantages_choose_by_their_means() -> None:
    rows, _ = rows_of([0, 0, 0], lengths=[2, 2, 2])
    a = torch.tensor([[5.0, -5.0], [1.0, 1.0], [-1.0, -1.0]])
    assert kept(D3S(rows=(2, 2), tokens=(1.0, 1.0)), rows, a).any(-1).tolist() == [False, True, True]


# Tokens.


def test_tokens_of_the_largest_keys() -> None:
    key = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    assert densest(key, key > 0, 0.5).tolist() == [[False, True, True, False]]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.sampled_from([0.1, 0.2, 0.5, 0.7, 1.0]), st.booleans())
def test_so_many_tokens_and_the_largest(lengths: list[int], k: float, few: bool) -> None:
    mask = torch.arange(max(lengths) + 1) < torch.tensor(lengths)[:, None]
    g = torch.Generator().manual_seed(sum(lengths))
    key = torch.randint(1, 3 if few else 1000, mask.shape, generator=g).double()
    key[~mask] = 1e6  # garbage in the padding
    total = sum(lengths)
    for per in ("batch", "row"):
        found = densest(key, mask, k, per)
        assert not (found & ~mask).any()
        for i in range(len(mask)) if per == "row" else [slice(None)]:
            here, there = mask[i], found[i]
            n = int(here.sum()) if per == "row" else total
            assert int(there.sum()) == max(1, -(-round(k * n * 10) // 10))
            if (here & ~there).any():
                assert key[i][there].min() >= key[i][here & ~there].max()


def test_equal_keys_go_by_row_and_column() -> None:
    one = torch.ones(2, 3)
    assert densest(one, one > 0, 0.5).tolist() == [[True] * 3, [False] * 3]
    assert densest(one, one > 0, 0.5, "row").tolist() == [[True, True, False]] * 2


def test_keys_of_0_are_never_kept() -> None:
    key = torch.tensor([[0.0, 2.0, 0.0]])
    for per in ("batch", "row"):
        assert densest(key, torch.ones_like(key, dtype=torch.bool), 0.9, per).tolist() == [[False, True, False]]
    rows, a = rows_of([1.0, -1.0, 0.0, 0.0], [0, 0, 1, 1])
    assert kept(D3S(rows=(1.0, 1.0), tokens=(0.9, 0.9)), rows, a).any(-1).tolist() == [True, True, False, False]
    assert kept(D3S(**ALL), rows, a).all()  # with all tokens they stay: the host's loss counts them


def test_no_token_at_all() -> None:
    key = torch.ones(2, 3)
    assert not densest(key, key < 0, 0.5).any()


@pytest.mark.parametrize("per", ["batch", "row"])
@pytest.mark.parametrize("c", [1e-3, 7.0])
def test_scale_changes_nothing(per: str, c: float) -> None:
    rows, a = rows_of([*ONE_RIGHT, 0.3, -0.9, 1.0, 0.2], [0] * 4 + [1] * 4, lengths=[3, 1, 5, 2, 4, 4, 2, 1])
    stage = D3S(rows=(0.5, 0.5), tokens=(0.4, 0.4), per=per)
    before = kept(stage, rows, a)
    assert torch.equal(kept(stage, rows, c * a), before)
    assert torch.equal(kept(stage, rows.with_columns(entropy=c * rows.columns["entropy"]), a), before)


def test_permuting_rows_permutes_the_masks_and_padding_changes_nothing() -> None:
    value, lengths = [1.7, -0.4, 0.8, -2.0, 0.1, 0.5, -0.7, 1.1], [3, 1, 5, 2, 4, 4, 2, 1]
    rows, a = rows_of(value, [0, 1] * 4, lengths)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    for scope in ("batch", "group", "group+batch"):
        stage = D3S(rows=(0.5, 0.5), tokens=(0.4, 0.4), scope=scope)
        before = kept(stage, rows, a)
        assert torch.equal(kept(stage, rows[order], a[order]), before[order])
        wide = Rollouts.join([rows, rows_of([0.0], lengths=[9])[0]])[torch.arange(8)]
        assert torch.equal(kept(stage, wide, torch.nn.functional.pad(a, (0, 4)))[:, :5], before)


# Schedule.


@pytest.mark.parametrize(
    ("step", "rows", "tokens"), [(0, 4, 0.25), (5, 6, 0.5), (10, 8, 0.75), (99, 8, 0.75), (-3, 4, 0.25)]
)
def test_linear_in_the_progress(step: int, rows: int, tokens: float) -> None:
    value = [float(i) for i in range(-8, 8)]
    value[8] = 0.5
    batch, a = rows_of(value, [0, 1] * 8)
    stage = D3S(rows=(2, 4), tokens=(0.25, 0.75))
    choice = stage(batch, a, Run(step, 10))
    assert choice.keep is not None
    assert choice.logs["d3s/selected_rows"] == rows
    assert int(choice.keep.sum()) == -(-2 * rows * tokens // 1)


def test_a_share_is_of_the_rows_and_two_at_least() -> None:
    assert len(chosen([1, 2, 3, 4, 5, 6, 7, 8.0], 0.5)) == 4
    assert len(chosen([1, 2, 3, 4.0], 0.01)) == 2
    assert len(chosen([1, 2, 3, 4, 5, 6, 7, 8.0], 2.5, group=[0] * 4 + [1] * 4)) == 5  # 2.5 x 2 groups


# Loss and gradient.


def plan_of(host: str, pieces: tuple = (), seed: int = 0, run: Run = END) -> tuple[Recipe, Plan, Tensor]:
    """A plan of random rows, and log-probabilities near the old ones, of the plan's rows."""
    g = torch.Generator().manual_seed(seed)
    lengths = [3, 1, 5, 2, 4, 4, 2, 1]
    rows, _ = rows_of([1, 0, 0, 1, 0, 0, 1, 0], [0] * 4 + [1] * 4, lengths)
    old = torch.randn(rows.mask.shape, generator=g, dtype=torch.float64) - 2
    logp = old + 0.3 * torch.randn(rows.mask.shape, generator=g, dtype=torch.float64)
    rows = rows.with_columns(old_logp=old * rows.mask, now=logp * rows.mask)
    recipe = Recipe(host, pieces)
    return recipe, (plan := recipe.prepare(rows, run)), plan.rollouts.columns["now"].clone().requires_grad_()


@pytest.mark.parametrize("host", [h for h in HOSTS if h not in ("ppo", "reinforce")])
def test_with_all_rows_and_tokens_it_is_its_host(host: str) -> None:
    found = []
    for pieces in ((), (D3S(**ALL),), (D3S(**ALL, scope="group+batch"),), (D3S(rows=(4, 4), tokens=(1.0, 1.0)),)):
        recipe, plan, logp = plan_of(host, pieces)
        loss, _ = recipe.loss(plan, {"logp": logp})
        loss.backward()
        found.append((loss.item(), logp.grad))
    for loss, grad in found[1:]:
        assert loss == found[0][0]
        assert torch.equal(grad, found[0][1])


@pytest.mark.parametrize("host", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_the_gradient_is_the_hosts_under_the_smaller_mask(host: str) -> None:
    recipe, plan, logp = plan_of(host, (D3S(rows=(2, 2), tokens=(0.5, 0.5)),))
    loss, _ = recipe.loss(plan, {"logp": logp})
    (grad,) = torch.autograd.grad(loss, logp)
    bare = Recipe(host)
    count = bare.aggregate.count(bare.aggregate.counted(plan.keep, plan.rollouts.mask, plan.weight), END)
    masked, _ = bare.loss(replace(plan, count=count), {"logp": logp})
    assert masked.item() == pytest.approx(loss.item(), rel=1e-12)
    assert torch.allclose(torch.autograd.grad(masked, logp)[0], grad, rtol=0, atol=1e-12)
    assert (grad[~plan.keep] == 0).all()


def test_at_ratio_1_the_gradient_has_a_closed_form() -> None:
    recipe, plan, _ = plan_of("dapo", (D3S(rows=(2, 2), tokens=(0.5, 0.5)),))
    logp = plan.rollouts.columns["old_logp"].clone().requires_grad_()
    recipe.loss(plan, {"logp": logp})[0].backward()
    expected = -(plan.advantages * plan.keep) / plan.keep.sum()
    assert torch.allclose(logp.grad, expected, rtol=0, atol=1e-12)


def test_advantages_are_those_of_all_rows() -> None:
    """And the sequence ratio is of all tokens of a row, kept or not."""
    host, plan, _ = plan_of("gspo")
    _, small, logp = plan_of("gspo", (D3S(rows=(2, 2), tokens=(0.5, 0.5)),))
    at = [
        i
        for i in range(8)
        if any(torch.equal(plan.rollouts.columns["now"][i, :1], x[:1]) for x in small.rollouts.columns["now"])
    ]
    width = small.advantages.shape[1]
    assert torch.equal(small.advantages, plan.advantages[at][:, :width])
    ratio = host._one("ratio")
    whole = ratio(plan.rollouts.columns["now"], plan.rollouts.columns["old_logp"], plan.rollouts.mask)
    part = ratio(logp, small.rollouts.columns["old_logp"], small.rollouts.mask)
    assert torch.allclose(part[:, 0], whole[at][:, 0], rtol=0, atol=1e-12)


def test_a_batch_that_teaches_nothing_has_loss_0_and_no_gradient() -> None:
    rows, _ = rows_of([1.0] * 4)
    recipe = Recipe("grpo", (D3S(),))
    plan = recipe.prepare(rows.with_columns(old_logp=rows.mask.double()), START)
    assert len(plan) == 0
    logp = torch.zeros(plan.advantages.shape, dtype=torch.float64, requires_grad=True)
    loss, _ = recipe.loss(plan, {"logp": logp})
    loss.backward()
    assert loss.item() == 0
    assert not logp.grad.any()


def test_figures() -> None:
    rows, a = rows_of([*ONE_RIGHT, 0, 0, 0, 0], [0] * 4 + [1] * 4)
    logs = D3S(rows=(2, 4), tokens=(1.0, 1.0))(rows, a, START).logs
    assert logs["d3s/variance_before"] == pytest.approx(0.5)
    assert logs["d3s/variance"] == pytest.approx(1.0)
    assert logs["d3s/useful_rows"] == 1.0
    assert D3S(rows=(2, 4), tokens=(1.0, 1.0))(rows, a, END).logs["d3s/useful_rows"] == 0.5
    plan = Recipe("grpo", (D3S(rows=(2, 2), tokens=(0.5, 0.5)),)).prepare(rows, START)
    assert plan.logs["kept_rows"] == len(plan) / 8
    assert plan.logs["kept_tokens"] == int(plan.keep.sum()) / 16


# Bad input.


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rows": (1, 2)}, "rows"),
        ({"rows": (1.5, 2)}, "rows"),
        ({"rows": (0.0, 0.5)}, "rows"),
        ({"rows": (float("nan"), 4)}, "rows"),
        ({"rows": (2, float("inf"))}, "rows"),
        ({"tokens": (0.0, 1.0)}, "tokens"),
        ({"tokens": (0.5, 1.1)}, "tokens"),
        ({"tokens": (float("nan"), 1.0)}, "tokens"),
        ({"scope": "query"}, "scope"),
        ({"key": "length"}, "key"),
        ({"per": "group"}, "per"),
        ({"row_stat": "max"}, "row_stat"),
        ({"shares": (2, 4)}, "shares"),
        ({"shares": (1, 4), "scope": "group+batch"}, "shares"),
    ],
)
def test_bad_settings_are_refused(fields: dict, named: str) -> None:
    with pytest.raises(UserError, match=rf"D3S\.{named} must be"):
        D3S(**fields)


@pytest.mark.parametrize(
    "fields", [{"rows": (4, 2)}, {"tokens": (0.5, 0.2)}, {"shares": (4, 2), "scope": "group+batch"}]
)
def test_a_schedule_the_other_way_is_allowed_with_a_warning(fields: dict) -> None:
    with pytest.warns(UserWarning, match="begins with more than it ends with"):
        D3S(**fields)


@pytest.mark.parametrize(("scope", "where"), [("batch", "batch"), ("group", "group")])
def test_more_rows_than_there_are_is_all_of_them_and_said_once(scope: str, where: str) -> None:
    rows, a = rows_of([1.0, -1.0, 2.0, -2.0], [0, 0, 1, 1])
    stage = D3S(rows=(3, 9), tokens=(1.0, 1.0), scope=scope)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for step in range(5):
            assert kept(stage, rows, a, Run(step, 5)).all()
    assert [str(w.message) for w in said] == [f"D3S is to choose more rows than a {where} has: all are taken"]


@pytest.mark.parametrize("what", ["advantage", "entropy"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_named_with_its_row(what: str, bad: float) -> None:
    rows, a = rows_of([1.0, -1.0, 2.0, -2.0], lengths=[3, 2, 3, 1])
    where = a if what == "advantage" else rows.columns["entropy"]
    where[1, 2] = where[3, 1] = bad  # in the padding: nothing is wrong
    kept(D3S(), rows, a)
    where[2, 1] = bad
    with pytest.raises(UserError, match=f"the {what} of row 2 is not finite"):
        D3S()(rows, a, START)


def test_entropies_are_asked_for_only_where_tokens_are_left_out() -> None:
    assert D3S().needs == {"entropy"}
    assert D3S(tokens=(1.0, 1.0)).needs == frozenset()


def test_it_is_refused_where_there_are_no_entropies() -> None:
    from locum.reinforce.gdpo import GDPO

    with pytest.raises(UserError, match="D3S needs 'entropy'"):
        Recipe("grpo", (GDPO(), D3S()))


def test_a_row_of_nothing_but_padding_counts_as_0() -> None:
    rows, a = rows_of([1.0, -1.0, 0.5], lengths=[2, 2, 2])
    mask = rows.mask.clone()
    mask[2] = False
    found = kept(D3S(rows=(2, 2), tokens=(1.0, 1.0)), replace(rows, mask=mask), a * mask)
    assert found.any(-1).tolist() == [True, True, False]


def test_nothing_is_normalised_again() -> None:
    """Var(A) of what is kept is above that of the batch, and stays so in the plan."""
    _, plan, _ = plan_of("grpo", (D3S(rows=(2, 2), tokens=(1.0, 1.0)),))
    rows, _ = rows_of([1, 0, 0, 1, 0, 0, 1, 0], [0] * 4 + [1] * 4)
    stats = group_stats(rows.reward, rows.group, 1)
    every = (rows.reward - stats.mean) / stats.sd
    assert variance(plan.advantages[:, 0]) > variance(every)


def test_means_over_rows_are_of_rows_with_a_kept_token() -> None:
    recipe, plan, logp = plan_of("grpo", (D3S(rows=(2, 2), tokens=(0.3, 0.3)),))
    assert isinstance(recipe.aggregate, SequenceMean)
    assert float(plan.count.sum()) == len(plan)
    loss, _ = recipe.loss(plan, {"logp": logp})
    ratio = (logp - plan.rollouts.columns["old_logp"]).exp()
    each = -torch.minimum(ratio * plan.advantages, ratio.clamp(0.8, 1.2) * plan.advantages) * plan.keep
    assert loss.item() == pytest.approx((each.sum(-1) / plan.keep.sum(-1)).mean().item(), rel=1e-12)
