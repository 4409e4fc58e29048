"""Inside transformers' `generate`: the same greedy ids, the same law, the same settings, and refusals by name."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from locum.decode import Chain, DySpec, Graft, Lookup, Plain, SpecTr, TokenRecycling
from locum.decode.integrations import custom_generate
from locum.errors import UserError
from locum.models import LM, tiny

DRAFTERS = [Plain(), Lookup(), Chain(3), SpecTr(K=2, L=2), DySpec(6), TokenRecycling(30), Graft()]
PROMPTS = [[1], [2, 3, 4, 5], [9, 9, 9, 1, 2, 9, 9]]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny(vocab_size=16, layers=1, seed=3)


@pytest.fixture(scope="module")
def draft() -> LM:
    return tiny(vocab_size=16, layers=1, seed=4)


def call(lm: LM, ours=None, prompt=PROMPTS[1], **kwargs):
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": 24, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)} | kwargs
    return lm.model.generate(ids, custom_generate=ours, **settings)


@pytest.mark.parametrize("drafter", DRAFTERS, ids=lambda d: type(d).__name__)
def test_greedy_ids_are_those_of_transformers(lm, draft, drafter):
    for prompt in PROMPTS:
        theirs = call(lm, None, prompt, do_sample=False)
        ours = call(lm, custom_generate(drafter, draft=draft), prompt, do_sample=False)
        assert ours.dtype == theirs.dtype
        assert ours.tolist() == theirs.tolist()
        assert ours.shape == (1, len(prompt) + 24)


@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 1}, {"max_new_tokens": None, "max_length": 10}, {"max_new_tokens": 7, "max_length": 100}],
    ids=str,
)
def test_lengths(lm, settings):
    ids = [call(lm, c, do_sample=False, **settings).tolist() for c in (None, custom_generate(Lookup()))]
    assert ids[0] == ids[1]


def test_ends_of_sequence_are_those_of_the_call(lm):
    text = call(lm, do_sample=False)[0, 4:].tolist()
    for eos in ([text[3]], [text[9], text[5]], [text[0]]):
        ids = [
            call(lm, c, do_sample=False, eos_token_id=eos).tolist() for c in (None, custom_generate(TokenRecycling(30)))
        ]
        assert ids[0] == ids[1]
        assert len(ids[0][0]) < 28


def test_a_generation_config_serves_as_well(lm):
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    ids = torch.tensor([PROMPTS[1]])
    theirs, ours = (
        lm.model.generate(ids, generation_config=config, custom_generate=c) for c in (None, custom_generate(Lookup()))
    )
    assert ours.tolist() == theirs.tolist()


def test_it_returns_what_was_asked_for(lm):
    out = call(lm, custom_generate(Lookup()), do_sample=False, return_dict_in_generate=True)
    assert out.sequences.tolist() == call(lm, do_sample=False).tolist()
    assert (out.scores, out.past_key_values) == (None, None)


SETTINGS = [
    {"temperature": 1.0, "top_k": 0},
    {"temperature": 0.8, "top_k": 3},
    {"temperature": 1.5, "top_k": 0, "top_p": 0.6},
    {"temperature": 1.2, "top_k": 0, "min_p": 0.2},
    {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    {},  # the defaults of the model's generation config
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_law_is_the_one_that_transformers_would_draw_from(lm, monkeypatch, settings):
    """The settings arrive as one law: compared with the scores of `generate` itself at the first token."""
    seen = []
    monkeypatch.setattr(
        "locum.decode.integrations.generate",
        lambda model, ids, *, sampling, **kw: (
            seen.append(sampling) or pytest.importorskip("locum.decode").generate(model, ids, max_new_tokens=1)
        ),
    )
    call(lm, custom_generate(), do_sample=True, **settings)
    theirs = call(lm, None, do_sample=True, output_scores=True, return_dict_in_generate=True, **settings)
    with torch.inference_mode():
        logits = lm.model(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1]
    torch.testing.assert_close(seen[0].law(logits), theirs.scores[0][0].double().softmax(-1), atol=1e-6, rtol=1e-5)


def test_the_global_seed_fixes_a_sampled_text(lm):
    def run(global_seed, **kwargs):
        torch.manual_seed(global_seed)
        return call(lm, custom_generate(Lookup(), **kwargs), do_sample=True, top_k=0).tolist()

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(1, seed=5) == run(2, seed=5)


def test_a_state_is_carried_from_call_to_call(lm):
    drafter = TokenRecycling(30)
    state = drafter.start(lm)
    ours = custom_generate(drafter, state=state)
    assert call(lm, ours, do_sample=False).tolist() == call(lm, do_sample=False).tolist()
    assert (state.successors >= 0).any()


class Nothing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


REFUSED = {
    "beams": ({"num_beams": 3}, "num_beams must be 1"),
    "several texts": ({"do_sample": True, "num_return_sequences": 2}, "num_return_sequences must be 1"),
    "repetition penalty": ({"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor"),
    "no repeated n-grams": ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
    "bad words": ({"bad_words_ids": [[1]]}, "BadWords"),
    "least length": ({"min_new_tokens": 3, "eos_token_id": 1}, "MinNewTokensLength"),
    "typical": ({"do_sample": True, "typical_p": 0.5}, "TypicalLogitsWarper"),
    "own processor": ({"logits_processor": LogitsProcessorList([Nothing()])}, "not Nothing"),
    "own criterion": ({"stopping_criteria": StoppingCriteriaList([Never()])}, "not Never"),
    "time": ({"max_time": 5.0}, "MaxTimeCriteria"),
    "scores": ({"output_scores": True, "return_dict_in_generate": True}, "output_scores is not supported"),
    "padding": ({"attention_mask": torch.tensor([[0, 1, 1, 1]])}, "attention_mask must be all ones"),
}


@pytest.mark.parametrize(("settings", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_done_is_refused_by_name(lm, settings, said):
    with pytest.raises(UserError, match=said) as caught:
        call(lm, custom_generate(Lookup()), **{"do_sample": False} | settings)
    assert "\n" not in str(caught.value)


def test_a_batch_is_refused(lm):
    ids = torch.tensor([[1, 2], [3, 4]])
    with pytest.raises(UserError, match=r"one prompt at a time .* got a batch of 2"):
        lm.model.generate(ids, custom_generate=custom_generate(), max_new_tokens=3, pad_token_id=0)


def test_a_draft_that_is_missing_or_foreign(lm):
    with pytest.raises(UserError, match="drafter Chain needs a draft model"):
        call(lm, custom_generate(Chain()))
    with pytest.raises(UserError, match="17 tokens"):
        call(lm, custom_generate(Chain(), draft=tiny(vocab_size=17)))
