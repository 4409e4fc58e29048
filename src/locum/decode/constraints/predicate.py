"""Any Python function as a constraint: the black box for which adaptive rejection sampling was made."""

from collections.abc import Callable
from dataclasses import dataclass

from locum.decode.constraints.base import Constraint, State


def whole_characters(text: bytes) -> str | None:
    """The text without a UTF-8 character that is cut off at its end; None if no continuation makes it UTF-8."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        cut_off = error.reason == "unexpected end of data"
        return text[: error.start].decode() if cut_off else None


@dataclass(frozen=True)
class Predicate(Constraint):
    """Texts for which a function says yes.

    `complete(text)` says whether a text is valid. `prefix(text)` says whether some valid text begins with it; it is
    asked once per token, never per byte. Without `prefix` there is hope for every beginning: the samples are still
    right, but only the end of a text tells whether it counted. A character cut in two is not shown to `prefix` until it
    is whole.

    The state is the bytes read so far.
    """

    complete_text: Callable[[str], bool]
    prefix: Callable[[str], bool] | None = None

    def start(self) -> State | None:
        return self._hopeful(b"")

    def advance(self, state: State, byte: int) -> State | None:
        return self.run(state, bytes([byte]))

    def run(self, state: State, text: bytes) -> State | None:
        assert isinstance(state, bytes)
        return self._hopeful(state + text)

    def complete(self, state: State) -> bool:
        assert isinstance(state, bytes)
        try:
            return bool(self.complete_text(state.decode()))
        except UnicodeDecodeError:
            return False

    def _hopeful(self, text: bytes) -> State | None:
        shown = whole_characters(text)
        hopeful = shown is not None and (self.prefix is None or self.prefix(shown))
        return text if hopeful else None
