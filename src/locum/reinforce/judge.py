"""Asking a reward, which is somebody else's code: it may fail, hang, or give something that is no reward.

A batch is asked for in one call, in a thread of its own with a time limit. Where that call fails, its rows are asked for
one by one, all at once under one more limit, so that the guilty ones are found and named. A guilty row has the reward nan.

A thread that hangs cannot be ended: it is left behind. One that hangs inside a single operation of a C library may hold
Python's lock, and then no limit of another thread is noticed; work like that belongs into a process, as the shipped
`MathAnswer` does it.
"""

import inspect
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locum.errors import UserError
from locum.method import require

__all__ = ["Judge", "Judged", "RewardError", "RowProblem"]

SHOWN = 80  # characters of a completion in a message
NAMED = 3  # rows that an error names

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowProblem:
    """Why a row has no reward.

    Args:
        row: its number in the batch, from 0.
        what: what happened, as the rest of a sentence that begins with the reward's name.
        prompt, completion: what the reward was given.
    """

    row: int
    what: str
    prompt: str
    completion: str


@dataclass(frozen=True, eq=False)
class Judged:
    """The rewards of a batch, nan in the rows that `problems` names."""

    rewards: Float[Tensor, " rows"]
    problems: list[RowProblem]


class RewardError(UserError):
    """A reward failed and the run stops. `judged` is what was found out until then."""

    def __init__(self, message: str, judged: Judged) -> None:
        super().__init__(message)
        self.judged = judged

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.judged)


@dataclass(frozen=True)
class Judge:
    """A reward, asked with care.

    Args:
        reward: ``(prompts, completions, **columns) -> list of floats``, a plain function or an object that can be called.
        limit_s: seconds that a call may take, > 0; twice as much passes where rows are asked for one by one.
        on_error: "stop" raises where a row has no reward; "skip" goes on, and the row's reward is nan.
    """

    reward: Callable[..., Any]
    limit_s: float = 60.0
    on_error: str = "stop"

    def __post_init__(self) -> None:
        require(self, "limit_s", 0 < self.limit_s < math.inf, "> 0 and finite")
        require(self, "on_error", self.on_error in ("stop", "skip"), '"stop" or "skip"')
        require(self, "reward", callable(self.reward), "a function (prompts, completions, **columns) -> list of floats")
        code = self.reward if inspect.isroutine(self.reward) else type(self.reward).__call__
        later = inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction
        plain = not any(is_one(code) for is_one in later)
        require(self, "reward", plain, "a plain function that returns a list, neither async nor a generator")

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Judged:
        """The rewards of a batch.

        Raises: RewardError, with what was found out, for a row without a reward under "stop"; and under either for rows of
            which none has one, for an infinite reward, and for a wrong number of rewards that no single row explains.
        """
        for name, column in {"completions": completions, **columns}.items():
            if len(column) != len(prompts):
                raise UserError(f"{name} has {len(column)} rows and there are {len(prompts)} prompts")
        if not prompts:
            return Judged(torch.empty(0), [])
        rows = range(len(prompts))
        given = self._ask([list(rows)], prompts, completions, columns)[0]
        whole = given if isinstance(given, _Failure) else None
        if isinstance(given, _Failure):
            found: list[float | _Failure] = [given]
            if len(rows) > 1:
                log.warning("%s %s; asking for its %d rows one by one", self._name, given.what, len(rows))
                alone = self._ask([[i] for i in rows], prompts, completions, columns)
                found = [a if isinstance(a, _Failure) else a[0] for a in alone]
        else:
            found = given
        problems = [
            RowProblem(i, r.what, prompts[i], completions[i]) for i, r in enumerate(found) if isinstance(r, _Failure)
        ]
        for p in problems:
            log.warning("%s, row %d: %s; its completion begins %r", self._name, p.row, p.what, p.completion[:SHOWN])
        judged = Judged(torch.tensor([math.nan if isinstance(r, _Failure) else r for r in found]), problems)
        if why := self._fatal(whole, found):
            at_once = f"; asked for all at once it {whole.what}" if whole and len(rows) > 1 else ""
            raise RewardError(f"{self._name} {why}{at_once}", judged)
        return judged

    @property
    def _name(self) -> str:
        return f"the reward {getattr(self.reward, '__name__', type(self.reward).__name__)}"

    def _fatal(self, whole: "_Failure | None", found: "Sequence[float | _Failure]") -> str:
        """Why the run must stop, as the rest of a sentence that begins with the reward; "" if it need not."""
        failed = {i: r for i, r in enumerate(found) if isinstance(r, _Failure)}
        if not failed:
            return "gives each row one reward, but not all of them together" if whole and whole.count else ""
        if self.on_error == "skip" and len(failed) < len(found) and not any(r.endless for r in failed.values()):
            return ""
        named = "; ".join(f"row {i} {r.what}" for i, r in list(failed.items())[:NAMED])
        rest = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
        return f"failed in {len(failed)} of {len(found)} rows: {named}{rest}"

    def _ask(
        self,
        calls: Sequence[Sequence[int]],
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> "list[list[float | _Failure] | _Failure]":
        """The rewards of some rows each, all calls at once, under one limit."""
        late = _Failure(f"took longer than {self.limit_s:g} s")
        outcomes: list[list[float | _Failure] | _Failure] = [late] * len(calls)
        device = torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

        def call(n: int) -> None:
            if device is not None:
                torch.cuda.set_device(device)  # a new thread begins on the first one
            rows = calls[n]
            try:
                with torch.no_grad():
                    # Lists of their own: a reward may change what it is given.
                    given = self.reward(
                        [prompts[i] for i in rows],
                        [completions[i] for i in rows],
                        **{name: [column[i] for i in rows] for name, column in columns.items()},
                    )
                    outcomes[n] = _rewards(given, len(rows))
            except BaseException as error:  # a reward that ends the program ends its thread alone
                outcomes[n] = _Failure(f"raised {type(error).__name__}: {_short(error)}")

        threads = [threading.Thread(target=call, args=(n,), name="reward", daemon=True) for n in range(len(calls))]
        end = time.monotonic() + self.limit_s
        try:
            for thread in threads:
                thread.start()
        except RuntimeError as error:  # the system gives no more threads
            outcomes[:] = [_Failure(f"could not be asked: {_short(error)}") if o is late else o for o in outcomes]
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, end - time.monotonic()))
        return list(outcomes)  # what comes later is not seen


@dataclass(frozen=True)
class _Failure:
    """What went wrong, for a row or for a call; `count`: the number of rewards was wrong; `endless`: the reward is infinite."""

    what: str
    count: bool = False
    endless: bool = False


def _rewards(given: Any, rows: int) -> "list[float | _Failure] | _Failure":
    """What a reward returned, as a number or a failure per row."""
    if inspect.isgenerator(given) or inspect.iscoroutine(given) or inspect.isasyncgen(given):
        if inspect.iscoroutine(given):
            given.close()
        return _Failure(f"returned a {type(given).__name__}, and it must return a list of numbers")
    if hasattr(given, "tolist"):  # a tensor or an array
        given = given.tolist()
    if not isinstance(given, list | tuple):
        return _Failure(f"returned {_kind(given)}, and it must return a list of numbers")
    if len(given) != rows:
        return _Failure(f"returned {len(given)} rewards for {rows} row{'s' * (rows != 1)}", count=True)
    return [_number(value) for value in given]


def _number(value: Any) -> "float | _Failure":
    if value is None:
        return _Failure("gave None")
    if isinstance(value, str | bytes | complex) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        return _Failure(f"gave {_kind(value)}, which is no number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except Exception:
        return _Failure(f"gave {_kind(value)}, which is no number")
    if math.isnan(number):
        return _Failure("gave nan")
    if math.isinf(torch.tensor(number, dtype=torch.float32).item()):
        return _Failure(f"gave {number}, and rewards must be finite", endless=True)
    return number


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {' '.join(repr(value).split())[:SHOWN]}"


def _short(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:200]
