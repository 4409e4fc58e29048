"""Rewards that fail in every way there is: the guilty rows are found, named, and nothing else is lost."""

import functools
import logging
import math
import pickle
import threading
import time
from decimal import Decimal

import numpy as np
import pytest
import torch

from locum.errors import UserError
from locum.reinforce.judge import Judge, RewardError

ROWS = ["fine", "also fine", "bad one", "the last"]


def ask(reward, texts=ROWS, **settings):
    return Judge(reward, **{"limit_s": 20.0} | settings)(
        ["prompt"] * len(texts), texts, {"answer": list(range(len(texts)))}
    )


def stopped(reward, texts=ROWS, **settings):
    with pytest.raises(RewardError) as error:
        ask(reward, texts, **settings)
    return str(error.value), error.value.judged


def guilty(what):
    """A reward of 1 that does something else on the bad row."""

    def reward(prompts, completions, **columns):
        return [what() if "bad" in c else 1.0 for c in completions]

    return reward


def fails():
    raise KeyError("no such\nthing")


def hangs():
    time.sleep(5)


def leaves():
    raise SystemExit(3)


# ---------------------------------------------------------------------------------------------------------- what goes well


def test_rewards_come_in_order_with_the_columns():
    def reward(prompts, completions, answer):
        return [len(p) + len(c) + a for p, c, a in zip(prompts, completions, answer, strict=True)]

    judged = ask(reward)
    assert judged.rewards.tolist() == [10.0, 16.0, 15.0, 17.0]
    assert (judged.rewards.dtype, judged.problems) == (torch.float32, [])


@pytest.mark.parametrize(
    "given",
    [
        [1, 0.5],
        (True, 0.5),
        torch.tensor([1.0, 0.5]),
        np.array([1.0, 0.5]),
        [torch.tensor(1), np.float16(0.5)],
        [1, Decimal("0.5")],
    ],
)
def test_whatever_is_a_list_of_numbers_is_taken(given):
    assert ask(lambda prompts, completions, answer: given, ["a", "b"]).rewards.tolist() == [1.0, 0.5]


def test_a_reward_may_keep_its_gradient_to_itself_and_change_what_it_is_given():
    texts, weight = ["a", "b"], torch.ones(2, requires_grad=True)

    def reward(prompts, completions, answer):
        assert not torch.is_grad_enabled()
        completions.clear()
        answer.clear()
        return weight * 2

    assert ask(reward, texts).rewards.tolist() == [2.0, 2.0]
    assert texts == ["a", "b"]


def test_no_rows_are_no_work():
    assert len(ask(guilty(fails), []).rewards) == 0


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (fails, "raised KeyError: 'no such\\nthing'"),
        (hangs, "took longer than 0.5 s"),
        (leaves, "raised SystemExit: 3"),
        (lambda: None, "gave None"),
        (lambda: math.nan, "gave nan"),
        (lambda: "1.0", "gave str '1.0', which is no number"),
        (lambda: [1.0], "gave list [1.0], which is no number"),
        (lambda: 1j, "gave complex 1j, which is no number"),
        (lambda: torch.ones(2, 2), "gave Tensor tensor([[1., 1.], [1., 1.]]), which is no number"),
    ],
)
def test_the_guilty_row_is_found(what, said, caplog):
    limit = {"limit_s": 0.5 if what is hangs else 20.0}
    message, judged = stopped(guilty(what), **limit)
    assert f"the reward reward failed in 1 of 4 rows: row 2 {said}" in message
    with caplog.at_level(logging.WARNING):
        judged = ask(guilty(what), on_error="skip", **limit)
    assert judged.rewards.nan_to_num(-1).tolist() == [1.0, 1.0, -1.0, 1.0]
    (problem,) = judged.problems
    assert (problem.row, problem.what, problem.prompt, problem.completion) == (2, said, "prompt", "bad one")
    lines = [r.getMessage() for r in caplog.records]
    assert f"the reward reward, row 2: {said}; its completion begins 'bad one'" in lines
    assert not any("\n" in line for line in lines)


def test_one_call_is_enough_where_only_values_are_wrong():
    calls = []

    def reward(prompts, completions, answer):
        calls.append(len(completions))
        return [None, math.nan, 1.0, 1.0]

    assert [p.row for p in ask(reward, on_error="skip").problems] == [0, 1]
    assert calls == [4]


def test_rows_are_asked_at_the_same_time():
    def reward(prompts, completions, answer):
        time.sleep(0.3 * len(completions))
        return [1.0] * len(completions)

    began = time.monotonic()
    judged = ask(reward, ["a"] * 20, limit_s=1.5)
    assert judged.rewards.tolist() == [1.0] * 20  # all together they take 6 s
    assert time.monotonic() - began < 4


def test_all_rows_guilty_is_an_error_even_when_rows_are_skipped():
    for what in (fails, hangs, lambda: None):
        texts = ["bad a", "bad b", "bad c", "bad d"]
        message, judged = stopped(guilty(what), texts, on_error="skip", limit_s=0.2 if what is hangs else 20.0)
        assert "failed in 4 of 4 rows: row 0" in message
        assert message.count("row ") == 3
        assert "; and 1 more" in message
        assert judged.rewards.isnan().all()
        assert [p.row for p in judged.problems] == [0, 1, 2, 3]


@pytest.mark.parametrize("endless", [math.inf, -math.inf, 1e39, 10**400, torch.tensor(math.inf)])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_an_infinite_reward_is_always_an_error(endless, on_error):
    message, judged = stopped(guilty(lambda: endless), on_error=on_error)
    assert "row 2 gave " in message
    assert "rewards must be finite" in message
    assert judged.rewards.nan_to_num(-1).tolist() == [1.0, 1.0, -1.0, 1.0]


def test_a_wrong_count_says_both_numbers_and_finds_the_row():
    def reward(prompts, completions, answer):
        return [1.0 for c in completions if "bad" not in c]

    message, _ = stopped(reward)
    assert "row 2 returned 0 rewards for 1 row; asked for all at once it returned 3 rewards for 4 rows" in message
    assert ask(reward, on_error="skip").rewards.nan_to_num(-1).tolist() == [1.0, 1.0, -1.0, 1.0]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_wrong_count_that_no_row_explains_is_always_an_error(on_error):
    message, judged = stopped(lambda prompts, completions, answer: [1.0], on_error=on_error)
    assert "the reward <lambda> gives each row one reward, but not all of them together" in message
    assert "it returned 1 rewards for 4 rows" in message
    assert judged.problems == []


def test_a_batch_that_fails_by_chance_is_made_up_for(caplog):
    calls = []

    def reward(prompts, completions, answer):
        calls.append(threading.current_thread().daemon)
        if len(calls) == 1:
            raise ConnectionError("try again")
        return [2.0] * len(completions)

    assert ask(reward).rewards.tolist() == [2.0] * 4
    assert "raised ConnectionError: try again; asking for its 4 rows one by one" in caplog.text
    assert all(calls)


def test_a_single_row_is_asked_once():
    calls = []

    def reward(prompts, completions, answer):
        calls.append(1)
        raise ValueError

    assert stopped(reward, ["a"])[0] == "the reward reward failed in 1 of 1 rows: row 0 raised ValueError: no message"
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (0.5, "returned float 0.5, and"),
        ({"a": 1}, "returned dict {'a': 1}, and"),
        ("ab", "returned str 'ab', and"),
        (torch.tensor(1.0), "returned float 1.0, and"),
        ((x for x in (1, 2)), "returned a generator, and"),
    ],
)
def test_what_is_no_list_is_refused(given, said):
    assert f"{said} it must return a list of numbers" in stopped(lambda prompts, completions, answer: given)[0]


# -------------------------------------------------------------------------------------------------------------- settings


async def later(prompts, completions):
    return [1.0]


async def later_still(prompts, completions):
    yield 1.0


def drop_by_drop(prompts, completions):
    yield 1.0


class Later:
    async def __call__(self, prompts, completions):
        return [1.0]


@pytest.mark.parametrize("reward", [later, later_still, drop_by_drop, Later()])
def test_async_and_generators_are_refused(reward):
    with pytest.raises(UserError, match=r"Judge\.reward must be a plain function .*, neither async nor a generator"):
        Judge(reward)


def test_async_in_disguise_is_found_when_asked():
    assert "returned a coroutine" in stopped(functools.partial(lambda f, p, c, answer: f(p, c), later))[0]


@pytest.mark.parametrize(
    "settings",
    [{"limit_s": 0.0}, {"limit_s": math.nan}, {"limit_s": math.inf}, {"on_error": "go"}],
)
def test_bad_settings_are_named(settings):
    (field,) = settings
    with pytest.raises(UserError, match=rf"Judge\.{field} must be"):
        Judge(**{"reward": guilty(fails)} | settings)


def test_columns_of_other_length_are_named():
    with pytest.raises(UserError, match="answer has 2 rows and there are 1 prompts"):
        Judge(guilty(fails))(["a"], ["b"], {"answer": [1, 2]})
    with pytest.raises(UserError, match="completions has 2 rows and there are 1 prompts"):
        Judge(guilty(fails))(["a"], ["b", "c"], {})


def test_an_error_can_be_sent_elsewhere():
    with pytest.raises(RewardError) as error:
        ask(guilty(fails))
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value)
    assert again.judged.problems == error.value.judged.problems
