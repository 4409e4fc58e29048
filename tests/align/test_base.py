"""The shared formula by hand, batches from examples, and the statistics of real (tiny) models, whatever the padding."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.align import DPO, TDPO2, AlignLoss, TokenStats
from locum.align.signals import TokenSignal
from locum.align.statistics import LOGP_REF, ModelScorer, collate, statistics, token_log_probs
from locum.errors import UserError
from locum.models import tiny

F64 = torch.float64
PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8]},
    {"prompt_ids": [9], "chosen_ids": [1, 2, 3, 4], "rejected_ids": [5]},
]


@dataclass(frozen=True)
class Weighed(AlignLoss):
    """DPO with a weight per token from the data, and the third block's sum added."""

    columns: ClassVar[tuple[str, ...]] = ("weight",)

    def score(self, s):
        return s.columns["weight"] * s.d

    def extra(self, s, z):
        return 2 * z

    def logs(self, s):
        return {"weight": s.columns["weight"].mean()}


def stats(rows, mask=None, **more):
    d = torch.tensor(rows, dtype=F64, requires_grad=True)
    return TokenStats(d, torch.ones(d.shape, dtype=torch.bool) if mask is None else torch.tensor(mask), **more)


@pytest.fixture(scope="module")
def models():
    return {n: ModelScorer(tiny(vocab_size=16, seed=i, dtype=F64).model) for i, n in enumerate(("policy", "ref"))}


def test_the_formula_by_hand():
    """Sums, not means, of two pairs: z = .5 [(.4 - .2) - (.1 + .3)] = -.1 and .5 [1 - (-1)] = 1 (one token masked)."""
    rows = [[0.4, -0.2], [1.0, math.nan], [0.1, 0.3], [-1.0, math.inf]]
    mask = [[True, True], [True, False], [True, True], [True, False]]
    s = stats(rows, mask)
    loss, logs = DPO(beta=0.5)(s)
    assert loss.item() == pytest.approx((math.log1p(math.exp(0.1)) + math.log1p(math.exp(-1))) / 2, abs=1e-12)
    assert {k: v.item() for k, v in logs.items()} == pytest.approx(
        {"rewards/chosen": 0.3, "rewards/rejected": -0.15, "rewards/margins": 0.45, "rewards/accuracies": 0.5},
        abs=1e-12,
    )
    loss.backward()
    c = [0.5 / (1 + math.exp(z)) / 2 for z in (-0.1, 1.0)]
    assert s.d.grad.flatten().tolist() == pytest.approx([-c[0], -c[0], -c[1], 0, c[0], c[0], c[1], 0], abs=1e-12)
    assert not any(v.requires_grad for v in logs.values())


def test_what_a_method_adds_enters_loss_and_logs():
    weight = torch.tensor([[2.0, 0.0], [0.5, 1.0]], dtype=F64)
    loss, logs = Weighed(beta=1.0)(stats([[0.4, 9.0], [0.2, 0.1]], columns={"weight": weight}))
    z = 2 * 0.4 - (0.5 * 0.2 + 0.1)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-z)) + 2 * z, abs=1e-12)
    assert logs["weight"].item() == pytest.approx(0.875)


def test_a_third_block_is_left_to_extra():
    three = stats([[0.4, -0.2], [0.1, 0.3], [5.0, 5.0]], blocks=3)
    assert DPO(beta=0.5)(three)[0].item() == pytest.approx(0.744396660, abs=1e-9)
    assert three.is_chosen.flatten().tolist() == [True, False, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_margin_that_is_not_finite_is_refused(bad):
    with pytest.raises(UserError, match=r"pair 1 of the batch has the margin .*impossible under the policy"):
        DPO()(stats([[0.1], [bad], [0.0], [0.0]]))


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_beta_is_checked(beta):
    with pytest.raises(UserError, match=rf"DPO.beta must be finite and > 0, got {beta}"):
        DPO(beta=beta)


@pytest.mark.parametrize("left", [False, True])
def test_collate_by_hand(left):
    examples = [
        p | {"chosen_r": [0.5] * len(p["chosen_ids"]), "rejected_r": range(len(p["rejected_ids"]))} for p in PAIRS
    ]
    b = collate(examples, columns=("r",), pad_id=15, left=left)
    ids = [[1, 2, 3, 4, 5], [9, 1, 2, 3, 4], [1, 2, 3, 6, 7, 8], [9, 5]]
    prompts = [3, 1, 3, 1]
    real = [[1] * len(row) for row in ids]
    r = [[0, 0, 0, 0.5, 0.5], [0, 0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0, 1, 2], [0, 0]]

    def padded(rows, fill):
        return [[fill] * (6 - len(x)) + x if left else x + [fill] * (6 - len(x)) for x in map(list, rows)]

    assert b.ids.tolist() == padded(ids, 15)
    assert b.attention_mask.tolist() == padded(real, 0)
    assert b.completion_mask.tolist() == padded(
        [[i >= p for i in range(len(x))] for x, p in zip(ids, prompts, strict=True)], False
    )
    assert b.columns["r"].tolist() == [row[1:] for row in padded(r, 0)]
    assert b.targets.tolist() == [4, 5, 1, 2, 3, 4, 6, 7, 8, 5]
    assert b.blocks == 2
    there = b.spread(torch.arange(1.0, 11.0))
    assert there[b.mask].tolist() == list(range(1, 11))
    assert there[~b.mask].eq(0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected_ids": []}, "example 1 of the batch has an empty rejected response"),
        ({"prompt_ids": []}, "example 1 of the batch has an empty prompt"),
        ({"chosen_r": [1.0]}, "example 1 of the batch has 1 values of chosen_r for 2 response tokens"),
        ({"chosen_r": [1.0] * 3}, "example 1 of the batch has 3 values of chosen_r for 2 response tokens"),
        ({"chosen_r": None}, "example 1 of the batch has no 'chosen_r', only prompt_ids"),
        ({"rejected_ids": None}, "example 1 of the batch has no 'rejected_ids'"),
    ],
)
def test_collate_names_what_is_wrong(change, message):
    good = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4], "chosen_r": [0, 1], "rejected_r": [1]}
    bad = {k: v for k, v in (good | change).items() if v is not None}
    with pytest.raises(UserError, match=message):
        collate([good, bad], columns=("r",))


def test_statistics_against_a_plain_forward(models):
    """d, logp and k of a padded batch against whole log-softmaxes of each text alone."""
    batch = collate(PAIRS, left=True)
    s = statistics(TDPO2(), batch, models["policy"], models)
    for row, text in enumerate([p["prompt_ids"] + p[b] for b in ("chosen_ids", "rejected_ids") for p in PAIRS]):
        n = int(batch.mask[row].sum())
        logp, ref = (m.model(torch.tensor([text])).logits[0].log_softmax(-1)[-n - 1 : -1] for m in models.values())
        at = torch.tensor(text[-n:])[:, None]
        want = {"logp": logp.gather(1, at)[:, 0], "d": (logp - ref).gather(1, at)[:, 0]}
        want["k"] = (ref.exp() * (ref - logp)).sum(-1)
        for name, value in want.items():
            torch.testing.assert_close(getattr(s, name)[row][batch.mask[row]], value, atol=1e-10, rtol=0)
    assert s.d.requires_grad
    assert not s.d[~batch.mask].any()


@settings(max_examples=15)
@given(st.data())
def test_padding_and_order_change_nothing(models, data):
    """The loss of a pair alone, and of the same pair among others, on either side, in any order."""
    number, ids = data.draw, st.integers(0, 15)
    text = st.lists(ids, min_size=1, max_size=5)
    pairs = [
        {k: number(text) for k in ("prompt_ids", "chosen_ids", "rejected_ids")}
        for _ in range(number(st.integers(1, 3)))
    ]
    method = TDPO2(beta=0.7)

    def loss(examples, left):
        return method(statistics(method, collate(examples, pad_id=3, left=left), models["policy"], models))[0].item()

    alone = [loss([pair], False) for pair in pairs]
    order = number(st.permutations(pairs))
    assert loss(order, number(st.booleans())) == pytest.approx(sum(alone) / len(pairs), abs=1e-10)


def test_the_references_log_probs_can_come_with_the_data(models):
    cached = [dict(p) for p in PAIRS]
    for block in ("chosen", "rejected"):
        for example, row in zip(cached, token_log_probs(models["ref"], PAIRS, block, batch_size=1), strict=True):
            example[f"{block}_{LOGP_REF}"] = row.tolist()
    online = statistics(DPO(), collate(PAIRS), models["policy"], models)
    offline = statistics(DPO(), collate(cached, columns=(LOGP_REF,)), models["policy"], {})
    torch.testing.assert_close(offline.d, online.d, atol=1e-6, rtol=0)
    assert LOGP_REF not in offline.columns
    with pytest.raises(UserError, match="needs the model 'ref'"):
        statistics(DPO(), collate(PAIRS), models["policy"], {})
    with pytest.raises(UserError, match=r"Weighed needs the column 'weight' per response token"):
        statistics(Weighed(), collate(PAIRS), models["policy"], models)


def test_a_signal_writes_its_column_and_refuses_what_does_not_fit():
    @dataclass(frozen=True)
    class Count(TokenSignal):
        rows: tuple[tuple[float, ...], ...]
        column: ClassVar[str] = "n"

        def values(self, examples, block):
            return [torch.tensor(r) for r in self.rows]

    one = PAIRS[:1]
    done = Count(((1.0, 2.0),)).annotate(one, ("chosen",))
    assert done == [one[0] | {"chosen_n": [1.0, 2.0]}]
    assert "chosen_n" not in one[0]
    with pytest.raises(UserError, match="example 0 has 1 values of chosen_n for 2 response tokens"):
        Count(((1.0,),)).annotate(one, ("chosen",))
    with pytest.raises(UserError, match="example 0 has chosen_n nan at its response token 1"):
        Count(((1.0, math.nan),)).annotate(one, ("chosen",))
