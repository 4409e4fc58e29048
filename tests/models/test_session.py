"""A session's tree forward against a plain forward of every path, whatever was fed, kept, committed or taken back before."""

import random

import pytest
import torch
from families import LEAN, MODULE, VOCAB, family
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.models import LM, Session, tiny

EVERY = [*LEAN, *MODULE]
Parents = list[int]
SHARED = tiny(vocab_size=VOCAB)


@pytest.fixture(scope="module")
def lm() -> LM:
    return SHARED


def plain(lm: LM, ids: list[int]) -> torch.Tensor:
    """Logits after each of the ids, by the model itself, without any cache."""
    with torch.inference_mode():
        return lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def path_of(parents: Parents, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def check_nodes(lm: LM, session: Session, logits: torch.Tensor, first: int = 0, tolerance: float = 1e-4) -> None:
    """Every row of `logits`, of nodes `first`, ..: a plain forward of the prefix and the node's path."""
    for row, node in enumerate(range(first, session.size)):
        ids = session.ids + [session.tokens[n] for n in path_of(session.parents, node)]
        torch.testing.assert_close(logits[row], plain(lm, ids)[-1], atol=tolerance, rtol=0)


def check_cache(lm: LM, session: Session) -> None:
    """Every entry in use is what a sequential forward of the prefix would have stored, to 1e-5."""
    assert session.cache.used == session.length
    fresh = lm.session()
    for token in session.ids:
        fresh.extend([token], [-1])
        fresh.commit([0])
    for ours, theirs in zip(session.cache.layers, fresh.cache.layers, strict=True):
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(a[:, :, : session.length], b[:, :, : session.length], atol=1e-5, rtol=1e-5)


def random_tree(rng: random.Random, nodes: int, first: int = 0) -> tuple[list[int], Parents]:
    return [rng.randrange(VOCAB) for _ in range(nodes)], [rng.randrange(-1, first + i) for i in range(nodes)]


TEMPLATES = {
    "one node": [-1],
    "chain": [-1, 0, 1, 2, 3, 4],
    "star": [-1] * 6,
    "comb": [-1, 0, 0, 2, 2, 4],
    "two trees": [-1, -1, 0, 1, 0, 1, 2, 3],
    "breadth first": [-1, 0, 0, 1, 1, 2, 2],
    "late branches": [-1, 0, 1, -1, 3, 0, 5, 2],
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_tree_forward_is_a_plain_forward_of_each_path(lm, template):
    session, rng = lm.session(), random.Random(0)
    session.prefill([3, 1, 4, 1, 5])
    logits = session.extend([rng.randrange(VOCAB) for _ in template], template)
    assert logits.shape == (len(template), VOCAB)
    check_nodes(lm, session, logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", EVERY)
def test_trees_and_commits_in_every_architecture(name, attention):
    lm, rng = family(name, attention=attention), random.Random(1)
    session = lm.session(capacity=16)
    last = session.prefill([3, 1, 4, 1, 5, 9, 2])
    torch.testing.assert_close(last, plain(lm, session.ids)[-1], atol=1e-4, rtol=0)
    for nodes in (9, 1, 12):
        logits = session.extend(*random_tree(rng, nodes))
        check_nodes(lm, session, logits)
        session.commit(path_of(session.parents, rng.randrange(nodes)))
        check_cache(lm, session)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_random_trees_over_several_commits(seed, sizes):
    lm, rng = SHARED, random.Random(seed)
    session = lm.session(capacity=4)
    session.prefill([rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))])
    for nodes in sizes:
        check_nodes(lm, session, session.extend(*random_tree(rng, nodes)))
        session.commit(path_of(session.parents, rng.randrange(-1, nodes)))
        check_cache(lm, session)


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32 - 1), parts=st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_a_tree_fed_in_parts_is_the_tree_fed_at_once(seed, parts):
    lm, rng = SHARED, random.Random(seed)
    tokens, parents = random_tree(rng, sum(parts))
    once, parted = lm.session(), lm.session(capacity=2)
    for session in (once, parted):
        session.prefill([7, 7, 2])
    whole, start = once.extend(tokens, parents), 0
    for n in parts:
        logits = parted.extend(tokens[start : start + n], parents[start : start + n])
        torch.testing.assert_close(logits, whole[start : start + n], atol=1e-5, rtol=0)
        start += n
    assert (parted.tokens, parted.parents, parted.size) == (tokens, parents, sum(parts))
    path = path_of(parents, len(tokens) - 1)
    parted.commit(path)
    assert parted.ids == [7, 7, 2] + [tokens[n] for n in path]
    check_cache(lm, parted)


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32 - 1))
def test_keep_renumbers_and_the_tree_grows_on(seed):
    lm, rng = SHARED, random.Random(seed)
    session = lm.session()
    session.prefill([1, 2])
    tokens, parents = random_tree(rng, 10)
    session.extend(tokens, parents)
    wanted = rng.sample(range(10), rng.randint(1, 4))
    number = session.keep(wanted)
    stay = sorted({n for w in wanted for n in path_of(parents, w)})
    assert number == {old: new for new, old in enumerate(stay)}
    assert session.tokens == [tokens[n] for n in stay]
    assert [path_of(session.parents, number[w]) for w in wanted] == [
        [number[n] for n in path_of(parents, w)] for w in wanted
    ]
    assert session.cache.used == session.length + session.size
    size = session.size
    fresh, below = random_tree(rng, 5, size)
    check_nodes(lm, session, session.extend(fresh, below), first=size)
    session.commit(path_of(session.parents, session.size - 1))
    check_cache(lm, session)


def test_keep_nothing_empties_the_tree(lm):
    session = lm.session()
    session.prefill([1, 2])
    session.extend([3, 4], [-1, 0])
    assert session.keep([]) == {}
    assert (session.size, session.cache.used) == (0, 2)


def test_commit_of_nothing_drops_the_tree(lm):
    session = lm.session()
    session.prefill([1, 2])
    session.extend([3, 4], [-1, 0])
    session.commit([])
    assert (session.length, session.size, session.cache.used) == (2, 0, 2)


@pytest.mark.parametrize("path", [[1], [0, 2], [1, 0]], ids=str)
def test_commit_refuses_what_is_no_path_from_the_prefix(lm, path):
    session = lm.session()
    session.prefill([1])
    session.extend([3, 4, 5], [-1, 0, 1])
    with pytest.raises(AssertionError, match="not a path"):
        session.commit(path)


@pytest.mark.parametrize("chunk", [1, 3, 4, 16, 64])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_prefill_in_chunks(name, chunk):
    lm, ids = family(name), [random.Random(2).randrange(VOCAB) for _ in range(16)]
    session, seen = Session(lm.model, capacity=2, chunk=chunk), []
    last = session.prefill(ids, lambda part, logits: seen.append((list(part), logits)))
    expected = plain(lm, ids)
    torch.testing.assert_close(last, expected[-1], atol=1e-4, rtol=0)
    assert [token for part, _ in seen for token in part] == ids
    torch.testing.assert_close(torch.cat([logits for _, logits in seen]), expected, atol=1e-4, rtol=0)
    assert session.forwards == -(-16 // chunk)
    again = Session(lm.model, chunk=chunk).prefill(ids)  # only the last row, without an observer
    torch.testing.assert_close(again, last, atol=1e-5, rtol=0)
    check_cache(lm, session)


def test_prefill_goes_on_behind_the_prefix(lm):
    session = lm.session()
    session.prefill([1, 2, 3])
    session.extend([4], [-1])
    session.commit([0])
    torch.testing.assert_close(session.prefill([5, 6]), plain(lm, [1, 2, 3, 4, 5, 6])[-1], atol=1e-4, rtol=0)
    assert session.ids == [1, 2, 3, 4, 5, 6]


def test_growth_beyond_capacity_keeps_everything(lm):
    session = lm.session(capacity=2)
    session.prefill([1, 2, 3])
    for token in range(30):
        [row] = session.extend([token], [-1])
        session.commit([0])
    torch.testing.assert_close(row, plain(lm, session.ids)[-1], atol=1e-4, rtol=0)
    assert session.cache.layers[0].keys.shape[2] >= session.length == 33
    check_cache(lm, session)


def test_rewind(lm):
    session = lm.session()
    session.prefill([1, 2, 3, 4, 5])
    session.extend([6, 7], [-1, -1])
    session.rewind(2)
    assert (session.ids, session.size, session.cache.used) == ([1, 2], 0, 2)
    torch.testing.assert_close(session.prefill([9]), plain(lm, [1, 2, 9])[-1], atol=1e-4, rtol=0)
    check_cache(lm, session)


RESUMED = {
    "goes on": ([1, 2, 3, 9, 9], 2),
    "goes on along the tree": ([1, 2, 3, 4, 5, 9], 1),
    "leaves the tree on its way": ([1, 2, 3, 4, 9, 9], 2),
    "ends inside the tree": ([1, 2, 3, 4, 5], 1),
    "is the prefix": ([1, 2, 3], 1),
    "is shorter": ([1, 2], 1),
    "departs early": ([1, 7, 3, 4], 3),
    "has nothing in common": ([9, 8], 2),
    "is one token": ([5], 1),
}


@pytest.mark.parametrize(("text", "fed"), RESUMED.values(), ids=RESUMED.keys())
def test_resume_uses_what_the_session_holds(lm, text, fed):
    session = lm.session()
    session.prefill([1, 2, 3])
    session.extend([4, 8, 5, 6], [-1, -1, 0, 1])
    seen = []
    run = session._run
    session._run = lambda tokens, *args, **kw: seen.append(len(tokens)) or run(tokens, *args, **kw)  # type: ignore[method-assign]
    torch.testing.assert_close(session.resume(text), plain(lm, text)[-1], atol=1e-4, rtol=0)
    assert (session.ids, session.size, sum(seen)) == (text, 0, fed)
    check_cache(lm, session)


def test_an_empty_prompt_is_refused(lm):
    with pytest.raises(ValueError, match="at least one token"):
        lm.session().prefill([])


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "gpt2"])
def test_bfloat16_tree_chooses_within_rounding(name):
    """In low precision a tree forward may flip near-ties: what it ranks first lies within 0.1 of the sequential maximum."""
    lm, rng = family(name, dtype=torch.bfloat16), random.Random(3)
    session = lm.session()
    session.prefill([3, 1, 4, 1, 5])
    logits = session.extend(*random_tree(rng, 12)).float()
    assert logits.isfinite().all()
    for node in range(12):
        ids = session.ids + [session.tokens[n] for n in path_of(session.parents, node)]
        row = plain(lm, ids)[-1].float()
        assert row.max() - row[logits[node].argmax()] <= 0.02 * row.abs().max()
