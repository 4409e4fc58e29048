"""TDPO's two losses: hand numbers, closed-form gradients, what the sequential KL is and is not, and impossible tokens."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from locum.align import DPO, TDPO1, TDPO2, PairBatch, TokenStats
from locum.align.statistics import statistics
from locum.align.table import TableScorer, response_batch
from locum.errors import UserError
from locum.tokens import tiles

F64 = torch.float64
V, H, N = 4, 3, 3
BOTH = pytest.mark.parametrize("loss", [TDPO1(beta=0.7), TDPO2(beta=0.7, alpha=0.3)])


@pytest.fixture
def tables():
    """Policy, reference and a batch of N pairs over a table MDP of one prompt."""
    g = torch.Generator().manual_seed(3)
    policy, ref = (torch.randn(1, H, V, V, generator=g, dtype=F64) for _ in range(2))
    chosen, rejected = (torch.randint(V, (N, H), generator=g) for _ in range(2))
    return policy, ref, response_batch(torch.zeros(N, dtype=torch.long), chosen, rejected)


def seen(loss, policy, ref, batch):
    return statistics(loss, batch, TableScorer(policy), {"ref": TableScorer(ref)})


def value(loss, policy, ref, batch):
    return loss(seen(loss, policy, ref, batch))[0]


def gradient(loss, policy, ref, batch):
    z = policy.clone().requires_grad_()
    return torch.autograd.grad(value(loss, z, ref, batch), z)[0]


def parts(policy, ref, batch):
    """D and K of chosen and rejected by whole log-softmaxes: the plain way."""
    y, rows = batch.ids[:, 1:], torch.arange(H)
    previous = F.pad(y[:, :-1], (1, 0))
    pi, rho = (z.log_softmax(-1)[0, rows, previous] for z in (policy, ref))
    D = (pi - rho).gather(-1, y[..., None]).sum((1, 2))
    return D.chunk(2), (rho.exp() * (rho - pi)).sum((1, 2)).chunk(2)


def hand(beta=1.0):
    """V = 2, uniform reference; chosen (.8, .2), (.5, .5) with tokens 0, 1, rejected (.75, .25) with token 0."""
    ids = torch.tensor([[0, 0, 1], [1, 0, 0]])
    done = torch.tensor([[False, True, True], [False, True, False]])
    batch = PairBatch(ids, torch.tensor([[1, 1, 1], [1, 1, 0]]), done)
    laws = torch.full((2, 2, 2, 2), 0.5, dtype=F64)
    laws[0, 0, 0] = torch.tensor([0.8, 0.2])
    laws[1, 0, 0] = torch.tensor([0.75, 0.25])
    return {
        type(m): m(seen(TDPO1(), laws.log(), torch.zeros_like(laws), batch))
        for m in (DPO(beta=beta), TDPO1(beta=beta), TDPO2(beta=beta))
    }


def test_hand_case():
    found = hand()
    assert [found[m][0].item() for m in (DPO, TDPO1, TDPO2)] == pytest.approx(
        [0.661398482, 0.623810716, 0.642408617], abs=1e-9
    )
    margins = [found[m][1]["rewards/margins"].item() for m in (DPO, TDPO1, TDPO2)]
    assert margins == pytest.approx([0.064538521, 0.143841036, 0.104189779], abs=1e-9)
    logs = found[TDPO2][1]
    assert logs["kl/chosen"].item() == pytest.approx(0.223143551, abs=1e-9)
    assert logs["kl/rejected"].item() == pytest.approx(0.143841036, abs=1e-9)
    assert found[DPO][1]["rewards/chosen"].item() == pytest.approx(0.470003629, abs=1e-9)
    assert found[DPO][1]["rewards/rejected"].item() == pytest.approx(0.405465108, abs=1e-9)
    small = [hand(0.1)[m][0].item() for m in (DPO, TDPO1, TDPO2)]
    assert small == pytest.approx([0.689925461, 0.685980991, 0.687951261], abs=1e-9)


def test_without_the_kl_both_are_dpo(tables):
    s = seen(TDPO1(), *tables)
    off = TokenStats(s.d, s.mask, torch.zeros_like(s.k))
    want = DPO(beta=0.7)(s)[0].item()
    assert [m(x)[0].item() for m, x in ((TDPO1(beta=0.7), off), (TDPO2(0.7), off))] == pytest.approx(
        [want] * 2, abs=1e-12
    )
    assert TDPO2(0.7, alpha=0.0)(s)[0].item() == pytest.approx(want, abs=1e-12)
    torch.testing.assert_close(gradient(TDPO2(0.7, 0.0), *tables), gradient(DPO(0.7), *tables), atol=1e-12, rtol=0)


def test_alpha_one_has_the_value_of_tdpo1_and_another_gradient(tables):
    one = TDPO2(0.7, alpha=1.0)
    assert value(one, *tables).item() == pytest.approx(value(TDPO1(0.7), *tables).item(), abs=1e-12)
    assert (gradient(one, *tables) - gradient(TDPO1(0.7), *tables)).abs().max() > 1e-2


def test_closed_form_values_and_gradients(tables):
    """TDPO1 -c [dD_w + dK_w - dD_l - dK_l], TDPO2 -c [dD_w - dD_l - alpha dK_l], c = beta sigmoid(-z), mean over pairs."""
    policy, ref, batch = tables
    leaf = policy.clone().requires_grad_()
    (D_w, D_l), (K_w, K_l) = parts(leaf, ref, batch)
    for loss, z, direction in (
        (TDPO1(0.7), D_w - D_l - (K_l - K_w), D_w + K_w - D_l - K_l),
        (TDPO2(0.7, 0.3), D_w - D_l - 0.3 * (K_l - K_w), D_w - D_l - 0.3 * K_l),
    ):
        z = 0.7 * z.detach()
        assert value(loss, *tables).item() == pytest.approx(-F.logsigmoid(z).mean().item(), abs=1e-12)
        (want,) = torch.autograd.grad(-(0.7 * torch.sigmoid(-z) * direction).mean(), leaf, retain_graph=True)
        torch.testing.assert_close(gradient(loss, *tables), want, atol=1e-12, rtol=0)


def test_gradient_by_central_differences(tables):
    policy, ref, batch = tables
    for loss in (DPO(0.7), TDPO1(0.7)):
        leaf = policy.clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda z, m=loss: value(m, z, ref, batch), leaf, atol=1e-6, rtol=0, fast_mode=True
        )
    # The chosen response's KL has a value and no gradient in TDPO2: hold it where it is and differentiate the rest.
    method = TDPO2(0.7, 0.3)
    (_, _), (held, _) = parts(policy, ref, batch)

    def rest(z):
        (D_w, D_l), (_, K_l) = parts(z, ref, batch)
        return -F.logsigmoid(0.7 * (D_w - D_l - 0.3 * (K_l - held))).mean()

    step, probe, found = 1e-5, torch.zeros_like(policy).view(-1), gradient(method, *tables).view(-1)
    for i in range(0, len(probe), 7):
        probe[i] = step
        ahead, behind = rest(policy + probe.view_as(policy)), rest(policy - probe.view_as(policy))
        probe[i] = 0
        assert found[i].item() == pytest.approx((ahead - behind).item() / 2 / step, abs=1e-6)


def test_at_the_reference_all_start_alike(tables):
    _, ref, batch = tables
    want = gradient(DPO(0.7), ref, ref, batch)
    for loss in (TDPO1(0.7), TDPO2(0.7)):
        total, logs = loss(seen(loss, ref, ref, batch))
        assert total.item() == pytest.approx(math.log(2), abs=1e-15)
        assert logs["kl/chosen"] == logs["kl/rejected"] == 0
        torch.testing.assert_close(gradient(loss, ref, ref, batch), want, atol=1e-10, rtol=0)


@given(st.lists(st.tuples(*[st.floats(-9, 9)] * 2), min_size=2, max_size=9))
def test_tdpo1s_token_score_is_an_advantage(pairs):
    """Its mean under the reference is zero, and it is the raw logits' gap less the gap's mean: no normaliser of pi."""
    policy, ref = torch.tensor(pairs, dtype=F64).T
    k = tiles.divergence(ref[None], policy[None])
    d = policy.log_softmax(-1) - ref.log_softmax(-1)
    p = ref.softmax(-1)
    assert (p * (d + k)).sum().item() == pytest.approx(0, abs=1e-12)
    gap = policy - ref
    torch.testing.assert_close(d + k, gap - (p * gap).sum(), atol=1e-10, rtol=0)
    assert k.item() >= -1e-12


def test_tdpo1_does_not_see_a_constant_on_the_policys_logits(tables):
    policy, ref, batch = tables
    moved = policy + 9 * ref[..., :1]
    z, z_moved = (TDPO1()(seen(TDPO1(), p, ref, batch))[1]["rewards/margins"].item() for p in (policy, moved))
    assert z == pytest.approx(z_moved, abs=1e-10)


def test_the_kl_runs_from_reference_to_policy(tables):
    policy, ref, batch = tables
    k, swapped = seen(TDPO1(), policy, ref, batch).k, seen(TDPO1(), ref, policy, batch).k
    assert (k > 0).all()
    assert (k - swapped).abs().max() > 1e-2
    assert not seen(TDPO1(), ref, ref, batch).k.any()


@BOTH
@given(left=st.integers(0, 3), right=st.integers(0, 3), junk=st.sampled_from([9.0, math.nan, math.inf]))
def test_padding_changes_nothing(loss, left, right, junk):
    rows = {"d": [[0.4, -0.2], [0.1, 0.3]], "k": [[0.2, 0.1], [0.3, 0.05]]}

    def stats(pad_left, pad_right, fill):
        x = {
            n: torch.tensor([[fill] * pad_left + r + [fill] * pad_right for r in v], dtype=F64) for n, v in rows.items()
        }
        mask = torch.tensor([False] * pad_left + [True, True] + [False] * pad_right).expand(2, -1)
        return TokenStats(x["d"], mask, x["k"])

    assert loss(stats(left, right, junk))[0].item() == pytest.approx(loss(stats(0, 0, 0.0))[0].item(), abs=1e-10)


@BOTH
def test_what_the_prompt_predicts_does_not_count(loss, tables):
    """Policy and reference may say anything at states that predict no response token: here, position 2."""
    policy, ref, batch = tables
    done = batch.completion_mask.clone()
    done[:, 3:] = False
    short = PairBatch(batch.ids, batch.attention_mask, done)
    other = policy.clone()
    other[:, 2:] += 9 * ref[:, 2:]
    assert value(loss, other, ref, short).item() == pytest.approx(value(loss, policy, ref, short).item(), abs=1e-10)


def test_tiles_change_neither_value_nor_gradient(tables, monkeypatch):
    """In float32, two positions at a time, all at once, and float64."""
    policy, ref, batch = tables

    def single(z):
        return lambda batch, taps=None: tiles.Scores(TableScorer(z)(batch).hidden.float())

    def both(loss):
        leaf = policy.clone().requires_grad_()
        found, _ = loss(statistics(loss, batch, single(leaf), {"ref": single(ref)}))
        return found.detach().double(), torch.autograd.grad(found, leaf)[0]

    for loss in (TDPO1(), TDPO2()):
        plain = value(loss, *tables), gradient(loss, *tables)
        torch.testing.assert_close(both(loss), plain, atol=1e-5, rtol=0)
        with monkeypatch.context() as m:
            m.setattr(tiles, "TILE", 2 * V)
            torch.testing.assert_close(both(loss), plain, atol=1e-5, rtol=0)


def test_a_pair_of_equal_responses_teaches_tdpo1_nothing(tables):
    """z = 0; TDPO2 keeps the pull of alpha K towards the reference: gradient (beta/2) alpha dK."""
    policy, ref, batch = tables
    y = batch.ids[:N, 1:]
    same = response_batch(torch.zeros(N, dtype=torch.long), y, y)
    for loss in (TDPO1(0.7), TDPO2(0.7, 0.3)):
        assert value(loss, policy, ref, same).item() == pytest.approx(math.log(2), abs=1e-12)
    assert gradient(TDPO1(0.7), policy, ref, same).abs().max() < 1e-12
    leaf = policy.clone().requires_grad_()
    (want,) = torch.autograd.grad(0.7 / 2 * 0.3 * parts(leaf, ref, same)[1][1].mean(), leaf)
    torch.testing.assert_close(gradient(TDPO2(0.7, 0.3), policy, ref, same), want, atol=1e-12, rtol=0)


@BOTH
def test_tokens_that_the_reference_never_says_add_nothing(loss, tables):
    """Masked vocabulary: a last token that nobody uses, impossible under the reference and, or not, under the policy."""
    policy, ref, batch = tables
    batch = response_batch(torch.zeros(N, dtype=torch.long), *(batch.ids[:, 1:] % (V - 1)).chunk(2))
    none = torch.full((1, H, V, 1), -math.inf, dtype=F64)
    cut_ref = torch.cat([ref[..., :-1], none], -1)
    cut_policy = torch.cat([policy[..., :-1], none], -1)
    small = [x[:, :, :-1, :-1] for x in (policy, ref)]
    assert value(loss, cut_policy, cut_ref, batch).item() == pytest.approx(value(loss, *small, batch).item(), abs=1e-12)
    for p in (policy, cut_policy):
        assert gradient(loss, p, cut_ref, batch).isfinite().all()


@BOTH
def test_an_infinite_kl_is_refused(loss, tables):
    policy, ref, batch = tables
    forbids = policy.clone()
    forbids[..., -1] = -math.inf
    with pytest.raises(
        UserError, match=r"pair 0 of the batch has the margin .*the policy rules out what the reference"
    ):
        value(loss, forbids, ref, batch)


@BOTH
def test_logits_that_are_no_numbers_are_refused(loss, tables):
    policy, ref, batch = tables
    with pytest.raises(UserError, match="pair 0 of the batch has the margin nan"):
        value(loss, policy * math.nan, ref, batch)


@pytest.mark.parametrize(
    ("cls", "field", "bad"),
    [(c, "beta", b) for c in (TDPO1, TDPO2) for b in (0.0, -0.1, math.nan, math.inf)]
    + [(TDPO2, "alpha", b) for b in (-0.1, math.nan, math.inf)],
)
def test_a_bad_value_is_named(cls, field, bad):
    with pytest.raises(UserError, match=rf"{cls.__name__}\.{field} must be .*, got {bad}"):
        cls(**{field: bad})


def test_vocabularies_must_agree(tables):
    policy, _, batch = tables
    with pytest.raises(UserError, match=r"all models must have the same vocabulary; their logits have 4, 5 entries"):
        value(TDPO1(), policy, torch.zeros(1, H, V + 1, V + 1, dtype=F64), batch)
