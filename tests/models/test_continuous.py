"""Chains of mixtures: exact where the model is linear, one forward against single steps, and every draw a row's own."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from locum.errors import UserError
from locum.models import thoughts
from locum.models.continuous import ContinuousPolicy
from locum.models.language_model import tiny
from locum.models.thoughts import Base, Greedy, Tokens, Weights
from locum.tokens.rollouts import Rollouts, pad_left, uniforms

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]


def draws(rows, steps, seed=0):
    return uniforms(seed, torch.arange(rows), steps)


def gpt2(dtype=torch.float32, seed=0, **options):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=32, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4, **options)
    return GPT2LMHeadModel(config).to(dtype).eval()


def gemma(version):
    import transformers as t

    cls = {2: ("Gemma2Config", "Gemma2ForCausalLM"), 3: ("Gemma3TextConfig", "Gemma3ForCausalLM")}[version]
    torch.manual_seed(0)
    config = getattr(t, cls[0])(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return getattr(t, cls[1])(config).eval()


MODELS = {
    "gpt2": gpt2,
    "untied": lambda: tiny(tie_word_embeddings=False).model,
    "scaled before the layers": lambda: gemma(2),
    "scaled by the table": lambda: gemma(3),
}


class Linear(nn.Module):
    """The law of the next token is linear in what was fed last: softmax(log(P^T z)) = P^T z for a row-stochastic P."""

    def __init__(self, p):
        super().__init__()
        self.p = p
        self.table = nn.Embedding.from_pretrained(torch.eye(len(p), dtype=p.dtype))

    def get_input_embeddings(self):
        return self.table

    def forward(self, inputs_embeds, attention_mask=None, use_cache=False, past_key_values=None):
        from transformers import DynamicCache

        return SimpleNamespace(logits=(inputs_embeds @ self.p).log(), past_key_values=DynamicCache())


def linear(v=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(v, v, dtype=torch.float64, generator=g).pow(2).add(0.01).log().mul(1.5).softmax(-1)


@pytest.mark.parametrize("m", [1, 2, 4])
def test_a_linear_model_says_the_marginal_of_its_discrete_chains(m):
    p = linear()
    laws = ContinuousPolicy(Linear(p), m).think([[2], [0, 1]], "base").laws
    for row, start in enumerate((2, 1)):
        assert torch.allclose(laws[row, -1], torch.linalg.matrix_power(p.T, m)[:, start], atol=1e-12, rtol=0)
        marginal = torch.zeros(4, dtype=torch.float64)  # of every discrete chain
        for chain in torch.cartesian_prod(*[torch.arange(4)] * m).view(-1, m).tolist():
            probability = torch.stack([p[a, b] for a, b in zip([start, *chain[:-1]], chain, strict=True)]).prod()
            marginal[chain[-1]] += probability
        assert torch.allclose(laws[row, -1], marginal, atol=1e-12, rtol=0)


def recursion(p, start, k, m):
    """Covariance of the last law when thoughts are the mean of k tokens."""
    z = torch.zeros(len(p), dtype=p.dtype)
    z[start] = 1
    second, mean = torch.outer(z, z), z
    for t in range(1, m + 1):
        a, mean = p.T @ second @ p, p.T @ mean
        second = (1 - 1 / k) * a + torch.diag(mean) / k
        if t == m:
            return a - torch.outer(mean, mean), mean
    raise AssertionError


@pytest.mark.parametrize(("k", "m"), [(1, 2), (4, 2), (1, 3), (4, 3), (3, 4)])
def test_tokens_are_unbiased_and_vary_as_the_recursion_says(k, m):
    p, n = linear(), 20_000
    policy = ContinuousPolicy(Linear(p), m, batch_rows=n)
    last = policy.think([[2]], Tokens(k), n, draws(n, m, seed=k)).laws[:, -1]
    covariance, mean = recursion(p, 2, k, m)
    off = last - mean
    assert ((off.mean(0)).abs() <= 4 * off.std(0) / n**0.5 + 1e-12).all()
    products = off[:, :, None] * off[:, None, :]
    assert ((products.mean(0) - covariance).abs() <= 4 * products.std(0) / n**0.5 + 1e-12).all()


def test_more_tokens_help_a_little_less_behind_the_second_step():
    p = linear()
    one, four = (recursion(p, 2, k, 2)[0] for k in (1, 4))
    assert torch.allclose(one, 4 * four, atol=1e-14)
    one, four = (recursion(p, 2, k, 3)[0].trace() for k in (1, 4))
    assert 3 < one / four < 4


# Modes.

LAW = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04], dtype=torch.float64)
N = 20_000


def vectors(mode, law=LAW, n=N, seed=0):
    """Drawn mixtures as weights over the vocabulary."""
    own = torch.arange(n)
    thought = mode(law.expand(n, -1), lambda many, part=0: uniforms(seed + part, own, many))
    weights = thought.weights
    if weights is None:
        weights = torch.full(thought.ids.shape, 1 / thought.ids.shape[1], dtype=law.dtype)
    return torch.zeros(n, len(law), dtype=law.dtype).scatter_add(-1, thought.ids, weights.to(law.dtype))


def holds(drawn, mean, covariance):
    off = drawn - mean
    assert (off.mean(0).abs() <= 4 * off.std(0) / len(drawn) ** 0.5).all()
    products = off[:, :, None] * off[:, None, :]
    assert ((products.mean(0) - covariance).abs() <= 4 * products.std(0) / len(drawn) ** 0.5 + 1e-12).all()


def spread(law):
    return torch.diag(law) - torch.outer(law, law)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_mean_of_tokens(k):
    holds(vectors(Tokens(k)), LAW, spread(LAW) / k)


def test_covariance_falls_with_the_number_of_tokens():
    one, four = (torch.cov(vectors(Tokens(k)).T).trace() for k in (1, 4))
    assert abs(one / four / 4 - 1) < 0.1


@pytest.mark.parametrize("gamma", [0.05, 1.0, 3.0, 40.0])
def test_dirichlet_weights(gamma):
    drawn = vectors(Weights(gamma))
    assert torch.allclose(drawn.sum(-1), torch.ones(N, dtype=torch.float64), atol=1e-6)
    holds(drawn, LAW, spread(LAW) / (gamma + 1))


def test_dirichlet_marginals_are_beta():
    from scipy.stats import beta, kstest

    drawn = vectors(Weights(5.0))
    for i, p in enumerate(LAW.tolist()):
        assert kstest(drawn[:, i].numpy(), beta(5 * p, 5 * (1 - p)).cdf).pvalue > 1e-4


def test_large_gamma_and_many_tokens_are_the_law_itself():
    assert (vectors(Weights(1e7), n=20) - LAW).abs().max() < 1e-3
    assert (vectors(Tokens(200_000), n=2) - LAW).abs().max() < 5e-3


def test_the_support_of_dirichlet_weights():
    law = torch.tensor([0.5, 0.4995, 0.0005], dtype=torch.float64)
    thought = Weights()(law.expand(3, -1), lambda many, part=0: uniforms(part, torch.arange(3), many))
    assert ((thought.weights > 0) == torch.tensor([True, True, False])).all()
    flat = torch.full((2, 4000), 1 / 4000, dtype=torch.float64)  # nothing reaches the floor: the first stays
    thought = Weights()(flat, lambda many, part=0: uniforms(part, torch.arange(2), many))
    assert thought.weights.shape == (2, 1000)
    assert thought.weights.sum(-1).tolist() == [1.0, 1.0]
    tiny_share = Weights(1e-3)(law.expand(50, -1), lambda many, part=0: uniforms(part, torch.arange(50), many)).weights
    assert (tiny_share[:, :2] >= 1e-12).all()  # nothing underflows to 0 where there is a share
    assert tiny_share.isfinite().all()


def test_what_one_token_is_drawn_by():
    u = torch.tensor([[0.0], [0.39], [0.41], [0.999999]])
    thought = Tokens()(LAW.expand(4, -1), lambda many: u)
    assert thought.first.tolist() == [0, 0, 1, 4]


# Chains of real models.


@pytest.mark.parametrize("name", MODELS)
def test_a_mixture_of_one_token_is_that_token(name):
    model = MODELS[name]()
    policy = ContinuousPolicy(model, 4)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]])
    hot = torch.nn.functional.one_hot(ids[:, 4:], 32).float()
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, 3:]
        real = torch.ones(2, 4, dtype=torch.bool)
        for fed in (
            policy.mix(hot),
            policy.mix(None, ids[:, 4:, None]),
            policy.mix(torch.ones(2, 3, 1), ids[:, 4:, None]),
        ):
            assert torch.allclose(policy(ids[:, :4], real, fed), expected, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", [Base(), Greedy(), Tokens(3), Weights(2.0)])
def test_one_forward_says_what_single_steps_said(name, mode):
    policy = ContinuousPolicy(MODELS[name](), 4)
    chain = policy.think(PROMPTS, mode, 2, draws(6, 4))
    rows = Rollouts.of([p for p in PROMPTS for _ in range(2)], policy.generate(PROMPTS, 2, [4] * 3, draws(6, 4), mode=mode),
                       torch.arange(3).repeat_interleave(2))  # fmt: skip
    with torch.no_grad():
        laws = policy.scores(rows).hidden.view(6, 4, -1).softmax(-1)
    assert torch.allclose(laws, chain.laws, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("model", [gpt2, lambda dtype: tiny(dtype=dtype).model])
def test_parallel_logits_are_the_cached_ones(model, dtype, tolerance):
    policy = ContinuousPolicy(model(dtype=dtype), 4)
    prefix, real = pad_left(PROMPTS)
    with torch.no_grad():
        fed = policy(prefix, real)
        whole = policy(prefix, real, policy.mix(fed[:, :-1].softmax(-1)))
    assert fed.dtype == dtype
    assert torch.allclose(fed, whole, atol=tolerance, rtol=0)


def test_one_token_a_step_is_plain_sampling():
    model, steps = gpt2(torch.float64), 5
    u = draws(6, steps)
    said = ContinuousPolicy(model, steps).generate(PROMPTS, 2, [steps] * 3, u, mode="mts")
    plain = ContinuousPolicy(model, steps).generate(PROMPTS, 2, draws=u, mode=Tokens(1, heat=1.0))
    assert torch.equal(said.ids, plain.ids)
    assert torch.equal(said.facts["thoughts"][..., 0], said.ids[:, :-1])
    for row, prompt in enumerate(p for p in PROMPTS for _ in range(2)):
        text = list(prompt)
        for t in range(steps):
            law = model(input_ids=torch.tensor([text])).logits[0, -1].softmax(-1)
            text.append(int((law.cumsum(-1) <= u[row, t]).sum()))
        assert text[len(prompt) :] == said.ids[row].tolist()


@pytest.mark.parametrize("mode", [Base(), Greedy(), Tokens(3), Weights()])
def test_a_chain_does_not_depend_on_what_is_drawn_beside_it(mode):
    u = draws(6, 4)
    whole = ContinuousPolicy(gpt2(torch.float64), 4).think(PROMPTS, mode, 2, u)
    small = ContinuousPolicy(gpt2(torch.float64), 4, batch_rows=2).think(PROMPTS, mode, 2, u)
    assert torch.equal(whole.ids, small.ids)
    assert torch.allclose(whole.laws, small.laws, atol=1e-10)
    for i, prompt in enumerate(PROMPTS):
        alone = ContinuousPolicy(gpt2(torch.float64), 4).think([prompt], mode, 1, u[2 * i : 2 * i + 1])
        assert torch.equal(alone.ids[0], whole.ids[2 * i])
        assert torch.allclose(alone.laws[0], whole.laws[2 * i], atol=1e-10)
        for name, fact in alone.facts.items():
            assert torch.allclose(fact[0], whole.facts[name][2 * i])


def test_without_draws_the_answer_is_the_likeliest():
    policy = ContinuousPolicy(gpt2(), 3)
    chain = policy.think(PROMPTS)
    assert torch.equal(chain.answers, chain.laws[:, -1].argmax(-1))
    assert torch.equal(policy.think(PROMPTS, "discrete").ids[:, 0], chain.laws[:, 0].argmax(-1))
    assert policy.think(PROMPTS, laws=False).laws is None


def test_heat_and_sampling_are_what_thoughts_are_drawn_at():
    from locum.tokens.sampling import Sampling

    policy, u = ContinuousPolicy(gpt2(), 3), draws(30, 3)
    cold = policy.think(PROMPTS, "mts", 10, u, heat=lambda z: torch.full((len(z),), 1e-4))
    assert torch.equal(cold.ids, policy.think(PROMPTS, "discrete").ids.repeat_interleave(10, 0))
    nucleus = policy.think(PROMPTS, "mts", 10, u, sampling=Sampling(temperature=1.0, top_k=1))
    assert torch.equal(cold.ids, nucleus.ids)


def test_gradients_run_through_the_table_and_the_whole_chain():
    model = gpt2(torch.float64, tie_word_embeddings=False)  # a head of its own: what is seen is the input table's
    policy = ContinuousPolicy(model, 3)
    prefix, real = pad_left([[3, 1], [4]])
    weight = model.get_input_embeddings().weight
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def value(fed):
        logits = policy(prefix, real, fed() if fed else None)
        return logits[:, -1].log_softmax(-1)[:, 7].sum()

    for fed in (None, lambda: policy.mix(torch.full((2, 2, 32), 1 / 32, dtype=torch.float64))):
        (slope,) = torch.autograd.grad(value(fed), [weight])
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                weight.add_(direction, alpha=step)
                values.append(value(fed))
                weight.add_(direction, alpha=-step)
        assert ((values[0] - values[1]) / 2e-6).item() == pytest.approx((slope * direction).sum().item(), rel=1e-5)


@settings(max_examples=10)
@given(st.lists(st.lists(st.integers(0, 31), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 3))
def test_padding_changes_nothing(prompts, more):
    policy = ContinuousPolicy(gpt2(torch.float64), 3)
    prefix, real = pad_left(prompts)
    pad = torch.zeros(len(prompts), more, dtype=torch.long)
    with torch.no_grad():
        wide = policy(torch.cat([pad, prefix], 1), torch.cat([pad.bool(), real], 1))
        for i, prompt in enumerate(prompts):
            alone = policy(torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.bool))
            assert torch.allclose(alone[0], wide[i], atol=1e-9)


def test_bad_input():
    policy = ContinuousPolicy(gpt2(), 3)
    for call, match in (
        (lambda: ContinuousPolicy(gpt2(), 0), "steps must be >= 1, got 0"),
        (lambda: Tokens(0), "Tokens.many must be >= 1, got 0"),
        (lambda: Weights(0.0), "Weights.gamma must be finite and > 0, got 0.0"),
        (lambda: thoughts.mode("soft"), "unknown mode of a chain 'soft'"),
        (lambda: policy.think(PROMPTS, "mts"), "Tokens draws its thoughts and needs draws: 3 numbers per row"),
        (lambda: policy.think(PROMPTS, "mts", 2, draws(3, 3)), "draws must have 6 rows and at least 3 columns"),
        (lambda: policy.think([[1], []]), "a prefix, of one token at least"),
        (lambda: policy.generate(PROMPTS, 1, [3, 2, 3], draws(3, 3)), "3 outputs, and there is room for 2 tokens"),
        (lambda: policy(torch.zeros(1, 2, dtype=torch.long), torch.tensor([[True, False]])), "padded on the left"),
        (lambda: policy.mix(torch.ones(1, 33)), "laws are over 33 tokens, and the model embeds 32"),
    ):
        with pytest.raises(UserError, match=match):
            call()
    short = policy.generate(PROMPTS, draws=draws(3, 3))
    with pytest.raises(UserError, match="a chain has 2 outputs; these completions"):
        ContinuousPolicy(gpt2(), 2).scores(Rollouts.of(PROMPTS, short, torch.arange(3)))


def test_logits_that_are_no_law_are_an_error():
    model = gpt2()
    with torch.no_grad():
        model.transformer.wpe.weight.fill_(torch.nan)
    for mode in ("base", "mts", "dirichlet", "discrete"):
        with pytest.raises(ValueError, match="NaN"):
            ContinuousPolicy(model, 3).think(PROMPTS, mode, 1, draws(3, 3))
