"""N-gram lookup: hand cases of what is found, and the index against a search of the whole text."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from locum.decode import Context, Lookup, generate
from locum.decode.lookup import _Index
from locum.errors import UserError
from locum.models import tiny
from locum.tokens import Sampling


def draft(
    ids: list[int], limit: int = 100, size: int | None = None, state: _Index | None = None, **kwargs
) -> list[int]:
    drafter = Lookup(**kwargs)
    state = state or _Index(drafter.longest)
    tree = drafter.propose(state, Context(ids, limit, Sampling(), np.random.default_rng(0), size))
    assert tree.tokens[0] == ids[-1]
    assert tree.parents == list(range(-1, len(tree)))
    return tree.tokens[1:]


def search(ids: list[int], length: int, longest: int, shortest: int) -> list[int]:
    """What it should find, by looking everywhere: the longest suffix, its latest earlier place, what follows there."""
    for n in range(min(longest, len(ids)), shortest - 1, -1):
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start : start + n] == ids[-n:]:
                whole = list(ids)
                while len(whole) < start + n + length:  # the end of the text is followed by what is being copied
                    whole.append(whole[len(whole) - (len(ids) - start - n)])
                return whole[start + n : start + n + length]
    return []


@pytest.mark.parametrize(
    ("ids", "kwargs", "found"),
    [
        ([1, 2, 3, 4, 1, 2], {"length": 2}, [3, 4]),
        (
            [1, 2, 3, 4, 1, 2],
            {"length": 6},
            [3, 4, 1, 2, 3, 4],
        ),  # beyond the end: a text that repeats goes on repeating
        ([5, 2, 7, 1, 2, 8, 5, 2], {"length": 1}, [7]),  # two tokens that match count more than one, though earlier
        ([5, 2, 7, 1, 2, 8, 5, 2], {"length": 1, "longest": 1}, [8]),  # the latest
        ([1, 2, 9, 1, 2, 8, 1, 2], {"length": 1}, [8]),
        ([1, 2, 3], {}, []),
        ([1], {}, []),
        ([1, 1], {"length": 3}, [1, 1, 1]),
        ([1, 1, 1, 1], {"length": 3}, [1, 1, 1]),  # the latest match overlaps the suffix itself
        ([1, 2, 3, 1], {"shortest": 2}, []),
        ([1, 2, 3, 1, 2], {"shortest": 2, "length": 1}, [3]),
        ([1, 2, 3, 1], {"length": 0}, []),
    ],
    ids=str,
)
def test_hand_cases(ids, kwargs, found):
    assert draft(ids, **kwargs) == found


def test_no_deeper_than_the_text_can_use():
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    assert draft(text, limit=2) == [3, 4]
    assert draft(text, size=1) == [3]
    assert draft(text, limit=0) == []


def test_the_kind_tells_how_long_the_match_was():
    state, d = _Index(3), Lookup()
    kinds = [
        d.propose(state, Context(ids, 9, Sampling(), np.random.default_rng(0))).kind
        for ids in ([1, 2, 3, 9], [1, 2, 3, 9, 3], [1, 2, 3, 9, 2, 3], [1, 2, 3, 9, 1, 2, 3])
    ]
    assert kinds == ["0-gram", "1-gram", "2-gram", "3-gram"]


@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    cuts=st.lists(st.integers(1, 40), max_size=6),
    length=st.integers(0, 5),
    longest=st.integers(1, 4),
    shortest=st.integers(1, 4),
)
def test_the_index_is_a_search(ids, cuts, length, longest, shortest):
    """As the text grows, shrinks or is another one: always what a search of the whole text finds."""
    shortest = min(shortest, longest)
    state = _Index(longest)
    for cut in [*cuts, len(ids)]:
        text = ids[:cut] if cut % 5 else ids[:cut][::-1]
        found = draft(text, state=state, length=length, longest=longest, shortest=shortest)
        assert found == search(text, length, longest, shortest)


@pytest.mark.parametrize(
    "field", [{"length": -1}, {"shortest": 0}, {"longest": 0}, {"longest": 2, "shortest": 3}], ids=str
)
def test_a_bad_value_is_named(field):
    with pytest.raises(UserError, match=r"Lookup\.(length|shortest|longest) must be >= "):
        Lookup(**field)


def test_a_repeating_text_needs_few_forwards():
    lm = tiny(vocab_size=6, layers=1, seed=1)
    [plain] = generate(lm, [1, 2], max_new_tokens=60)
    [out] = generate(lm, [1, 2], drafter=Lookup(), max_new_tokens=60)
    assert out.ids == plain.ids
    assert out.forwards < 45
