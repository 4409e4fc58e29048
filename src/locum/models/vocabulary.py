"""What each token id spells, in bytes.

Constraints, text scores and comparisons across tokenizers need the bytes of a token, not its decoded text: a token may
end inside a UTF-8 character, and decoding tokens one by one loses blanks. The map is read off the tokenizer's own
files:

- byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM): each character of a token stands for one byte, by GPT-2's table;
- sentencepiece-like (Llama 2, Gemma, T5): U+2581 stands for a blank and <0x0A> for a byte.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from jaxtyping import Int16

from locum.errors import UserError

__all__ = ["Vocabulary"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_characters() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for characters from U+0100
    on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The bytes of every token.

    Args:
        tokens: id -> bytes; None where an id spells nothing: special tokens, unused ids, padding of the logits.
    """

    tokens: tuple[bytes | None, ...]

    @classmethod
    def of(cls, tokenizer: Any, size: int) -> "Vocabulary":
        """Read the map off a Hugging Face fast tokenizer.

        Args:
            size: number of logits, which may exceed the tokenizer's vocabulary.

        Raises: UserError for a tokenizer without the fast backend, or of a kind whose tokens do not spell bytes.
        """
        return _read(tokenizer, size, len(tokenizer))

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def first(self) -> Int16[np.ndarray, " vocab"]:
        """First byte of each token, -1 where it spells nothing."""
        return np.array([-1 if t is None else t[0] for t in self.tokens], np.int16)

    def text(self, ids: Sequence[int]) -> bytes:
        """What a sequence of tokens spells; ids that spell nothing are passed over."""
        return b"".join(self.tokens[i] or b"" for i in ids)


@lru_cache(maxsize=8)
def _read(tokenizer: Any, size: int, known: int) -> Vocabulary:
    """`Vocabulary.of`, remembered; `known` tells a tokenizer from itself with tokens added."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"tokenizer {type(tokenizer).__name__} is not a fast tokenizer, so its tokens' bytes are unknown"
        )
    decoder = json.loads(backend.to_str())["decoder"] or {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part}
    if "ByteLevel" in kinds:
        table = _byte_characters()
    elif kinds & {"ByteFallback", "Metaspace", "Replace"}:
        table = None
    else:
        name, found = type(tokenizer).__name__, ", ".join(sorted(kinds)) or "none"
        raise UserError(f"tokenizer {name} must decode byte-level or sentencepiece tokens, got the decoder {found}")
    tokens: list[bytes | None] = [None] * size
    for text, i in tokenizer.get_vocab().items():
        if i < size:
            tokens[i] = _spell(text, table)
    special = set(tokenizer.all_special_ids)
    for i, added in tokenizer.added_tokens_decoder.items():
        if i < size:
            tokens[i] = None if added.special or i in special else added.content.encode()
    for i in special:
        tokens[i] = None
    return Vocabulary(tuple(t or None for t in tokens))


def _spell(text: str, table: dict[str, int] | None) -> bytes:
    if table is None:
        byte = _BYTE_TOKEN.fullmatch(text)
        return bytes([int(byte[1], 16)]) if byte else text.replace("\u2581", " ").encode()
    # A character outside the table is no byte of a byte-level token: it was added by hand and stands for itself.
    return bytes(table[c] for c in text) if all(c in table for c in text) else text.encode()
