"""Any two papers' pieces either go together, with what the pipeline promises kept, or are refused with the reason.

The pieces are read from the catalogue: a new paper's are tested here as soon as its file is there.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from locum.errors import UserError
from locum.method import names
from locum.models.continuous import ContinuousPolicy
from locum.reinforce import (
    D3S,
    HAPO,
    THR,
    TWGRPO,
    Autoregressive,
    Flat,
    GroupCentred,
    GroupNormalised,
    HAPOAdvantage,
    HAPOClip,
    HAPORedistribute,
    HAPOTemperature,
    LeaveOneOut,
    Recipe,
    Run,
    SPOChain,
    SPOChainSample,
    SPOMask,
    SPOTree,
    SPOTreeAdvantage,
    SPOTreeSample,
)
from locum.reinforce.base import Piece, Weigh
from locum.reinforce.gdpo import SequenceKL, _Infilling
from locum.reinforce.learner import Learner, Problem, Settings
from locum.reinforce.old_policy import old_policy
from locum.reinforce.plan import Plan
from locum.tasks.digit_chain import DigitChain, pretrained
from locum.tasks.mnns import MNNS, small_model
from locum.tasks.permutations import Permutations, untrained
from locum.tokens.rollouts import Generated, Rollouts, uniforms
from locum.tokens.sampling import Sampling
from locum.tokens.tiles import Scores

pytestmark = pytest.mark.filterwarnings("ignore:THR.beta", "ignore:a group has one row", "ignore:D3S is to choose")

BASELINES = {"advantages", "collect", "likelihood", "losses"}  # files whose stages belong to no paper
CATALOGUE = names("reinforce", "Piece")
NAMES = sorted(name for name in CATALOGUE if CATALOGUE.module(name).rpartition(".")[2] not in BASELINES)
RUN = Run(2, 4, room=6)
V, D = 7, 5
SMALL: dict[str, Piece] = {  # that do something to a few short rows
    "d3s": D3S(rows=(0.5, 0.75), tokens=(0.3, 0.8)),
    "spochain": SPOChain(group_size=4, n_mc=2, interval=2),
    "spochainsample": SPOChainSample(group_size=4, n_mc=2, interval=2),
    "spotree": SPOTree((3, 3), segment_tokens=2),  # of two siblings the advantages are of one size: D3S would have ties
    "spotreesample": SPOTreeSample((3, 3), segment_tokens=2),
    "thr": THR(beta=0.3),
}
HOSTS = ("grpo", "dapo")


def piece(name: str) -> Piece:
    return SMALL.get(name) or CATALOGUE[name]()


class Linear(nn.Module):
    """Logits of an embedding of the last token and of the place."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        for name, size in (("token", V), ("place", 32), ("head", V)):
            self.register_parameter(name, nn.Parameter(torch.randn(size, D, generator=g, dtype=torch.float64)))

    def scores(self, rollouts: Rollouts) -> Scores:
        ids, real, where = rollouts.texts()
        hidden = self.token[ids] + self.place[(real.long().cumsum(-1) - 1).clamp(min=0)]
        return Scores(hidden[:, :-1][where], self.head)


@dataclass(frozen=True, eq=False)
class World:
    """A policy as it was and as it is, its rollouts, and a reference."""

    old: Any
    now: Any
    rollouts: Rollouts

    @contextmanager
    def reference(self) -> Iterator[Any]:
        yield self.now

    @property
    def exact(self) -> bool:
        return next(iter(parameters(self.now))).dtype == torch.float64


def parameters(policy: Any) -> list[Tensor]:
    return list((policy if isinstance(policy, nn.Module) else policy.model).parameters())


def shaken(policy: Any) -> Any:
    """Moves a policy a little."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in parameters(policy):
            x += 0.05 * torch.randn(x.shape, generator=g, dtype=x.dtype)
    return policy


def policy_for(likelihood: Any, sample: Any) -> Any:
    if sample is not None:
        return pretrained(0, TASK)
    if isinstance(likelihood, Autoregressive):
        return Linear()
    if isinstance(likelihood, _Infilling):
        return untrained(0, Permutations())
    return ContinuousPolicy(small_model(MNNS(length=3), 8, 1, 2, 0).double(), 3)


def world(recipe: Recipe) -> World:
    sample = None if isinstance(recipe.sample, Flat) else recipe.sample
    return _world(recipe.likelihood, sample)


@functools.cache
def _world(likelihood: Any, sample: Any) -> World:
    """Rows in unequal groups that are not adjacent, with rewards that all differ."""
    g, old = torch.Generator().manual_seed(2), policy_for(likelihood, sample)
    if sample is not None:
        rows, _ = chain(sample).collect(lambda batch: problems())
        assert rows is not None
        cuts = {"cut_value": torch.rand(rows.mask.shape, generator=g)} if "cut_value" in rows.columns else {}
        rows = rows.with_columns(**cuts)
    elif isinstance(likelihood, Autoregressive):
        lengths = torch.randint(1, 7, (12,), generator=g)
        mask = torch.arange(7) < lengths[:, None]  # one column is nothing but padding
        made = Generated(torch.randint(V, mask.shape, generator=g) * mask, mask, lengths < 6)
        rows = Rollouts.of([[1, 2, 3][: 1 + i % 3] for i in range(12)], made, torch.arange(12))
    else:
        infills = isinstance(likelihood, _Infilling)
        width = 6 if infills else 3
        prefixes = [[6]] if infills else MNNS(length=3).prompts(torch.tensor([[2, 1, 4]])).tolist()
        draws = uniforms(0, torch.arange(12), width)
        made = likelihood.generate(old, prefixes, 12, [width], draws, None, Sampling(temperature=1.0))
        rows = Rollouts.of(prefixes * 12, made, torch.arange(12))
    if sample is None:
        rows = replace(rows, group=torch.tensor([0, 5, 0, 9, 5, 5, 0, 9, 5, 9, 5, 0]))
    numbers = torch.arange(len(rows))
    rows = rows.with_facts(number=numbers * 1_000_003, epoch=torch.zeros_like(numbers), row=numbers)
    kind = parameters(old)[0].dtype
    return World(
        old, shaken(policy_for(likelihood, sample)), rows.with_reward(torch.rand(len(rows), generator=g).to(kind))
    )


TASK = replace(DigitChain.hetero(4), warm_steps=30)


def problems() -> list[Problem]:
    return [Problem(p) for p in TASK.prompts(3, torch.Generator().manual_seed(3)).tolist()]


def chain(*pieces: Piece, host: str = "grpo") -> Learner:
    policy = pretrained(0, TASK)

    def reward(asked: Any, completions: Any) -> Tensor:
        return torch.tensor([TASK.score(p.ids, c) for p, c in zip(asked, completions, strict=True)])

    settings = Settings(epochs=2, rows_per_forward=64, rows_per_pass=64)
    optimizer = torch.optim.SGD(policy.parameters(), 0.1)
    return Learner(Recipe(host, pieces), policy, optimizer, reward, Run(0, 4, TASK.limit), settings=settings)


def prepared(recipe: Recipe, rows: Rollouts | None = None) -> Plan:
    """A plan as a learner makes it; of the world's own rows with a few of them to a forward."""
    at = world(recipe)
    want = (recipe.needs | {"old_logp"}) - {"scores"} - recipe.sample.makes
    seen = old_policy(
        recipe, at.old, at.rollouts if rows is None else rows, want, 8 if rows is None else 99, at.reference
    )
    return recipe.prepare(seen, RUN)


def loss_of(recipe: Recipe, plan: Plan, total: Tensor | None = None) -> tuple[float, Tensor]:
    """The loss, and its gradient with respect to all parameters of the policy as it is now."""
    policy, wrt = world(recipe).now, parameters(world(recipe).now)
    if not len(plan):
        loss, _ = recipe.loss(plan, {"logp": plan.advantages})
        return loss.item(), torch.zeros(1)
    columns = recipe.likelihood.columns(policy, plan.rollouts, recipe.live | {"logp"})
    loss, _ = recipe.loss(plan, columns, total)
    grads = torch.autograd.grad(loss, wrt, allow_unused=True)
    flat = [torch.zeros_like(x) if g is None else g for x, g in zip(wrt, grads, strict=True)]
    return loss.item(), torch.cat([g.flatten() for g in flat])


def whole(recipe: Recipe, rows: Rollouts | None = None) -> tuple[float, Tensor]:
    return loss_of(recipe, recipe.batch(prepared(recipe, rows), slice(None)))


def padded(rows: Rollouts) -> Rollouts:
    """With columns that are padding, on both sides."""

    def right(x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, 2))

    def left(x: Tensor) -> Tensor:
        return nn.functional.pad(x, (3, 0))

    columns = {k: right(x) for k, x in rows.columns.items()}
    ids, mask, prefix, real = right(rows.ids), right(rows.mask), left(rows.prefix), left(rows.prefix_mask)
    return replace(rows, ids=ids, mask=mask, prefix=prefix, prefix_mask=real, columns=columns)


def near(a: tuple[float, Tensor], b: tuple[float, Tensor], exact: bool) -> None:
    tolerance = 1e-9 if exact else 1e-5
    assert a[0] == pytest.approx(b[0], rel=tolerance, abs=tolerance)
    assert (a[1] - b[1]).abs().max() <= 10 * tolerance * b[1].abs().max().clamp(min=1)


def keeps_its_promises(recipe: Recipe) -> None:
    rows, exact = world(recipe).rollouts, world(recipe).exact
    plan = recipe.batch(prepared(recipe), slice(None))
    found = loss_of(recipe, plan)
    assert abs(found[0]) < torch.inf
    assert torch.isfinite(found[1]).all()
    assert (plan.keep & ~plan.rollouts.mask).sum() == 0
    # Neither the order of rows nor padding matters. Chains of thoughts are all of one length: they are never padded.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(4))
    mixed = rows[order] if "thoughts" in rows.facts else padded(rows[order])
    near(whole(recipe, mixed), found, exact)
    # Weights are in no denominator.
    counted = recipe.aggregate.counted(plan.keep, plan.rollouts.mask, torch.ones_like(plan.weight))
    assert plan.count.sum().item() == pytest.approx(recipe.aggregate.count(counted, RUN).sum().item(), rel=1e-6)
    # Parts of a batch add up to it.
    if len(plan):
        total = plan.count.sum()
        parts = [loss_of(recipe, plan[at].trimmed(), total) for at in torch.arange(len(plan)).split(8)]
        near((sum(x for x, _ in parts), torch.stack([g for _, g in parts]).sum(0)), found, exact)
    # Where nothing is to be learnt nothing is.
    if recipe._one("penalty") is None:
        level = rows.with_reward(torch.full_like(rows.reward, 0.75))
        if "cut_value" in rows.columns:
            level = level.with_columns(cut_value=torch.full_like(rows.columns["cut_value"], 0.75))
        loss, grad = whole(recipe, level)
        assert loss == 0
        assert not grad.any()


def test_the_catalogue_has_the_papers() -> None:
    assert {"d3s", "hapo", "hapoclip", "thr", "twgrpo", "spochain", "spotree", "gdpo", "cot2"} <= set(NAMES)


INCOMPLETE = {  # pieces that need another one
    "persequence": "PerSequence lets the last token stand for a completion",
    "spochainadvantage": "SPOChainAdvantage needs 'cut'",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("host", HOSTS)
def test_alone(host: str, name: str) -> None:
    if name in INCOMPLETE:
        with pytest.raises(UserError, match=INCOMPLETE[name]):
            Recipe(host, (piece(name),))
    else:
        keeps_its_promises(Recipe(host, (piece(name),)))


@pytest.mark.parametrize("name", NAMES)
def test_every_pair_goes_together_or_says_why_not(name: str) -> None:
    """Hosts in turn, so that each is seen with half of the pairs; what goes with one goes with the other."""
    accepted = 0
    for i, other in enumerate(b for a, b in combinations(NAMES, 2) if a == name):
        pieces, reasons = (piece(name), piece(other)), []
        for host in HOSTS:
            try:
                Recipe(host, pieces)
            except UserError as error:
                reasons.append(str(error))
        if reasons:
            assert len(reasons) == len(HOSTS)
            involved = {name, other} | {type(s).__name__ for p in pieces for s in p.stages()}
            assert any(one in reasons[0] for one in involved), reasons[0]
            assert len(reasons[0].split()) > 6, reasons[0]
            continue
        recipe = Recipe(HOSTS[i % 2], pieces)
        accepted += 1
        try:
            keeps_its_promises(recipe)
        except Exception as error:
            error.add_note(str(recipe))
            raise


SAMPLERS = [n for n in NAMES if any(s.slot == "sample" for s in piece(n).stages())]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_train_with_the_others(sampler: str) -> None:
    """A step of a learner on the digit chain."""
    trained = 0
    for other in NAMES:
        try:
            learner = chain(piece(sampler), piece(other), host=HOSTS[len(other) % 2])
        except UserError:
            continue
        before = [x.clone() for x in learner.policy.parameters()]
        try:
            figures = learner.step(problems())
        except Exception as error:
            error.add_note(str(learner.recipe))
            raise
        assert all(abs(x) < torch.inf for x in figures.values())
        changed = any(not torch.equal(x, y) for x, y in zip(before, learner.policy.parameters(), strict=True))
        trained += changed
        assert changed or not figures.get("grad_norm"), str(learner.recipe)
    assert trained


WEIGHERS = [n for n in NAMES if n != "d3s" and all(isinstance(s, Weigh) for s in piece(n).stages())]


@pytest.mark.parametrize("name", WEIGHERS)
@pytest.mark.parametrize("scope", ["batch", "group"])
def test_what_is_dropped_by_one_changes_nothing_for_another(name: str, scope: str) -> None:
    """Rows that D3S leaves out were seen by the others: weights and advantages of rows that are kept are the same."""
    d3s = replace(SMALL["d3s"], scope=scope)
    try:
        alone, both = (Recipe("dapo", pieces) for pieces in ((piece(name),), (piece(name), d3s)))
    except UserError:
        pytest.skip("needs another likelihood, which knows no entropies")
    one, other, only = prepared(alone), prepared(both), prepared(Recipe("dapo", (d3s,)))
    kept = set(other.rollouts.facts["row"].tolist())
    assert 0 < len(kept) < len(world(alone).rollouts)
    assert kept <= set(one.rollouts.facts["row"].tolist()) & set(only.rollouts.facts["row"].tolist())
    at, by = one.rollouts.facts["row"].tolist(), only.rollouts.facts["row"].tolist()
    for i, row in enumerate(other.rollouts.facts["row"].tolist()):
        n = int(other.rollouts.lengths[i])
        first, second = at.index(row), by.index(row)
        assert torch.equal(other.weight[i, :n], one.weight[first, :n])
        assert torch.equal(other.advantages[i, :n], one.advantages[first, :n])
        assert torch.equal(other.keep[i, :n], one.keep[first, :n] & only.keep[second, :n])  # masks intersect


NEUTRAL: dict[str, list[tuple[Piece, tuple[Piece, ...]]]] = {  # settings that do nothing, and what the host is then
    "d3s": [(D3S((1.0, 1.0), (1.0, 1.0), scope), ()) for scope in ("batch", "group", "group+batch")],
    "hapo": [(HAPO(tau=0.0, adv_beta=0.0, alpha=0.0), (HAPOAdvantage(),))],
    "hapoclip": [(HAPOClip(alpha=0.0), ()), (HAPOClip(alpha=0.0, stats="minibatch"), ())],
    "haporedistribute": [(HAPORedistribute(adv_beta=0.0), ())],
    "hapotemperature": [(HAPOTemperature(tau=0.0), ())],
    "spomask": [(SPOMask(rho=1.0), ()), (SPOMask(rho=1.0, per="row"), ())],
    "spotreeadvantage": [
        (SPOTreeAdvantage("none"), (GroupCentred(),)),
        (SPOTreeAdvantage("std"), (GroupNormalised(ddof=0, eps=1e-8),)),
        (SPOTreeAdvantage("loo"), (LeaveOneOut(),)),
    ],
    "spodrop": [(CATALOGUE["spodrop"](), ())],  # where no advantage is 0
    "thr": [(THR(p=0.0, mask=False), ()), (THR(p=0.0, beta=-torch.inf), ())],
    "twgrpo": [(TWGRPO(alpha=1.0), ())],
}
BARE = {  # pieces that do nothing in no setting: why
    "hapoadvantage": "counts tokens in the place of rows",
    "spochain": "brings rows of its own",
    "spochainsample": "brings rows of its own",
    "spotree": "brings rows of its own",
    "spotreesample": "brings rows of its own",
    "spochainadvantage": "is of values that only SPOChainSample tells",
    "spowhiten": "is a normalisation",
}


def _other_likelihood(name: str) -> bool:
    """Whether it is for policies that are asked in another way."""
    one = piece(name)
    return any(s.slot == "likelihood" for s in one.stages()) or isinstance(one, SequenceKL) or name == "persequence"


def test_every_piece_has_a_neutral_setting_or_a_reason() -> None:
    assert set(NAMES) == NEUTRAL.keys() | BARE.keys() | {n for n in NAMES if _other_likelihood(n)}


@pytest.mark.parametrize("host", ["grpo", "dapo", "dr_grpo", "gspo"])
@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_setting_is_the_host(host: str, name: str) -> None:
    for neutral, instead in NEUTRAL[name]:
        loss, grad = whole(Recipe(host, (neutral,)))
        expected, slope = whole(Recipe(host, instead))
        assert loss == pytest.approx(expected, rel=1e-14), neutral  # to rounding: rows are asked in other batches
        assert torch.allclose(grad, slope, rtol=0, atol=1e-14), neutral


def test_a_penalty_of_weight_0_is_none() -> None:
    gdpo = CATALOGUE["gdpo"]()
    loss, grad = whole(Recipe("dr_grpo", (gdpo, SequenceKL(0.0))))
    expected, slope = whole(Recipe("dr_grpo", (gdpo,)))
    assert loss == expected
    assert torch.equal(grad, slope)


def test_no_warning_where_there_is_nothing_to_warn_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keeps_its_promises(Recipe("dapo", (SMALL["d3s"], HAPOClip(), TWGRPO())))
