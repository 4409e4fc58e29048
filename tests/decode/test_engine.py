"""The loop: how a text ends, wherever the end falls; streams, stops, seeds, states; and what is refused."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from locum.decode import Chain, Drafter, Generation, Lookup, Plain, SpecTr, TokenRecycling, Tree, generate
from locum.decode.engine import _append
from locum.errors import UserError
from locum.models import LM, tiny
from locum.tokens import Sampling

PROMPT = [3, 1, 4]


class Oracle(Drafter):
    """Drafts what plain decoding will say, so that ends fall inside accepted runs; `wrong` spoils the last token."""

    def __init__(self, text: list[int], length: int, wrong: bool = False):
        for name, value in (("text", text), ("length", length), ("wrong", wrong)):
            object.__setattr__(self, name, value)

    def propose(self, state, context):
        at = len(context.ids)
        tokens = self.text[at : at + self.length]  # deeper than context.limit on purpose: the engine must cut
        if self.wrong and tokens:
            tokens[-1] = (tokens[-1] + 1) % 16
        return Tree.chain(context.ids[-1], tokens)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny(vocab_size=16, layers=1, seed=3)


@pytest.fixture(scope="module")
def text(lm) -> list[int]:
    """Prompt and 40 greedy tokens; no end-of-sequence token is set."""
    [out] = generate(lm, PROMPT, max_new_tokens=40)
    assert (len(out.ids), out.finish) == (40, "length")
    return PROMPT + out.ids


def ending(lm: LM, *eos: int) -> LM:
    """The same model with end-of-sequence tokens."""
    made = LM(lm.model, lm.tokenizer, lm.name)
    made.__dict__["eos_ids"] = frozenset(eos)
    return made


def check(out: Generation, plain: Generation) -> None:
    assert (out.ids, out.finish, out.text) == (plain.ids, plain.finish, plain.text)
    assert len(out.sources) == len(out.ids)
    assert out.forwards == len(out.steps) + 1
    # Accepted drafts that lie behind the end are not part of the text.
    assert out.sources.count("draft") <= sum(step.accepted for step in out.steps)


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 50])
def test_length_in_the_middle_of_a_path(lm, text, length, wrong):
    for n in range(1, 14):
        [plain] = generate(lm, PROMPT, max_new_tokens=n)
        [out] = generate(lm, PROMPT, drafter=Oracle(text, length, wrong), max_new_tokens=n)
        check(out, plain)
        assert len(out.ids) == n


@pytest.mark.parametrize("length", [1, 2, 3, 7, 50])
def test_every_token_as_the_end_of_the_text(lm, text, length):
    """With the token at each place as EOS: it comes as a draft, as the bonus token, in mid-path and as the very first token."""
    places = set()
    for eos in set(text[len(PROMPT) :]):
        model = ending(lm, eos)
        [plain] = generate(model, PROMPT, max_new_tokens=30)
        [out] = generate(model, PROMPT, drafter=Oracle(text, length), max_new_tokens=30)
        check(out, plain)
        if out.finish == "eos":
            assert out.ids.index(eos) == len(out.ids) - 1
            places.add(out.sources[-1])
    assert "model" in places
    assert length == 1 or places == {"draft", "model"}


def test_several_ends_of_a_text_the_first_counts(lm, text):
    some = text[5], text[9], text[12]
    [plain] = generate(ending(lm, *some), PROMPT, max_new_tokens=30)
    [out] = generate(ending(lm, *some), PROMPT, drafter=Oracle(text, 7), max_new_tokens=30)
    check(out, plain)
    assert out.ids[-1] in some
    assert not set(out.ids[:-1]) & set(some)


@given(
    new=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    before=st.integers(0, 4),
    budget=st.integers(5, 12),
    eos=st.sets(st.integers(0, 5), max_size=2),
)
def test_tokens_are_taken_over_as_a_plain_decoder_would(new, before, budget, eos):
    """One by one or all at once: same ids, same finish."""
    model = ending(tiny(vocab_size=6, layers=1), *eos)
    whole, single = Generation([0]), Generation([0])
    for out in (whole, single):
        out.ids += [9] * before
        out.sources += ["model"] * before
    at_once = _append(model, whole, new, ["draft"] * len(new), (), budget)
    one_by_one = any(_append(model, single, [token], ["draft"], (), budget) for token in new)
    assert (whole.ids, whole.finish, at_once) == (single.ids, single.finish, one_by_one)
    assert len(whole.ids) == len(whole.sources) <= budget


def test_no_tokens_cost_nothing(lm):
    [out] = generate(lm, PROMPT, max_new_tokens=0)
    assert (out.ids, out.steps, out.forwards, out.tokens_per_forward, out.text) == ([], [], 0, 0, "")


def test_one_token_needs_no_step(lm, text):
    [out] = generate(lm, PROMPT, drafter=Lookup(), max_new_tokens=1)
    assert (out.ids, out.forwards, out.steps, out.sources) == (text[3:4], 1, [], ["model"])


def test_the_figures_add_up(lm, text):
    [out] = generate(lm, PROMPT, drafter=Oracle(text, 3), max_new_tokens=17)
    assert len(out.ids) == 1 + sum(step.accepted + 1 for step in out.steps)
    assert [step.accepted for step in out.steps] == [3, 3, 3, 3]
    assert out.sources == ["model"] + ["draft", "draft", "draft", "model"] * 4
    assert out.tokens_per_forward == 17 / 5
    assert 0 <= out.draft_seconds <= sum(step.seconds for step in out.steps) <= out.seconds


def test_several_prompts_are_as_many_runs(lm):
    prompts = [[1], (2, 3, 4), [5, 6], range(7, 10)]
    together = generate(lm, prompts, max_new_tokens=10)
    alone = [generate(lm, list(p), max_new_tokens=10)[0] for p in prompts]
    assert [out.ids for out in together] == [out.ids for out in alone]
    assert generate(lm, []) == []


@pytest.mark.parametrize("drafter", [Plain(), Lookup(), SpecTr(K=2, L=2)], ids=lambda d: type(d).__name__)
def test_a_seed_fixes_the_text(lm, drafter):
    draft, hot = tiny(vocab_size=16, layers=1, seed=4), Sampling(1.5)

    def run(seed):
        outs = generate(lm, [PROMPT, PROMPT], drafter=drafter, draft=draft, sampling=hot, seed=seed, max_new_tokens=20)
        return [out.ids for out in outs]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(1)[0] != run(1)[1]  # each prompt has its own random numbers


def test_a_state_goes_on_with_what_it_has_learned():
    """The same prompt again with a hot table: same text, fewer forwards; a cold one in between is not disturbed."""
    lm, drafter = tiny(vocab_size=200), TokenRecycling(30)
    state = drafter.start(lm)
    first, again = (generate(lm, PROMPT, drafter=drafter, state=state, max_new_tokens=40)[0] for _ in range(2))
    [cold] = generate(lm, PROMPT, drafter=drafter, max_new_tokens=40)
    assert first.ids == again.ids == cold.ids
    assert again.forwards < first.forwards == cold.forwards


def test_a_draft_session_serves_one_text_after_another(lm):
    draft, drafter = tiny(vocab_size=16, layers=1, seed=3), Chain(4)
    state = drafter.start(lm, draft)
    for prompt in ([1, 2], [1, 2, 3], [7], [1, 2]):
        [out] = generate(lm, prompt, drafter=drafter, state=state, max_new_tokens=20)
        assert out.ids == generate(lm, prompt, max_new_tokens=20)[0].ids
        assert out.forwards == 5  # the draft is the target: all four are accepted every time


def test_progress_tells_tokens(lm):
    seen = []
    generate(lm, PROMPT, max_new_tokens=5, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 5) for n in range(1, 6)]


# Text: a byte-level tokenizer, so that one character takes up to four tokens.

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def speaker() -> LM:
    """A model over bytes. Its greedy text is whatever its random weights say; tests of text put words into its mouth."""
    inner = Tokenizer(BPE({c: i for i, c in enumerate(BYTES)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return LM(
        tiny(vocab_size=256, layers=1, hidden_size=16).model, PreTrainedTokenizerFast(tokenizer_object=inner), "bytes"
    )


@pytest.fixture
def says(speaker, monkeypatch):
    """Make the model say a text: its logits are replaced by the next byte of the script, whatever the tree."""

    def script(words: str) -> list[int]:
        from locum.models import Session

        ids = speaker.encode(words)

        def one_hot(at: int) -> torch.Tensor:
            row = torch.zeros(256)
            row[ids[at] if at < len(ids) else 0] = 9.0
            return row

        prefill, extend = Session.prefill, Session.extend

        def prefilled(self, tokens, observe=None):
            prefill(self, tokens, observe)
            self.prompt = self.length
            return one_hot(0)

        def extended(self, tokens, parents):
            extend(self, tokens, parents)
            depth = []
            for node in range(len(tokens)):
                depth.append(1 + (depth[parents[node]] if parents[node] >= 0 else 0))
            return torch.stack([one_hot(self.length - self.prompt + d) for d in depth])

        monkeypatch.setattr(Session, "prefill", prefilled)
        monkeypatch.setattr(Session, "extend", extended)
        return ids

    return script


def oracle(speaker: LM, ids: list[int], prompt: str, length: int) -> Oracle:
    return Oracle(speaker.encode(prompt) + ids, length)


@pytest.mark.parametrize("length", [0, 1, 3, 8])
@pytest.mark.parametrize("words", ["plain ascii", "größer 日本語 🎉 end", "é", "🎉🎉"])
def test_the_pieces_of_a_stream_add_up(speaker, says, words, length):
    ids, pieces = says(words), []
    [out] = generate(
        speaker, "go", drafter=oracle(speaker, ids, "go", length), max_new_tokens=len(ids), stream=pieces.append
    )
    assert "".join(pieces) == out.text == words
    assert all(pieces)
    assert not any("\ufffd" in piece for piece in pieces)  # never half a character


def test_a_text_cut_inside_a_character_streams_the_whole_of_what_there_is(speaker, says):
    ids, pieces = says("a🎉"), []
    [out] = generate(speaker, "go", max_new_tokens=len(ids) - 1, stream=pieces.append)
    assert "".join(pieces) == out.text
    assert out.text.startswith("a")


@pytest.mark.parametrize("length", [0, 1, 2, 5, 30])
@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        (["STOP"], "one two é🎉 "),
        ("STOP", "one two é🎉 "),
        (["é"], "one two "),
        (["🎉"], "one two é"),
        (["three", "two"], "one "),
        (["e t"], "on"),
        (["o"], ""),
        (["not there"], "one two é🎉 STOP three"),
    ],
    ids=str,
)
def test_a_stop_string_anywhere(speaker, says, stop, kept, length):
    words, pieces = "one two é🎉 STOP three", []
    ids = says(words)
    common = {"max_new_tokens": len(ids), "stop": stop}
    [plain] = generate(speaker, "go", **common)
    [out] = generate(speaker, "go", drafter=oracle(speaker, ids, "go", length), stream=pieces.append, **common)
    check(out, plain)
    assert out.text == "".join(pieces) == kept
    assert out.finish == ("length" if kept == words else "stop")


def test_the_prompt_does_not_count_as_a_stop(speaker, says):
    ids = says("on and on")
    [out] = generate(speaker, "STOP", max_new_tokens=len(ids), stop=["STOP"])
    assert (out.text, out.finish) == ("on and on", "length")


def test_chat_uses_the_template(speaker, says):
    ids = says("yes")
    tokenizer = speaker.tokenizer
    tokenizer.chat_template = "<{{ messages[0]['content'] }}>"
    try:
        [out] = generate(speaker, "hi", chat=True, max_new_tokens=len(ids))
        assert out.prompt_ids == speaker.encode("<hi>")
        assert generate(speaker, "hi", max_new_tokens=0)[0].prompt_ids == speaker.encode("hi")
    finally:
        tokenizer.chat_template = None


BAD = {
    "empty prompt": ({"prompts": [[]]}, "a prompt must hold at least one token"),
    "token below": ({"prompts": [-1]}, "token -1 is outside the vocabulary"),
    "token above": ({"prompts": [3, 16]}, "token 16 is outside the vocabulary of model .*, which has 16 tokens"),
    "too long": ({"prompts": [1] * 4000}, "a prompt of 4000 tokens and 128 new ones exceed the 4096 positions"),
    "text without tokenizer": ({"prompts": "text"}, "has no tokenizer"),
    "negative budget": ({"max_new_tokens": -1}, "max_new_tokens must be >= 0, got -1"),
    "stop without tokenizer": ({"stop": ["x"]}, "stop strings need a tokenizer"),
    "empty stop": ({"stop": ["x", ""]}, "a stop string must not be empty"),
    "no draft": ({"drafter": Chain()}, "drafter Chain needs a draft model"),
    "foreign draft": ({"drafter": Chain(), "draft": tiny(vocab_size=17)}, "17 tokens and model .* has 16"),
    "negative seed": ({"seed": -1}, "seed must be"),
}


@pytest.mark.parametrize(("kwargs", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_sentence(lm, kwargs, said):
    with pytest.raises(UserError, match=said) as caught:
        generate(lm, **{"prompts": PROMPT} | kwargs)
    assert "\n" not in str(caught.value)


def test_bad_input_is_seen_before_anything_runs(lm):
    with pytest.raises(UserError, match="token 99"):
        generate(
            lm, [PROMPT, [99]], stream=lambda piece: pytest.fail("began"), progress=lambda *_: pytest.fail("began")
        )


@settings(max_examples=30)
@given(prompt=st.lists(st.integers(0, 15), min_size=1, max_size=6), length=st.integers(0, 9), n=st.integers(0, 25))
def test_any_prompt_any_length(lm, prompt, length, n):
    [plain] = generate(lm, prompt, max_new_tokens=n)
    for drafter in (Oracle(prompt + plain.ids, length), Oracle(prompt + plain.ids, length, wrong=True), Lookup(length)):
        [out] = generate(lm, prompt, drafter=drafter, max_new_tokens=n)
        assert (out.ids, out.finish) == (plain.ids, plain.finish)


def test_tree_parts():
    tree = Tree.merge(7, [[1, 2], [1, 3], [1, 2], [4]])
    assert (tree.tokens, tree.parents, tree.counts) == ([7, 1, 2, 3, 4], [-1, 0, 1, 1, 0], [4, 3, 2, 1, 1])
    assert (len(tree), tree.children) == (4, [[1, 4], [2, 3], [], [], []])
    assert [tree.follow(t) for t in ([1, 3, 9], [4], [9], [])] == [[1, 3], [4], [], []]
    assert list(itertools.pairwise(Tree.chain(7, [1, 2]).parents)) == [(-1, 0), (0, 1)]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)], ids=["greedy", "sampled"])
def test_nan_stops_where_it_starts(sampling):
    lm = tiny(vocab_size=8)
    with torch.no_grad():
        lm.model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="logits hold NaN"):
        generate(lm, [1, 2], sampling=sampling, max_new_tokens=4)
