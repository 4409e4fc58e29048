"""The command line. What each command takes is a dataclass; it is imported when it is called, so that help is quick."""

import importlib
import os
import sys
from collections.abc import Sequence

from locum.errors import UserError, unknown

__all__ = ["main"]

# command: (module, class, what it does)
COMMANDS = {
    "papers": ("catalogue", "Papers", "the catalogue: what is expensive, what stands in, how to check it, what works"),
    "show": ("catalogue", "Show", "one method: its equations in words, parameters, citation, last verified claim"),
    "cite": ("catalogue", "Cite", "the citations of papers as BibTeX"),
    "verify": ("bench", "Verify", "run papers' claims here and now: claimed, measured, verdict"),
    "compare": ("bench", "Compare", "methods of a family side by side, on your model and data or on what ships"),
    "decode": ("decode", "Decode", "continue a text with one method"),
    "align": ("align", "Align", "train a model on preference pairs with one method"),
    "reinforce": ("reinforce", "Reinforce", "train a model on problems with checkable answers, by a recipe"),
    "infer": (
        "infer",
        "Infer",
        "regress on labels that a model made, draw those to check, fit a variational program",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a mistake of the user's, 130 for Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    try:
        code = _run([a for a in args if a != "--debug"])
        sys.stdout.flush()
        return code
    except UserError as error:
        if debug:
            raise
        print(f"locum: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("locum: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug or error.filename is None:
            raise
        print(f"locum: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if args[0] in ("-V", "--version"):
        import locum

        print(f"locum {locum.__version__}")
        return 0
    if args[0] not in COMMANDS:
        raise unknown("command", args[0], COMMANDS)
    module, cls, _ = COMMANDS[args[0]]
    command = getattr(importlib.import_module(f"locum.cli.{module}"), cls)
    return int(command.read(args[1:]).run())


def _help() -> str:
    lines = [
        "usage: locum COMMAND ...",
        "",
        "Published methods that put something cheap in the place of something expensive.",
        "",
    ]
    lines += [f"  {name:<9} {what}" for name, (_, _, what) in COMMANDS.items()]
    lines += [
        "",
        "  locum COMMAND --help  what a command takes",
        "  --json                one JSON document on stdout, everything else on stderr",
        "  --debug               show where an error comes from",
        "  --version",
    ]
    return "\n".join(lines)
