"""Grading answers in a process of its own: reads a question per line and writes a line of JSON for each.

Why apart: an answer such as ``9^{9^9}`` keeps a computer-algebra system busy for hours inside one long multiplication, and
no thread or signal of the same Python ends that. A process can be ended. `locum.reinforce.apart` starts this file as a
script and asks it; so it imports nothing of Locum.

What a model wrote is never executed. reasoning-gym's graders hand some answers to ``eval`` and to sympy's parser, which is
``eval`` too; in this process both are replaced by ones that know numbers, containers, arithmetic and elementary functions.
"""

import ast
import functools
import json
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["final_answer", "last_boxed", "packed", "unpacked"]

MEMORY = 4 << 30  # bytes that grading may take beside what the libraries take

Grade = Callable[[], float]


# ------------------------------------------------------------------------------------------------ where the answer stands


def last_tag(text: str, tag: str = "answer") -> str | None:
    """What stands in the last <tag>...</tag>; None without one."""
    end = text.rfind(f"</{tag}>")
    begin = text.rfind(f"<{tag}>", 0, max(end, 0))
    return None if begin < 0 else text[begin + len(tag) + 2 : end]


def final_answer(text: str) -> str:
    """The last <answer>, else what stands behind the last "####", else the whole text."""
    tagged = last_tag(text)
    return text.rsplit("####", 1)[-1] if tagged is None else tagged


def last_boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}`` whose braces are closed; None without one."""
    for begin in reversed([m.end() for m in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth = 1
        for i in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0) if text[i - 1] != "\\" else 0
            if not depth:
                return text[begin:i]
    return None


# ------------------------------------------------------------------------------------------------------------ mathematics

NUMBER = re.compile(r"([+-]?)(\d{1,3}(?:[, ]\d{3})+|\d+|(?=\.\d))(\.\d+)?(?:[eE]([+-]?\d{1,3}))?")
DELIMITED = re.compile(r"\$|\\\(|\\\[|\\begin\{")
WORD = re.compile(r"\b[^\W\d_]{4,}\b")  # shorter ones may be products of variables
COMMAND = re.compile(r"\\(?:text|mathrm|mbox|textbf)\s*\{[^{}]*\}|\\[A-Za-z]+")
PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])")
FUNCTIONS = frozenset(
    """sqrt exp log ln sin cos tan cot sec csc asin acos atan acot asec acsc arcsin arccos arctan sinh cosh tanh coth asinh acosh
    atanh abs Abs floor ceiling gamma beta erf Si Ci li Ei pi oo inf alpha theta lamda mu phi omega binomial factorial gcd lcm
    min max Min Max Rational Integer Float""".split()  # noqa: SIM905
)


def math_grade(gold: str, completion: str) -> Grade:
    """1.0 where the completion's final answer is the gold one, whatever form either is written in."""
    _math_verify()
    return functools.partial(_math, gold, completion)


def _math(gold: str, completion: str) -> float:
    want, got = _answer(gold), _answer(completion)
    return 1.0 if want and want.split() == got.split() else _same(_latex(want), _latex(got))


def _answer(text: str) -> str:
    """What an answer is read from: its last box, or all that may hold it."""
    answer = final_answer(text)
    boxed = last_boxed(answer)
    return (answer if boxed is None else boxed).strip("* \t\r\n")


@functools.lru_cache(100_000)  # the completions of one problem give few different answers
def _same(want: str, got: str) -> float:
    parse, verify = _math_verify()
    gold = parse(want, parsing_timeout=None)
    if not any(not isinstance(x, str) for x in gold):
        raise ValueError(f"the answer {want!r} cannot be read as mathematics")
    return float(verify(gold, parse(got, parsing_timeout=None), timeout_seconds=None))


def _latex(text: str) -> str:
    """An answer that stands alone, in the form in which math-verify finds it; running text as it is."""
    if not text or "\n" in text or DELIMITED.search(text):
        return text
    if number := NUMBER.fullmatch(text):
        sign, whole, part, power = number.groups(default="")
        digits = re.sub("[, ]", "", whole) or "0"
        return f"${sign}{_shifted(digits, part[1:], int(power))}$" if power else f"${sign}{digits}{part}$"
    if len(text) > 1 and text.isalpha() and text not in FUNCTIONS:
        return f"$\\text{{{text}}}$"
    words = set(WORD.findall(COMMAND.sub(" ", text))) - FUNCTIONS
    return text if words else "$" + PI.sub(r"\\pi", text.replace("**", "^")) + "$"


def _shifted(digits: str, part: str, power: int) -> str:
    """digits.part * 10^power, written out: math-verify reads the e of 1e-3 as Euler's number."""
    places = power - len(part)
    number = digits + part
    if places >= 0:
        return number + "0" * places
    number = number.rjust(1 - places, "0")
    return f"{number[:places]}.{number[places:]}"


@functools.cache
def _math_verify() -> tuple[Callable[..., list[Any]], Callable[..., bool]]:
    from math_verify import parse, verify

    verify(
        parse("$1/2$", parsing_timeout=None), parse("0.5", parsing_timeout=None), timeout_seconds=None
    )  # builds its tables
    return parse, verify


# ---------------------------------------------------------------------------------------------------------- reasoning-gym


def gym_grade(dataset: str, entry: Any, answer: str) -> Grade:
    """reasoning-gym's own score of an answer, under the settings that the problem was made with."""
    whole = unpacked(entry)
    if not isinstance(whole, dict) or "metadata" not in whole:
        raise ValueError("the entry must be reasoning-gym's, an object with question, answer and metadata")
    made_by = whole["metadata"].get("source_dataset", dataset)
    if made_by != dataset:
        raise ValueError(f"the entry is a problem of {made_by!r}, not of {dataset!r}")
    config = json.dumps(packed(whole.pop("config", {})), sort_keys=True)
    return functools.partial(_gym, _dataset(dataset, config), whole, answer)


def _gym(dataset: Any, entry: dict[str, Any], answer: str) -> float:
    try:
        return float(dataset.score_answer(answer, entry))
    except Exception:  # some graders fail on an answer in the wrong form, which is a wrong answer ...
        try:
            dataset.score_answer(entry["answer"], entry)  # ... if they can grade the right one
        except Exception as error:
            raise ValueError(f"the entry cannot be graded ({type(error).__name__}: {error})") from None
        return 0.0


@functools.lru_cache(64)
def _dataset(name: str, config: str) -> Any:
    return _reasoning_gym().create_dataset(name, **{"size": 1, "seed": 0} | unpacked(json.loads(config)))


@functools.cache
def _reasoning_gym() -> Any:
    import sympy
    from sympy.parsing import sympy_parser

    sympy.parse_expr = sympy_parser.parse_expr = functools.partial(parsed_safely, sympy_parser.parse_expr)
    import reasoning_gym

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "reasoning_gym":
            vars(module).update(eval=evaluated_safely, exec=_refused)
    return reasoning_gym


def evaluated_safely(text: str) -> Any:
    """The value of an expression of literals, containers and arithmetic. Raises: ValueError for anything else."""
    tree = ast.parse(text.strip(), mode="eval")
    known = (ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Load)
    if not all(isinstance(n, (*known, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)) for n in ast.walk(tree)):
        return _refused()
    return eval(compile(tree, "answer", "eval"), {"__builtins__": {}})


def parsed_safely(parse: Callable[..., Any], text: str, *args: Any, **settings: Any) -> Any:
    """sympy's parser on a formula of numbers, elementary functions and names of one letter. Raises: ValueError otherwise."""
    given = settings.get("local_dict") or (args[0] if args else None) or {}
    named = all(
        re.fullmatch(r"[A-Za-z]\d*", n) or n in FUNCTIONS or n in given for n in re.findall(r"[^\W\d]\w*", text)
    )
    if not named or re.search(r"[^\w\s+\-*/^(),.!%<>]|\.\s*[^\W\d]", re.sub(r"(?<=\d)[eE](?=[+-]?\d)", "0", text)):
        return _refused()
    return parse(text, *args, **settings)


def _refused(*_: Any) -> Any:
    raise ValueError("only numbers, containers and arithmetic are evaluated")


def packed(value: Any) -> Any:
    """A value as JSON that keeps what JSON would change: tuples, and keys that are no texts."""
    if isinstance(value, tuple):
        return {"__tuple__": [packed(v) for v in value]}
    if isinstance(value, list):
        return [packed(v) for v in value]
    if isinstance(value, dict):
        if all(isinstance(k, str) for k in value):
            return {k: packed(v) for k, v in value.items()}
        return {"__pairs__": [[packed(k), packed(v)] for k, v in value.items()]}
    return value


def unpacked(value: Any) -> Any:
    """The value that was packed."""
    if isinstance(value, list):
        return [unpacked(v) for v in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__tuple__"}:
        return tuple(unpacked(v) for v in value["__tuple__"])
    if value.keys() == {"__pairs__"}:
        return {unpacked(k): unpacked(v) for k, v in value["__pairs__"]}
    return {k: unpacked(v) for k, v in value.items()}


# ------------------------------------------------------------------------------------------------------------ the process

KINDS: dict[str, Callable[..., Grade]] = {"math": math_grade, "gym": gym_grade}


def serve() -> None:
    """Two lines per question: "ready" when libraries and data are loaded and the time begins to count, then the outcome."""
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks
    told = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # graders print

    def tell(outcome: object) -> None:
        print(json.dumps(outcome), file=told, flush=True)

    for line in sys.stdin:
        kind, *question = json.loads(line)
        try:
            grade = KINDS[kind](*question)
            _bound_memory()
            tell("ready")
            reward = grade()
            tell({"reward": reward if math.isfinite(reward) else repr(reward)})
        except Exception as error:
            tell({"error": (str(error).strip() or type(error).__name__).splitlines()[0]})


@functools.cache
def _bound_memory() -> None:
    try:
        import resource

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = now + MEMORY if hard == resource.RLIM_INFINITY else min(now + MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    except (ImportError, OSError, ValueError):  # not everywhere; the time limit holds all the same
        pass


if __name__ == "__main__":
    serve()
