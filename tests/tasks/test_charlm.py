"""Byte-level models of the standard library: they learn, are made once, and their prompts come from files they never saw."""

import pytest
import torch

from locum.errors import UserError
from locum.tasks import charlm

SMALL = {"layers": 1, "width": 32, "batch": 4}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCUM_CACHE", str(tmp_path))
    return tmp_path


def test_training_learns_and_is_done_once(cache, monkeypatch):
    calls = []
    lm = charlm.train(**SMALL, steps=30, progress=lambda *call: calls.append(call))
    assert calls[-1] == ("training 1x32", 30, 30)
    assert lm.vocab_size == 256
    assert not lm.eos_ids
    untrained = charlm._fresh(1, 32, seed=0).eval()
    assert charlm.held_out_loss(lm, 8) < charlm.held_out_loss(charlm.LM(untrained), 8) - 1.0  # 5.6 nats to about 3.4
    monkeypatch.setattr(charlm, "_fit", lambda *_: pytest.fail("trained a second time"))
    again = charlm.train(**SMALL, steps=30)
    assert all(torch.equal(a, b) for a, b in zip(lm.model.parameters(), again.model.parameters(), strict=True))
    assert not list((cache / "charlm").glob(".making-*"))


def test_the_seed_decides_the_weights_and_touches_no_global_state(cache):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two = (charlm.train(**SMALL, steps=1, seed=s) for s in (0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert not torch.equal(one.model.lm_head.weight, two.model.lm_head.weight)


def test_text_goes_through_bytes(cache):
    lm = charlm.train(**SMALL, steps=1)
    assert lm.encode("né") == [110, 0xC3, 0xA9]
    assert lm.decode([110, 0xC3, 0xA9]) == "né"
    assert lm.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"
    assert lm.chat("x") == [120]


def test_prompts_are_held_out_and_begin_with_a_line():
    text, held = charlm._library()
    pieces = charlm.stdlib_prompts(20, 64, seed=3)
    assert pieces == charlm.stdlib_prompts(20, 64, seed=3) != charlm.stdlib_prompts(20, 64, seed=4)
    for piece in map(bytes, pieces):
        assert len(piece) == 64
        assert any(file.startswith(piece) or b"\n" + piece in file for file in held)
    assert sum(bytes(piece) in text for piece in pieces) <= 10  # licence headers and the like occur in many files
    assert 0.02 < sum(map(len, held)) / len(text) < 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: charlm.train(layers=0), "layers must be at least 1, got 0"),
        (lambda: charlm.train(steps=0), "steps must be at least 1, got 0"),
        (lambda: charlm.train(width=48), "multiple of 32, got 48"),
        (lambda: charlm.stdlib_prompts(1, 10**9), "got 1 and 1000000000"),
        (lambda: charlm.stdlib_prompts(0, 8), "got 0 and 8"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
