"""Two drafts in one tree."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locum.decode import Chain, DySpec, Graft, Lookup, Match, TokenRecycling, Tree, check_pair, generate
from locum.decode.graft import union
from locum.errors import UserError
from locum.models import tiny


def paths(tree: Tree) -> set[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
        found.append((*found[parent], token))
    return set(found)


def test_equal_beginnings_are_shared():
    first = Tree([9, 1, 2, 3], [-1, 0, 0, 1])  # 1, 2, 1-3
    second = Tree.chain(9, [1, 3, 4])
    both = union(first, second)
    assert (both.tokens, both.parents) == ([9, 1, 2, 3, 4], [-1, 0, 0, 1, 3])
    assert (both.draws, both.laws, both.counts) == ("fixed", {}, None)


def test_an_empty_tree_adds_nothing():
    tree = Tree.chain(9, [1, 2])
    for both in (union(tree, Tree.root(9)), union(Tree.root(9), tree)):
        assert (both.tokens, both.parents) == (tree.tokens, tree.parents)


sequences = st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=5)


@given(a=sequences, b=sequences)
def test_the_union_holds_the_paths_of_both_and_no_others(a, b):
    first, second = Tree.merge(7, a), Tree.merge(7, b)
    both = union(first, second)
    assert paths(both) == paths(first) | paths(second)
    assert len(paths(both)) == len(both.tokens)  # each path once
    assert both.tokens[: len(first.tokens)] == first.tokens  # the first tree stays as it is
    assert all(parent < node for node, parent in enumerate(both.parents))


def test_it_is_at_least_as_good_as_each_of_its_parts():
    """Two lookups with different reach: the grafted draft accepts no less than either, on the same text."""
    lm = tiny(vocab_size=6, layers=1, seed=1)

    def forwards(drafter):
        [out] = generate(lm, [1, 2, 1], drafter=drafter, max_new_tokens=40)
        return out.forwards, out.ids

    (both, text), (a, text_a), (b, text_b) = (
        forwards(d) for d in (Graft(Lookup(2), Lookup(4, 1)), Lookup(2), Lookup(4, 1))
    )
    assert text == text_a == text_b
    assert both <= min(a, b)


def test_it_needs_and_reads_what_its_parts_do():
    assert not Graft().needs_draft
    assert Graft().reads_prompt
    assert Graft(Lookup(), Chain()).needs_draft
    assert not Graft(Lookup(), Chain()).reads_prompt
    with pytest.raises(UserError, match="drafter Chain needs a draft model"):
        generate(tiny(), [1], drafter=Graft(Lookup(), Chain()))


def test_both_parts_learn_from_the_other_ones_tokens():
    lm, drafter = tiny(vocab_size=12, layers=1), Graft(Lookup(), TokenRecycling(8))
    state = drafter.start(lm)
    generate(lm, [1, 2, 3], drafter=drafter, state=state, max_new_tokens=20)
    assert (state[1].successors >= 0).any()
    assert len(state[0].ids) >= 15


def test_only_match_is_exact_for_it():
    check_pair(Graft(Chain(), DySpec()).draws, Match())
    assert Graft(Chain(), DySpec()).draws == "fixed"
