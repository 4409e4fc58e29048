"""Per-token quantities equal their one-line definitions, in every chunking, padding and dtype."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.errors import UserError
from locum.tokens import logprobs as lp
from locum.tokens import tiles

F64 = torch.float64


def test_hand_numbers():
    logits = torch.tensor([[math.log(0.7), math.log(0.2), math.log(0.1)]], dtype=F64)
    assert lp.of_ids(logits + 5, torch.tensor([1])).item() == pytest.approx(math.log(0.2), abs=1e-12)
    assert lp.entropy(logits).item() == pytest.approx(0.8018185525, abs=1e-10)
    flat = torch.zeros(1, 3, dtype=F64)
    assert lp.kl(logits, flat).item() == pytest.approx(math.log(3) - 0.8018185525, abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(2, 7), st.integers(2, 9), st.integers(1, 8), st.integers(0, 99))
def test_chunked_equals_whole(B, L, V, chunk, seed):
    g = torch.Generator().manual_seed(seed)
    z, r = torch.randn(2, B, L, V, generator=g, dtype=F64)
    ids = torch.randint(V, (B, L), generator=g)
    logp, logr = z.log_softmax(-1), r.log_softmax(-1)
    want = logp[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    got = lp.of_sequence(z, ids, chunk)
    assert got.shape == (B, L)
    assert (got[:, 0] == 0).all()
    torch.testing.assert_close(got[:, 1:], want, atol=1e-12, rtol=0)
    torch.testing.assert_close(lp.entropy(z, chunk), -(logp.exp() * logp).sum(-1), atol=1e-12, rtol=0)
    torch.testing.assert_close(lp.kl(r, z, chunk), (logr.exp() * (logr - logp)).sum(-1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_gradients_equal_the_plain_formula(chunk):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(2, 5, 4, generator=g, dtype=F64, requires_grad=True)
    w = torch.randn(7, 4, generator=g, dtype=F64, requires_grad=True)
    b = torch.randn(7, generator=g, dtype=F64)
    ids = torch.randint(7, (2, 5), generator=g)
    want = (h @ w.T + b).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    g_want = torch.autograd.grad(want.square().sum(), (h, w))
    for got in (lp.of_hidden(h, w, ids, b, chunk), lp.of_ids(h @ w.T + b, ids, chunk)):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
        for a, c in zip(torch.autograd.grad(got.square().sum(), (h, w)), g_want, strict=True):
            torch.testing.assert_close(a, c, atol=1e-10, rtol=0)
    z = torch.randn(6, 7, generator=g, dtype=F64, requires_grad=True)
    r = torch.randn(6, 7, generator=g, dtype=F64)
    assert torch.autograd.gradcheck(lambda z: lp.kl(r, z, chunk), (z,))


def test_half_precision_logits_are_summed_in_float32():
    z = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids = torch.arange(4)
    got = lp.of_ids(z, ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, z.float().log_softmax(-1)[torch.arange(4), ids], atol=1e-6, rtol=0)


def test_gibbs_and_equality():
    g = torch.Generator().manual_seed(2)
    z, r = torch.randn(2, 50, 11, generator=g, dtype=F64)
    assert (lp.kl(r, z) > 0).all()
    assert lp.kl(r, r + 3).abs().max() < 1e-12


def test_probability_zero_is_inf_and_never_nan():
    ninf = -math.inf
    z = torch.tensor([[0.0, 0.0, ninf], [0.0, ninf, 0.0]], dtype=F64)
    r = torch.tensor([[0.0, ninf, ninf], [0.0, 0.0, 0.0]], dtype=F64)
    assert lp.of_ids(z, torch.tensor([2, 0])).tolist() == [ninf, pytest.approx(-math.log(2))]
    assert lp.kl(r, z).tolist() == [pytest.approx(math.log(2)), math.inf]
    assert lp.entropy(z).tolist() == pytest.approx([math.log(2)] * 2)
    got = lp.log_ratio(torch.tensor([0.0, ninf, ninf]), torch.tensor([ninf, 0.0, ninf]))
    assert got.tolist() == [math.inf, ninf, ninf]
    x = torch.tensor([[1.0, math.nan, math.inf]])
    assert lp.masked_sum(x, torch.tensor([[True, False, False]])).tolist() == [1.0]
    assert lp.masked_mean(x, torch.zeros(1, 3, dtype=torch.bool)).tolist() == [0.0]


@given(st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4))
def test_response_mask_under_padding(left, right, n_prompt, n_response):
    attention = torch.tensor([[0] * left + [1] * (n_prompt + n_response) + [0] * right])
    mask = lp.response_mask(attention, torch.tensor([n_prompt]))
    assert mask[0].tolist() == [False] * (left + n_prompt) + [True] * n_response + [False] * right
    assert lp.positions(attention)[0, left : left + n_prompt + n_response].tolist() == list(
        range(n_prompt + n_response)
    )


def test_response_mask_ends_after_the_first_eos():
    ids = torch.tensor([[9, 5, 1, 2, 9, 9]])  # 9 ends a sequence; the one in the prompt does not count
    mask = lp.response_mask(torch.ones_like(ids), torch.tensor([2]), ids, {9})
    assert mask[0].tolist() == [False, False, True, True, True, False]


def test_token_form_equals_sequence_form_and_finite_differences():
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 6, 5, generator=g, dtype=F64, requires_grad=True)
    ref = torch.randn(4, 6, 5, generator=g, dtype=F64)
    ids = torch.randint(5, (4, 6), generator=g)
    mask = lp.response_mask(torch.ones_like(ids), torch.tensor([2, 1, 3, 2]))

    def loss(z):
        return lp.dpo_loss(lp.of_sequence(z, ids) - lp.of_sequence(ref, ids), mask, 0.3)[0]

    seq = (
        (lp.of_sequence(logits, ids) * mask).sum(-1),
        (lp.of_sequence(ref, ids) * mask).sum(-1),
    )  # log-prob of whole responses
    d = 0.3 * ((seq[0][:2] - seq[0][2:]) - (seq[1][:2] - seq[1][2:]))
    assert loss(logits).item() == pytest.approx(-torch.nn.functional.logsigmoid(d).mean().item(), abs=1e-6)
    assert torch.autograd.gradcheck(loss, (logits,), eps=1e-6, atol=1e-7)
    assert loss(ref).item() == pytest.approx(math.log(2), abs=1e-12)


def test_other_vocabulary_is_refused():
    with pytest.raises(UserError, match="vocabulary of 5 tokens and the reference one of 4"):
        lp.kl(torch.zeros(1, 4), torch.zeros(1, 5))
    with pytest.raises(UserError, match="one shape"):
        lp.kl(torch.zeros(1, 5), torch.zeros(2, 5))


def test_the_direction_of_a_divergence():
    """KL((.5, .5) || (.9, .1)) and KL((.9, .1) || (.5, .5)), by hand."""
    z, q = torch.zeros(1, 2, dtype=F64), torch.tensor([[math.log(9), 0.0]], dtype=F64)
    assert tiles.divergence(z, q).item() == pytest.approx(math.log(5 / 3), abs=1e-12)
    assert tiles.distilled(z, q.log_softmax(-1)).item() == pytest.approx(math.log(5 / 3), abs=1e-12)
    assert tiles.divergence(q, z).item() == pytest.approx(0.9 * math.log(9) + math.log(0.2), abs=1e-12)


def test_log_sum_exp_in_every_tiling():
    z = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(4), dtype=F64, requires_grad=True)
    for chunk in (1, 4, None):
        torch.testing.assert_close(lp.log_sum_exp(z, chunk), z.logsumexp(-1), atol=1e-12, rtol=0)
        (grad,) = torch.autograd.grad(lp.log_sum_exp(z, chunk).sum(), z)
        torch.testing.assert_close(grad, z.softmax(-1), atol=1e-12, rtol=0)
    assert lp.log_sum_exp(z.detach().bfloat16()).dtype == torch.float32


def test_the_closed_form_gradient_is_autograd_s_and_reaches_the_student_alone():
    g = torch.Generator().manual_seed(5)
    z, q = (torch.randn(6, 7, generator=g, dtype=F64, requires_grad=True) for _ in range(2))
    weight = torch.rand(6, generator=g, dtype=F64)
    value = tiles.distilled(z, q.log_softmax(-1))
    torch.testing.assert_close(value, tiles.divergence(z, q), atol=1e-12, rtol=0)
    got = torch.autograd.grad((weight * value).sum(), (z, q), allow_unused=True)
    (want,) = torch.autograd.grad((weight * tiles.divergence(z, q)).sum(), z)
    torch.testing.assert_close(got[0], want, atol=1e-12, rtol=0)
    assert got[1] is None
    assert torch.autograd.gradcheck(lambda z: tiles.distilled(z, q.detach().log_softmax(-1)), (z,))
    assert tiles.distilled(z, z.log_softmax(-1)).abs().max() < 1e-12


@pytest.mark.parametrize("form", [tiles.divergence, lambda z, q: tiles.distilled(z, q.log_softmax(-1))])
def test_a_divergence_from_what_is_ruled_out(form):
    """Both rule a token out: 0 and no gradient for it. The teacher alone: inf. nan stays nan."""
    ninf = -math.inf
    z = torch.tensor([[0.0, 0.0, ninf], [0.0, ninf, 0.0], [0.0, 0.0, 0.0]], dtype=F64, requires_grad=True)
    q = torch.tensor([[math.log(3), 0.0, ninf], [0.0, 0.0, 0.0], [0.0, ninf, 0.0]], dtype=F64)
    value = form(z, q)
    assert value.tolist() == [
        pytest.approx(0.5 * math.log(4 / 3)),
        pytest.approx(math.log(1.5)),
        math.inf,
    ]
    (grad,) = torch.autograd.grad(value[:2].sum(), z)
    assert torch.isfinite(grad[:2]).all()
    assert (grad[0, 2], grad[1, 1]) == (0, 0)
    assert form(torch.tensor([[0.0, math.nan]], dtype=F64), torch.zeros(1, 2, dtype=F64)).isnan().all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(2, 40), st.integers(1, 6), st.integers(1, 12), st.integers(0, 99))
def test_distillation_from_hidden_states_is_that_of_plain_logits(n, V, D, tile, seed):
    """Float32 against float64 formulas with logits that exist whole: values and gradients to 1e-5."""
    g = torch.Generator().manual_seed(seed)
    h, th = torch.randn(2, n, D, generator=g)
    w, tw = torch.randn(2, V, D, generator=g)
    b = torch.randn(V, generator=g)
    up = torch.rand(n, generator=g)
    exact = [x.double().requires_grad_() for x in (h, w, b)]
    want = tiles.divergence(exact[0] @ exact[1].T + exact[2], (th @ tw.T).double())
    grads = torch.autograd.grad((up * want).sum(), exact)
    own = [x.clone().requires_grad_() for x in (h, w, b)]
    got = tiles.distillation(tiles.Scores(*own), tiles.Scores(th, tw), tile)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    for a, c in zip(torch.autograd.grad((up * got).sum(), own), grads, strict=True):
        torch.testing.assert_close(a.double(), c, atol=1e-5, rtol=1e-5)
    plain = tiles.distillation(tiles.Scores(h @ w.T + b), tiles.Scores(th @ tw.T), tile)
    torch.testing.assert_close(plain, got, atol=1e-5, rtol=1e-5)


def test_distillation_in_bfloat16_over_a_large_vocabulary():
    """Bfloat16 states and heads, 50k tokens: the sums are float32, so only the logits' own rounding is left (2 %)."""
    g = torch.Generator().manual_seed(6)
    n, V, D = 4, 50_021, 16
    h, th = torch.randn(2, n, D, generator=g).bfloat16()
    w, tw = torch.randn(2, V, D, generator=g).bfloat16() / 4
    want = tiles.divergence((h.double() @ w.double().T), (th.double() @ tw.double().T))
    own = [x.clone().requires_grad_() for x in (h, w)]
    got = tiles.distillation(tiles.Scores(*own), tiles.Scores(th, tw), tile=3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=0)
    exact = [x.double().requires_grad_() for x in (h, w)]
    torch.autograd.backward(tiles.divergence(exact[0] @ exact[1].T, th.double() @ tw.double().T).sum())
    got.sum().backward()
    for a, c in zip(own, exact, strict=True):
        assert a.grad.dtype == torch.bfloat16
        assert (a.grad.double() - c.grad).norm() < 2e-2 * c.grad.norm()


def test_models_of_other_vocabularies_cannot_be_distilled():
    with pytest.raises(UserError, match="same vocabulary; their logits have 4, 5 entries"):
        tiles.distillation(tiles.Scores(torch.zeros(1, 4)), tiles.Scores(torch.zeros(1, 5)))


def test_extrapolated_laws_and_what_they_rule_out():
    """z + a (to - away), normalised; -inf in either of the two stays impossible, and the same -inf in all is no nan."""
    g = torch.Generator().manual_seed(7)
    z, to, away = torch.randn(3, 4, 5, generator=g, dtype=F64)
    a = torch.tensor([0.0, 0.5, 1.0, 20.0], dtype=F64)
    want = (z + a[:, None] * (to - away)).log_softmax(-1)
    torch.testing.assert_close(tiles.extrapolated(z, to, away, a), want, atol=1e-12, rtol=0)
    torch.testing.assert_close(tiles.extrapolated(z + 1, to - 2, away + 3, a), want, atol=1e-12, rtol=0)
    to[:, 0], away[:, 0], to[0, 1], away[1, 2] = -math.inf, -math.inf, -math.inf, -math.inf
    got = tiles.extrapolated(to, to, away, a)
    assert torch.isneginf(got).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 2], [2, 0], [3, 0]]
    assert got.exp().sum(-1).tolist() == pytest.approx([1.0] * 4)
    away[2, 3] = math.nan
    assert tiles.extrapolated(to, to, away, a)[2].isnan().all()
