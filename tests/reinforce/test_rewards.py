"""Shipped rewards: forms of one answer, where an answer stands, and that nothing which a model wrote is executed or waited for."""

import importlib.util
import json
import math
import os
import threading
import time
from pathlib import Path

import pytest

from locum.errors import MissingExtra, UserError
from locum.reinforce import apart
from locum.reinforce.grader import evaluated_safely, last_boxed, packed, parsed_safely, unpacked
from locum.reinforce.problems import reasoning_gym_problems
from locum.reinforce.rewards import ExactAnswer, Format, MathAnswer, ReasoningGym, Weighted, from_name

THOUGHT = "<think>1 + 1</think><answer>2</answer>"


def math_of(pairs, **settings):
    """The rewards of (gold answer, completion) pairs."""
    gold, completions = map(list, zip(*pairs, strict=True))
    return MathAnswer(**{"workers": 1} | settings)(["?"] * len(gold), completions, answer=gold)


def one(reward, completion, **columns):
    return reward(["?"], [completion], **{name: [value] for name, value in columns.items()})[0]


# ---------------------------------------------------------------------------------------------------------- mathematics

SAME = [
    ("1/2", "0.5"),
    ("0.5", r"so it is \boxed{\frac{1}{2}}"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"Thus $x=\frac{1}{2}$."),
    ("1/2", r"\boxed{\dfrac12}"),
    ("-1/2", "-.5"),
    (0.5, r"\boxed{1/2}"),
    (1e-05, r"\boxed{0.00001}"),
    ("1e3", "1,000"),
    ("1 000 000", r"$10^6$"),
    ("1024", "2**10"),
    ("4", "2^(1+1)"),
    ("0.5", r"\boxed{50\%}"),
    ("x^2+1", r"<answer>1+x**2</answer>"),
    ("2xyz", r"\boxed{2zyx}"),
    ("sqrt(2)", r"\boxed{\sqrt{2}}"),
    ("2*pi", r"\boxed{2\pi}"),
    ("{1,2}", r"\boxed{2, 1}"),
    ("(1,2)", r"\boxed{(1, 2)}"),
    ("3", r"\boxed{x = 3}"),
    ("12", r"\boxed{12 \text{ cm}}"),
    ("even", r"\boxed{\text{even}}"),
    ("(A)", r"\boxed{A}"),
]
OTHER = [
    ("1/3", r"\boxed{0.333}"),
    ("2xyz", "2"),
    ("12", "1,2"),
    ("Paris", r"\boxed{pairs}"),
    ("7", ""),
    ("7", "no idea"),
    ("3.14", r"\boxed{3.14159}"),
]
PLACES = [
    (r"\boxed{1}, no: \boxed{2}", "2", "1"),
    (r"7 <answer>8</answer> 9", "8", "9"),
    (r"<answer>1</answer> or <answer>the result is \boxed{2}, not 3</answer>", "2", "3"),
    ("40 + 2\n#### 42\n", "42", "40"),
    (r"\boxed{4} and \boxed{5", "4", "5"),
    (r"\boxed{\frac{\{a\}}{2}} is not 2", r"\frac{\{a\}}{2}", "2"),
    ("The answer is 6.\n", "6", "5"),
    ("**6**", "6", "5"),
]


def test_forms_of_one_number_are_equal():
    assert math_of(SAME) == [1.0] * len(SAME)
    assert math_of([("So 6 * 7.\n#### 42", "42"), (r"Therefore $a = \boxed{42}$.", "42")]) == [1.0, 1.0]


def test_other_answers_are_wrong():
    assert math_of(OTHER) == [0.0] * len(OTHER)


def test_the_last_answer_counts_wherever_it_stands():
    assert math_of([(right, c) for c, right, _ in PLACES]) == [1.0] * len(PLACES)
    assert math_of([(wrong, c) for c, _, wrong in PLACES]) == [0.0] * len(PLACES)


def test_an_answer_that_is_no_mathematics_is_an_error_of_the_data():
    with pytest.raises(UserError, match="the answer 'Paris, France' cannot be read as mathematics"):
        math_of([("1", "1"), ("Paris, France", "1")])
    assert math_of([("Paris, France", r"\boxed{Paris,  France}")]) == [1.0]


def test_what_would_take_hours_is_wrong_in_seconds(caplog):
    """Each of these holds Python's lock in one multiplication: threads would wait for it."""
    endless = [r"\boxed{9^{9^{9^9}}}", r"\boxed{\binom{100000000}{50000000}}"]
    began = time.monotonic()
    assert math_of([("7", c) for c in [*endless, "7"]], limit_s=0.7) == [0.0, 0.0, 1.0]
    assert time.monotonic() - began < 30
    assert caplog.text.count("counts as wrong: grading it took longer than 0.7 s") == 2
    assert math_of([("7", "7")], limit_s=0.7) == [1.0]


def test_many_threads_may_ask_at_once():
    got = {}
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: math_of([(str(i % 3), "2")], workers=2)[0]}))
        for i in range(12)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == {i: float(i % 3 == 2) for i in range(12)}
    assert math_of([(str(i % 3), "2") for i in range(12)], workers=2) == [float(i % 3 == 2) for i in range(12)]


def test_a_grader_that_the_system_ended_is_replaced():
    graders = apart._graders(os.getpid(), 1)
    assert math_of([("1", "1")], workers=1) == [1.0]
    first = graders.all[0]._process
    first.kill()
    first.wait()
    assert math_of([("1", "1")], workers=1) == [1.0]
    second = graders.all[0]._process
    second.kill()
    second.wait()
    second.poll = lambda: None  # as if it had ended between a look and the question
    assert math_of([("1", "1")], workers=1) == [1.0]
    assert len({first.pid, second.pid, graders.all[0]._process.pid}) == 3


def test_graders_are_small_and_end_with_the_process_that_asks():
    graders = apart._Graders(1)
    assert graders.ask(("math", "1", "1"), 20.0) == 1.0
    process = graders.all[0]._process
    maps = Path(f"/proc/{process.pid}/maps")
    assert not maps.exists() or "torch" not in maps.read_text()
    graders.close(owner=os.getpid() + 1)  # a forked process
    assert process.poll() is None
    graders.close(owner=os.getpid())
    assert process.poll() is not None


def test_a_grader_that_never_comes_up_is_an_error(monkeypatch):
    process = apart._Process()
    monkeypatch.setattr(apart.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended before it was ready"):
        process.ask(("math", "1", "1"), 1.0)


def test_boxes():
    assert last_boxed(r"\boxed{a}\fbox{b}") == "a"
    assert last_boxed(r"\boxed {a{b}c}") == "a{b}c"
    assert last_boxed(r"\fboxed{\}}") == r"\}"
    assert last_boxed("no box") is None


# -------------------------------------------------------------------------------------------------------- reasoning-gym


def test_reasoning_gym_scores_its_own_answers():
    for name in ("chain_sum", "countdown", "arc_1d", "graph_color"):  # graph_color has no single answer
        problems = reasoning_gym_problems(name, 3, seed=1)
        answers = [p["answer"] or "none" for p in problems]
        completions = [f"<answer>{answers[0]}</answer>", f" {answers[1]}\n", "<answer>nothing</answer>"]
        scores = ReasoningGym(name, workers=1)(["?"] * 3, completions, entry=[p["entry"] for p in problems])
        assert scores[:2] == ([1.0, 1.0] if problems[0]["answer"] else [0.0, 0.0])
        assert scores[2] < 0.1


def test_the_settings_of_the_problem_hold_when_it_is_graded():
    (problem,) = reasoning_gym_problems("puzzle24", 1, seed=2, min_value=5)
    loose = json.dumps({k: v for k, v in json.loads(problem["entry"]).items() if k != "config"})
    completion = "<answer>3 * 8 * 1 * 1</answer>"
    assert one(ReasoningGym("puzzle24", workers=1), completion, entry=problem["entry"]) == 0.01
    assert one(ReasoningGym("puzzle24", workers=1), completion, entry=loose) == 1.0  # by default 1 is the lowest


def test_an_answer_in_the_wrong_form_is_wrong_and_a_broken_entry_an_error():
    reward = ReasoningGym("prime_factorization", workers=1)
    (problem,) = reasoning_gym_problems("prime_factorization", 1)
    assert one(reward, "garbage", entry=problem["entry"]) == 0.0  # its grader raises
    entry = json.loads(problem["entry"])
    for broken, said in [
        ({"metadata": entry["metadata"]}, r"the entry cannot be graded \(KeyError: 'answer'\)"),
        ("[1]", "the entry must be reasoning-gym's"),
        ("{", r"'entry' holds no JSON \(Expecting property name"),
        (reasoning_gym_problems("chain_sum", 1)[0]["entry"], "a problem of 'chain_sum', not of 'prime_factorization'"),
    ]:
        with pytest.raises(UserError, match=said):
            one(reward, "garbage", entry=broken)


@pytest.mark.parametrize(
    ("dataset", "form"),
    [
        ("string_insertion", "{}"),
        ("spiral_matrix", "[{}]"),
        ("binary_matrix", "[[{}]]"),
        ("n_queens", "[[{}]]"),
        ("countdown", "{}"),
        ("puzzle24", "{} + 3!"),
        ("simple_integration", "{}"),
        ("intermediate_integration", "{}"),
        ("polynomial_multiplication", "{}"),
    ],
)
def test_no_answer_is_executed(dataset, form, tmp_path):
    """These graders evaluate answers as Python."""
    trace = tmp_path / "trace"
    (problem,) = reasoning_gym_problems(dataset, 1)
    reward = ReasoningGym(dataset, workers=1)
    for code in (f"open({str(trace)!r}, 'w')", f"__import__('pathlib').Path({str(trace)!r}).touch()"):
        assert one(reward, f"<answer>{form.format(code)}</answer>", entry=problem["entry"]) <= 0.01
    assert not trace.exists()


def test_no_entry_is_executed(tmp_path):
    trace = tmp_path / "trace"
    for dataset, answer in [("number_sorting", "[1]"), ("polynomial_multiplication", "x")]:
        entry = json.loads(reasoning_gym_problems(dataset, 1)[0]["entry"]) | {"answer": f"open({str(trace)!r}, 'w')"}
        one(ReasoningGym(dataset, workers=1), answer, entry=entry)
    assert not trace.exists()


def test_what_is_evaluated():
    assert evaluated_safely(" [1, (2, 'a')] ") == [1, (2, "a")]
    assert evaluated_safely("((0x3a + 1) << 2) % 7") == 236 % 7
    for code in ("x", "f()", "().__class__", "[i for i in (1,)]", "f'{1}'", "(lambda: 1)()", "1 if 2 else 3", "[1][0]"):
        with pytest.raises(ValueError, match="only numbers, containers and arithmetic"):
            evaluated_safely(code)


def test_what_is_parsed():
    import sympy
    from sympy.parsing.sympy_parser import parse_expr

    x = sympy.Symbol("x")
    assert parsed_safely(parse_expr, "x**2*exp(2*x)/1.5e3 + C", local_dict={"x": x}).free_symbols == {
        x,
        sympy.Symbol("C"),
    }
    for code in (
        "exit()",
        "open(0)",
        "x.real",
        "1 .real",
        "'a'",
        "[x]",
        "lambda: 1",
        "x_",
        "Symbol(x)",
        "x:=1",
        "preview(x)",
    ):
        with pytest.raises(ValueError, match="only numbers, containers and arithmetic"):
            parsed_safely(parse_expr, code)


def test_json_keeps_what_it_would_change():
    value = {"a": (1, [2, (3,)]), "b": {1: "x", (2, 3): None}, "c": {"d": 1.5}}
    assert unpacked(json.loads(json.dumps(packed(value)))) == value


# -------------------------------------------------------------------------------------------------------- texts and forms


def test_exact_answers():
    reward = ExactAnswer()
    assert one(reward, "I think so.\n<answer> Rome </answer>", answer="Rome") == 1.0
    assert one(reward, "so\n#### 42", answer="40 + 2\n#### 42") == 1.0
    assert one(reward, " 7\n", answer=7) == 1.0
    assert one(reward, "rome", answer="Rome") == 0.0
    assert one(ExactAnswer(casefold=True), "rome", answer="Rome") == 1.0
    assert one(ExactAnswer(strip=False), " Rome", answer="Rome") == 0.0
    assert one(reward, "<answer>Rome</answer> <answer>Paris</answer>", answer="Rome") == 0.0


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        (THOUGHT, 1.0),
        (f"\n{THOUGHT}\n", 1.0),
        ("<think>a\nb</think>\n\n<answer>\n2\n</answer>", 1.0),
        ("<think></think><answer></answer>", 1.0),
        (f"{THOUGHT} done", 0.0),
        (f"Well, {THOUGHT}", 0.0),
        (f"{THOUGHT}{THOUGHT}", 0.0),
        ("<think>a<think>b</think></think><answer>2</answer>", 0.0),
        ("<think>a</think><answer>2<answer>3</answer>", 0.0),
        ("<answer>2</answer><think>a</think>", 0.0),
        ("<think>a</think> so <answer>2</answer>", 0.0),
        ("<answer>2</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_the_form_of_thought_and_answer(text, fits):
    assert one(Format(), text) == fits


def test_a_form_of_ones_own():
    assert one(Format(r"a.*z"), "a\nz") == 1.0
    assert one(Format(r"a.*z"), "a z ") == 0.0
    with pytest.raises(UserError, match=r"Format\.pattern '\(' is no regular expression: missing \)"):
        Format("(")


def test_weighted_sums():
    reward = Weighted((ExactAnswer(), Format()), (1.0, 0.5))
    assert reward(["?"] * 3, ["2", THOUGHT, "<answer>3</answer>"], answer=["2"] * 3) == [1.0, 1.5, 0.0]
    some = Weighted((lambda prompts, completions: [None, 1, math.nan], Format()), (2.0, 1.0))
    assert str(some(["?"] * 3, ["a", THOUGHT, "b"])) == "[nan, 3.0, nan]"
    with pytest.raises(UserError, match="<lambda> returned 1 rewards for 2 rows"):
        Weighted((lambda prompts, completions: [1],), (1.0,))(["?"] * 2, ["a", "b"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Weighted((), ()), r"Weighted\.parts must be at least one callable"),
        (lambda: Weighted((Format(),), (1.0, 2.0)), r"Weighted\.weights must be 1 finite numbers, one for each part"),
        (lambda: Weighted((Format(),), (math.inf,)), r"Weighted\.weights must be"),
        (lambda: MathAnswer(limit_s=math.nan), r"MathAnswer\.limit_s must be > 0 and finite, got nan"),
        (lambda: MathAnswer(workers=0), r"MathAnswer\.workers must be >= 1, got 0"),
        (lambda: ReasoningGym("chain_sum", limit_s=0.0), r"ReasoningGym\.limit_s must be > 0"),
        (lambda: ReasoningGym("chain_sums"), "unknown reasoning-gym dataset 'chain_sums': did you mean 'chain_sum'"),
        (lambda: one(MathAnswer(), "1"), "MathAnswer needs the column 'answer' in the data; it has none beside"),
        (lambda: one(ExactAnswer(), "1", gold=1), "ExactAnswer needs the column 'answer' in the data; it has 'gold'"),
        (lambda: one(ExactAnswer(), "1", answer=None), "ExactAnswer needs a value in the column 'answer', got None"),
        (lambda: one(ReasoningGym("chain_sum"), "1"), "ReasoningGym needs the column 'entry'"),
    ],
)
def test_what_is_wrong_is_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"the reward MathAnswer needs the extra 'reinforce'"):
        MathAnswer()


# ----------------------------------------------------------------------------------------------------------------- names

OWN = """
from dataclasses import dataclass

@dataclass
class Long:
    least: int = 2
    def __call__(self, prompts, completions, **columns):
        return [float(len(c) >= self.least) for c in completions]

long = Long()
LIMIT = 3
"""


def test_names_of_rewards():
    assert from_name("math") == MathAnswer()
    assert from_name("exact") == ExactAnswer()
    assert from_name("format") == Format()
    assert from_name("reasoning-gym:chain_sum") == ReasoningGym("chain_sum")
    assert from_name("locum.reinforce.rewards:from_name") is from_name


def test_a_function_of_ones_own_file(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(OWN)
    assert from_name(f"{tmp_path}/my_reward.py:long")(["?"] * 2, ["a", "ab"]) == [0.0, 1.0]
    monkeypatch.syspath_prepend(tmp_path)
    assert from_name("my_reward:long")(["?"], ["abc"]) == [1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", r"unknown reward 'maths': did you mean 'math'\? \(known: .*MODULE:FUNCTION"),
        (":f", "unknown reward ':f'"),
        ("math:", "unknown reward 'math:'"),
        (
            "no_such_module:f",
            "module 'no_such_module' of the reward is not installed; name a file as path/to/file.py:f",
        ),
        ("no/such/file.py:f", "file 'no/such/file.py' of the reward does not exist"),
        ("FILE:lang", r"unknown function of .*: did you mean 'long'\?"),
        ("FILE:Long", "must be a function .*, got a class; make one of it"),
        ("FILE:LIMIT", "must be a function .*, got a int"),
    ],
)
def test_names_that_are_none(name, message, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(UserError, match=message):
        from_name(name.replace("FILE", str(tmp_path / "own.py")))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\nx / 0\n", r"the reward fails \(.*bad\.py, line 2\): ZeroDivisionError: division by zero$"),
        ("import no_such_module\n", r"bad\.py, line 1\): ModuleNotFoundError: No module named 'no_such_module'$"),
        ("def f(:\n", r"bad\.py, line 1\): SyntaxError: "),
    ],
)
def test_a_file_that_fails_is_named_with_its_line(code, message, tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(UserError, match=message):
        from_name(f"{tmp_path}/bad.py:f")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="the reward fails"):
        from_name("bad:f")
