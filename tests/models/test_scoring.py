"""Scores of a response are the same whatever the route (head or whole logits), the padding, the wrapper, the precision."""

import copy

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from families import VOCAB, build, family
from peft import LoraConfig, get_peft_model
from transformers import (
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3Config,
)

from locum.errors import UserError
from locum.models import tiny
from locum.models.scoring import TAPS, adapter, score, unwrapped
from locum.tokens.tiles import log_prob, over_tiles

F64 = torch.float64
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
LINEAR = {
    "llama": LlamaConfig(**LLAMA),
    "tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**LLAMA, head_dim=8),
    "mixtral": MixtralConfig(**LLAMA, num_local_experts=4),
    "neox": GPTNeoXConfig(**SIZES, intermediate_size=48, max_position_embeddings=64),
    "falcon": FalconConfig(**SIZES),
    "bloom": BloomConfig(**{k: v for k, v in SIZES.items() if not k.startswith("num")}, n_layer=2, n_head=4),
    "bigcode": GPTBigCodeConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=None),
    "opt": OPTConfig(**SIZES | {"pad_token_id": 0}, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=64),
}
MORE_THAN_LINEAR = {
    "gemma2": Gemma2Config(**LLAMA, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=30.0),
    "cohere": CohereConfig(**LLAMA, logit_scale=0.25),
    "granite": GraniteConfig(**LLAMA, logits_scaling=3.0),
}
IDS = torch.randint(1, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
RESPONSES = [(4, 9), (3, 6), (1, 8)]  # where each row's response is; row 0 is full, the others end before their padding


def made(name):
    """A random model; eager attention, whose softmax is float32, only where there is no other."""
    if name == "gpt2":
        return family(name).model
    return build((LINEAR | MORE_THAN_LINEAR)[name], attention="eager" if name in ("bloom", "gemma2") else "sdpa").model


def batch(left=0, right=0):
    """Rows of different lengths, padded on the left or on the right; where response tokens are predicted."""
    width = IDS.shape[1] + left + right
    ids = torch.full((3, width), VOCAB - 1)  # a real token stands in the padding, so that reading it would be seen
    attention, where = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width - 1, dtype=torch.bool)
    for row, (start, end) in enumerate(RESPONSES):
        at = left + 9 - end if left else 0
        ids[row, at : at + end], attention[row, at : at + end] = IDS[row, :end], 1
        where[row, at + start - 1 : at + end - 1] = True
    return ids, attention, where


def alone(model, taps=lambda out: out.logits):
    """What the model says of each row without any padding, at the positions that predict the response."""
    rows = []
    for row, (start, end) in enumerate(RESPONSES):
        out = model(input_ids=IDS[row : row + 1, :end], use_cache=False, output_hidden_states=True)
        rows.append(taps(out)[0, start - 1 : end - 1])
    return torch.cat(rows)


def logits(s):
    return s.logits(s.hidden)


@pytest.mark.parametrize("padding", [{}, {"left": 3}, {"right": 3}])
@pytest.mark.parametrize("name", [*LINEAR, "gpt2"])
def test_hidden_states_and_head_give_the_models_logits(name, padding):
    """Sides may differ as rows do: no prompt and no padding enters, and positions count real tokens only."""
    model = made(name)
    s = score(model, *batch(**padding))
    assert s.head is model.get_output_embeddings().weight
    assert len(s) == 5 + 3 + 7
    torch.testing.assert_close(logits(s), alone(model), atol=2e-5, rtol=0)


@pytest.mark.parametrize("padding", [{}, {"left": 3}, {"right": 3}])
@pytest.mark.parametrize("name", MORE_THAN_LINEAR)
def test_logits_that_are_more_than_a_product_come_whole(name, padding):
    """The soft cap of 30 moves logits of size 1 by 4e-4 only; it is found out all the same."""
    model = made(name)
    for _ in range(2):  # found out by the first call, known in the second
        s = score(model, *batch(**padding), taps={"residual": lambda h: h})
        assert s.head is None
        torch.testing.assert_close(logits(s), alone(model), atol=2e-5, rtol=0)
        assert len(s.taps["residual"]) == 2


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_both_routes_have_one_gradient(name):
    model = made(name).double()
    ids, attention, where = batch(left=2)
    found = []
    for linear in (True, False):
        model._locum_linear_head = linear
        s = score(model, ids, attention, where)
        assert (s.head is not None) == linear
        (logp,) = over_tiles(log_prob, [s], ids[:, 1:][where], tile=4)
        model.zero_grad()
        (logp * torch.arange(len(logp))).sum().backward()
        found.append((logp.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-10, rtol=0)
    assert found[0][1].keys() == found[1][1].keys()
    for n, grad in found[0][1].items():
        torch.testing.assert_close(grad, found[1][1][n], atol=1e-10, rtol=0)


def test_a_prompt_is_never_scored_and_what_follows_a_position_is_never_seen():
    model = tiny(vocab_size=VOCAB, dtype=F64).model
    ids, attention, where = batch()
    before = logits(score(model, ids, attention, where))
    later = ids.clone()
    later[0, 8] = (later[0, 8] + 1) % VOCAB  # the last token of the first row is a target; no position reads it
    assert torch.equal(before, logits(score(model, later, attention, where)))
    nothing = score(model, ids, attention, torch.zeros_like(where))
    assert len(nothing) == 0


@pytest.mark.parametrize("padding", [{}, {"left": 3}, {"right": 3}])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_taps_hear_hidden_states_at_response_positions(name, padding):
    """ "residual" is what transformers calls the hidden states of the layers, the last one after the final norm."""
    model = made(name).double()
    s = score(model, *batch(**padding), taps={kind: lambda h: h for kind in TAPS})
    for layer in range(2):
        want = alone(model, lambda out, layer=layer: out.hidden_states[layer + 1])
        torch.testing.assert_close(s.taps["residual"][layer], want, atol=1e-10, rtol=0)
    assert torch.equal(s.taps["last"][0], s.taps["residual"][1])
    assert not any(x.requires_grad for kind in TAPS for x in s.taps[kind])
    # the first layer's output is the embedding and what both parts add to it
    added = s.taps["mlp"][0] + s.taps["attention"][0]
    want = alone(model, lambda out: out.hidden_states[1] - out.hidden_states[0])
    torch.testing.assert_close(added, want, atol=1e-10, rtol=0)


def test_taps_are_reduced_once_per_layer_and_leave_no_hook():
    model = tiny(vocab_size=VOCAB, layers=3).model
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    calls = []
    s = score(model, *batch(), taps={"residual": lambda h: calls.append(h.shape) or h.mean(-1)})
    assert calls == [(15, 32)] * 3
    assert [x.shape for x in s.taps["residual"]] == [(15,)] * 3
    with pytest.raises(RuntimeError, match="stop"):
        score(model, *batch(), taps={"mlp": lambda h: (_ for _ in ()).throw(RuntimeError("stop"))})
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks


def test_a_tap_that_is_not_there_is_named():
    model = made("opt")
    with pytest.raises(UserError, match="OPTForCausalLM has no mlp part in its layers that can be listened to"):
        score(model, *batch(), taps={"mlp": lambda h: h})
    with pytest.raises(UserError, match="has no mind part"):
        score(model, *batch(), taps={"mind": lambda h: h})


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_autocast_gives_what_the_model_gives_under_autocast(name):
    """As accelerate wraps a model: autocast inside its forward only, and logits as float32 outside of it."""
    model = made(name)
    wide = logits(score(copy.deepcopy(model), *batch()))
    forward = model.forward
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(forward))
    s = score(model, *batch())
    assert s.head is not None
    ids, attention, where = batch()
    assert torch.equal(logits(s), model(input_ids=ids, attention_mask=attention).logits[:, :-1][where])
    assert 0 < (logits(s) - wide).abs().max() < 0.1
    logits(s).sum().backward()
    assert model.get_output_embeddings().weight.grad.dtype == torch.float32


def test_a_head_with_a_hook_is_not_used_outside_the_model():
    model = tiny(vocab_size=VOCAB, dtype=F64).model
    hook = model.lm_head.register_forward_hook(lambda m, x, out: out + 1)
    s = score(model, *batch())
    assert s.head is None
    torch.testing.assert_close(logits(s), alone(model), atol=1e-10, rtol=0)
    hook.remove()
    assert score(model, *batch()).head is not None


def lora(model, *names, targets=("q_proj", "v_proj"), **settings):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False, **settings)
    made = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        made.add_adapter(name, config)
    return made.eval()


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_without_adapter_a_peft_model_is_its_base():
    base = tiny(vocab_size=VOCAB, dtype=F64).model
    want = logits(score(copy.deepcopy(base), *batch()))
    model = lora(base, "first", "second")
    assert unwrapped(model) is base
    flags = trained(model)
    with_first = logits(score(model, *batch()))
    assert (with_first - want).abs().max() > 1e-3
    with adapter(model, None) as plain:
        assert torch.equal(logits(score(plain, *batch())), want)
    with adapter(model, "second") as second:
        with_second = logits(score(second, *batch()))
    assert (with_second - with_first).abs().max() > 1e-3
    assert model.active_adapter == "first"
    assert torch.equal(logits(score(model, *batch())), with_first)
    assert trained(model) == flags


@pytest.mark.parametrize("name", [None, "second"])
def test_switching_leaves_what_is_trained_as_it_was(name):
    """peft decides anew what is trained with every switch: a frozen adapter would thaw, a part of one too."""
    model = lora(tiny(vocab_size=VOCAB).model, "first", "second")
    for n, p in model.named_parameters():
        p.requires_grad_("lora_A.first" in n or "norm" in n or "lora_B.second" in n)
    flags = trained(model)
    assert flags
    with pytest.raises(RuntimeError, match="stop"), adapter(model, name):
        raise RuntimeError("stop")
    assert trained(model) == flags
    assert model.active_adapter == "first"


def test_adapters_that_work_together_do_so_again():
    model = lora(tiny(vocab_size=VOCAB, dtype=F64).model, "first", "second", "third")
    model.base_model.set_adapter(["first", "second"])
    both = logits(score(model, *batch()))
    with adapter(model, "third"):
        assert (logits(score(model, *batch())) - both).abs().max() > 1e-3
    assert torch.equal(logits(score(model, *batch())), both)


def test_an_adapter_on_the_head_is_heard():
    model = lora(tiny(vocab_size=VOCAB, dtype=F64).model, "first", targets=["q_proj", "lm_head"])
    ids, attention, where = batch()
    s = score(model, ids, attention, where)
    assert s.head is None
    torch.testing.assert_close(logits(s), model(ids, attention_mask=attention).logits[:, :-1][where])
    logits(s).sum().backward()
    assert model.get_output_embeddings().lora_B["first"].weight.grad.abs().sum() > 0


def test_gradients_reach_an_adapter_through_a_checkpointed_model():
    model = lora(tiny(vocab_size=VOCAB, dtype=F64).model, "first")
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        model.zero_grad()
        s = score(model, *batch(right=2), taps={"residual": lambda h: h.mean(-1)})
        logits(s).log_softmax(-1)[:, 0].sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == 8
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_bad_adapters_are_named():
    with pytest.raises(UserError, match="only on a PEFT model"), adapter(tiny().model, None):
        pass
    model = lora(tiny(vocab_size=VOCAB).model, "first", "second")
    with pytest.raises(UserError, match="no adapter 'third', only first, second"), adapter(model, "third"):
        pass
