"""Texts drawn many at once are those drawn alone: picked by their own numbers, whatever runs beside them."""

import math

import pytest
import torch
from families import _SIZES, VOCAB, build, family
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from transformers import GenerationConfig, GPT2Config, MambaConfig, MistralConfig, RwkvConfig, RwkvForCausalLM

from locum.errors import UserError
from locum.models import LM, tiny
from locum.models.generate import generate
from locum.tokens.rollouts import uniforms
from locum.tokens.sampling import Sampling

V, EOS = 16, {3, 5}
PLAIN, GREEDY = Sampling(1.0), Sampling(0.0)
PROMPTS = [[1, 2, 3], [4], [9, 9, 1, 1, 2, 7, 3], [4], [5, 6]]

MODELS = {
    "lean": lambda: family("llama-gqa"),
    "module": lambda: family("llama-gelu"),
    "eager": lambda: family("llama-gelu", attention="eager"),
    "gpt2": lambda: family("gpt2"),
    "gpt-neox": lambda: family("gpt-neox"),
    "sliding": lambda: build(MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=4)),
    "recurrent": lambda: build(
        MambaConfig(
            vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=None, eos_token_id=None
        ),
        attention="eager",
    ),
}


def draws(numbers, width=8, seed=0):
    return uniforms(seed, torch.as_tensor(numbers), width)


def drawn(lm: LM, prefixes, copies=1, room=8, numbers=None, **how):
    """The completions as lists, row by row."""
    room = [room] * len(prefixes) if isinstance(room, int) else room
    numbers = torch.arange(len(prefixes) * copies) if numbers is None else numbers
    how = {"eos_ids": EOS} | how
    return generate(lm.model, prefixes, copies, room, draws(numbers, max(room, default=0)), **how).lists()


def alone(lm: LM, prefix, room, u, sampling=PLAIN, eos=EOS):
    """One text without cache, batch and padding, by the definition."""
    ids = list(prefix)
    for t in range(room):
        with torch.no_grad():
            law = sampling.law(lm.model(torch.tensor([ids])).logits[0, -1])
        ids.append(int((law.cumsum(-1) > u[t].double()).long().argmax()))
        if ids[-1] in eos:
            break
    return ids[len(prefix) :]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny(vocab_size=V, seed=1, dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("eos", [set(), set(range(0, VOCAB, 5))], ids=["to the limit", "with ends"])
def test_greedy_is_that_of_transformers(name, eos):
    lm, width = MODELS[name](), max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=sorted(eos) or None, pad_token_id=0)
    want = lm.model.generate(input_ids=ids, attention_mask=real, generation_config=config)[:, width:]
    found = generate(lm.model, PROMPTS, 1, [12] * 5, None, eos_ids=eos, sampling=GREEDY)
    assert torch.equal(found.ids, want[:, : found.ids.shape[1]])
    assert (want[:, found.ids.shape[1] :] == 0).all()
    assert found.ended.tolist() == [bool(eos & set(text)) for text in found.lists()]


@pytest.mark.parametrize("name", MODELS)
def test_each_row_is_the_text_drawn_alone(name):
    """Copies, a prefix that comes twice, more rows of one prefix than run at once, rows that leave early."""
    lm, eos, room = MODELS[name](), set(range(0, VOCAB, 7)), [6, 8, 3, 1, 5]
    u = draws(torch.arange(15))
    want = [alone(lm, PROMPTS[r // 3], room[r // 3], u[r], eos=eos) for r in range(15)]
    for most in (256, 4):
        assert generate(lm.model, PROMPTS, 3, room, u, eos_ids=eos, batch_rows=most).lists() == want
    assert len({len(text) for text in want}) > 2


@settings(max_examples=15)
@given(
    st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=50), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(1, 9),
    st.randoms(use_true_random=False),
)
def test_a_text_does_not_depend_on_what_is_drawn_beside_it(prefixes, copies, most, shuffler):
    lm = tiny(vocab_size=V, seed=1, dtype=torch.float64)
    room = [1 + len(p) % 5 for p in prefixes]
    order = list(range(len(prefixes)))
    shuffler.shuffle(order)
    numbers = torch.tensor([i * copies + c for i in order for c in range(copies)])
    all_at_once = drawn(lm, prefixes, copies, room)
    found = drawn(lm, [prefixes[i] for i in order], copies, [room[i] for i in order], numbers, batch_rows=most)
    assert found == [all_at_once[n] for n in numbers.tolist()]
    single = order[0]
    assert drawn(lm, [prefixes[single]], 1, [room[single]], [single * copies]) == [all_at_once[single * copies]]


def test_a_row_ends_with_its_end_of_sequence_or_its_room(lm):
    made = generate(lm.model, [[1], [2]], 40, [6, 3], draws(torch.arange(80)), eos_ids=EOS)
    assert made.mask.shape == made.ids.shape == (80, 6)
    assert (made.ids[~made.mask] == 0).all()
    for row, (text, ended) in enumerate(zip(made.lists(), made.ended.tolist(), strict=True)):
        limit = 6 if row < 40 else 3
        assert ended == (text[-1] in EOS)
        assert ended or len(text) == limit
        assert not EOS & set(text[:-1])
    lengths = [len(text) for text, ended in zip(made.lists(), made.ended.tolist(), strict=True) if ended]
    assert {1, 2, 3, 6} <= set(lengths)  # an end at the very limit is an end


def fed(layer: nn.Module) -> list[tuple[int, int]]:
    """Rows and columns of what a layer reads from now on."""
    shapes: list[tuple[int, int]] = []
    layer.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape[:2])))
    return shapes


def test_copies_share_one_reading_of_their_prefix():
    lm = tiny(vocab_size=V, seed=1)
    shapes, scored = fed(lm.model.get_input_embeddings()), fed(lm.model.get_output_embeddings())
    drawn(lm, [[1, 2, 3], [4, 5, 6], [1, 2, 3]], 4, 5, eos_ids=set())
    assert shapes == [(2, 3)] + 4 * [(12, 1)]
    assert scored == [(2, 1)] + 4 * [(12, 1)]  # no logits behind the other tokens of a prefix
    shapes.clear()
    drawn(lm, [[1, 2, 3]], 10, 3, eos_ids=set(), batch_rows=4)  # three parts, one reading
    assert shapes == [(1, 3)] + 2 * [(4, 1)] + 4 * [(3, 1)]
    shapes.clear()
    drawn(lm, [[1] * 90, [2] * 80, [3, 3]], 1, 2, eos_ids=set())  # a short prefix is not padded to a long one
    assert shapes == [(2, 90), (2, 1), (1, 2), (1, 1)]


def test_a_recurrent_state_meets_no_padding():
    lm = MODELS["recurrent"]()
    shapes = fed(lm.model.get_input_embeddings())
    drawn(lm, PROMPTS, 1, 1, eos_ids=set())
    assert shapes == [(1, 7), (1, 3), (1, 2), (1, 1)]


def test_rows_that_are_done_leave():
    lm = tiny(vocab_size=V, seed=1, dtype=torch.float64)
    prefixes, room = [[1, 2], [3], [4], [5]], [1, 2, 3, 12]
    want = [drawn(lm, [p], 1, [r], [n])[0] for n, (p, r) in enumerate(zip(prefixes, room, strict=True))]
    shapes = fed(lm.model.get_input_embeddings())
    assert drawn(lm, prefixes, 1, room) == want
    assert [rows for rows, _ in shapes[:4]] == [4, 3, 2, 1]


def test_a_row_that_is_done_stays_within_the_models_positions():
    """Nine rows in ten run on; the tenth has reached the last position and waits there."""
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    lm = build(config)
    prefixes = [[1] * 14] + [[2 + i, 1] for i in range(9)]
    assert [len(x) for x in drawn(lm, prefixes, 1, [2] + [14] * 9, eos_ids=set())] == [2] + [14] * 9


def test_the_first_id_whose_cumulated_probability_exceeds_the_draw():
    lm = tiny(vocab_size=V, seed=2, dtype=torch.float64, scale=0.2)
    with torch.no_grad():
        p = Sampling(0.7).law(lm.model(torch.tensor([[1, 2]])).logits[0, -1])
    middles = (p.cumsum(-1) - p / 2)[:, None]
    assert p.min() > 1e-6
    made = generate(lm.model, [[1, 2]], V, [1], middles, eos_ids=set(), sampling=Sampling(0.7))
    assert made.ids[:, 0].tolist() == list(range(V))
    none = torch.zeros(len(PROMPTS), 8)  # the first id that can come at all, not the first one
    best = generate(lm.model, PROMPTS, 1, [8] * 5, None, eos_ids=EOS, sampling=GREEDY).lists()
    assert generate(lm.model, PROMPTS, 1, [8] * 5, none, eos_ids=EOS, sampling=Sampling(1.0, top_k=1)).lists() == best


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.5), Sampling(1.5, top_p=0.7), Sampling(1.0, top_k=4), Sampling(1, min_p=0.1)]
)
def test_texts_follow_the_law(sampling):
    """Pairs of tokens against the exact law, chi-square at the 0.1 % level; another prefix pads the batch."""
    lm, n = tiny(vocab_size=8, seed=1, scale=0.2), 4000
    with torch.no_grad():
        first = sampling.law(lm.model(torch.tensor([[1, 2]])).logits[0, -1])
        then = sampling.law(lm.model(torch.tensor([[1, 2, a] for a in range(8)])).logits[:, -1])
    p = (first[:, None] * then).flatten()
    made = generate(
        lm.model,
        [[1, 2], [4, 5, 6, 7]],
        n,
        [2, 2],
        draws(torch.arange(2 * n), 2),
        eos_ids=set(),
        sampling=sampling,
        batch_rows=2 * n,
    )
    counts = torch.bincount(made.ids[:n, 0] * 8 + made.ids[:n, 1], minlength=64)
    assert (counts[p == 0] == 0).all()
    often = p * n >= 5
    seen = torch.cat([counts[often], counts[~often].sum()[None]]).double()
    want = torch.cat([p[often], p[~often].sum()[None]]) * n
    some = want > 0
    assert stats.chisquare(seen[some].numpy(), want[some].numpy()).pvalue > 1e-3


def test_heat_divides_the_logits_before_anything_else(lm):
    def ones(logits):
        return torch.ones_like(logits[:, 0])

    for sampling in (Sampling(1.0), Sampling(0.7, top_k=5), GREEDY):
        plain = drawn(lm, PROMPTS, 4, sampling=sampling)
        assert drawn(lm, PROMPTS, 4, sampling=sampling, heat=ones) == plain
    hot = drawn(lm, PROMPTS, 4, sampling=Sampling(0.5), heat=lambda z: 3.0 * ones(z))
    assert hot == drawn(lm, PROMPTS, 4, sampling=Sampling(1.5)) != drawn(lm, PROMPTS, 4)
    flat = ((torch.arange(V) + 0.5) / V)[:, None]
    for sampling in (Sampling(1.0), Sampling(1.0, top_p=1.0)):
        even = generate(lm.model, [[1]], V, [1], flat, eos_ids=set(), sampling=sampling, heat=lambda z: 1e9 * ones(z))
        assert even.ids[:, 0].tolist() == list(range(V))


def test_heat_is_asked_for_the_rows_that_run_and_may_differ_between_them(lm):
    met = []

    def by_entropy(z):
        met.append(len(z))
        return 1 + 0.5 * torch.distributions.Categorical(logits=z).entropy()

    together = drawn(lm, PROMPTS, 2, heat=by_entropy)
    assert met[0] == 10 > met[-1]
    assert together == drawn(lm, PROMPTS, 2, heat=by_entropy, batch_rows=1)
    assert together != drawn(lm, PROMPTS, 2)


class Wrapped(nn.Module):
    """What DDP looks like from outside; its own forward would wait for other processes."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *_, **__):
        raise AssertionError("other processes do not take part")


def test_modes_come_back_module_by_module_and_training_goes_on():
    lm = tiny(vocab_size=V, seed=1, attention_dropout=0.9)
    want = drawn(tiny(vocab_size=V, seed=1), PROMPTS)
    lm.model.train()
    lm.model.model.layers[0].eval()
    wrapped = Wrapped(lm.model)
    before = [m.training for m in wrapped.modules()]
    made = generate(wrapped, PROMPTS, 1, [8] * 5, draws(torch.arange(5)), eos_ids=EOS)
    assert made.lists() == want
    assert [m.training for m in wrapped.modules()] == before
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())
    lm.model(made.ids).logits.sum().backward()  # what was drawn can be trained on
    with pytest.raises(UserError):
        generate(wrapped, [[]], 1, [1], draws([0]), eos_ids=EOS)
    assert [m.training for m in wrapped.modules()] == before


def test_an_adapter_is_sampled_with():
    peft = pytest.importorskip("peft")
    lm = tiny(vocab_size=V, seed=1, dtype=torch.float64)
    plain = drawn(lm, PROMPTS, 2)
    policy = LM(peft.get_peft_model(lm.model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])))
    assert drawn(policy, PROMPTS, 2) == plain  # an untrained adapter adds nothing
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.5)
    policy.model.train()
    found = generate(Wrapped(policy.model), PROMPTS, 2, [8] * 5, draws(torch.arange(10)), eos_ids=EOS).lists()
    policy.model.eval()
    u = draws(torch.arange(10))
    assert found == [alone(policy, PROMPTS[r // 2], 8, u[r]) for r in range(10)] != plain
    virtual = peft.get_peft_model(
        tiny(vocab_size=V).model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(UserError, match="virtual tokens"):
        generate(virtual, [[1]], 1, [1], draws([0]), eos_ids=EOS)


def test_no_prefixes_and_progress(lm):
    made = generate(lm.model, [], 2, [], torch.zeros(0, 0), eos_ids=EOS)
    assert (made.ids.shape, made.mask.shape, made.ended.shape) == ((0, 0), (0, 0), (0,))
    said = []
    drawn(lm, [[1], [2], [1], [3]], 2, 2, batch_rows=5, progress=lambda *at: said.append(at))
    assert said == [(4, 8), (8, 8)]


@pytest.mark.parametrize(
    ("prefixes", "copies", "room", "shape", "how", "message"),
    [
        ([[1], []], 1, [2, 2], (2, 2), {}, "prefix 1 has no tokens"),
        ([[1]], 0, [2], (0, 2), {}, "copies must be >= 1, got 0"),
        ([[1]], 1, [2], (1, 2), {"batch_rows": 0}, "batch_rows must be >= 1, got 0"),
        ([[1], [2]], 1, [2, 0], (2, 2), {}, "room must be >= 1, got 0 for prefix 1"),
        ([[1], [2]], 1, [2], (2, 2), {}, "room must be one number per prefix, got 1 for 2"),
        ([[1], [2]], 3, [2, 4], (6, 3), {}, r"draws must have 6 rows and at least 4 columns, got \[6, 3\]"),
        ([[1], [2]], 3, [2, 4], (2, 4), {}, r"draws must have 6 rows and at least 4 columns, got \[2, 4\]"),
        ([[1], [1] * 4090], 1, [7, 7], (2, 7), {}, "prefix 1 of 4090 tokens and 7 new ones exceed the 4096 positions"),
    ],
)
def test_bad_input_ends_in_one_sentence(lm, prefixes, copies, room, shape, how, message):
    with pytest.raises(UserError, match=message):
        generate(lm.model, prefixes, copies, room, torch.zeros(shape), eos_ids=EOS, **how)


def test_draws_lie_between_zero_and_one(lm):
    for value in (1.0, -0.1, math.nan):
        with pytest.raises(UserError, match=r"draws must lie in \[0, 1\)"):
            generate(lm.model, [[1]], 1, [1], torch.tensor([[value]]), eos_ids=EOS)
    with pytest.raises(UserError, match="draws must have 1 rows and at least 1 columns, got none"):
        generate(lm.model, [[1]], 1, [1], None, eos_ids=EOS)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0), Sampling(1.0, top_k=3)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_no_law_can_be_made_of_name_their_prefix(sampling, value):
    lm = tiny(vocab_size=V, seed=1)
    lm.model.model.embed_tokens.weight.data[7] = value
    with pytest.raises(UserError, match="after 0 tokens of a completion of prefix 2;"):
        drawn(lm, [[1], [2], [3, 7], [4]], 3, 4, sampling=sampling)
    with pytest.raises(UserError, match=r"heat must give temperatures > 0, got -1\.0 after 0 tokens .* prefix 0"):
        drawn(lm, [[1], [2]], 2, 4, heat=lambda z: -torch.ones_like(z[:, 0]))


def test_a_state_that_cannot_be_repeated_is_refused():
    model = RwkvForCausalLM(RwkvConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16))
    with pytest.raises(UserError, match="RwkvForCausalLM keeps its past in a cache of its own kind"):
        generate(model, [[1]], 1, [1], draws([0]), eos_ids=EOS)
