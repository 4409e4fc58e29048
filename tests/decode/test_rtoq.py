"""Credit, reranking, guidance and diagnostics obey the identities of arXiv 2404.12358 on real (tiny) transformers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.decode.beam import beam_search
from locum.decode.guide import guided
from locum.decode.rtoq import RtoQ, credit, dpo_diagnostics, guide, rerank
from locum.errors import UserError
from locum.models import LM, tiny
from locum.tasks.token_mdp import TableMDP
from locum.tokens import logprobs as lp
from locum.tokens.sampling import Sampling

F64 = torch.float64
V = 16


@pytest.fixture(scope="module")
def policy():
    return tiny(vocab_size=V, seed=1, dtype=F64)


@pytest.fixture(scope="module")
def ref():
    return tiny(vocab_size=V, seed=2, dtype=F64)


class Fixed(torch.nn.Module):
    """A model whose next-token logits are the same everywhere."""

    def __init__(self, logits):
        super().__init__()
        self.head = torch.nn.Linear(1, len(logits), dtype=F64)
        self.register_buffer("logits", torch.tensor(logits, dtype=F64))
        self.device, self.dtype, self.config, self.generation_config = self.logits.device, F64, None, None

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        out = self.logits.expand(*input_ids.shape, -1)
        return type("Out", (), {"logits": out})


def fixed(*p):
    return LM(Fixed([math.log(x) if x else -math.inf for x in p]), name="fixed")


def test_hand_case():
    """pi = (.7, .2, .1), ref = (.5, .3, .2), beta .5: c = .5 log(pi/ref) per token."""
    c = credit(fixed(0.7, 0.2, 0.1), fixed(0.5, 0.3, 0.2), torch.tensor([[2, 0, 1, 2]]), [1], beta=0.5)
    want = [0.0, 0.5 * math.log(1.4), 0.5 * math.log(2 / 3), 0.5 * math.log(0.5)]
    assert c.tokens[0].tolist() == pytest.approx(want, abs=1e-12)
    assert want[1:] == pytest.approx([0.1682361183, -0.2027325541, -0.3465735903], abs=1e-9)
    assert c.sums.tolist() == pytest.approx([sum(want)], abs=1e-12)
    assert c.running[0].tolist() == pytest.approx([0, want[1], want[1] + want[2], sum(want)], abs=1e-12)
    assert c.ranks.tolist() == [[-1, 2, 1, 0]]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 3), st.booleans(), st.integers(1, 3))
def test_padding_and_batches_change_nothing(n_prompt, n_response, pad, left, batch_size):
    policy, ref = tiny(vocab_size=V, seed=1, dtype=F64), tiny(vocab_size=V, seed=2, dtype=F64)
    g = torch.Generator().manual_seed(n_prompt)
    text = torch.randint(V, (n_prompt + n_response,), generator=g)
    alone = credit(policy, ref, text[None], [n_prompt], beta=0.3)
    logp = [m.model(text[None]).logits[0, :-1].log_softmax(-1).gather(-1, text[1:, None])[:, 0] for m in (policy, ref)]
    want = 0.3 * (logp[0] - logp[1])[n_prompt - 1 :]
    torch.testing.assert_close(alone.tokens[0, n_prompt:], want, atol=1e-10, rtol=0)
    assert not alone.mask[0, :n_prompt].any()
    other = torch.randint(V, (n_prompt + n_response + pad,), generator=g)
    fill = torch.zeros(pad, dtype=torch.long)
    row, real = (torch.cat([fill, x] if left else [x, fill]) for x in (text, torch.ones_like(text)))
    batch = torch.stack([row, other]), torch.tensor([n_prompt, 1]), torch.stack([real, torch.ones_like(other)])
    both = credit(policy, ref, *batch, beta=0.3, batch_size=batch_size)
    torch.testing.assert_close(both.tokens[0][both.mask[0]], want, atol=1e-10, rtol=0)
    assert (both.tokens[~both.mask] == 0).all()
    assert both.mask[0].sum() == n_response
    assert both.mask[1].sum() == len(other) - 1
    torch.testing.assert_close(both.sums[0], want.sum(), atol=1e-10, rtol=0)


def test_policy_equal_to_reference_has_no_credit_and_loss_log_2(policy):
    ids = torch.arange(8).view(2, 4)
    assert credit(policy, policy, ids, [1, 2]).tokens.abs().max() == 0
    d = dpo_diagnostics(policy, policy, ids, [1, 2])
    assert d.loss == pytest.approx(math.log(2), abs=1e-12)
    assert (d.chosen, d.rejected, d.margin, d.accuracy) == (0, 0, 0, 0)
    assert abs(d.decline) < 1e-12


def test_diagnostics_equal_their_definitions(policy, ref):
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(V, (6, 9), generator=g)
    prompt_len = torch.tensor([2, 3, 4, 2, 3, 4])
    attention = torch.ones_like(ids)
    attention[1, 7:] = attention[4, 6:] = 0
    d = dpo_diagnostics(policy, ref, ids, prompt_len, attention, beta=0.5, batch_size=2)
    c = credit(policy, ref, ids, prompt_len, attention, beta=0.5)
    margin = c.sums[:3] - c.sums[3:]
    assert d.chosen == pytest.approx(c.sums[:3].mean().item(), abs=1e-10)
    assert d.rejected == pytest.approx(c.sums[3:].mean().item(), abs=1e-10)
    assert d.margin == pytest.approx(margin.mean().item(), abs=1e-10)
    assert d.accuracy == (margin > 0).double().mean().item()
    assert d.loss == pytest.approx(-torch.nn.functional.logsigmoid(margin).mean().item(), abs=1e-6)
    with torch.no_grad():
        p, r = (m.model(ids[:3], attention_mask=attention[:3]).logits.log_softmax(-1)[:, :-1] for m in (policy, ref))
    kl = (r.exp() * (r - p)).sum(-1) * c.mask[:3, 1:]
    assert d.decline == pytest.approx(-0.5 * kl.sum(-1).mean().item(), abs=1e-10)
    assert d.decline_per_token == pytest.approx(-0.5 * (kl.sum() / c.mask[:3].sum()).item(), abs=1e-10)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.5, 2.0]))
def test_decline_identity(seed, beta):
    """eq. 11: E over ref of the credit is -beta KL(ref || pi), never positive, 0 only for equal laws."""
    g = torch.Generator().manual_seed(seed)
    z, r = torch.randn(2, 5, V, generator=g, dtype=F64)
    logr = r.log_softmax(-1)
    expected = (logr.exp() * beta * (z.log_softmax(-1) - logr)).sum(-1)
    torch.testing.assert_close(expected, -beta * lp.kl(r, z), atol=1e-10, rtol=0)
    assert (expected < 0).all()
    assert lp.kl(r, r + torch.randn(5, 1, generator=g, dtype=F64)).abs().max() < 1e-12


def test_shift_of_logits_leaves_credit_and_search_alone(policy, ref):
    ids = torch.randint(V, (3, 8), generator=torch.Generator().manual_seed(0))
    before = credit(policy, ref, ids, [2, 2, 2])
    hook = policy.model.lm_head.register_forward_hook(lambda m, x, out: out + x[0].sum(-1, keepdim=True))
    try:
        after = credit(policy, ref, ids, [2, 2, 2])
    finally:
        hook.remove()
    torch.testing.assert_close(before.tokens, after.tokens, atol=1e-10, rtol=0)
    mdp = TableMDP.random(0)
    phi = torch.randn(*mdp.reward.shape[:-1], 1, generator=torch.Generator().manual_seed(1), dtype=F64)
    found, moved = (beam_search(mdp.session(z), [2], beams=3, max_new_tokens=8) for z in (mdp.reward, mdp.reward + phi))
    assert [h.ids for h in found] == [h.ids for h in moved]
    assert [h.logp for h in found] == pytest.approx([h.logp for h in moved], abs=1e-10)


def test_probability_zero_is_reported_at_its_position():
    ids = torch.tensor([[0, 0, 1, 2, 0], [0, 0, 1, 0, 0]])  # ref never says 1, the policy never says 2
    c = credit(fixed(0.5, 0.5, 0.0), fixed(0.5, 0.0, 0.5), ids, [1, 1], beta=1.0)
    assert c.tokens.tolist() == [[0, 0, math.inf, -math.inf, 0], [0, 0, math.inf, 0, 0]]
    assert c.running[0].tolist() == [0, 0, math.inf, -math.inf, -math.inf]
    assert c.sums.tolist() == [-math.inf, math.inf]
    assert c.impossible.tolist() == [[False, False, True, True, False], [False, False, True, False, False]]
    assert c.ranks.tolist() == [[-1, 1, 3, 0, 2], [-1, 0, 3, 1, 2]]


def test_rerank_orders_by_credit_or_likelihood(policy, ref):
    prompt, candidates = [1, 2], [[3], [4, 5, 6], [7, 8], [3]]
    for by in ("credit", "likelihood"):
        got = rerank(policy, ref, prompt, candidates, by=by, beta=0.2)
        for candidate, score in zip(candidates, got.scores, strict=True):
            c = credit(policy, ref, torch.tensor([prompt + candidate]), [2], beta=0.2)
            want = c.sums if by == "credit" else c.logp.sum(-1)
            assert score == pytest.approx(want.item(), abs=1e-9)
        assert got.order == sorted(range(4), key=lambda i: -got.scores[i])
        assert got.order.index(0) < got.order.index(3)  # equal ones stay in the order given
    found = RtoQ(beams=4).search(policy, prompt, max_new_tokens=3)
    assert rerank(policy, ref, prompt, [h.ids for h in found], by="likelihood").order == [0, 1, 2, 3]


def test_guided_law_identities():
    g = torch.Generator().manual_seed(0)
    base, proxy, ref = torch.randn(3, 4, V, generator=g, dtype=F64)
    assert guided(base, proxy, ref, 0.0) is base
    for kappa in (0.3, 1.0, -2.0):
        law = guided(base, proxy, ref, kappa).softmax(-1)
        want = base.softmax(-1) * (proxy.softmax(-1) / ref.softmax(-1)) ** kappa
        torch.testing.assert_close(law, want / want.sum(-1, keepdim=True), atol=1e-10, rtol=0)
    torch.testing.assert_close(guided(ref, proxy, ref, 1.0).softmax(-1), proxy.softmax(-1), atol=1e-10, rtol=0)
    ref[:, 3] = -math.inf
    never = guided(base, proxy, ref, 0.5).softmax(-1)
    assert (never[:, 3] == 0).all()
    torch.testing.assert_close(never.sum(-1), torch.ones(4, dtype=F64))


def guided_uncached(base, proxy, ref, kappa, ids, steps):
    ids = list(ids)
    with torch.no_grad():
        for _ in range(steps):
            z = [m.model(torch.tensor([ids])).logits[0, -1] for m in (base, proxy, ref)]
            ids.append(int(guided(*z, kappa).argmax()))
    return ids


@pytest.fixture(scope="module")
def base():
    return tiny(vocab_size=V, seed=3, hidden_size=48, dtype=F64)


def generate(lm, ids, processor, **how):
    how = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | how
    attention = (ids != 0).long()
    return lm.model.generate(ids, attention_mask=attention, logits_processor=[processor], **how)


def test_guide_in_transformers_generate(base, policy, ref):
    prompt = [3, 9, 4]
    out = generate(base, torch.tensor([prompt]), guide(policy, ref, kappa=1.5))
    assert out[0].tolist() == guided_uncached(base, policy, ref, 1.5, prompt, 10)
    plain = generate(base, torch.tensor([prompt]), guide(policy, ref, kappa=0.0))
    assert plain[0].tolist() == guided_uncached(base, base, base, 0.0, prompt, 10)
    as_proxy = generate(ref, torch.tensor([prompt]), guide(policy, ref))
    assert as_proxy[0].tolist() == guided_uncached(policy, policy, policy, 0.0, prompt, 10)


def test_guide_follows_batches_with_left_padding_and_is_reusable(base, policy, ref):
    processor = guide(policy, ref, kappa=0.7, pad_id=0)
    for texts in ([[3, 9, 4], [5]], [[8, 8], [8, 8]]):
        width = max(map(len, texts))
        ids = torch.tensor([[0] * (width - len(t)) + t for t in texts])
        out = generate(base, ids, processor)
        for row, text in zip(out.tolist(), texts, strict=True):
            assert row[width - len(text) :] == guided_uncached(base, policy, ref, 0.7, text, 10)


def test_guide_follows_beams(base, policy, ref):
    """Beams are reordered, dropped and doubled between calls; each row's law must stay that of its own text."""
    inner, seen = guide(policy, ref, kappa=0.8), []

    def checked(input_ids, scores):
        out = inner(input_ids, scores)
        with torch.no_grad():
            p, r = (m.model(input_ids).logits[:, -1] for m in (policy, ref))
        torch.testing.assert_close(out.exp(), guided(scores, p, r, 0.8).exp(), atol=1e-6, rtol=0)
        seen.append(len(input_ids))
        return out

    generate(base, torch.tensor([[3, 9, 4]]), checked, num_beams=4, max_new_tokens=15)
    assert len(seen) == 15


def test_guide_with_sampling_law(base, policy, ref):
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        z, p, r = (m.model(ids).logits[:, -1] for m in (base, policy, ref))
    law = Sampling(temperature=1.0).law(guide(policy, ref, kappa=0.5)(ids, z))
    want = z.softmax(-1) * (p.softmax(-1) / r.softmax(-1)) ** 0.5
    torch.testing.assert_close(law, want / want.sum(-1, keepdim=True), atol=1e-6, rtol=0)


def test_search_is_the_beam_search_of_its_fields(policy):
    for penalty in (0.0, 1.0):
        got = RtoQ(beams=3, length_penalty=penalty).search(policy, [4, 5], max_new_tokens=7)
        want = beam_search(policy.session(), [4, 5], beams=3, max_new_tokens=7, length_penalty=penalty)
        assert got == want
        assert got[0].score == pytest.approx(got[0].logp / 7**penalty, abs=1e-12)


@pytest.mark.parametrize(
    ("field", "value"),
    [("beams", 0), ("beta", 0.0), ("beta", -1.0), ("beta", math.nan), ("length_penalty", math.nan)],
)
def test_a_bad_field_is_named(field, value):
    with pytest.raises(UserError, match=rf"RtoQ\.{field} must be .*, got {value}"):
        RtoQ(**{field: value})


def test_bad_input_ends_in_one_sentence(policy, ref):
    ids, other = torch.tensor([[1, 2, 3]]), tiny(vocab_size=V + 1, dtype=F64)
    for call in (lambda: credit(policy, other, ids, [1]), lambda: guide(policy, other)):
        with pytest.raises(UserError, match=r"has 16 tokens and reference .* has 17; they must share one vocabulary"):
            call()
    with pytest.raises(UserError, match="the base model has 17 tokens and the guide 16"):
        guide(policy, ref)(ids, torch.zeros(1, 17))
    with pytest.raises(UserError, match=r"beta must be > 0, got -0\.5"):
        credit(policy, ref, ids, [1], beta=-0.5)
    for n in (0, 3):
        with pytest.raises(UserError, match=rf"prompt_len\[0\] must be >= 1 and below the row's 3 tokens, got {n}"):
            credit(policy, ref, ids, [n])
    with pytest.raises(UserError, match="even number of rows"):
        dpo_diagnostics(policy, ref, ids, [1])
    with pytest.raises(UserError, match="at least one token each"):
        rerank(policy, ref, [1], [[2], []])
    with pytest.raises(UserError, match="by must be 'credit' or 'likelihood', got 'reward'"):
        rerank(policy, ref, [1], [[2]], by="reward")
    with pytest.raises(UserError, match="kappa must be finite, got inf"):
        guide(policy, ref, kappa=math.inf)
