"""Sequential Monte Carlo: the toy whose posterior is summed up, and a tiny real model."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerFast

from locum.decode.awrs import AWRS
from locum.decode.constraints import Predicate, Regex
from locum.decode.constraints.gate import Gate
from locum.decode.smc import Draw, Samples, effective_size, smc, stratified
from locum.errors import UserError
from locum.models import LM, tiny
from locum.models.vocabulary import Vocabulary
from locum.tasks.table_lm import END, LIMIT, PATTERN, TableLM, distance, exact
from locum.tokens.sampling import Sampling

VOCABULARY = Vocabulary((b"a", b"b", b"c", None))
JOINT, LOCAL = exact()


def run_toy(method: AWRS, times: int, propose=None, seed: int = 0) -> list[Samples]:
    gate = Gate(Regex(PATTERN), VOCABULARY, frozenset({END}))
    return [
        smc(
            TableLM(),
            gate,
            propose or method.draw,
            particles=method.n_particles,
            tau=method.tau,
            weighted=method.weights,
            lookahead=method.lookahead,
            max_new_tokens=LIMIT,
            rng=rng,
        )
        for rng in np.random.default_rng(seed).spawn(times)
    ]


def mean_posterior(runs: list[Samples]) -> dict[str, float]:
    found: dict[str, float] = {}
    for run in runs:
        for text, share in run.posterior.items():
            found[text] = found.get(text, 0.0) + share / len(runs)
    return found


def pooled(runs: list[Samples]) -> dict[str, float]:
    """Sum of the weights themselves by text: its mean is p(text) whatever the number of particles."""
    found: dict[str, float] = {}
    for run in runs:
        for c in run.completions:
            found[c.text] = found.get(c.text, 0.0) + math.exp(c.log_weight) / len(run.completions) / len(runs)
    return {text: mass for text, mass in found.items() if mass > 0}


def test_the_toy_by_enumeration():
    z = sum(JOINT.values())
    assert z == pytest.approx(0.1396125, abs=1e-12)
    assert JOINT["abc"] / z == pytest.approx(0.0128928, abs=5e-8)
    assert sum(LOCAL.values()) == pytest.approx(1, abs=1e-12)
    assert LOCAL["abc"] == pytest.approx(0.634, abs=0.003)


@pytest.mark.usefixtures("unchecked")
def test_mean_weight_is_the_mass_of_valid_texts_and_distance_falls_with_particles():
    """Measured elsewhere: distances .673, .177, .048; mean weights .1397 +- .0019 and .1405 +- .0015."""
    far = {}
    for particles, times in ((5, 800), (20, 300)):
        runs = run_toy(AWRS(n_particles=particles), times)
        w = np.exp([r.log_normaliser for r in runs])
        assert abs(w.mean() - 0.1396125) < 4 * w.std() / math.sqrt(times)
        far[particles] = distance(mean_posterior(runs), JOINT)
    local = distance(mean_posterior(run_toy(AWRS(n_particles=1, weights=False), 800)), JOINT)
    assert local > far[5] > far[20]
    assert local == pytest.approx(0.673, abs=0.05)
    assert far[5] == pytest.approx(0.177, abs=0.06)
    assert far[20] == pytest.approx(0.048, abs=0.04)


@pytest.mark.usefixtures("unchecked")
def test_one_particle_without_weights_is_locally_constrained_decoding():
    n, counts = 2000, {}
    for run in run_toy(AWRS(n_particles=1, weights=False), n):
        assert run.log_normaliser is None
        (text,) = run.posterior
        counts[text] = counts.get(text, 0) + 1
    often = [text for text in LOCAL if LOCAL[text] * n >= 8]
    expected = [LOCAL[text] * n for text in often]
    observed = [counts.get(text, 0) for text in often]
    assert chisquare([*observed, n - sum(observed)], [*expected, n - sum(expected)]).pvalue > 1e-3


@pytest.fixture(scope="module")
def masks() -> dict[str, float]:
    """The same particles with tokens drawn under a full mask, weighted by the exact local normaliser."""

    def masked(logp, accept, rng):
        allowed = [t for t in range(4) if logp[t] > -np.inf and accept(t)]
        log_z = logsumexp(logp[allowed])
        return Draw(int(rng.choice(allowed, p=np.exp(logp[allowed] - log_z))), float(log_z), 4)

    found = pooled(run_toy(AWRS(n_particles=20), 100, masked))
    assert distance(found, JOINT) < 0.12
    return found


@pytest.mark.parametrize("fields", [{}, {"estimator": "auto"}, {"lookahead": True}, {"tau": 0.0}, {"tau": 1.0}])
def test_every_proposal_has_the_law_of_the_exact_normaliser(fields, masks):
    ours = pooled(run_toy(AWRS(n_particles=20, **fields), 100))
    assert distance(ours, JOINT) < 0.15
    assert distance(ours, masks) < 0.2


def test_looking_ahead_asks_less():
    plain, ahead = (run_toy(AWRS(lookahead=x), 100) for x in (False, True))
    assert sum(r.checks for r in ahead) < 0.7 * sum(r.checks for r in plain)


def test_equal_seeds_give_equal_results_and_copies_part():
    first, again, other = (run_toy(AWRS(n_particles=20, tau=1.0), 1, seed=s)[0] for s in (3, 3, 4))
    assert first.completions == again.completions
    assert first.completions != other.completions
    # Resampled every round, copies still go different ways.
    assert len({c.ids for c in first.completions}) > 1


def test_stratified_counts_and_effective_size():
    rng = np.random.default_rng(0)
    logw = np.log([0.5, 0.25, 0.25, 1e-300])
    assert effective_size(logw) == pytest.approx(1 / (0.25 + 2 * 0.0625))
    assert effective_size(np.array([0.0, -np.inf])) == 1
    assert effective_size(np.full(3, -np.inf)) == 0
    for _ in range(50):
        assert np.bincount(stratified(logw, rng), minlength=4)[3] == 0
    counts = np.mean([np.bincount(stratified(logw, rng), minlength=4) for _ in range(4000)], 0)
    assert counts == pytest.approx([2, 1, 1, 0], abs=0.05)


@given(st.lists(st.floats(-700, 0) | st.just(-math.inf), min_size=1, max_size=8), st.integers(0, 100))
def test_stratified_never_picks_the_dead(log_weights, seed):
    logw = np.array(log_weights)
    if np.isfinite(logw).any():
        chosen = stratified(logw, np.random.default_rng(seed))
        assert len(chosen) == len(logw)
        assert np.isfinite(logw[chosen]).all()


CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123"


@pytest.fixture(scope="module")
def lm() -> LM:
    """A random Llama over 30 characters and an end; the last of its 32 logits is padding."""
    table = {c: i for i, c in enumerate([*CHARACTERS, "<end>"])}
    tokenizer = Tokenizer(BPE(table, []))
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    model = tiny(vocab_size=32, seed=5).model
    model.generation_config = GenerationConfig(eos_token_id=table["<end>"])
    return LM(model.float(), fast, "tiny")


def exact_posterior(lm: LM, texts: list[str], prompt: list[int]) -> dict[str, float]:
    """p(text and its end) from whole forwards of the module itself, tokens being characters."""
    found = {}
    for text in texts:
        ids = [*[CHARACTERS.index(c) for c in text], 30]
        with torch.no_grad():
            logits = lm.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        found[text] = float(logits.double().log_softmax(-1)[range(len(ids)), ids].sum().exp())
    return found


@pytest.mark.parametrize("lookahead", [False, True])
def test_on_a_model_the_normaliser_and_posterior_are_those_of_whole_forwards(lm, lookahead):
    texts = [x + y + z for x in "ab" for y in "cd" for z in ("", "e")]
    truth = exact_posterior(lm, texts, [1, 2, 3])
    method = AWRS(n_particles=60, estimator="auto", lookahead=lookahead)
    runs = [
        method.generate(lm, [1, 2, 3], Regex("[ab][cd]e?"), max_new_tokens=3, sampling=Sampling(1.0), seed=s)
        for s in range(12)
    ]
    z = np.exp([r.log_normaliser for r in runs])
    assert abs(z.mean() - sum(truth.values())) < 4 * z.std() / math.sqrt(len(z))
    assert distance(pooled(runs), truth) < 0.15
    assert all(set(r.posterior) <= set(texts) for r in runs)
    assert all(r.forwards == 3 for r in runs)


def test_several_prompts_are_handled_one_after_the_other(lm):
    both = AWRS().generate_all(lm, [[1, 2], [3]], Regex("[a-d]{2}"), max_new_tokens=4)
    assert len(both) == 2
    assert all(sum(r.posterior.values()) == pytest.approx(1) for r in both)


def test_a_limit_of_tokens_ends_texts_with_their_weight(lm):
    run = AWRS(n_particles=40).generate(lm, [1], Regex("[a-z]{3,}"), max_new_tokens=3)
    assert {c.finish for c in run.completions} == {"length"}
    short = AWRS(n_particles=4).generate(lm, [1], Regex("[a-z]{9}"), max_new_tokens=3)
    assert short.posterior == {}
    assert short.log_normaliser == -math.inf


def test_all_dead_is_an_empty_posterior(lm):
    """No token spells anything but these characters, so a text in capitals cannot be begun."""
    run = AWRS().generate(lm, [1], Regex("[A-Z]+"))
    assert run.posterior == {}
    assert run.log_normaliser == -math.inf
    assert {c.finish for c in run.completions} == {"dead"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"sampling": Sampling()}, "temperature must be > 0, got 0"),
        ({"constraint": Predicate(lambda t: False, lambda t: False)}, "has no valid text"),
    ],
)
def test_bad_input_is_one_sentence(lm, change, message):
    asked = {"prompt": [1], "constraint": Regex("a"), **change}
    with pytest.raises(UserError, match=message):
        AWRS().generate(lm, asked.pop("prompt"), asked.pop("constraint"), **asked)
