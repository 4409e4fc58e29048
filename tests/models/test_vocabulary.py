"""Token ids to bytes, for byte-level and sentencepiece-like tokenizers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from locum.errors import UserError
from locum.models.vocabulary import Vocabulary


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the cat sat on the mat, naïve café", "über 猫 the the"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.add_tokens([AddedToken(" kept ", special=False)])
    return fast


BYTE_LEVEL = byte_level()


@given(st.text())
def test_byte_level_tokens_spell_any_text(text):
    vocabulary = Vocabulary.of(BYTE_LEVEL, len(BYTE_LEVEL))
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    assert vocabulary.text(ids) == text.encode()


def test_specials_and_padding_spell_nothing_and_added_words_spell_themselves():
    size = len(BYTE_LEVEL) + 5
    vocabulary = Vocabulary.of(BYTE_LEVEL, size)
    assert len(vocabulary) == size
    assert vocabulary.tokens[BYTE_LEVEL.eos_token_id] is None
    assert vocabulary.tokens[BYTE_LEVEL.convert_tokens_to_ids(" kept ")] == b" kept "
    assert set(vocabulary.tokens[-5:]) == {None}
    assert vocabulary.first[-1] == -1
    assert {t for t in vocabulary.tokens if t and len(t) == 1} == {bytes([b]) for b in range(256)}


def test_a_token_may_end_inside_a_character():
    vocabulary = Vocabulary.of(BYTE_LEVEL, len(BYTE_LEVEL))
    pieces = [vocabulary.tokens[i] for i in BYTE_LEVEL.encode("😀", add_special_tokens=False)]
    assert pieces == ["😀".encode()[i : i + 1] for i in range(4)]


def test_sentencepiece_blanks_and_byte_tokens():
    table = {"<unk>": 0, "</s>": 1, "\u2581the": 2, "<0x0A>": 3, "<0xE7>": 4, "猫": 5, "\u2581": 6}
    tokenizer = Tokenizer(models.BPE(table, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    assert Vocabulary.of(fast, 7).tokens == (None, None, b" the", b"\n", b"\xe7", "猫".encode(), b" ")


def test_other_kinds_are_refused():
    with pytest.raises(UserError, match="not a fast tokenizer"):
        Vocabulary.of("not a tokenizer", 5)
    pieces = Tokenizer(models.WordPiece({"a": 0, "##b": 1}))
    pieces.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match="got the decoder WordPiece"):
        Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=pieces), 2)
