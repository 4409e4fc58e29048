"""The law of a token against the processors of transformers, in their order; ties, extremes and bad numbers."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from locum.errors import UserError
from locum.tokens import Sampling

LOGITS = [2.0, 1.0, 0.0, -1.0, 0.5]


def theirs(logits: torch.Tensor, s: Sampling) -> torch.Tensor:
    """The law of `model.generate(do_sample=True)`: its processors in its order, in float64."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(s.temperature))] if s.temperature != 1 else [])
    if s.top_k is not None:
        warpers.append(TopKLogitsWarper(s.top_k))
    if s.top_p is not None and s.top_p < 1:
        warpers.append(TopPLogitsWarper(s.top_p))
    if s.min_p is not None:
        warpers.append(MinPLogitsWarper(s.min_p))
    rows = logits.double().reshape(-1, logits.shape[-1])
    return warpers(torch.zeros(len(rows), 1, dtype=torch.long), rows).softmax(-1).reshape(logits.shape)


def law(values: list[float], **kwargs) -> list[float]:
    return Sampling(**{"temperature": 1.0} | kwargs).law(torch.tensor(values)).tolist()


SETTINGS = [
    Sampling(1.0),
    Sampling(0.3),
    Sampling(2.5),
    Sampling(1.0, top_k=2),
    Sampling(1.0, top_k=50),
    Sampling(1.0, top_p=0.7),
    Sampling(1.0, top_p=0.01),
    Sampling(1.0, min_p=0.2),
    Sampling(1.0, min_p=0.0),
    Sampling(1.0, min_p=1.0),
    Sampling(0.7, top_k=4, top_p=0.8, min_p=0.1),
    Sampling(1.6, top_k=3, top_p=0.9),
    Sampling(1.6, top_p=0.6, min_p=0.3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sampling", SETTINGS, ids=repr)
def test_the_law_is_that_of_transformers(sampling, dtype):
    g = torch.Generator().manual_seed(
        0
    )  # quarters in random order: exact in every type, and no ties, where cuts differ
    logits = torch.stack([torch.randperm(33, generator=g) / 4 for _ in range(12)]).reshape(4, 3, 33).to(dtype)
    ours = sampling.law(logits)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs(logits, sampling), atol=1e-12, rtol=1e-9)


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12, unique=True),
    temperature=st.floats(0.1, 4),
    top_k=st.none() | st.integers(1, 14),
    top_p=st.none() | st.floats(0.05, 1),
    min_p=st.none() | st.floats(0, 1),
)
def test_any_combination_of_filters(logits, temperature, top_k, top_p, min_p):
    sampling, z = Sampling(temperature, top_k, top_p, min_p), torch.tensor(logits, dtype=torch.float64)
    # A cut that falls on a token's very edge may go either way by rounding.
    p = (z / temperature).softmax(-1)
    kept = p.sort(descending=True).values[: top_k or len(p)]
    assume(top_p is None or (kept.cumsum(0) / kept.sum() - top_p).abs().min() > 1e-9)
    assume(min_p is None or (p / p.max() - min_p).abs().min() > 1e-9 or min_p in (0, 1))
    assume(len(set((z / temperature).tolist())) == len(logits))
    ours = sampling.law(z)
    torch.testing.assert_close(ours, theirs(z, sampling), atol=1e-9, rtol=1e-6)
    assert ours.sum().item() == pytest.approx(1, abs=1e-12)
    assert ours[z.argmax()] == ours.max() > 0


def test_hand_values():
    e = [math.exp(x) for x in LOGITS]
    assert law(LOGITS) == pytest.approx([x / sum(e) for x in e], abs=1e-12)
    assert law(LOGITS, top_k=2) == pytest.approx([e[0] / (e[0] + e[1]), e[1] / (e[0] + e[1]), 0, 0, 0], abs=1e-12)
    # laws .563, .207, .126, .076, .028 by rank: .563 + .207 < .8, so a third token stays
    kept = e[0] + e[1] + e[4]
    assert law(LOGITS, top_p=0.8) == pytest.approx([e[0] / kept, e[1] / kept, 0, 0, e[4] / kept], abs=1e-12)
    assert law(LOGITS, min_p=0.3) == pytest.approx(law(LOGITS, top_k=2))  # e^-1 = .37 stays, e^-1.5 = .22 goes


def test_top_p_counts_what_top_k_left():
    """After top-k 2 the laws are .73 and .27: top-p 0.7 leaves one, where without top-k it would leave two."""
    assert law(LOGITS, top_k=2, top_p=0.7) == [1, 0, 0, 0, 0]
    assert sum(x > 0 for x in law(LOGITS, top_p=0.7)) == 2


def test_min_p_is_relative_to_the_tempered_law():
    assert sum(x > 0 for x in law(LOGITS, temperature=1.0, min_p=0.3)) == 2
    assert sum(x > 0 for x in law(LOGITS, temperature=2.0, min_p=0.3)) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_greedy_is_one_hot_at_the_first_maximum(dtype):
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [5.0, 1.0, 5.0, 5.0]], dtype=dtype)
    assert Sampling().law(logits).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert Sampling().greedy
    assert not Sampling(1e-9).greedy


def test_ties_share_equally_and_top_k_keeps_all_of_them():
    """As transformers' top-k: what equals the k-th logit stays."""
    assert law([1.0, 1.0, 1.0, 0.0], top_k=2) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    torch.testing.assert_close(
        Sampling(1.0, top_k=2).law(torch.tensor([1.0, 1.0, 1.0, 0.0])),
        theirs(torch.tensor([1.0, 1.0, 1.0, 0.0]), Sampling(1.0, top_k=2)),
    )


def test_top_p_among_ties_keeps_the_lowest_ids():
    assert law([0.0, 0.0, 0.0, 0.0], top_p=0.5) == pytest.approx([0.5, 0.5, 0, 0])


def test_low_temperature_and_huge_logits_stay_finite():
    assert law([1e4, -1e4, 0.0], temperature=1e-3) == [1, 0, 0]
    assert law([3e38, 3e38]) == [0.5, 0.5]
    assert law([-math.inf, 0.0, -math.inf]) == [0, 1, 0]
    assert law([-math.inf, 0.0, 0.0], top_k=1) == [0, 0.5, 0.5]


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_make_no_law_are_refused(bad, temperature):
    with pytest.raises(ValueError, match="NaN, \\+inf or no finite value"):
        Sampling(temperature).law(torch.tensor([[0.0, 1.0], bad]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_k", -3),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("min_p", math.nan),
    ],
)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(UserError, match=rf"Sampling\.{field} must be .*, got {value}"):
        Sampling(**{field: value})
