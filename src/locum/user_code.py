"""Python that a user names on the command line: a module, or a file. Loading it runs it; name nothing here that comes from data."""

import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from locum.errors import UserError

__all__ = ["blamed", "load_code"]


def load_code(where: str, what: str, form: str = "path/to/file.py") -> ModuleType:
    """The module of a file (where it ends with .py) or of a dotted name.

    Args:
        where: as the user wrote it.
        what: what it is for, as errors say it: "the reward".
        form: how a file is named there.

    Raises:
        UserError: where there is none, or its code fails.
    """
    if not where.endswith(".py"):
        try:
            with blamed(where, what):
                return importlib.import_module(where)
        except ModuleNotFoundError:
            raise UserError(f"module {where!r} of {what} is not installed; name a file as {form}") from None
    path = Path(where)
    if not path.is_file():
        raise UserError(f"file {where!r} of {what} does not exist")
    name = f"{what.split()[-1]}_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    with blamed(where, what):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def blamed(where: str, what: str, calls: bool = False) -> Iterator[None]:
    """Errors of the user's own code, in one sentence with the line; --debug shows where they come from.

    Passed on as they are: errors of users, and that `where` itself is no module.

    Args:
        calls: our code runs here, and calls the user's: errors that do not come through that are our own.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{where}.".startswith(f"{error.name}."):
            raise
        if isinstance(error, SyntaxError):
            line, said = error.lineno, error.msg
        else:
            stem = where if where.endswith(".py") else where.replace(".", "/") + ".py"
            own = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(stem)]
            if calls and not own:
                raise
            line, said = (own[-1] if own else None), str(error)
        at = f"{where}, line {line}" if line is not None else where
        text = " ".join(said.split("\n\n")[0].split())
        raise UserError(f"{what} fails ({at}): {type(error).__name__}: {text}".rstrip(": ")) from error
