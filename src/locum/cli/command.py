"""What the commands share: reading arguments into a dataclass, one JSON document, tables that fit 100 columns."""

import contextlib
import io
import json
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from locum.errors import UserError

__all__ = ["Command", "calm", "console", "emit", "quiet_stdout", "read", "table", "told"]

T = TypeVar("T")
WIDTH = 100


class Command:
    """A command is a frozen dataclass: its fields are its arguments, `run` does the work."""

    name: ClassVar[str]

    @classmethod
    def read(cls, args: Sequence[str]) -> "Command":
        """The command that the arguments after its name describe."""
        return read(cls, cls.name, args)

    def run(self) -> int:
        raise NotImplementedError


def read(cls: Callable[..., T], name: str, args: Sequence[str]) -> T:
    """Arguments as a dataclass, or as the arguments of a function.

    Raises:
        UserError: for arguments that do not fit, in one sentence.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
            return tyro.cli(cls, prog=f"locum {name}", args=list(args), config=config)
    except SystemExit as stop:
        if not stop.code:
            raise
        cause = stop.__context__
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__context__
        raise cause or UserError(f"{_sentence(said.getvalue())} (see locum {name} --help)") from None


def _sentence(box: str) -> str:
    """What the parser says in the frame that it draws around an error: the first part after the frame's title."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        inner = line.strip().strip("│|").strip()
        if line.lstrip().startswith("╰"):
            continue
        if line.lstrip().startswith("╭") or not set(inner) - {"─", "-"}:  # the title in the frame, or a rule below it
            parts.append([])
        else:
            parts[-1].append(inner)
    sentence = " ".join(parts[1] if len(parts) > 1 else []).replace(" (required)", "").rstrip(" .:")
    return sentence[:1].lower() + sentence[1:] if sentence else "these arguments do not fit"


def console() -> Console:
    """Standard output, at most 100 columns wide."""
    return Console(width=min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns), highlight=False)


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table; its cells wrap."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for column in columns:
        made.add_column(column, overflow="fold", ratio=None)
    return made


def emit(document: Any) -> None:
    """The one JSON document on standard output."""
    print(json.dumps(document, ensure_ascii=False, indent=2))


@contextlib.contextmanager
def quiet_stdout(quiet: bool) -> Iterator[None]:
    """While `quiet`, whatever is printed goes to standard error, so that the JSON document stays alone."""
    with contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext():
        yield


def calm(family: str) -> None:
    """transformers tells much that no user of the command line needs; what a family tells is heard."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger(family).setLevel(logging.INFO)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Warnings that are for users, a line each on standard error; others are not heard."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"locum: {' '.join(str(message).split())}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield
