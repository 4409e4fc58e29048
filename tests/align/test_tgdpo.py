"""TGDPO: hand numbers, its closed-form gradient, what the guidance may and may not do, and its two ways of getting it."""

import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locum.align import DPO, TGDPO, PairBatch, TokenStats
from locum.align.statistics import LOGP_REF, ModelScorer, collate, statistics, token_log_probs
from locum.align.table import TableScorer, response_batch
from locum.align.tgdpo import GuideReward, OnlineTGDPO
from locum.errors import UserError
from locum.models import tiny

F64 = torch.float64
V, H, N = 4, 3, 3
D = [[0.4, -0.2], [0.1, 0.3]]  # chosen, rejected
R = [[0.5, -0.5], [1.0, -1.0]]  # beta_g = .5 times the guide's log-ratios (1, -1), (2, -2)


def stats(d=D, r=R, mask=None):
    d, r = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (d, r))
    where = torch.ones(d.shape, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return TokenStats(d, where, columns={"r_hat": r})


@pytest.fixture
def tables():
    """Policy, reference, guide and a batch of N pairs over a table MDP of one prompt."""
    g = torch.Generator().manual_seed(5)
    models = [torch.randn(1, H, V, V, generator=g, dtype=F64) for _ in range(3)]
    chosen, rejected = (torch.randint(V, (N, H), generator=g) for _ in range(2))
    return *models, response_batch(torch.zeros(N, dtype=torch.long), chosen, rejected)


def online(loss, policy, ref, guide, batch):
    """Loss and gradient with respect to the policy's logits."""
    leaf = policy.clone().requires_grad_()
    frozen = {"ref": TableScorer(ref), "guide": TableScorer(guide)}
    found, _ = loss(statistics(loss, batch, TableScorer(leaf), frozen))
    return found.item(), torch.autograd.grad(found, leaf)[0]


def as_examples(batch):
    """Each pair of a batch of tables as an example."""
    rows = batch.ids[:, 1:].tolist()
    n = len(rows) // 2
    return [{"prompt_ids": [0], "chosen_ids": rows[i], "rejected_ids": rows[n + i]} for i in range(n)]


def test_hand_case():
    s = stats()
    loss, logs = TGDPO(beta=0.5, alpha=0.5)(s)
    assert loss.item() == pytest.approx(0.731350141, abs=1e-9)
    assert logs["rewards/margins"].item() == pytest.approx(-0.075, abs=1e-12)
    assert TGDPO(beta=0.5).weights(s).tolist() == [[1.25, 0.75], [0.5, 1.5]]
    assert DPO(beta=0.5)(s)[0].item() == pytest.approx(0.744396660, abs=1e-9)
    shown = {k: v.item() for k, v in logs.items() if k.startswith("weights") or "plain" in k}
    want = {"weights/min": 0.5, "weights/mean": 1.0, "weights/max": 1.5, "weights/not_positive": 0}
    assert shown == pytest.approx(want | {"rewards/plain_chosen": 0.1, "rewards/plain_rejected": 0.2}, abs=1e-12)


def test_closed_form_gradient_and_none_to_the_guidance():
    """-/+ beta sigmoid(-z) times the token's weight."""
    s = stats()
    loss, _ = TGDPO(beta=0.5)(s)
    loss.backward()
    c = 0.5 / (1 + math.exp(-0.075))
    assert s.d.grad.flatten().tolist() == pytest.approx([-c * 1.25, -c * 0.75, c * 0.5, c * 1.5], abs=1e-12)
    assert s.columns["r_hat"].grad is None


def test_without_guidance_it_is_dpo(tables):
    policy, ref, guide, batch = tables
    want, slope = online(DPO(0.7), *tables)
    for loss, other in ((OnlineTGDPO(0.7, alpha=0.0), guide), (OnlineTGDPO(0.7, alpha=2.0), ref)):
        found, gradient = online(loss, policy, ref, other, batch)
        assert found == pytest.approx(want, abs=1e-12)
        torch.testing.assert_close(gradient, slope, atol=1e-12, rtol=0)
    none = stats(r=[[0.0, 0.0]] * 2)
    assert TGDPO(0.7, alpha=3.0)(none)[0].item() == pytest.approx(DPO(0.7)(none)[0].item(), abs=1e-12)


def test_gradient_by_central_differences_and_none_to_the_frozen_models(tables):
    policy, ref, guide, batch = tables
    method = OnlineTGDPO(0.7, 0.5)

    def loss(p, r, g):
        return method(statistics(method, batch, TableScorer(p), {"ref": TableScorer(r), "guide": TableScorer(g)}))[0]

    leaves = [x.clone().requires_grad_() for x in (policy, ref, guide)]
    # What the guidance depends on is held by no_grad, so only the policy is moved.
    assert torch.autograd.gradcheck(lambda p: loss(p, ref, guide), leaves[0], atol=1e-6, rtol=0, fast_mode=True)
    loss(*leaves).backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is None
    assert leaves[2].grad is None


@given(st.lists(st.tuples(*[st.floats(-3, 3)] * 4), min_size=1, max_size=5), st.floats(0, 2))
def test_swapping_the_pair_and_the_guidances_sign_turns_the_margin(tokens, alpha):
    d_w, d_l, r_w, r_l = map(list, zip(*tokens, strict=True))

    def margin(d, r):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return TGDPO(0.7, alpha)(stats(d, r))[1]["rewards/margins"].item()

    swapped = margin([d_l, d_w], [[-x for x in r_l], [-x for x in r_w]])
    assert margin([d_w, d_l], [r_w, r_l]) == pytest.approx(-swapped, abs=1e-12)


@given(alpha=st.floats(0, 1), r=st.floats(-0.9, 0.9))
def test_at_the_reference(alpha, r):
    """log 2, and the gradient -(beta/2) (1 + alpha r) or (beta/2) (1 - alpha r)."""
    s = stats([[0.0] * 2] * 2, [[r, -r], [-r, r]])
    loss, _ = TGDPO(0.7, alpha)(s)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    want = [-0.35 * (1 + alpha * r), -0.35 * (1 - alpha * r), 0.35 * (1 + alpha * r), 0.35 * (1 - alpha * r)]
    assert s.d.grad.flatten().tolist() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("k", [0.25, 3.0])
def test_only_alpha_times_beta_g_matters(tables, k):
    want, slope = online(OnlineTGDPO(0.7, alpha=0.4, beta_g=0.3), *tables)
    found, gradient = online(OnlineTGDPO(0.7, alpha=0.4 * k, beta_g=0.3 / k), *tables)
    assert found == pytest.approx(want, abs=1e-12)
    torch.testing.assert_close(gradient, slope, atol=1e-12, rtol=0)
    assert online(OnlineTGDPO(0.3, 0.4), *tables)[0] == online(OnlineTGDPO(0.3, 0.4, beta_g=0.3), *tables)[0]


def test_constant_guidance():
    z = TGDPO(0.5, 0.3)(stats(r=[[0.2] * 2] * 2))[1]["rewards/margins"].item()
    assert z == pytest.approx(0.5 * (1.06 * 0.2 - 0.94 * 0.4), abs=1e-12)


@given(left=st.integers(0, 3), right=st.integers(0, 3), junk=st.sampled_from([9.0, math.nan, math.inf]))
def test_padding_changes_nothing(left, right, junk):
    def padded(rows):
        return [[junk] * left + row + [junk] * right for row in rows]

    mask = [[False] * left + [True] * 2 + [False] * right] * 2
    loss, logs = TGDPO(0.5)(stats(padded(D), padded(R), mask))
    assert loss.item() == pytest.approx(0.731350141, abs=1e-9)
    assert all(v.isfinite() for v in logs.values())


def test_a_batch_is_the_mean_of_its_pairs_in_any_order(tables):
    policy, ref, guide, batch = tables
    method, y = OnlineTGDPO(0.7), batch.ids[:, 1:]

    def loss(rows):
        pairs = response_batch(torch.zeros(len(rows), dtype=torch.long), y[rows], y[[N + i for i in rows]])
        return online(method, policy, ref, guide, pairs)[0]

    alone = [loss([i]) for i in range(N)]
    assert loss([2, 0, 1]) == pytest.approx(sum(alone) / N, abs=1e-10)


def test_written_before_training_or_scored_with_the_batch(tables):
    policy, ref, guide, batch = tables
    want, slope = online(OnlineTGDPO(0.7, alpha=0.8, beta_g=0.3), *tables)
    signal = GuideReward(TableScorer(guide), TableScorer(ref), beta=0.3, batch_size=2)
    cached = collate(signal.annotate(as_examples(batch)), columns=("r_hat",))
    found, gradient = online(TGDPO(0.7, alpha=0.8), policy, ref, guide, cached)
    assert found == pytest.approx(want, abs=1e-6)
    torch.testing.assert_close(gradient, slope, atol=1e-6, rtol=0)


def test_language_models_with_nothing_but_the_policy_in_memory():
    """Guide and reference write their columns once; then neither is needed. Responses differ in length."""
    lms = {name: ModelScorer(tiny(vocab_size=16, seed=i).model) for i, name in enumerate(("policy", "ref", "guide"))}
    pairs = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8]},
        {"prompt_ids": [9], "chosen_ids": [1, 2, 3, 4], "rejected_ids": [5]},
    ]
    frozen = {name: lms[name] for name in ("ref", "guide")}
    want = OnlineTGDPO(alpha=2.0)(statistics(OnlineTGDPO(alpha=2.0), collate(pairs, left=True), lms["policy"], frozen))
    done = GuideReward.of(*(tiny(vocab_size=16, seed=i) for i in (2, 1))).annotate(pairs)
    for block in ("chosen", "rejected"):
        for example, row in zip(done, token_log_probs(lms["ref"], pairs, block), strict=True):
            example[f"{block}_{LOGP_REF}"] = row
    batch = collate(done, columns=("r_hat", LOGP_REF))
    found = TGDPO(alpha=2.0)(statistics(TGDPO(alpha=2.0), batch, lms["policy"], {}))
    assert found[0].item() == pytest.approx(want[0].item(), abs=1e-6)
    assert found[1]["weights/max"].item() == pytest.approx(want[1]["weights/max"].item(), abs=1e-5)


def test_weights_below_zero_are_kept_and_told_or_raised():
    s = stats(r=[[-3.0, 0.0], [0.0, 3.0]])
    with pytest.warns(UserWarning, match="TGDPO: some tokens weigh 0 or less"):
        _, logs = TGDPO(1.0, alpha=0.5)(s)
    assert logs["rewards/margins"].item() == pytest.approx((-0.5 * 0.4 - 0.2) - (0.1 - 0.5 * 0.3), abs=1e-12)
    assert logs["weights/not_positive"] == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        raised = TGDPO(1.0, alpha=0.5, min_weight=0.2)
        z = raised(s)[1]["rewards/margins"].item()
    assert z == pytest.approx((0.2 * 0.4 - 0.2) - (0.1 + 0.2 * 0.3), abs=1e-12)


def test_other_weights_are_a_subclass():
    @dataclass(frozen=True)
    class Exponential(TGDPO):
        def weights(self, s):
            r = self.rewards(s).detach()
            return torch.where(s.is_chosen, r, -r).mul(self.alpha).exp()

    z = Exponential(1.0)(stats())[1]["rewards/margins"].item()
    up, down = math.exp(0.25), math.exp(-0.25)
    assert z == pytest.approx((up * 0.4 - down * 0.2) - (down**2 * 0.1 + up**2 * 0.3), abs=1e-12)


def test_guidance_that_is_no_number_is_refused(tables):
    with pytest.raises(UserError, match=r"pair 0 of the batch has the margin nan.*or a column are not finite"):
        TGDPO()(stats(r=[[0.1, math.nan], [0.0, 0.0]]))
    _, ref, guide, batch = tables
    mute = guide.clone()
    mute[..., 1] = -math.inf
    with pytest.raises(UserError, match=r"example \d has (chosen|rejected)_r_hat -inf at its response token \d"):
        GuideReward(TableScorer(mute), TableScorer(ref)).annotate(as_examples(batch))


def test_what_is_missing_is_named(tables):
    policy, ref, _, batch = tables
    one = {"ref": TableScorer(ref)}
    with pytest.raises(UserError, match="TGDPO needs the column 'r_hat' per response token; the data has none"):
        statistics(TGDPO(), batch, TableScorer(policy), one)
    with pytest.raises(UserError, match="OnlineTGDPO needs the model 'guide' beside the policy; none was given"):
        statistics(OnlineTGDPO(), batch, TableScorer(policy), one)
    big = TableScorer(torch.zeros(1, H, V + 1, V + 1, dtype=F64))
    with pytest.raises(UserError, match=r"all models must have the same vocabulary; their logits have 4, 5 entries"):
        GuideReward(big, one["ref"]).annotate(as_examples(batch))
    with pytest.raises(UserError, match=r"guide 'tiny-8-0' has 8 tokens and model 'tiny-9-0' has 9; they must share"):
        GuideReward.of(tiny(vocab_size=8), tiny(vocab_size=9))
    with pytest.raises(UserError, match="example 0 of the batch has an empty rejected response"):
        GuideReward(one["ref"], one["ref"]).annotate([{"prompt_ids": [0], "chosen_ids": [1], "rejected_ids": []}])


def test_the_prompt_does_not_count(tables):
    """A state that predicts no response token may be anything in all three models."""
    policy, ref, guide, batch = tables
    done = batch.completion_mask.clone()
    done[:, 1] = False
    short = PairBatch(batch.ids, batch.attention_mask, done)
    moved = [x.clone() for x in (policy, ref, guide)]
    for x, other in zip(moved, (ref, guide, policy), strict=True):
        x[:, 0] += 9 * other[:, 0]
    assert online(OnlineTGDPO(), *moved, short)[0] == pytest.approx(
        online(OnlineTGDPO(), *tables[:3], short)[0], abs=1e-10
    )


@pytest.mark.parametrize(
    ("cls", "field", "bad"),
    [
        (TGDPO, "beta", 0.0),
        *((TGDPO, "alpha", bad) for bad in (-0.1, math.nan, math.inf)),
        *((TGDPO, "min_weight", bad) for bad in (-0.1, 1.5, math.nan)),
        *((OnlineTGDPO, "beta_g", bad) for bad in (0.0, math.nan, math.inf)),
        (OnlineTGDPO, "alpha", -1.0),
    ],
)
def test_a_bad_value_is_named(cls, field, bad):
    with pytest.raises(UserError, match=rf"{cls.__name__}\.{field} must be .*, got {bad}"):
        cls(**{field: bad})
    with pytest.raises(UserError, match=r"GuideReward\.beta must be finite and > 0, got 0"):
        GuideReward(lambda batch, taps=None: None, lambda batch, taps=None: None, beta=0.0)
