"""The sentiment task: its prompts, its shipped pairs, and a reward that comes out the same on every machine."""

import subprocess
import sys

import pytest

from locum.align import read_pairs
from locum.errors import MissingExtra
from locum.tasks import sentiment

COLUMNS = ["prompt", "chosen", "rejected", "reward_chosen", "reward_rejected"]


def test_prompts_are_many_short_and_apart():
    train, held_out = sentiment.prompts(), sentiment.prompts(held_out=True)
    assert (len(train), len(held_out)) == (256, 64)
    assert len({*train, *held_out}) == 320
    assert all(4 <= len(p.split()) <= 16 and p == p.strip() and p[-1].isalpha() for p in train + held_out)


def test_held_out_prompts_are_new_combinations_of_known_parts():
    for things, openings in sentiment._KINDS:
        train = [p for p in sentiment.prompts() for o in openings.split("|") if p.startswith(o.split("{}")[0])]
        for thing in things.split("|"):
            assert any(thing in p for p in train)
        for opening in openings.split("|"):
            parts = opening.split("{}")
            assert any(p.startswith(parts[0]) and p.endswith(parts[1]) for p in train)


@pytest.mark.parametrize(("held_out", "least"), [(False, 220), (True, 50)])
def test_shipped_pairs_are_well_formed(held_out, least):
    pairs, prompts = sentiment.pairs(held_out), sentiment.prompts(held_out)
    assert len(pairs) >= least
    asked = [row["prompt"] for row in pairs]
    assert asked == [p for p in prompts if p in set(asked)]  # one pair at most for each prompt, in order
    for row in pairs:
        assert list(row) == COLUMNS
        assert row["reward_chosen"] - row["reward_rejected"] >= 0.3
        for response in (row["chosen"], row["rejected"]):
            assert sentiment.sentence(response) == response


@pytest.mark.parametrize("held_out", [False, True])
def test_shipped_rewards_are_what_anyone_gets(held_out):
    for side in ("chosen", "rejected"):
        pairs = sentiment.pairs(held_out)
        assert sentiment.rewards([row[side] for row in pairs]) == [row[f"reward_{side}"] for row in pairs]


def test_shipped_files_are_small_and_have_their_card():
    folder = sentiment.files()[0].parent
    assert sum(f.stat().st_size for f in folder.iterdir()) < 300_000
    card = (folder / "README.md").read_text("utf-8")
    for held_out in (False, True):
        assert f"{len(sentiment.pairs(held_out))} pairs" in card
    assert "apache-2.0" in card


def test_shipped_pairs_are_rows_that_training_takes():
    for held_out, path in enumerate(sentiment.files()):
        assert list(read_pairs(path)) == sentiment.pairs(bool(held_out))


@pytest.mark.parametrize(
    ("text", "response"),
    [
        (" it was better than expected. Then we left", " it was better than expected."),
        (" no. It was not good at all! Never", " no. It was not good at all!"),  # five words at least
        (' they said "what a lovely day." And', ' they said "what a lovely day."'),
        (" we paid 3.50 for two of them. And", " we paid 3.50 for two of them."),
        (" I saw Dr. Smith and Mrs. Jones there... Later", " I saw Dr. Smith and Mrs. Jones there..."),
        (" what did it cost in the end?!", " what did it cost in the end?!"),
        (" it was so good that I", None),
        (" it was good\nand we went home again.", None),
        ("", None),
    ],
)
def test_a_response_ends_where_a_sentence_does(text, response):
    assert sentiment.sentence(text) == response


def test_rewards_by_hand():
    good, neutral, bad = sentiment.rewards([" it was wonderful.", " it was a table.", " it was horrible."])
    assert -1 <= bad < neutral == 0.0 < good <= 1
    assert good == 0.5719  # "wonderful" weighs 2.7: 2.7 / sqrt(2.7 ** 2 + 15)


def test_without_the_extra_the_reward_names_it_and_the_pairs_still_load(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    sentiment._analyser.cache_clear()
    with pytest.raises(
        MissingExtra, match=r"the sentiment reward needs the extra 'align': pip install 'locum\[align\]'"
    ):
        sentiment.rewards(["good"])


def test_reading_the_pairs_loads_no_torch():
    code = "import sys; from locum.tasks import sentiment as s; s.pairs(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
