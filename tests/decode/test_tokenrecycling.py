"""Token Recycling (arXiv 2408.08696): its template, its table, its text."""

import random

import numpy as np
import pytest
import torch
from toys import table_lm, window_p_value

from locum.decode import Context, Plain, Rows, TokenRecycling, TokenTable, Tree, generate
from locum.decode.tokenrecycling import _layout, template
from locum.errors import UserError
from locum.models import LM, tiny
from locum.tokens import Sampling

PROMPTS = [[r.randrange(50) for _ in range(r.randint(1, 9))] for r in map(random.Random, range(8))]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny(vocab_size=50, layers=1, seed=5)


@pytest.fixture(scope="module")
def plain(lm) -> list[list[int]]:
    return [out.ids for out in generate(lm, PROMPTS, max_new_tokens=30)]


def context(ids: list[int], limit: int = 99, size: int | None = None) -> Context:
    return Context(ids, limit, Sampling(), np.random.default_rng(0), size)


# The template.


def test_the_paper_tree_has_80_nodes_in_six_levels():
    paths = template(80)
    assert len(paths) == len(set(paths)) == 80
    assert [sum(len(p) == depth for p in paths) for depth in range(1, 8)] == [8, 21, 25, 15, 8, 3, 0]


@pytest.mark.parametrize("nodes", range(81))
def test_every_sub_tree_is_closed_under_parents(nodes):
    paths = template(nodes)
    assert len(paths) == nodes
    assert all(len(p) == 1 or p[:-1] in paths for p in paths)


def test_paths_of_the_paper_that_must_be_there():
    paths = set(template(80))
    assert {(7,), (0, 7), (1, 3), (2, 2), (3, 1), (7, 0)} <= paths
    assert {(0, 0, 7), (0, 1, 2), (0, 7, 0), (1, 0, 1), (5, 0, 0)} <= paths
    assert {
        (0, 0, 0, 4),
        (3, 0, 0, 0),
        (0, 0, 0, 0, 2),
        (1, 0, 0, 0, 0),
        (0, 0, 0, 0, 0, 1),
        (0, 0, 0, 1, 0, 0),
    } <= paths
    assert not {(1, 4), (2, 3), (0, 1, 3), (1, 1, 1), (0, 0, 0, 0, 0, 2), (6, 0, 0)} & paths


def test_rows_of_the_ancestor_matrix_sum_to_depth_and_one():
    parents, _, levels = _layout(80, 8, 6)
    reach = np.eye(81, dtype=bool)
    for node in range(1, 81):
        assert parents[node] < node
        reach[node] |= reach[parents[node]]
    depth = np.zeros(81, int)
    for d, level in enumerate(levels, 1):
        depth[level] = d
    assert (reach.sum(1) == depth + 1).all()
    assert sorted(np.concatenate(levels).tolist()) == list(range(1, 81))


def test_a_narrow_table_and_little_room_prune_the_tree():
    for top_k, depth in ((3, 6), (8, 2), (1, 4), (2, 1)):
        _, ranks, levels = _layout(80, top_k, depth)
        assert ranks.max() < top_k
        assert len(levels) == depth
    assert len(_layout(80, 1, 6)[0]) == 7  # the root and the chain of best successors
    assert len(_layout(0, 8, 6)[0]) == 1


# The table.


def logits_of(*order: int, vocab: int = 6) -> torch.Tensor:
    """A row whose highest entries are the given tokens, best first."""
    row = torch.zeros(vocab)
    for rank, token in enumerate(order):
        row[token] = 9.0 - rank
    return row


def test_the_rows_of_fed_tokens_become_their_top_k():
    table = TokenTable.empty(6, 3)
    table.learn([2, 5], torch.stack([logits_of(1, 4, 0), logits_of(3, 2, 5)]))
    assert table.successors.tolist() == [[-1] * 3, [-1] * 3, [1, 4, 0], [-1] * 3, [-1] * 3, [3, 2, 5]]
    table.learn([2], logits_of(0, 1, 2)[None])
    assert table.successors[[2, 5]].tolist() == [[0, 1, 2], [3, 2, 5]]


def test_of_equal_tokens_the_last_wins_and_an_accepted_one_always():
    rows = torch.stack([logits_of(1), logits_of(2), logits_of(3), logits_of(4)])
    table = TokenTable.empty(6, 1)
    table.learn([5, 5, 0, 5], rows)
    assert table.successors[:, 0].tolist() == [3, -1, -1, -1, -1, 4]
    drafter, table = TokenRecycling(top_k=1), TokenTable.empty(6, 1)
    tree = Tree([5, 5, 0, 5], [-1, 0, 0, 2])
    drafter.observe(table, tree, Rows(rows, Sampling()), [1])
    assert table.successors[:, 0].tolist() == [3, -1, -1, -1, -1, 2]  # node 1 was accepted, node 3 came later
    drafter.observe(table, tree, Rows(rows, Sampling()), [])
    assert table.successors[5, 0] == 1  # the root counts as accepted


def test_one_step_by_hand():
    """Six tokens, k = 2, the four best nodes: filled level by level, an empty row ends its branch."""
    table = TokenTable(np.array([[1, 2], [3, 4], [5, 0], [-1, -1], [0, 1], [2, 3]]))
    assert template(4) == ((0,), (0, 0), (1,), (0, 0, 0))
    tree = TokenRecycling(nodes=4, top_k=2).propose(table, context([9, 0]))
    # root 0 -> its best 1, second 2; 1's best is 3; row 3 is empty, so its child is left out
    assert (tree.tokens, tree.parents) == ([0, 1, 3, 2], [-1, 0, 1, 0])
    tree = TokenRecycling(nodes=4, top_k=2).propose(table, context([2]))
    assert (tree.tokens, tree.parents) == ([2, 5, 2, 0, 5], [-1, 0, 1, 0, 2])
    assert len(TokenRecycling(nodes=4, top_k=2).propose(table, context([3]))) == 0
    assert TokenRecycling(nodes=4, top_k=2).propose(table, context([2], limit=1)).tokens == [2, 5, 0]
    assert TokenRecycling(nodes=4, top_k=2).propose(table, context([2], size=2)).tokens == [2, 5, 2]


def test_a_step_writes_the_fed_rows_and_no_others():
    lm = tiny(vocab_size=6, layers=1, seed=1)
    drafter = TokenRecycling(nodes=8, top_k=3, learn_from_prompt=False)
    before = np.array([[1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 0], [-1, -1, -1], [-1, -1, -1]])
    state, seen = TokenTable(before.copy()), []
    observe = TokenRecycling.observe

    class Watched(TokenRecycling):
        def observe(self, state, tree, rows, path):
            was = state.successors.copy()
            observe(self, state, tree, rows, path)
            fed, accepted = set(tree.tokens), [0, *path]
            for token in range(6):
                nodes = [n for n, t in enumerate(tree.tokens) if t == token]
                if token not in fed:
                    assert (state.successors[token] == was[token]).all()
                    continue
                node = max([n for n in nodes if n in accepted] or nodes)
                assert state.successors[token].tolist() == rows.logits[node].topk(3).indices.tolist()
            seen.append(len(fed))

    [out] = generate(lm, [0, 3], drafter=Watched(8, 3, False), state=state, max_new_tokens=12)
    assert len(seen) == len(out.steps) > 0
    assert drafter == TokenRecycling(8, 3, False)


def test_k_1_and_a_chain_is_a_bigram_lookup():
    """With one successor per token the tree is the chain t, M[t], M[M[t]], ..: the same drafts as a dictionary of last successors."""
    lm, nodes = tiny(vocab_size=12, layers=1, seed=2), 80
    drafter = TokenRecycling(nodes, top_k=1)
    best: dict[int, int] = {}
    text, state, steps = [1, 2, 3], drafter.start(lm), 0

    def told(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    rows = told(text)
    drafter.read(state, text, rows)
    best.update(zip(text, rows.argmax(-1).tolist(), strict=True))
    text.append(int(rows[-1].argmax()))
    while len(text) < 60:
        chain, token = [], text[-1]
        while len(chain) < 6 and (token := best.get(token, -1)) >= 0:
            chain.append(token)
        tree = drafter.propose(state, context(text))
        assert tree.tokens == [text[-1], *chain]
        assert tree.parents == list(range(-1, len(chain)))
        rows = told(text + chain)[-1 - len(chain) :]
        path = []
        while len(path) < len(chain) and rows[len(path)].argmax() == chain[len(path)]:
            path.append(len(path) + 1)
        drafter.observe(state, tree, Rows(rows, Sampling()), path)
        fed, accepted = tree.tokens, {0, *path}
        for node in sorted(range(len(fed)), key=lambda n: n in accepted):
            best[fed[node]] = int(rows[node].argmax())
        text += [chain[n - 1] for n in path] + [int(rows[len(path)].argmax())]
        steps += 1
    assert steps < 57
    [out] = generate(lm, [1, 2, 3], drafter=drafter, max_new_tokens=len(text) - 3)
    assert [1, 2, 3, *out.ids] == text


def test_the_prompt_fills_the_table_only_if_asked():
    lm = tiny(vocab_size=20, layers=1)
    for learn in (True, False):
        drafter = TokenRecycling(8, learn_from_prompt=learn)
        assert drafter.reads_prompt is learn
        state = drafter.start(lm)
        generate(lm, [4, 5, 6, 5], drafter=drafter, state=state, max_new_tokens=1)
        with torch.inference_mode():
            rows = lm.model(input_ids=torch.tensor([[4, 5, 6, 5]]), use_cache=False).logits[0]
        expected = np.full((20, 8), -1)
        if learn:
            expected[[4, 6, 5]] = rows[[0, 2, 3]].topk(8).indices  # of the two fives the later one
        assert (state.successors == expected).all()


# The text.


@pytest.mark.parametrize("nodes", [0, 1, 8, 16, 30, 80])
def test_the_greedy_text_is_plain_cold_and_hot(lm, plain, nodes):
    drafter = TokenRecycling(nodes)
    state = drafter.start(lm)
    hot = [generate(lm, p, drafter=drafter, state=state, max_new_tokens=30)[0] for p in PROMPTS]
    cold = [generate(lm, p, drafter=drafter, max_new_tokens=30)[0] for p in PROMPTS]
    assert [out.ids for out in hot] == [out.ids for out in cold] == plain
    if nodes >= 8:
        assert sum(o.forwards for o in hot) < sum(o.forwards for o in cold) < 30 * len(PROMPTS)
    if nodes == 0:
        assert all(out.forwards == 30 and {s.drafted for s in out.steps} == {0} for out in cold)


@pytest.mark.parametrize("nodes", [8, 80])
def test_ends_of_the_text_are_those_of_plain(lm, plain, nodes):
    """Every token of the text as EOS, and every budget: same ids, whether it falls on a draft, in mid-path or on the bonus."""
    drafter, kinds = TokenRecycling(nodes), set()
    state = drafter.start(lm)
    generate(lm, PROMPTS, drafter=drafter, state=state, max_new_tokens=30)  # hot: long accepted runs
    for prompt, text in zip(PROMPTS[:2], plain, strict=False):
        for eos in set(text):
            model = LM(lm.model, name="ends")
            model.__dict__["eos_ids"] = frozenset({eos})
            outs = [
                generate(model, prompt, drafter=d, state=s, max_new_tokens=30)[0]
                for d, s in ((Plain(), None), (drafter, state))
            ]
            assert outs[0].ids == outs[1].ids == text[: text.index(eos) + 1]
            assert outs[1].finish == "eos"
            kinds.add(outs[1].sources[-1])
        for budget in range(1, 20):
            [out] = generate(lm, prompt, drafter=drafter, state=state, max_new_tokens=budget)
            assert out.ids == text[:budget]
    assert kinds == {"draft", "model"}


@pytest.mark.usefixtures("unchecked")
def test_50000_sampled_tokens_follow_the_law():
    """Six tokens, temperature 1: chi-square of pairs given the token before, against the exact law, p > 1e-3."""
    lm, sampling = table_lm(6, seed=3), Sampling(1.0)
    outs = generate(lm, [[0]] * 25, drafter=TokenRecycling(30), sampling=sampling, max_new_tokens=2000, seed=1)
    assert sum(len(out.ids) for out in outs) == 50_000
    assert sum(out.forwards for out in outs) < 25_000
    assert window_p_value(lm, sampling, [out.ids for out in outs], 0) > 1e-3


# Keeping the table.


def test_a_saved_table_comes_back_hot(lm, tmp_path, plain):
    path, drafter = tmp_path / "table.safetensors", TokenRecycling(30)
    state = drafter.start(lm)
    generate(lm, PROMPTS, drafter=drafter, state=state, max_new_tokens=30)
    state.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["table.safetensors"]
    assert (TokenTable.load(path).successors == state.successors).all()
    hot = TokenRecycling(30, table=str(path))
    assert (hot.start(lm).successors == state.successors).all()
    cold, warm = (generate(lm, PROMPTS[0], drafter=d, max_new_tokens=30)[0] for d in (drafter, hot))
    assert cold.ids == warm.ids == plain[0]
    assert warm.forwards < cold.forwards
    assert (TokenTable.load(path).successors == state.successors).all()  # a run does not write into the file


@pytest.mark.parametrize("content", [None, b"", b"not a table at all"], ids=["missing", "empty", "other"])
def test_a_file_that_is_no_table(lm, tmp_path, content):
    path = tmp_path / "table"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="holds no token table"):
        TokenRecycling(table=str(path)).start(lm)


def test_a_table_of_another_model_is_refused(lm, tmp_path):
    TokenTable.empty(7, 8).save(tmp_path / "table")
    with pytest.raises(UserError, match=r"is \[7, 8\], but model 'tiny-50-5' and top_k need \[50, 8\]"):
        TokenRecycling(table=str(tmp_path / "table")).start(lm)
    with pytest.raises(UserError, match=r"is \[7, 8\], but .* need \[7, 4\]"):
        TokenRecycling(top_k=4, table=str(tmp_path / "table")).start(tiny(vocab_size=7))


def test_a_vocabulary_smaller_than_k():
    lm = tiny(vocab_size=5, layers=1)
    assert TokenRecycling().start(lm).successors.shape == (5, 5)
    texts = [generate(lm, [1, 2], drafter=d, max_new_tokens=20)[0].ids for d in (Plain(), TokenRecycling())]
    assert texts[0] == texts[1]


def test_rows_beyond_the_tokenizer_are_there():
    """The table is as wide as the logits, which may be padded beyond the tokenizer's vocabulary."""
    assert TokenRecycling().start(tiny(vocab_size=64)).successors.shape == (64, 8)


@pytest.mark.parametrize(("field", "value"), [("nodes", -1), ("nodes", 81), ("top_k", 0), ("top_k", 9)], ids=str)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(UserError, match=rf"TokenRecycling\.{field} must be in .*, got {value}"):
        TokenRecycling(**{field: value})
