"""Every drafter with every verifier: the valid pairs keep the target's law and its greedy text, the others are refused.

The table of pairs is made from what the family holds, so a new drafter or verifier is tested by being there.
"""

import random
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from toys import TableLM, table_lm, window_p_value

from locum.decode import (
    Chain,
    ChainRejection,
    Context,
    Drafter,
    DySpec,
    Graft,
    RecursiveRejection,
    SpecTr,
    Tree,
    Verifier,
    check_pair,
    generate,
)
from locum.decode.base import MEANING
from locum.decode.cost import ForwardCost
from locum.decode.engine import DEFAULT
from locum.errors import UserError
from locum.method import from_dict, names
from locum.models import LM, Session, load, tiny
from locum.models.load import _DRAFT_DIR
from locum.tasks import prompts
from locum.tokens import Sampling

# Small settings of those whose defaults are meant for large models; others are tested as they come.
SMALL = {
    "chain": {"length": 3},
    "dyspec": {"budget": 6},
    "spectr": {"K": 3, "L": 2},
    "lookup": {"length": 3},
    "tokenrecycling": {"nodes": 8, "top_k": 4},
}
VERIFIERS: dict[str, Verifier | None] = {"default": None} | {v: c() for v, c in names("decode", "Verifier").items()}


def drafters() -> dict[str, Drafter]:
    made = {name: from_dict({"method": f"decode.{name}"} | SMALL.get(name, {})) for name in names("decode", "Drafter")}
    made["dyspec-layers"] = DySpec(budget=8, threshold=0.15)
    made["one-sequence"] = SpecTr(K=1, L=3)
    needing = [d for d in made.values() if d.needs_draft]
    for first, second in zip(needing, [*needing[1:], made["tokenrecycling"]], strict=True):
        made[f"graft-{type(first).__name__}-{type(second).__name__}".lower()] = Graft(first, second)
    made["graft-of-graft"] = Graft(made["lookup"], Graft(made["chain"], made["tokenrecycling"]))
    return made


DRAFTERS = drafters()


def fits(drafter: Drafter, verifier: Verifier | None) -> bool:
    if verifier is None:
        return drafter.draws not in DEFAULT  # otherwise it is one of the others
    try:
        check_pair(drafter.draws, verifier)
    except UserError:
        return False
    return True


EVERY = [(d, v) for d in DRAFTERS for v in VERIFIERS]
VALID = [(d, v) for d, v in EVERY if fits(DRAFTERS[d], VERIFIERS[v])]
INVALID = [(d, v) for d, v in EVERY if VERIFIERS[v] is not None and (d, v) not in VALID]
LENGTH = 600  # tokens of a sampled text
valid = pytest.mark.parametrize(("drafter", "verifier"), VALID)
SAMPLINGS = [Sampling(1.0), Sampling(1.3, top_k=4, top_p=0.9, min_p=0.05)]


@pytest.fixture(autouse=True)
def drafting_pays(monkeypatch):
    """For the controller: a larger forward costs nothing, whatever this machine is doing; so it drafts."""
    monkeypatch.setattr("locum.decode.auto.forward_cost", lambda lm: ForwardCost((1, 2, 64), (1.0, 1.01, 1.1)))


@pytest.fixture(scope="module")
def tables() -> tuple[LM, LM]:
    target = table_lm(5, seed=0)
    return target, table_lm(5, seed=1, scale=0.8, like=target)


def test_the_table_holds_what_it_should():
    assert {"plain", "lookup", "chain", "spectr", "dyspec", "tokenrecycling", "graft", "auto"} <= set(DRAFTERS)
    assert {"match", "chainrejection", "kseq", "recursiverejection"} <= set(VERIFIERS)
    assert {("spectr", "kseq"), ("chain", "chainrejection"), ("dyspec", "recursiverejection")} <= set(VALID)
    assert {(d, "match") for d in DRAFTERS} | {("auto", "default")} <= set(VALID)
    assert {("dyspec", "kseq"), ("spectr", "recursiverejection"), ("lookup", "chainrejection")} <= set(INVALID)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain law", "filtered law"])
@valid
def test_the_text_has_the_target_law(tables, drafter, verifier, sampling):
    """Pairs of tokens given the one before, chi-square against the exact law, p > 1e-3."""
    target, draft = tables
    [out] = generate(
        target,
        [0],
        drafter=DRAFTERS[drafter],
        verifier=VERIFIERS[verifier],
        draft=draft,
        sampling=sampling,
        max_new_tokens=LENGTH,
    )
    assert len(out.ids) == LENGTH
    assert window_p_value(target, sampling, [out.ids], 0) > 1e-3
    if drafter != "plain":
        assert out.forwards < LENGTH


@dataclass(frozen=True)
class Careless(RecursiveRejection):
    """The rule for draws without replacement, used for draws with it."""

    accepts: ClassVar[frozenset[str]] = frozenset(MEANING)


@dataclass(frozen=True)
class Liar(Chain):
    """Says that its tokens were drawn at another temperature than they were: the trap of filters that reach the sampler alone."""

    def propose(self, state: Session, context: Context) -> Tree:
        tree = super().propose(state, replace(context, sampling=Sampling(0.5)))
        return replace(tree, laws={node: law**0.5 / (law**0.5).sum() for node, law in tree.laws.items()})


@pytest.mark.parametrize(
    ("drafter", "verifier"), [(DRAFTERS["spectr"], Careless()), (Liar(3), ChainRejection())], ids=["pair", "law"]
)
def test_the_test_sees_what_is_not_exact(tables, drafter, verifier):
    target, draft = tables
    [out] = generate(
        target, [0], drafter=drafter, verifier=verifier, draft=draft, sampling=SAMPLINGS[0], max_new_tokens=LENGTH
    )
    assert window_p_value(target, SAMPLINGS[0], [out.ids], 0) < 1e-3


@pytest.mark.parametrize(("drafter", "verifier"), INVALID)
def test_other_pairs_are_refused_with_the_reason(tables, drafter, verifier):
    draws = DRAFTERS[drafter].draws
    with pytest.raises(UserError) as caught:
        generate(tables[0], [0], drafter=DRAFTERS[drafter], verifier=VERIFIERS[verifier], draft=tables[1])
    said = str(caught.value)
    assert said.startswith(f"verifier {type(VERIFIERS[verifier]).__name__} is exact only for drafts that are ")
    assert f"this draft is {draws!r}" in said
    assert draws not in MEANING or MEANING[draws] in said


@pytest.fixture(scope="module")
def models() -> tuple[LM, LM]:
    """A random target and the same with its weights a little off, so that drafts are often right and often wrong."""
    target, draft = (tiny(vocab_size=8, hidden_size=16, layers=1, heads=2, kv_heads=1, seed=2) for _ in range(2))
    with torch.no_grad():
        g = torch.Generator().manual_seed(0)
        for weight in draft.model.parameters():
            weight.add_(0.08 * torch.randn(weight.shape, generator=g))
    return target, draft


PROMPTS = [[r.randrange(8) for _ in range(r.randint(1, 7))] for r in map(random.Random, range(50))]


@pytest.fixture(scope="module")
def plain(models) -> list[list[int]]:
    return [out.ids for out in generate(models[0], PROMPTS, max_new_tokens=8)]


@valid
def test_the_greedy_text_is_plain_on_50_prompts(models, plain, drafter, verifier):
    target, draft = models
    outs = generate(
        target, PROMPTS, drafter=DRAFTERS[drafter], verifier=VERIFIERS[verifier], draft=draft, max_new_tokens=8
    )
    assert [out.ids for out in outs] == plain
    if drafter != "plain":
        assert sum(out.forwards for out in outs) < sum(map(len, plain))


@pytest.fixture(scope="module")
def real() -> tuple[LM, list[list[int]], list[list[int]]]:
    """The shipped draft model as a target, 50 pieces of the shipped prompts, and their plain greedy texts."""
    if not (_DRAFT_DIR / "config.json").exists():
        pytest.skip("the tiny draft model is not part of this checkout")
    lm = load("smollm2-draft", dtype="float32", device="cpu")
    ids = [lm.chat(p.text) for p in prompts()]
    pieces = [text[: 5 + 7 * n % len(text)] for n in range(5) for text in ids][:50]
    return lm, pieces, [out.ids for out in generate(lm, pieces, max_new_tokens=8)]


@pytest.mark.slow
@pytest.mark.parametrize("drafter", [d for d in DRAFTERS if d != "plain"])
def test_the_greedy_text_is_plain_on_real_text(real, drafter):
    target, pieces, plain = real
    outs = generate(target, pieces, drafter=DRAFTERS[drafter], draft=target, max_new_tokens=8)
    assert [out.ids for out in outs] == plain


def test_a_table_is_a_model_to_the_engine(tables):
    """The table behind the tests of laws: greedy text as read off it by hand."""
    target = tables[0]
    assert isinstance(target, TableLM)
    text = [0]
    for _ in range(10):
        text.append(int(target.model.table[text[-1]].argmax()))
    assert generate(target, [0], max_new_tokens=10)[0].ids == text[1:]
