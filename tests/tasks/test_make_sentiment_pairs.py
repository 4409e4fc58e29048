"""The script that makes the sentiment pairs: what it keeps, and that a killed run goes on where it was."""

import importlib.util
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from locum.models import LM, tiny
from locum.tasks import sentiment

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_sentiment_pairs.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_sentiment_pairs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Letters:
    """A tokenizer of characters in which the letters b and l, side by side, are one token."""

    eos_token_id = pad_token_id = 0

    def __call__(self, texts, **_):
        if isinstance(texts, str):
            return {"input_ids": [ord(c) for c in texts.replace("bl", "\x01")]}
        ids = [self(t)["input_ids"] for t in texts]
        width = max(map(len, ids))
        return {
            "input_ids": torch.tensor([[0] * (width - len(i)) + i for i in ids]),
            "attention_mask": torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids]),
        }

    def batch_decode(self, rows, **_):
        return ["".join(map(chr, row)) for row in rows.tolist()]


def test_only_whole_clean_responses_are_usable(script):
    def usable(text, prompt="it was ab"):
        return script.usable(Letters(), prompt, text)

    assert usable(" good and cheap and big. More") == " good and cheap and big."
    assert usable("le to do so again. More") is None  # its first letter merges with the prompt
    assert usable(" good and cheap and") is None
    assert usable(" good \ufffd cheap and big. More") is None
    assert usable(" all of it was shitty. More") is None


def test_a_pair_is_best_against_worst_when_they_are_clearly_apart(script):
    good, flat, bad = (f" all of it was {word}." for word in ("wonderful", "yellow", "horrible"))
    made = script.pair(Letters(), {"prompt": "I say", "samples": [flat, bad, good, "no end"]}, margin=0.3)
    assert made == {
        "prompt": "I say",
        "chosen": good,
        "rejected": bad,
        "reward_chosen": 0.5719,
        "reward_rejected": -0.5423,
    }
    assert script.pair(Letters(), {"prompt": "I say", "samples": [flat, flat]}, margin=0.3) is None
    assert script.pair(Letters(), {"prompt": "I say", "samples": ["no end"]}, margin=0.3) is None


def test_a_killed_run_goes_on_and_gives_the_same_samples(script, tmp_path, monkeypatch):
    lm = tiny(vocab_size=128)
    monkeypatch.setattr(script, "load", lambda *_, **__: LM(lm.model, Letters()))
    monkeypatch.setattr(
        sentiment, "prompts", lambda held_out=False: ["held out"] if held_out else ["one", "two", "six"]
    )
    args = Namespace(work=tmp_path / "whole", seed=0, samples=2, batch=1)
    whole = script.sample(args)
    assert [row["prompt"] for row in whole] == ["one", "two", "six", "held out"]
    assert {len(row["samples"]) for row in whole} == {2}
    args.work = tmp_path / "cut"
    args.work.mkdir()
    kept = (tmp_path / "whole" / "samples-0.jsonl").read_text("utf-8")
    (args.work / "samples-0.jsonl").write_text(kept[: kept.index("\n") + 20], "utf-8")  # the second line was cut off
    assert script.sample(args) == whole
    assert (args.work / "samples-0.jsonl").read_text("utf-8") == kept
