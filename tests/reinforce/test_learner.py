"""The learner: what it draws and learns does not depend on how a batch is cut up; what it counts; what it asks again."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from locum.errors import UserError
from locum.reinforce import D3S, KL, Autoregressive, Flat, Informative, Recipe, Run, SPOChain, SPOTree
from locum.reinforce.learner import Alone, Learner, Problem, Settings
from locum.tasks.digit_chain import DigitChain, pretrained
from locum.tokens.rollouts import Rollouts
from locum.tokens.sampling import Sampling

TASK = replace(DigitChain.hetero(4), warm_steps=40)
ONCE = Settings(max_grad_norm=None)


def prompts(n: int = 6, seed: int = 0) -> list[Problem]:
    return [Problem(p) for p in TASK.prompts(n, torch.Generator().manual_seed(seed)).tolist()]


def reward(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([TASK.score(p.ids, c) for p, c in zip(problems, completions, strict=True)])


def learner(recipe: str | Recipe = "grpo", settings: Settings = ONCE, lr: float = 0.05, **more: Any) -> Learner:
    policy = pretrained(0, TASK)
    recipe = Recipe.read(recipe) if isinstance(recipe, str) else recipe
    optimizer = torch.optim.SGD(policy.parameters(), lr)
    given = {"reward": reward, "run": Run(0, 4, TASK.limit)} | more
    return Learner(recipe, policy, optimizer, given.pop("reward"), settings=settings, **given)


def weights(teacher: Learner) -> Tensor:
    return torch.cat([x.detach().flatten() for x in teacher.policy.parameters()])


def collected(teacher: Learner, problems: Any = None) -> Rollouts:
    rows, _ = teacher.collect(problems or (lambda batch: prompts()))
    assert rows is not None
    return rows


def texts(rows: Rollouts) -> list[list[int]]:
    return [ids[:n] for ids, n in zip(rows.ids.tolist(), rows.lengths.tolist(), strict=True)]


def steps(teacher: Learner, n: int = 3) -> tuple[Tensor, list[dict[str, float]]]:
    figures = [teacher.step(prompts(seed=i)) for i in range(n)]
    return weights(teacher), [{k: v for k, v in f.items() if "second" not in k} for f in figures]


# Draws.


def test_what_is_drawn_depends_on_seed_and_step_alone() -> None:
    first = texts(collected(learner()))
    assert texts(collected(learner(settings=Settings(rows_per_forward=3, rows_per_pass=5)))) == first
    assert texts(collected(learner(seed=1))) != first
    assert texts(collected(learner(run=Run(1, 4, TASK.limit)))) != first


def test_a_prompts_draws_do_not_depend_on_those_behind_it() -> None:
    many = texts(collected(learner()))
    assert texts(collected(learner(), lambda batch: prompts()[:2])) == many[: 2 * 8]


@pytest.mark.parametrize("recipe", ["dapo + hapo + d3s", "gspo + thr + twgrpo"])
def test_the_result_does_not_depend_on_batch_sizes(recipe: str) -> None:
    base = Settings(epochs=2, minibatches=2, rows_per_forward=1000, rows_per_pass=1000, max_grad_norm=1.0)
    whole, figures = steps(learner(recipe, base), 2)
    found, others = steps(learner(recipe, replace(base, rows_per_forward=7, rows_per_pass=7)), 2)
    assert torch.allclose(found, whole, rtol=0, atol=2e-6)
    for one, other in zip(figures, others, strict=True):
        assert one.keys() == other.keys()
        assert other["trained_tokens"] == one["trained_tokens"]
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3, abs=1e-5)


def test_the_same_again() -> None:
    one, figures = steps(learner("dapo + hapo + d3s"))
    other, again = steps(learner("dapo + hapo + d3s"))
    assert torch.equal(one, other)
    assert figures == again


# Groups that teach something.


def test_a_filter_asks_for_more_prompts() -> None:
    asked = []

    def more(batch: int) -> list[Problem]:
        asked.append(batch)
        return prompts(4, seed=batch)

    teacher = learner(Recipe("grpo", (Flat(3), Informative(max_batches=5))))
    rows, figures = teacher.collect(more)
    assert rows is not None
    assert asked == list(range(len(asked)))
    assert 1 < len(asked) <= 5
    assert figures["prompts"] == 4 * len(asked)
    assert figures["kept_prompts"] == len(rows.facts["prompt"].unique()) <= 4
    assert figures["sampled_tokens"] >= rows.mask.sum()
    for group in rows.group.unique():
        value = rows.reward[rows.group == group]
        assert len(value) == 3
        assert len(value.unique()) > 1


def test_no_more_than_it_may() -> None:
    teacher = learner(Recipe("grpo", (Flat(2), Informative(max_batches=3))), reward=lambda p, c: torch.zeros(len(c)))
    before, asked = weights(teacher), []

    def more(batch: int) -> list[Problem]:
        asked.append(batch)
        return prompts(2)

    figures = teacher.step(more)
    assert asked == [0, 1, 2]
    assert figures["prompts"] == 6
    assert figures["kept_prompts"] == 0
    assert torch.equal(weights(teacher), before)
    assert teacher.run.step == 1


def test_batches_of_one_step_are_drawn_apart() -> None:
    """The same prompts again: other texts, in groups of their own."""
    always = {"reward": lambda p, c: torch.arange(len(c)).float() % 2}
    one = Recipe("grpo", (Flat(2), Informative(max_batches=1)))
    first = collected(learner(one, **always), lambda batch: prompts(2))

    def scarce(p: Sequence[Problem], c: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([float(i == 0) for i in range(len(c))])  # only the first group of a batch differs

    both = collected(
        learner(Recipe("grpo", (Flat(2), Informative(max_batches=2))), reward=scarce), lambda batch: prompts(2)
    )
    assert len(both) == 4
    assert len(both.group.unique()) == 2
    assert texts(both)[:2] == texts(first)[:2]
    assert texts(both)[2:] != texts(both)[:2]


def test_enough_groups_are_the_first_ones() -> None:
    """Three groups of four teach something in each batch: of the six that come, the first four stay."""

    def some(p: Sequence[Problem], c: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([float(i % 2 and i > 1) for i in range(len(c))])

    rows = collected(
        learner(Recipe("grpo", (Flat(2), Informative())), reward=some), lambda batch: prompts(4, seed=batch)
    )
    assert len(rows.group.unique()) == 4
    assert rows.facts["prompt"].unique().tolist()[:3] == [1, 2, 3]


# Updates.


@pytest.mark.parametrize("recipe", ["grpo", "dr_grpo", "dapo"])
def test_one_update_is_the_gradient_of_the_batch(recipe: str) -> None:
    teacher = learner(recipe, lr=1.0)
    before = weights(teacher)
    rows = collected(learner(recipe))
    plan = teacher.recipe.prepare(rows.with_columns(), teacher.run)
    columns = teacher.recipe.likelihood.columns(teacher.policy, plan.rollouts, frozenset({"logp"}))
    loss, _ = teacher.recipe.loss(plan, columns)
    grads = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(teacher.policy.parameters()))])
    teacher.learn(rows)
    assert torch.allclose(weights(teacher), before - grads, rtol=0, atol=1e-6)


def test_an_epoch_is_as_many_updates_as_minibatches() -> None:
    for epochs, minibatches in ((1, 1), (2, 1), (1, 3), (2, 3)):
        teacher = learner(settings=Settings(epochs=epochs, minibatches=minibatches))
        done = 0
        step = teacher.optimizer.step

        def counted(step: Any = step) -> None:
            nonlocal done
            done += 1
            step()

        teacher.optimizer.step = counted
        teacher.step(prompts())
        assert done == epochs * minibatches


def test_minibatches_share_out_the_rows() -> None:
    """With a rate of 0 the policy stays: gradients of the minibatches are those of their rows, every row in one of them."""
    teacher = learner("dr_grpo", Settings(minibatches=3), lr=0.0)
    rows = collected(teacher)
    seen: list[int] = []
    update = teacher._update
    teacher._update = lambda plan: (seen.extend(plan.rollouts.facts["row"].tolist()), update(plan))[1]  # type: ignore[method-assign]
    teacher.learn(rows.with_facts(row=torch.arange(len(rows))))
    assert sorted(seen) == list(range(len(rows)))
    assert seen != sorted(seen)  # mixed


def test_epochs_measure_ratios_from_the_policy_before_the_first() -> None:
    teacher = learner(settings=Settings(epochs=3, max_grad_norm=None), lr=0.5)
    ratios: list[float] = []
    update = teacher._update

    def kept(plan: Any) -> dict[str, float]:
        found = update(plan)
        ratios.append(found["kl"] / found["tokens"])
        return found

    teacher._update = kept  # type: ignore[method-assign]
    teacher.step(prompts())
    assert ratios[0] == pytest.approx(0, abs=1e-6)
    assert 0 < ratios[1] < ratios[2]


# Counts.


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("minibatches", [1, 4])
def test_trained_tokens_are_those_of_every_pass(epochs: int, minibatches: int) -> None:
    settings = Settings(epochs=epochs, minibatches=minibatches)
    for recipe in ("grpo", "grpo + d3s(rows=(0.5, 0.5), tokens=(0.5, 0.5))"):
        teacher = learner(recipe, settings)
        figures = teacher.step(prompts())
        kept = round(figures["kept_tokens"] * figures["sampled_tokens"])
        assert figures["trained_tokens"] == epochs * kept
        assert (figures["kept_tokens"] == 1) == (recipe == "grpo")


def test_sampled_tokens_of_samplers_that_go_on() -> None:
    """Those of continuations too."""
    flat = learner("grpo").step(prompts(2))
    for piece in (SPOChain(n_mc=3, interval=2), SPOTree((2, 2), segment_tokens=2)):
        teacher = learner(Recipe("grpo", (piece,)))
        told: list[int] = []
        generate = teacher.policy.generate

        def counted(*args: Any, told: list[int] = told, generate: Any = generate, **more: Any) -> Any:
            made = generate(*args, **more)
            told.append(int(made.mask.sum()))
            return made

        teacher.policy.generate = counted
        figures = teacher.step(prompts(2))
        assert figures["sampled_tokens"] == sum(told)
        assert len(told) > 1
    assert flat["sampled_tokens"] > 0


def test_figures_of_a_step() -> None:
    teacher = learner("dapo + d3s")
    figures = teacher.step(prompts())
    assert {
        "reward",
        "length",
        "level_groups",
        "ended",
        "prompts",
        "kept_prompts",
        "sampled_tokens",
        "loss",
        "grad_norm",
    } <= (figures.keys())
    assert {"seconds/rollout", "seconds/old_policy", "seconds/update", "tokens_per_second/rollout"} <= figures.keys()
    assert 0 <= figures["reward"] <= 1
    assert 4 <= figures["length"] <= TASK.limit
    assert figures["clipped_low"] == figures["clipped_high"] == 0  # the first update is at ratio 1
    assert teacher.run.step == 1


def test_rows_without_a_reward_are_left_out_of_the_mean() -> None:
    def half(p: Sequence[Problem], c: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([1.0 if i % 2 else torch.nan for i in range(len(c))])

    assert learner(reward=half).step(prompts())["reward"] == 1.0


# Likelihoods that are estimates.


@dataclass(frozen=True)
class Noisy(Autoregressive):
    """Log-probabilities with noise that depends on a row's number and the epoch."""

    redraws: ClassVar[bool] = True
    asked: list[tuple[str, int, bool]] = field(default_factory=list, compare=False)

    def columns(self, policy: Any, rollouts: Rollouts, want: frozenset[str]) -> dict[str, Tensor]:
        epoch, number = rollouts.facts["epoch"], rollouts.facts["number"]
        self.asked.extend((str(n), int(e), torch.is_grad_enabled()) for n, e in zip(number, epoch, strict=True))
        noise = ((number % 97 + 31 * epoch) % 7).float() / 100
        found = super().columns(policy, rollouts, want)
        return found | {"logp": (found["logp"] + noise[:, None]) * rollouts.mask}


def test_estimates_are_drawn_anew_for_every_epoch_and_are_the_old_policys_too() -> None:
    stage = Noisy()
    teacher = learner(Recipe("grpo", (stage,)), Settings(epochs=3, max_grad_norm=None), lr=0.0)
    figures = teacher.step(prompts())
    before, now = ([a for a in stage.asked if a[2] == grad] for grad in (False, True))
    assert {e for _, e, _ in before} == {e for _, e, _ in now} == {0, 1, 2}
    assert sorted(a[:2] for a in before) == sorted(a[:2] for a in now)  # the same rows with the same draws
    assert figures["kl"] == pytest.approx(0, abs=1e-9)  # so at a rate of 0 the ratio is 1 in every epoch
    assert len({n for n, _, _ in now}) == 48  # each row has a number of its own


def test_other_likelihoods_are_asked_once() -> None:
    stage = Noisy()
    object.__setattr__(stage, "redraws", False)
    learner(Recipe("grpo", (stage,)), Settings(epochs=3)).step(prompts())
    assert {e for _, e, grad in stage.asked if not grad} == {0}


def test_a_single_update_asks_for_no_old_policy() -> None:
    """At ratio 1 there is nothing to compare with."""
    stage = replace(Noisy(), temperature=1.0)
    object.__setattr__(stage, "redraws", False)
    learner(Recipe("grpo", (stage,))).step(prompts())
    assert all(grad for _, _, grad in stage.asked)


# Memory.


@dataclass(frozen=True)
class Counting(D3S):
    """Counts the steps, and says so."""

    def remember(self, rollouts: Rollouts, memory: dict[str, Any]) -> dict[str, Any]:
        return {"steps": memory.get("steps", 0) + 1}

    def figures(self, rollouts: Rollouts, run: Run) -> dict[str, float]:
        return {"counted": float(run.memory.get(self.slot, {}).get("steps", 0))}


def test_what_stages_keep_goes_to_the_next_step() -> None:
    teacher = learner(Recipe("grpo", (Counting(),)), Settings(epochs=2))
    assert [teacher.step(prompts(seed=i))["counted"] for i in range(3)] == [0, 1, 2]
    assert teacher.run.memory == {"weigh": {"steps": 3}}


def test_progress_is_the_runs() -> None:
    teacher = learner("grpo + d3s(rows=(2, 8), tokens=(1.0, 1.0))")
    found = [teacher.step(prompts(seed=i)).get("d3s/selected_rows") for i in range(4)]
    assert found == [12, 21, 30, 39]  # (2 + 6 p) x 6 groups at p = 0, 1/4, 1/2, 3/4


# What goes wrong.


def test_a_reference_is_asked_for_before_any_work() -> None:
    with pytest.raises(UserError, match="needs a reference policy"):
        learner(Recipe("grpo", (KL(),)))


def test_greedy_rollouts_are_refused() -> None:
    with pytest.raises(UserError, match="the temperature is 0"):
        learner(sampling=Sampling(temperature=0.0))


def test_an_infinite_reward_changes_nothing() -> None:
    teacher = learner(reward=lambda p, c: torch.tensor([torch.inf] + [0.0] * (len(c) - 1)))
    before = weights(teacher)
    with pytest.raises(UserError, match="rewards must be finite"):
        teacher.step(prompts())
    assert torch.equal(weights(teacher), before)
    assert not teacher.changed


def test_logits_that_are_not_finite_are_named_and_nothing_is_changed() -> None:
    teacher = learner()
    rows = collected(teacher)
    with torch.no_grad():
        teacher.policy.lm_head.weight[3] = torch.nan
    before = weights(teacher)
    with pytest.raises(UserError, match="the policy's logits are not finite"):
        teacher.learn(rows)
    assert torch.equal(weights(teacher).nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("name", ["epochs", "minibatches", "rows_per_forward", "rows_per_pass"])
def test_bad_settings_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"Settings\.{name} must be >= 1, got 0"):
        Settings(**{name: 0})
    with pytest.raises(UserError, match=r"Settings\.max_grad_norm must be > 0 or None"):
        Settings(max_grad_norm=0.0)


def test_more_minibatches_than_rows() -> None:
    teacher = learner("grpo + d3s(rows=(2, 2))", Settings(minibatches=50))
    before = weights(teacher)
    teacher.step(prompts())
    assert not torch.equal(weights(teacher), before)


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize("patience", [2.0, 3.0])
def test_a_batch_of_wild_ratios_changes_nothing_however_it_is_split(rows, patience):
    """Old log-probabilities are a nat too low, so every ratio is e: beyond a patience of 2, within one of 3."""
    task = DigitChain(length=3, warm_steps=20)
    policy = pretrained(0, task)
    before = [p.detach().clone() for p in policy.parameters()]

    def reward(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Tensor:
        return torch.arange(len(problems)) % 2 * 1.0

    recipe = Recipe.read(f"grpo + clip(patience={patience}, high=inf)")
    settings = Settings(rows_per_forward=rows, max_grad_norm=None)
    optimizer = torch.optim.SGD(policy.parameters(), 1.0)
    learner = Learner(recipe, policy, optimizer, reward, Run(room=6), settings=settings)
    prompts = task.prompts(4, torch.Generator().manual_seed(0)).tolist()
    rollouts, _ = learner.collect(lambda batch: [Problem(p) for p in prompts])
    assert rollouts is not None
    with torch.no_grad():
        logp = recipe.likelihood.columns(policy, rollouts, frozenset({"logp"}))["logp"]
    found = learner._update(recipe.prepare(rollouts.with_columns(old_logp=logp - rollouts.mask.float())))
    moved = any(not torch.equal(p, q) for p, q in zip(policy.parameters(), before, strict=True))
    assert moved == (patience > 2.8)
    assert bool(found["passed_over"]) != moved


def test_where_one_process_fails_the_others_stop_too():
    class Two(Alone):
        world = 2

        def total(self, x: Tensor) -> Tensor:
            return x + 1  # the other one has failed

    task = DigitChain(length=3, warm_steps=1)
    policy = pretrained(0, task)
    learner = Learner(
        Recipe.read("grpo"),
        policy,
        torch.optim.SGD(policy.parameters(), 1.0),
        lambda problems, completions: torch.zeros(len(problems)),
        Run(room=6),
        processes=Two(),
    )
    with pytest.raises(UserError, match="1 of 2 processes stopped in step 0"):
        learner.step([Problem(p) for p in task.prompts(4, torch.Generator().manual_seed(0)).tolist()])
