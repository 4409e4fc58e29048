"""Problems: every form they come in, every way a row can be wrong, and splits in which no prompt is on both sides."""

import json
import sys

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from locum.errors import MissingExtra, UserError
from locum.reinforce.problems import held_out, read_problems, reasoning_gym_problems
from locum.reinforce.rewards import gym

ASKED = {"role": "user", "content": "2 + 2?"}
ROWS = [{"prompt": "1 + 1 =", "answer": 2, "tags": ["easy"]}, {"prompt": [ASKED], "answer": 4, "tags": []}]
TEXTS = [{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(3)]


def refused(source, **options):
    with pytest.raises(UserError) as error:
        read_problems(source, **options)
    return str(error.value)


def test_all_sources_give_the_same_rows(tmp_path):
    lines = [json.dumps(r) for r in TEXTS]
    (tmp_path / "a.jsonl").write_text(f"{lines[0]}\n\n{lines[1]}\n{lines[2]}\n")
    data = Dataset.from_list(TEXTS)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "folder")
    for source in (tmp_path / "a.jsonl", str(tmp_path / "a.parquet"), tmp_path / "folder", data, TEXTS, iter(TEXTS)):
        assert list(read_problems(source)) == TEXTS
    assert list(read_problems(DatasetDict(train=data), split="train")) == TEXTS
    assert read_problems(tmp_path / "a.jsonl").numbers == [1, 3, 4]


def test_texts_and_conversations_keep_their_columns():
    rows = read_problems(ROWS)
    assert list(rows) == ROWS
    assert read_problems(rows) is rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": 1}, "row 1: has no 'prompt'"),
        ({"prompt": None, "answer": 1}, "row 1: has no 'prompt'"),
        ({"prompt": " \n", "answer": 1}, "row 1: prompt is empty"),
        ({"prompt": [], "answer": 1}, "row 1: prompt is empty"),
        ({"prompt": 3, "answer": 1}, "row 1: prompt must be a string or a list of messages, got int"),
        ({"prompt": [{"role": "user"}], "answer": 1}, "row 1: a message of prompt must have a text"),
        ({"prompt": [{"role": "assistant", "content": "a"}], "answer": 1}, "row 1: the prompt's last message is the"),
        ({"prompt": "a"}, "row 1: has no 'answer', other than the first row"),
        ({"prompt": "a", "answer": 1, "level": 2}, "row 1: has a column 'level', other than the first row"),
        ({"prompt": "a", "answer": 1, "completions": []}, "row 1: has a column 'completions', a name that rewards use"),
        ({"prompt": [ASKED], "answer": 1, "tools": "f"}, "row 1: tools is not JSON (Expecting value at column 1)"),
        ("a", "row 1: must be an object with prompt, got str"),
    ],
)
def test_a_bad_row_is_named(row, message):
    assert message in refused([TEXTS[0], row])


def test_bad_rows_are_named_together_by_their_lines(tmp_path):
    good = json.dumps(TEXTS[0])
    (tmp_path / "a.jsonl").write_bytes(f'{good}\n{{"prompt": }}\n\n{good}\n'.encode() + b'\xff\n{"prompt": ""}\n')
    message = refused(tmp_path / "a.jsonl")
    assert "has 3 lines that cannot be used: line 2: is not JSON (Expecting value at column 12)" in message
    assert "line 5: is not UTF-8; line 6: prompt is empty" in message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "the data is empty: give at least one row"),
        ("no/such.jsonl", "data 'no/such.jsonl' does not exist"),
        (DatasetDict(train=Dataset.from_list(TEXTS)), "has several parts, and name one of its splits: train"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(source, message):
    assert message in refused(source)


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingExtra, match="a folder of datasets needs the extra 'reinforce'"):
        read_problems(tmp_path / "folder")
    gym.cache_clear()
    with pytest.raises(MissingExtra, match="reasoning-gym needs the extra 'reinforce'"):
        reasoning_gym_problems("chain_sum", 1)


# -------------------------------------------------------------------------------------------------------- reasoning-gym


def test_problems_of_reasoning_gym():
    problems = reasoning_gym_problems("chain_sum", 4, seed=3, min_terms=2, max_terms=2)
    assert [set(p) for p in problems] == [{"prompt", "answer", "entry", "dataset"}] * 4
    for p in problems:
        entry = json.loads(p["entry"])
        assert (entry["question"], entry["answer"]) == (p["prompt"], p["answer"])
        assert entry["config"] == {"min_terms": 2, "max_terms": 2}
        assert (entry["metadata"]["num_terms"], p["dataset"]) == (2, "chain_sum")
    assert problems == reasoning_gym_problems("chain_sum", 4, seed=3, min_terms=2, max_terms=2)
    assert problems != reasoning_gym_problems("chain_sum", 4, seed=4, min_terms=2, max_terms=2)
    assert list(read_problems(problems)) == problems
    assert list(read_problems(Dataset.from_list(problems))) == problems


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("chain_summ", {}, "unknown reasoning-gym dataset 'chain_summ': did you mean 'chain_sum'"),
        ("chain_sum", {"size": 0}, "size must be >= 1, got 0"),
        (
            "chain_sum",
            {"terms": 3},
            "reasoning-gym's chain_sum refuses its settings: .*unexpected keyword argument 'terms'",
        ),
        (
            "chain_sum",
            {"min_terms": 9, "max_terms": 2},
            "reasoning-gym's chain_sum refuses its settings: max_terms must be",
        ),
    ],
)
def test_what_reasoning_gym_refuses_is_named(name, settings, message):
    with pytest.raises(UserError, match=message):
        reasoning_gym_problems(name, **{"size": 1} | settings)


# ---------------------------------------------------------------------------------------------------------------- splits


@given(st.lists(st.integers(0, 9), min_size=2, max_size=40), st.floats(0.01, 0.99), st.integers(0, 5))
def test_no_prompt_is_on_both_sides(kinds, fraction, seed):
    rows = [{"prompt": f"problem {k}", "number": i} for i, k in enumerate(kinds)]
    if len(set(kinds)) == 1:
        with pytest.raises(UserError, match="the data has one prompt alone: there is none to hold out"):
            held_out(rows, fraction, seed)
        return
    train, test = held_out(rows, fraction, seed)
    numbers = [r["number"] for r in train], [r["number"] for r in test]
    assert sorted(numbers[0] + numbers[1]) == list(range(len(rows)))
    assert list(numbers) == [sorted(n) for n in numbers]
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    assert len(train) > 0
    assert len(test) > 0
    largest = max(kinds.count(k) for k in kinds)
    assert abs(len(test) - fraction * len(rows)) <= largest


def test_the_fraction_is_met_where_prompts_differ_and_the_seed_decides():
    rows = [{"prompt": str(i)} for i in range(100)]
    train, test = held_out(rows, 0.2, 0)
    assert (len(train), len(test)) == (80, 20)
    assert list(held_out(rows, 0.2, 0)[1]) == list(test)
    assert list(held_out(rows, 0.2, 1)[1]) != list(test)
    assert (train.numbers[:1], test.source) == ([int(train[0]["prompt"])], "the data")


def test_white_space_and_form_make_no_other_prompt():
    rows = [{"prompt": "2 +  2?\n"}, {"prompt": [ASKED]}, {"prompt": "2 + 2?"}, {"prompt": "3 + 3?"}]
    sides = [{" ".join(str(r["prompt"]).split())[:5] for r in side} for side in held_out(rows, 0.5)]
    assert {"3 + 3"} in sides


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_out_of_range_is_named(fraction):
    with pytest.raises(UserError, match=r"fraction must be in \(0, 1\)"):
        held_out(TEXTS, fraction)
