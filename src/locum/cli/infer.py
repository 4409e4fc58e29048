"""``locum infer``: estimates with guarantees. The first argument is the method; the others are its own."""

import importlib
from collections.abc import Sequence
from typing import ClassVar

from locum.cli.command import Command, read
from locum.errors import UserError, unknown

__all__ = ["Infer"]

# method: (module, class, what it does)
METHODS = {
    "dsl": ("infer_dsl", "Dsl", "a regression on labels that a model made, valid because an expert made a random few"),
    "plan": ("infer_plan", "Plan", "draw the documents that an expert is to label, with known probabilities"),
    "progvi": ("infer_progvi", "Progvi", "fit a variational program of your own, with unbiased gradients"),
}


class Infer(Command):
    """Estimates with guarantees: reading it gives the command of the method that was named."""

    name: ClassVar[str] = "infer"

    @classmethod
    def read(cls, args: Sequence[str]) -> Command:
        if not args:
            raise UserError(f"say which method of infer: {', '.join(METHODS)}")
        if args[0] in ("-h", "--help"):
            lines = [f"  {name:<7} {what}" for name, (_, _, what) in METHODS.items()]
            more = ["", "  locum infer METHOD --help  what a method takes"]
            print("\n".join(["usage: locum infer METHOD ...", "", *lines, *more]))
            raise SystemExit(0)
        method, *rest = args
        if method not in METHODS:
            raise unknown("method of infer", method, METHODS)
        module, name, _ = METHODS[method]
        return read(getattr(importlib.import_module(f"locum.cli.{module}"), name), f"infer {method}", rest)
