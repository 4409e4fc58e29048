"""The lean forward against the module forward: same logits, same cache entries; and the models it must leave alone."""

import pytest
import torch
from families import LEAN, MODULE, VOCAB, family
from torch import nn

from locum.models import Session, tiny
from locum.models.cache import TreeCache
from locum.models.lean import _linear, lean_forward

TREE = [9, 8, 7, 9, 1, 2], [-1, 0, 0, 1, 1, 4]


def both(lm) -> tuple[Session, Session]:
    lean, module = lm.session(capacity=8), lm.session(capacity=8)
    assert lean._forward != lean._module_forward
    module._forward = module._module_forward
    return lean, module


def compare(lean: Session, module: Session, tolerance: float) -> None:
    for act in (
        lambda s: s.prefill([3, 1, 4, 1, 5])[None],
        lambda s: s.extend(*TREE),
        lambda s: s.commit([0, 1, 4]),
        lambda s: s.extend([11], [-1]),  # one token: no mask
        lambda s: s.commit([0]),
        lambda s: s.extend(list(range(20)), [-1] * 20),
    ):
        a, b = act(lean), act(module)
        if a is not None:
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    for ours, theirs in zip(lean.cache.layers, module.cache.layers, strict=True):
        for x, y in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(x[:, :, : ours.used], y[:, :, : ours.used], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", LEAN)
def test_lean_is_the_module(name):
    compare(*both(family(name)), tolerance=1e-5)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "qwen2"])
def test_in_bfloat16_lean_is_as_near_to_the_truth_as_the_module(name):
    lean, module = both(family(name, dtype=torch.bfloat16))
    true = family(name).session()
    for feed in (lambda s: s.prefill([3, 1, 4, 1, 5])[None], lambda s: s.extend(*TREE)):
        ours, theirs, truth = (feed(s).float() for s in (lean, module, true))
        assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm()


@pytest.mark.parametrize("name", LEAN)
def test_several_texts_at_once(name):
    """Two texts, one with two columns of padding in the cache, then with all columns real: no mask."""
    lm = family(name)
    ids, mask = torch.tensor([[0, 0, 3, 1, 4], [1, 5, 9, 2, 6]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    token, lean = torch.tensor([[7], [8]]), lean_forward(lm.model)
    with torch.inference_mode():
        for real in (mask, torch.ones_like(mask)):
            position = (real.cumsum(-1) - 1).clamp(min=0)
            caches = [TreeCache(2, 8), TreeCache(2, 8)]
            for cache in caches:
                lm.model(input_ids=ids, attention_mask=real, position_ids=position, past_key_values=cache)
            real = torch.cat([real, torch.ones(2, 1, dtype=torch.long)], 1)
            at = position[:, -1:] + 1
            want = lm.model(input_ids=token, attention_mask=real, position_ids=at, past_key_values=caches[0]).logits
            found = lean(token, at, None if real.all() else real.bool()[:, None, None], caches[1], True)
            torch.testing.assert_close(found, want[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 64, 65])
@pytest.mark.parametrize("bias", [True, False])
def test_every_road_through_a_matrix_product(rows, bias):
    """Small weights and many rows go one way, large weights and few rows the other."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        for width in (16, 600):
            layer, x = nn.Linear(width, width, bias=bias), torch.randn(rows, width)
            torch.testing.assert_close(_linear(x, layer), layer(x), atol=1e-5, rtol=1e-5)


def test_positions_beyond_the_kept_table():
    lean, module = both(family("llama-llama3-rope"))
    for part in ([1] * 250, [2] * 20):  # the table of cosines begins with 256 positions
        a, b = (s.prefill(part) for s in (lean, module))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_weights_are_read_at_every_call():
    """Training the model between two calls changes what the session says: nothing is copied."""
    lm = family("llama-gqa")
    lean, module = both(lm)
    with torch.no_grad():
        lm.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        lm.model.lm_head.weight.add_(0.1)
    compare(lean, module, tolerance=1e-5)


@pytest.mark.parametrize("name", MODULE)
def test_other_shapes_take_the_module_road(name):
    assert lean_forward(family(name).model) is None


class LowRank(nn.Module):
    """An adapter as libraries write it: the old layer plus a product of two thin ones."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    """A layer that is a Linear by descent only."""

    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(nn.Module):
    """A wrapper without weights of its own."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) + 1


def _adapter(model):
    model.model.layers[0].self_attn.q_proj = LowRank(model.model.layers[0].self_attn.q_proj)


def _mlp_adapter(model):
    model.model.layers[1].mlp.gate_proj = LowRank(model.model.layers[1].mlp.gate_proj)


def _subclass(model):
    model.model.layers[0].mlp.down_proj.__class__ = Doubled


def _wrapper(model):
    model.model.layers[0].self_attn.v_proj = Shifted(model.model.layers[0].self_attn.v_proj)


def _other_norm(model):
    model.model.norm = nn.LayerNorm(32)


def _hook(model):
    model.model.layers[1].register_forward_hook(lambda module, args, out: out * 1.1)


def _pre_hook(model):
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 1.1,))


def _own_forward(model):
    """What accelerate's dispatch does: the instance carries a forward of its own."""
    old = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: 2 * old(x)


CHANGES = [_adapter, _mlp_adapter, _subclass, _wrapper, _other_norm, _hook, _pre_hook, _own_forward]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_a_changed_model_is_seen_as_it_is(change):
    """Lean must not run over an adapter, a hook or a foreign layer; the session's logits are the changed model's."""
    torch.manual_seed(0)
    lm = tiny(vocab_size=VOCAB)
    change(lm.model)
    assert lean_forward(lm.model) is None
    session = lm.session()
    with torch.inference_mode():
        expected = lm.model(input_ids=torch.tensor([[3, 1, 4]]), use_cache=False).logits[0]
    torch.testing.assert_close(session.prefill([3, 1, 4]), expected[-1], atol=1e-4, rtol=0)
