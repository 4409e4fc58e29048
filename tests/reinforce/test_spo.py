"""Segments: where answers are cut, what a state is worth, trees of continuations, and what is made of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from locum.errors import UserError
from locum.reinforce import Flat, GroupCentred, GroupNormalised, Recipe, Run
from locum.reinforce.base import Asked
from locum.reinforce.learner import Learner, Problem, Settings
from locum.reinforce.likelihood import Autoregressive
from locum.reinforce.recipe import of
from locum.reinforce.segments import SPOChainSample, SPOTreeSample, cut_points, unsure
from locum.reinforce.spo import (
    SPOChain,
    SPOChainAdvantage,
    SPODrop,
    SPOMask,
    SPOTree,
    SPOTreeAdvantage,
    SPOWhiten,
    segment_advantages,
)
from locum.tasks.digit_chain import ChainPolicy, DigitChain, exact_advantages, pretrained, success
from locum.tokens.rollouts import Generated, Rollouts, uniforms

TASK = DigitChain(length=4, warm_steps=200)


def rows(mask: Tensor, **columns: Tensor) -> Rollouts:
    """Rows of one group without prefix and reward."""
    n = len(mask)
    none = torch.zeros(n, 0, dtype=torch.long)
    group, reward = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.float64)
    return Rollouts(none, none.bool(), mask.long(), mask, group, reward, columns)


def grid(*values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass
class Spy:
    """What a sampler asks for, of a policy on the digit chain or of a function, and what it was told."""

    generate: Callable[..., Generated]
    score: Callable[[int, Sequence[int]], float]
    columns: Callable[..., dict[str, Tensor]] | None = None
    seed: int = 0
    numbers: list[Tensor] = field(default_factory=list)
    scored: list[tuple[int, list[int]]] = field(default_factory=list)
    rewards: int = 0

    def ask(self, prompts: int, room: int, first: int = 0) -> Asked:
        def generate(prefixes: Any, copies: int, room: Any, numbers: Tensor) -> Generated:
            self.numbers.append(numbers)
            return self.generate(prefixes, copies, room, uniforms(self.seed, numbers, max(room)))

        def reward(owner: Sequence[int], texts: Sequence[Sequence[int]]) -> Tensor:
            self.rewards += 1
            self.scored += [(o, list(t)) for o, t in zip(owner, texts, strict=True)]
            return torch.tensor([self.score(o, t) for o, t in zip(owner, texts, strict=True)], dtype=torch.float64)

        def columns(rollouts: Rollouts, want: frozenset[str]) -> dict[str, Tensor]:
            assert self.columns is not None
            return {name: x.detach() for name, x in self.columns(rollouts, want).items()}

        return Asked(generate, reward, columns, room, torch.arange(first, first + prompts))


def on_chain(policy: ChainPolicy, prompts: list[list[int]], seed: int = 0) -> Spy:
    def columns(rollouts: Rollouts, want: frozenset[str]) -> dict[str, Tensor]:
        return Autoregressive().columns(policy, rollouts, want)

    return Spy(policy.generate, lambda o, text: policy.task.score(prompts[o], text), columns, seed)


def writer(length: Callable[[int], int]) -> Callable[..., Generated]:
    """Writes bits, and ends when a text (its prompt of one token included) is as long as its first two tokens say."""

    def generate(prefixes: Any, copies: int, room: Any, draws: Tensor) -> Generated:
        out, ended = list[list[int]](), list[bool]()
        for row in range(len(prefixes) * copies):
            text = list(prefixes[row // copies])
            begun = len(text)
            while len(text) - begun < room[row // copies]:
                text.append(int(draws[row, len(text) - begun] * 2))
                if len(text) == 1 + length(text[1]):
                    break
            ended.append(len(text) == 1 + length(text[1]))
            out.append(text[begun:])
        width = max(map(len, out))
        ids = torch.tensor([t + [0] * (width - len(t)) for t in out])
        mask = torch.arange(width) < torch.tensor([[len(t)] for t in out])
        return Generated(ids, mask, torch.tensor(ended))

    return generate


# Cut points and advantages.


@pytest.mark.parametrize(
    ("p", "interval", "values", "reward", "cuts", "masked"),
    [
        ((0.5, 0.95, 0.6, 0.99, 0.7, 0.8), 2, (0.25, 0.75), 0.0, [0, 4], [0.5, 0, 0.5, 0, -0.75, -0.75]),
        ((0.95, 0.95, 0.6, 0.99, 0.7, 0.8), 1, (0.5, 0.75, 0.25), 1.0, [2, 4, 5], [0, 0, 0.25, 0, -0.5, 0.75]),
    ],
)
def test_by_hand(p: Any, interval: int, values: Any, reward: float, cuts: list[int], masked: list[float]) -> None:
    logp = grid(p).log()
    mask = torch.ones_like(logp, dtype=torch.bool)
    cut = cut_points(unsure(logp, mask, 0.9), interval)
    assert cut[0].nonzero()[:, 0].tolist() == cuts
    value = torch.zeros_like(logp).masked_scatter(cut, grid(values)[0])
    answer = rows(mask, old_logp=logp, cut=cut.double(), cut_value=value).with_reward(grid([reward])[0])
    advantages = SPOChainAdvantage()(answer)
    if interval == 2:
        assert advantages.tolist() == [[0.5, 0.5, 0.5, 0.5, -0.75, -0.75]]
    keep = SPOMask().__call__(answer, advantages, Run()).keep
    assert keep is not None
    assert torch.where(keep, advantages, 0.0)[0].tolist() == masked


def test_a_token_of_probability_rho_is_no_candidate_and_is_masked() -> None:
    for kind in (torch.float32, torch.float64):
        logp = torch.tensor([[0.9, 0.89, 0.9]], dtype=torch.float64).log().to(kind)
        assert unsure(logp, torch.ones(1, 3, dtype=torch.bool), 0.9).tolist() == [[False, True, False]]
    assert unsure(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), 1.0).tolist() == [[False]]


MASKS = st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=1, max_size=5).map(torch.tensor)


@given(MASKS, st.integers(1, 10), st.integers(0, 1000))
def test_segments_telescope_and_have_equal_counts(candidates: Tensor, interval: int, seed: int) -> None:
    cut = cut_points(candidates, interval)
    g = torch.Generator().manual_seed(seed)
    value = torch.randint(0, 64, cut.shape, generator=g) / 64.0  # sums of these are exact
    reward = torch.randint(0, 2, (len(cut),), generator=g).float()
    a = segment_advantages(cut, value, reward, torch.ones_like(cut))
    for row in range(len(cut)):
        at = cut[row].nonzero()[:, 0].tolist()
        u = candidates[row].nonzero()[:, 0].tolist()
        assert at == u[::interval]  # interval 1: one segment per candidate; interval >= |U|: one segment
        assert not a[row, : at[0] if at else None].any()
        if at:
            assert a[row, at].sum() == reward[row] - value[row, at[0]]
        for begin, end in zip(at, [*at[1:], 8][: len(at)], strict=True):
            assert (a[row, begin:end] == a[row, begin]).all()  # one number per segment
    shuffled = torch.randperm(len(cut), generator=g)
    wide = [torch.nn.functional.pad(x[shuffled], (0, 3)) for x in (cut, value, torch.ones_like(cut))]
    again = segment_advantages(wide[0], wide[1] + 7.0 * ~wide[0], reward[shuffled], wide[2])
    assert torch.equal(again[:, :8], a[shuffled])
    assert not again[:, 8:].any()


def test_one_segment_valued_by_the_groups_mean_is_centred_grpo_on_masked_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    logp = torch.rand(6, 9, generator=g, dtype=torch.float64).log()
    mask = torch.arange(9) < torch.tensor([[9], [4], [7], [1], [9], [5]])
    cut = cut_points(unsure(logp, mask, 0.7), 9)
    reward = torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=torch.float64)
    group = torch.tensor([0, 1, 0, 1, 0, 1])
    mean = torch.where(group == 0, grid([2.0]), grid([1.0])).T / 3
    batch = replace(rows(mask, old_logp=logp, cut=cut.double(), cut_value=mean * cut), group=group)
    batch = batch.with_reward(reward)
    keep = SPOMask(0.7)(batch, logp, Run()).keep
    mine, theirs = (torch.where(keep, x, 0.0) for x in (SPOChainAdvantage()(batch), GroupCentred()(batch)))
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def test_unknown_values_teach_nothing() -> None:
    cut = torch.tensor([[True, False, True, True]])
    value = grid([0.5, 0, math.nan, 0.25])
    a = segment_advantages(cut, value, grid([1.0])[0], torch.ones_like(cut))
    assert a.tolist() == [[0.0, 0.0, 0.0, 0.75]]
    a = segment_advantages(cut, grid([0.5, 0, 0.5, 0.25]), grid([math.nan])[0], torch.ones_like(cut))
    assert a.tolist() == [[0.0, 0.0, -0.25, 0.0]]


# Values.


def test_values_of_states_are_unbiased_and_vary_as_a_mean_of_rewards_does() -> None:
    task, prompt, n = DigitChain(length=2, warm_steps=200), [3, 7], 9
    policy = pretrained(0, task)
    spy = on_chain(policy, [prompt] * 2000)
    found, _ = SPOChainSample(group_size=1, rho=1.0, interval=100, n_mc=n)(spy.ask(2000, task.limit), [prompt] * 2000)
    value = found.columns["cut_value"][:, 0]  # of the prompt, 2000 times
    true = success(policy, torch.tensor([prompt])).item()
    assert abs(value.mean().item() - true) < 4 * math.sqrt(true * (1 - true) / n / 2000)
    assert value.var().item() == pytest.approx(true * (1 - true) / n, rel=0.1)


def test_advantages_of_segments_are_unbiased() -> None:
    policy, g = pretrained(0, TASK), torch.Generator().manual_seed(0)
    prompts = TASK.prompts(600, g).tolist()
    spy = on_chain(policy, prompts)
    found, _ = SPOChainSample(group_size=2, rho=0.99, interval=2, n_mc=3)(spy.ask(600, TASK.limit), prompts)
    cut = found.columns["cut"] > 0
    segment = cut.long().cumsum(-1)
    exact = torch.zeros(len(found), 20, dtype=torch.float64)
    exact.scatter_add_(1, segment, exact_advantages(policy, found))  # telescopes to V behind less V before
    wrong = (SPOChainAdvantage()(found) - exact.gather(1, segment))[cut].double()
    per_prompt = torch.zeros(600).double().index_add_(0, found.group[:, None].expand_as(cut)[cut], wrong)
    assert abs(per_prompt.mean()) < 4 * per_prompt.std() / math.sqrt(600)
    assert wrong.std() > 0.05


def test_the_value_of_a_root_weighs_leaves_by_their_paths() -> None:
    # First bit 1: the text ends after two tokens; 0: after six. A prompt's value is not the mean over its leaves.
    spy = Spy(writer(lambda bit: 2 if bit else 6), lambda o, text: float(sum(text) % 3))
    prompts = [[7], [7], [7]]
    found, figures = SPOTreeSample((3, 2, 2), 2)(spy.ask(3, 40), prompts)
    depth, reward, width = found.facts["depth"], found.reward, found.lengths
    leaf = found.facts["ended"]
    weight = torch.tensor([1 / 3, 1 / 6, 1 / 12], dtype=torch.float64)[depth]
    root = torch.zeros(3).double().index_add_(0, found.facts["prompt"][leaf], (weight * reward)[leaf])
    assert figures["spo/values"] == pytest.approx(root.sum().item(), abs=1e-12)
    first = torch.stack([reward[(depth == 0) & (found.facts["prompt"] == i)].mean() for i in range(3)])
    torch.testing.assert_close(first, root, atol=1e-12, rtol=0)
    plain = torch.stack([reward[leaf & (found.facts["prompt"] == i)].mean() for i in range(3)])
    assert not torch.allclose(plain, root)
    assert (width == 2).all()
    # Nothing ends early: the plain mean it is.
    spy = Spy(writer(lambda bit: 6), lambda o, text: float(sum(text) % 3))
    found, figures = SPOTreeSample((3, 2, 2), 2)(spy.ask(3, 40), prompts)
    assert figures["spo/values"] / 3 == pytest.approx(found.reward[found.facts["ended"]].mean().item(), abs=1e-12)
    # Siblings' advantages are nothing in sum.
    for norm in ("none", "std", "loo"):
        a = SPOTreeAdvantage(norm)(found)[:, 0]
        sums = torch.zeros(40).double().index_add_(0, found.group, a)
        assert sums.abs().max() < 1e-6


def test_siblings_by_hand() -> None:
    batch = rows(torch.ones(3, 2, dtype=torch.bool)).with_reward(grid([1.0, 0.0, 0.5])[0])
    expected = {"none": [0.5, -0.5, 0.0], "std": [1.2247, -1.2247, 0.0], "loo": [0.75, -0.75, 0.0]}
    for norm, values in expected.items():
        a = SPOTreeAdvantage(norm)(batch)
        assert a[:, 0].tolist() == pytest.approx(values, abs=5e-5)
        keep = SPODrop()(batch, a, Run()).keep
        assert keep is not None
        assert keep.any(-1).tolist() == [True, True, False]
    assert SPOTreeAdvantage("std")(batch)[0, 0].item() == pytest.approx(0.5 / (math.sqrt(1 / 6) + 1e-8), abs=1e-12)


def test_edges_whose_values_differ_by_rounding_alone_are_dropped() -> None:
    third = torch.tensor([1 / 3, 2 / 3, 0.5], dtype=torch.float32)
    batch = rows(torch.ones(3, 1, dtype=torch.bool)).with_reward(third)
    a = SPOTreeAdvantage()(batch)
    a[2] = 3e-8  # where the mean is not met to the last bit
    keep = SPODrop()(batch, a, Run()).keep
    assert keep is not None
    assert keep[:, 0].tolist() == [True, True, False]


@pytest.mark.parametrize(("norm", "factor"), [("none", 2 / 3), ("loo", 1.0)])
def test_expected_advantages_of_edges(norm: str, factor: float) -> None:
    policy, g = pretrained(0, TASK), torch.Generator().manual_seed(1)
    prompts = TASK.prompts(500, g).tolist()
    spy = on_chain(policy, prompts)
    found, _ = SPOTreeSample((3, 3), 2)(spy.ask(500, TASK.limit), prompts)
    a, true = SPOTreeAdvantage(norm)(found)[:, 0].double(), exact_advantages(policy, found).sum(-1)
    for depth in (0, 1):
        # A = factor (V(child) - V(parent)) + noise that no child knows of, so the slope of A on the true difference is it.
        at = found.facts["depth"] == depth
        owner = found.facts["prompt"][at]
        wrong = torch.zeros(500).double().index_add_(0, owner, ((a - factor * true) * true)[at])
        assert abs(wrong.mean()) < 4 * wrong.std() / math.sqrt(500)
        slope = (a * true)[at].sum() / true.square()[at].sum()
        assert slope == pytest.approx(factor, rel=0.1)


# What is asked of the sampler.


def test_a_full_tree_of_258_edges_takes_258_segments() -> None:
    m = 4
    spy = Spy(writer(lambda bit: 3 * m), lambda o, text: float(sum(text)))
    found, figures = SPOTreeSample((6, 6, 6), m)(spy.ask(2, 3 * m), [[7], [8]])
    assert len(found) == 2 * 258
    assert figures["sampled_tokens"] == 2 * 258 * m
    assert [figures[f"spo/edges_{d}"] for d in (1, 2, 3)] == [12, 72, 432]
    assert len(spy.numbers) == 3
    assert spy.rewards == 1
    # Each row's prefix and completion are a path of the tree; the group is the parent; leaves are scored on their full text.
    assert found.prefix_mask.sum(-1).tolist() == (1 + m * found.facts["depth"]).tolist()
    texts = [[*p[q].tolist(), *c.tolist()] for p, q, c in zip(found.prefix, found.prefix_mask, found.ids, strict=True)]
    ends = [text[1:] for text, done in zip(texts, found.facts["ended"].tolist(), strict=True) if done]
    assert sorted(ends) == sorted(text for _, text in spy.scored)
    for g in found.group.unique().tolist():
        siblings = (found.group == g).nonzero()[:, 0].tolist()
        assert len(siblings) == 6
        assert len({tuple(found.prefix[i][found.prefix_mask[i]].tolist()) for i in siblings}) == 1


def test_a_tree_that_ends_early_asks_no_more() -> None:
    spy = Spy(writer(lambda bit: 2), lambda o, text: 1.0)
    found, figures = SPOTreeSample((2, 2, 2), 5)(spy.ask(1, 40), [[7]])
    assert len(spy.numbers) == 1
    assert len(found) == 2
    assert figures["spo/edges_3"] == 0


def test_unfinished_texts_have_their_own_reward_and_are_never_scored() -> None:
    # Limits cut both: the tree's texts run out of room at depth 2 of 3, the chain's at once.
    spy = Spy(writer(lambda bit: 9), lambda o, text: 1.0)
    found, _ = SPOTreeSample((2, 2, 2), 3, unfinished_reward=-0.5)(spy.ask(1, 6), [[7]])
    assert not spy.scored
    assert found.reward.tolist() == [-0.5] * 6
    policy = pretrained(0, DigitChain(length=4, cap=4, warm_steps=200))
    prompts = [[1, 2, 3, 4]]
    spy = on_chain(policy, prompts)
    chain, _ = SPOChainSample(group_size=16, unfinished_reward=-1.0)(spy.ask(1, 4), prompts)
    short = ~chain.facts["ended"]
    assert 0 < short.sum() < 16
    assert (chain.reward[short] == -1).all()
    assert all(len([t for t in text if t != 10]) == 4 for _, text in spy.scored)
    # A policy that stops short of its room has a limit of its own: what it said is a leaf.
    spy = Spy(lambda p, c, room, draws: writer(lambda bit: 9)(p, c, [min(r, 2) for r in room], draws), lambda o, t: 1.0)
    found, _ = SPOTreeSample((2, 2), 3)(spy.ask(1, 20), [[7]])
    assert found.reward.tolist() == [0.0, 0.0]


def test_a_chain_asks_twice_and_values_a_state_once() -> None:
    policy = pretrained(0, TASK)
    prompts = [[3, 7, 1, 8], [3, 7, 1, 8]]
    spy = on_chain(policy, prompts)
    found, figures = SPOChainSample(group_size=5, rho=1.0, interval=2, n_mc=4)(spy.ask(2, TASK.limit), prompts)
    assert len(spy.numbers) == 2
    assert spy.rewards == 1
    cut = found.columns["cut"] > 0
    states = {
        (int(found.group[r]), tuple(found.ids[r, :at].tolist())): found.columns["cut_value"][r, at].item()
        for r, at in cut.nonzero().tolist()
    }
    assert figures["spo/states"] == len(states) == len(spy.numbers[1]) / 4
    assert figures["spo/segments"] == cut.sum() > len(states)
    for r, at in cut.nonzero().tolist():  # one value per state, and each prompt has its own, equal prompts too
        assert (
            found.columns["cut_value"][r, at].item() == states[int(found.group[r]), tuple(found.ids[r, :at].tolist())]
        )
    assert figures["sampled_tokens"] > found.mask.sum()
    assert max(len(text) for _, text in spy.scored) <= TASK.limit
    torch.testing.assert_close(
        found.columns["old_logp"], Autoregressive().columns(policy, found, frozenset())["logp"].detach()
    )


def test_a_chain_without_candidates_asks_once() -> None:
    policy = pretrained(0, TASK)
    spy = on_chain(policy, [[3, 7, 1, 8]])
    found, figures = SPOChainSample(rho=1e-9)(spy.ask(1, TASK.limit), [[3, 7, 1, 8]])
    assert len(spy.numbers) == 1
    assert not SPOChainAdvantage()(found).any()
    assert figures["spo/states"] == 0
    for prob_mask in (True, False):
        plan = of(SPOChain(rho=1e-9, prob_mask=prob_mask)).prepare(found)
        assert len(plan) == 0


@settings(max_examples=8)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.lists(st.integers(2, 3), min_size=1, max_size=3))
def test_no_two_texts_have_the_same_draws(g: int, n_mc: int, interval: int, branching: list[int]) -> None:
    policy = pretrained(0, TASK)
    prompts = [[3, 7, 1, 8], [0, 0, 9, 9], [3, 7, 1, 8]]
    for sample in (SPOChainSample(g, 1.0, interval, n_mc), SPOTreeSample(tuple(branching), 2)):
        spy = on_chain(policy, prompts)
        sample(spy.ask(3, TASK.limit), prompts)
        sample(spy.ask(3, TASK.limit, first=3), prompts)
        numbers = torch.cat(spy.numbers)
        assert len(numbers) == len(numbers.unique())
    spy = on_chain(policy, prompts)
    SPOChainSample(g, 1.0, interval, n_mc)(spy.ask(3, TASK.limit), prompts)
    Flat(g)(spy.ask(3, TASK.limit), prompts)
    assert torch.equal(spy.numbers[0], spy.numbers[2])  # its answers are GRPO's


@pytest.mark.parametrize("sample", [SPOChainSample(3, 0.9, 2, 2), SPOTreeSample((3, 2, 2), 2)])
def test_a_prompts_texts_do_not_depend_on_the_others(sample: Any) -> None:
    policy = pretrained(0, TASK)
    prompts = [[3, 7, 1, 8], [0, 0, 9, 9], [5, 5, 5, 5]]
    whole, _ = sample(on_chain(policy, prompts).ask(3, TASK.limit), prompts)
    alone, _ = sample(on_chain(policy, prompts[2:]).ask(1, TASK.limit, first=2), prompts[2:])
    part = whole[whole.facts["prompt"] == 2].trimmed()
    for name in ("prefix", "prefix_mask", "ids", "mask", "reward"):
        assert torch.equal(getattr(part, name), getattr(alone.trimmed(), name))
    assert part.columns.keys() == alone.columns.keys()
    for name in part.columns:
        torch.testing.assert_close(part.columns[name], alone.trimmed().columns[name])


@pytest.mark.parametrize("sample", [SPOChainSample(3, 0.9, 2, 2), SPOTreeSample((3, 2, 2), 2)])
def test_rewards_that_are_missing_or_not_finite(sample: Any) -> None:
    policy = pretrained(0, TASK)
    prompts = [[3, 7, 1, 8]]
    spy = on_chain(policy, prompts)
    spy.score = lambda o, text: math.nan if text[0] == 3 else 1.0
    found, figures = sample(spy.ask(1, TASK.limit), prompts)
    rest = [s for s in of(SPOChain() if "cut" in found.columns else SPOTree()).stages if s.slot == "advantage"]
    assert torch.isfinite(rest[0](found)).all()
    assert found.reward.isnan().any()
    assert math.isfinite(figures["sampled_tokens"])
    spy.score = lambda o, text: math.inf
    with pytest.raises(UserError, match="a reward is inf"):
        sample(spy.ask(1, TASK.limit), prompts)


# Recipes.


def learner(recipe: Recipe | str, seed: int = 0, epochs: int = 1, dtype: torch.dtype = torch.float64) -> Learner:
    policy = pretrained(0, TASK).to(dtype)
    recipe = Recipe.read(recipe) if isinstance(recipe, str) else recipe

    def reward(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([TASK.score(p.ids, c) for p, c in zip(problems, completions, strict=True)], dtype=dtype)

    settings = Settings(epochs, rows_per_forward=512, rows_per_pass=7, max_grad_norm=None)
    optimizer = torch.optim.SGD(policy.parameters(), 1.0)
    return Learner(recipe, policy, optimizer, reward, Run(total=2, room=TASK.limit), seed, settings=settings)


PROBLEMS = [Problem(p) for p in ([3, 7, 1, 8], [0, 0, 9, 9], [5, 5, 5, 5])]


@pytest.mark.parametrize(
    ("norm", "host"), [("none", GroupCentred()), ("std", GroupNormalised(ddof=0, eps=1e-8)), ("none", None)]
)
def test_a_tree_of_one_depth_is_its_host(norm: str, host: Any) -> None:
    base = "dr_grpo" if host is None else "grpo"
    pieces = () if host is None else (host,)
    theirs = learner(Recipe(base, (Flat(6), *pieces)), epochs=2)
    mine = learner(Recipe(base, (SPOTreeSample((6,)), SPOTreeAdvantage(norm))), epochs=2)
    a, b = theirs.step(PROBLEMS), mine.step(PROBLEMS)
    assert a["loss"] == b["loss"] != 0
    for x, y in zip(theirs.policy.parameters(), mine.policy.parameters(), strict=True):
        assert torch.equal(x, y)


def test_a_neutral_tree_recipe_is_token_mean_over_rows_that_teach() -> None:
    found, _ = learner("spotree(branching=(2,))").collect(lambda batch: PROBLEMS)
    assert found is not None
    found = found.with_columns(old_logp=torch.full(found.mask.shape, -1.0).double() * found.mask)
    plan = of(SPOTree(branching=(2,), prob_mask=False, whiten=False)).prepare(found)
    host = Recipe.read("dr_grpo + tokenmean").prepare(found)
    live = (host.advantages != 0).any(-1)
    assert 0 < live.sum() == len(plan) < len(host)
    torch.testing.assert_close(plan.advantages, host[live].trimmed().advantages)


def test_the_papers_recipes() -> None:
    chain, tree = of(SPOChain()), of(SPOTree())
    for recipe in (chain, tree):
        assert (recipe.clip.low, recipe.clip.high, recipe.clip.patience) == (0.2, 0.2, 10.0)
        assert type(recipe.aggregate).__name__ == "TokenMean"
        assert Recipe.read(str(recipe)).stages == recipe.stages
        assert Recipe.read("spochain" if recipe is chain else "spotree").stages == recipe.stages
    assert [type(s).__name__ for s in tree.stages if s.slot == "weigh"] == ["SPODrop", "SPOMask"]
    assert not [s for s in of(SPOTree(whiten=False, prob_mask=False)).stages if s.slot == "normalise"]


def test_chain_and_tree_train() -> None:
    for recipe in ("spochain(interval=2, n_mc=2, group_size=4)", "spotree(branching=(3, 3), segment_tokens=2)"):
        one = learner(recipe, epochs=2)
        before = [p.detach().clone() for p in one.policy.parameters()]
        figures = one.step(PROBLEMS)
        assert figures["trained_tokens"] > 0
        assert figures["sampled_tokens"] > 0
        assert any(not torch.equal(a, b) for a, b in zip(before, one.policy.parameters(), strict=True))


def test_the_old_policy_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one = learner("spochain(interval=2, n_mc=2, group_size=4)")
    seen = list[int]()
    scores = ChainPolicy.scores

    def counted(self: ChainPolicy, rollouts: Rollouts) -> Any:
        seen.append(len(rollouts))
        return scores(self, rollouts)

    monkeypatch.setattr(ChainPolicy, "scores", counted)
    one.step(PROBLEMS)
    assert sum(seen) == 2 * 12  # the answers when they are cut, and when they are trained on
    assert max(seen[:-1]) <= 7  # so many at a time


def test_probabilities_are_those_of_the_temperature_that_is_scored_at() -> None:
    def cuts(recipe: str) -> Rollouts:
        found, _ = learner(recipe).collect(lambda batch: PROBLEMS)
        assert found is not None
        return found

    plain, sharp = (cuts(f"spochain{t}") for t in ("", " + autoregressive(temperature=0.5)"))
    assert torch.equal(plain.ids, sharp.ids)
    assert (sharp.columns["old_logp"] - plain.columns["old_logp"]).abs().max() > 0.1
    assert sharp.columns["cut"].sum() < plain.columns["cut"].sum()


# Mask, whitening, loss.


def plan_of(recipe: Recipe, logp: Tensor, p: Tensor, reward: Tensor, group: Tensor) -> Any:
    mask = torch.ones_like(p, dtype=torch.bool)
    batch = replace(rows(mask, old_logp=p.log()), group=group).with_reward(reward)
    return recipe.batch(recipe.prepare(batch), slice(None))


def tree_parts(whiten: bool) -> Recipe:
    parts = (SPOTreeAdvantage(), SPODrop(), SPOMask(), *([SPOWhiten()] if whiten else []))
    return Recipe("grpo", (*SPOTree().setting, *parts))


def test_whitened_advantages_enter_the_loss_and_masked_tokens_have_no_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    p = torch.rand(4, 5, generator=g, dtype=torch.float64)
    p[0, 1], p[2, 0] = 0.95, 0.9
    reward, group = grid([1.0, 0, 0.25, 0.5])[0], torch.tensor([0, 0, 0, 0])
    recipe = tree_parts(whiten=True)
    plan = plan_of(recipe, p, p, reward, group)
    kept = plan.keep
    raw = (reward - reward.mean())[:, None].expand_as(p)
    white = (raw - raw[kept].mean()) / (raw[kept].var() + 1e-8).sqrt()
    torch.testing.assert_close(plan.advantages[kept], white[kept], atol=1e-12, rtol=0)
    shift = torch.randn(4, 5, generator=g, dtype=torch.float64) / 5
    logp = (p.log() + shift).requires_grad_()
    loss, _ = recipe.loss(plan, {"logp": logp})
    r = shift.exp()
    clipped = -torch.minimum(r * white, r.clamp(0.8, 1.2) * white)
    assert loss.item() == pytest.approx(clipped[kept].mean().item(), abs=1e-12)
    loss.backward()
    assert logp.grad is not None
    assert (logp.grad[~kept] == 0).all()
    assert logp.grad[kept].any()


def test_advantages_that_hardly_differ_are_not_whitened() -> None:
    keep = torch.ones(1, 4, dtype=torch.bool)
    level = grid([1e-4, -1e-4, 5e-4, 0])
    assert SPOWhiten()(level, keep) is level
    assert SPOWhiten()(level, torch.tensor([[True, False, False, False]])) is level
    assert torch.equal(SPOWhiten()(level, torch.zeros_like(keep)), level)
    a = SPOWhiten()(grid([1, -1, 9, 0]), torch.tensor([[True, True, False, False]]))
    assert a.tolist() == [[pytest.approx(1 / math.sqrt(2 + 1e-8)), pytest.approx(-1 / math.sqrt(2 + 1e-8)), 0.0, 0.0]]


def test_everything_masked_is_no_loss_and_no_gradient() -> None:
    p = torch.full((2, 3), 0.95, dtype=torch.float64)
    recipe = tree_parts(whiten=True)
    plan = plan_of(recipe, p, p, grid([1.0, 0.0])[0], torch.zeros(2, dtype=torch.long))
    logp = torch.zeros(0, plan.keep.shape[1], dtype=torch.float64, requires_grad=True)
    loss, _ = recipe.loss(plan, {"logp": logp})
    assert loss.item() == 0
    one = learner("spotree(branching=(3, 3), segment_tokens=2, rho=1e-9)")
    before = [x.detach().clone() for x in one.policy.parameters()]
    assert one.step(PROBLEMS)["trained_tokens"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, one.policy.parameters(), strict=True))


def test_a_batch_of_wild_ratios_is_passed_over() -> None:
    p = torch.full((2, 3), 0.5, dtype=torch.float64)
    recipe = tree_parts(whiten=False)
    plan = plan_of(recipe, p, p, grid([1.0, 0.0])[0], torch.zeros(2, dtype=torch.long))
    logp = (p.log() + 3.0).requires_grad_()
    loss, logs = recipe.loss(plan, {"logp": logp})
    loss.backward()
    assert logp.grad is not None
    assert (loss.item(), logs["passed_over"].item(), logp.grad.abs().sum().item()) == (0, 1, 0)


@given(MASKS, st.floats(0.05, 1.0))
def test_the_mask_keeps_real_unsure_tokens_alone(mask: Tensor, rho: float) -> None:
    p = torch.linspace(0.01, 1.0, 8, dtype=torch.float64).expand(len(mask), 8)
    batch = rows(mask, old_logp=p.log())
    token, row = (SPOMask(rho, per)(batch, p, Run()).keep for per in ("token", "row"))
    assert token is not None
    assert row is not None
    assert not (token & ~mask).any()
    assert not (token & (p > rho * (1 + 1e-9))).any()
    assert torch.equal(row, mask & token.any(-1, keepdim=True))


# What is refused.


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        *[(SPOChain, "rho", x) for x in (0.0, 1.5, math.nan)],
        *[(SPOChain, name, 0) for name in ("interval", "n_mc", "group_size")],
        (SPOChain, "unfinished_reward", math.inf),
        (SPOChainSample, "n_mc", 0),
        (SPOTree, "segment_tokens", 0),
        (SPOTree, "norm", "mean"),
        (SPOTreeAdvantage, "norm", "mean"),
        *[(SPOTree, "branching", b) for b in ((), (1,), (6, 1, 6), (6, 0), (2.5, 2))],
        (SPOTreeSample, "branching", (1, 6)),
        (SPOMask, "rho", 0.0),
        (SPOMask, "per", "edge"),
    ],
)
def test_a_bad_value_is_named(cls: Any, name: str, value: Any) -> None:
    try:
        cls(**{name: value})
    except UserError as error:
        assert f"{cls.__name__}.{name} must be" in str(error)  # noqa: PT017 - the other way out is a type error
    except Exception as error:
        assert "beartype" in type(error).__module__ or "jaxtyping" in type(error).__module__  # noqa: PT017
    else:
        pytest.fail(f"{cls.__name__}({name}={value}) was taken")


def test_the_last_branching_may_be_1_but_not_beside_others_left_out() -> None:
    assert SPOTree(branching=(4, 1)).branching == (4, 1)
    with pytest.raises(UserError, match=r"SPOTree\.branching must be >= 2 at every depth for norm 'loo'"):
        SPOTree(branching=(4, 1), norm="loo")
    with pytest.raises(UserError, match="SPOTreeAdvantage with norm 'loo' compares a child with others"):
        Recipe("grpo", (SPOTreeSample((4, 1)), SPOTreeAdvantage("loo")))


def test_recipes_that_make_no_sense_are_refused_with_the_reason() -> None:
    with pytest.raises(
        UserError, match="SPOChainAdvantage needs 'cut', which neither Autoregressive nor Flat can tell"
    ):
        Recipe.read("grpo + spo.chainadvantage")
    with pytest.raises(UserError, match="SPOTreeSample can tell"):
        Recipe("grpo", (SPOTreeSample(), SPOChainAdvantage()))
    for recipe in ("spochain + overlong", "spotree + overlong"):
        with pytest.raises(UserError, match="Overlong would change those of its rows alone"):
            Recipe.read(recipe)

    @dataclass(frozen=True)
    class Whole(Autoregressive):
        provides = frozenset({"entropy"})

    for piece in (SPOChain(), SPOTree()):
        with pytest.raises(UserError, match="needs 'segments', which neither Whole"):
            Recipe("grpo", (Whole(), piece))
