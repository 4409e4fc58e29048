"""One forward of a causal language model over whole texts, kept only where a response is scored.

What comes out is a `Scores`: the last hidden states at the positions that predict response tokens, and the head that
makes logits of them. Prompts, padding and the vocabulary axis are never scored. It works through wrappers (PEFT
adapters, DDP, autocast): the wrapped model is called as a user would call it, and the hidden states are picked up on
the way. Models whose logits are more than a linear head of the last hidden state (soft caps, scales, adapters on the
head) give their logits whole: what the head reads and makes is compared with hidden states and logits, once per model.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

from locum.errors import UserError
from locum.tokens import logprobs as lp
from locum.tokens.tiles import Scores

__all__ = ["TAPS", "adapter", "score", "stands_alone", "unwrapped"]

Reduce = Callable[[Tensor], Tensor]
PARTS = {  # what the parts of a layer are called in different models
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
    "attention": ("self_attn", "attn", "attention", "self_attention"),
}
TAPS = ("residual", *PARTS, "last")  # where a model can be listened to


def score(
    model: nn.Module,
    ids: Int[Tensor, "B L"],
    attention_mask: Shaped[Tensor, "B L"],
    where: Bool[Tensor, "B Lm1"],
    taps: Mapping[str, Reduce] | None = None,
) -> Scores:
    """The model's scores at the positions where `where` is true: column t predicts the token ids[:, t + 1].

    Args:
        model: a Hugging Face causal language model, possibly wrapped.
        ids, attention_mask: texts padded on either side; 0 in the mask is padding.
        where: one column less than ids. The n true entries, row by row, are the result's positions.
        taps: what to listen to in every layer, "residual" (the layer's output, the last one after the final norm),
            "mlp" or "attention" (what these add to it), and what to keep of it: a function of [n, H]; "last" keeps only
            what the head sees. Without gradients.

    Raises: UserError for a tap that the model does not have.
    """
    inner = unwrapped(model)
    body, head = inner.get_decoder(), inner.get_output_embeddings()
    caught: dict[str, Tensor] = {}
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": attention_mask, "use_cache": False}
    known = inspect.signature(type(inner).forward).parameters
    if "position_ids" in known and not bool(attention_mask[:, 0].all()):
        arguments["position_ids"] = lp.positions(attention_mask)  # models count from the first column unless told
    alone = stands_alone(head) and getattr(inner, "_locum_linear_head", True)
    if alone and "logits_to_keep" in known:
        arguments["logits_to_keep"] = 1

    lower: torch.dtype | None = None  # what the head multiplies in where that is not its own dtype

    def catch(_: nn.Module, __: Any, out: Any) -> None:
        nonlocal lower
        caught["hidden"] = out[0] if isinstance(out, tuple) else out.last_hidden_state
        if torch.is_autocast_enabled(ids.device.type) and caught["hidden"].dtype != torch.float64:
            lower = torch.get_autocast_dtype(ids.device.type)

    def catch_head(_: nn.Module, given: Any, out: Tensor) -> None:
        caught["read"], caught["made"] = given[0], out

    hooks = [body.register_forward_hook(catch)]
    if alone and not hasattr(inner, "_locum_linear_head"):
        hooks.append(head.register_forward_hook(catch_head))
    try:
        with _listening(inner, body, where, taps or {}) as heard:
            out = model(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    for kind in heard.keys() & {"residual", "last"}:  # the end is heard as the head hears it: after the final norm
        heard[kind].append((taps or {})[kind](caught["hidden"].detach()[:, :-1][where]))
    if alone and not hasattr(inner, "_locum_linear_head"):
        inner._locum_linear_head = _same(caught["read"], caught["hidden"]) and _same(out.logits, caught["made"])
        if not inner._locum_linear_head:
            return score(model, ids, attention_mask, where, taps)
    if not alone:
        return Scores(out.logits[:, :-1][where], taps=heard)
    product = [caught["hidden"][:, :-1][where], head.weight, head.bias]
    hidden, weight, bias = (x.to(lower) if lower and x is not None else x for x in product)
    return Scores(hidden, weight, bias, heard)


def stands_alone(head: Any) -> bool:
    """Whether the head is a matrix that can be used outside the model: no adapter, no hook, no shard of a weight."""
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
        return False
    return type(head.weight) is nn.Parameter and head.weight.shape == (head.out_features, head.in_features)


@torch.no_grad()
def _same(a: Tensor, b: Tensor) -> bool:
    """Equal in the last column, number by number, whatever the dtype that a wrapper cast one of them to."""
    a, b = a[:, -1], b[:, -1]
    return a.shape == b.shape and bool(torch.allclose(a.to(b.dtype), b, rtol=0, atol=0, equal_nan=True))


@contextmanager
def _listening(
    inner: nn.Module, body: Any, where: Tensor, taps: Mapping[str, Reduce]
) -> Iterator[dict[str, list[Tensor]]]:
    heard: dict[str, list[Tensor]] = {kind: [] for kind in taps}
    hooks = []
    try:
        for kind, reduce in taps.items():
            layers = list(_layers(inner, body)) if kind != "last" else []
            for layer in layers[:-1] if kind == "residual" else layers:

                def hear(_: nn.Module, __: Any, out: Any, kind: str = kind, reduce: Reduce = reduce) -> None:
                    value = out[0] if isinstance(out, tuple) else out
                    heard[kind].append(reduce(value.detach()[:, :-1][where]))

                hooks.append(_part(inner, layer, kind).register_forward_hook(hear))
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _layers(inner: nn.Module, body: Any) -> nn.ModuleList:
    for name in ("layers", "h", "blocks"):
        if isinstance(found := getattr(body, name, None), nn.ModuleList):
            return found
    raise UserError(f"{type(inner).__name__} shows no list of layers to take hidden states from")


def _part(inner: nn.Module, layer: nn.Module, kind: str) -> nn.Module:
    if kind == "residual":
        return layer
    for name in PARTS.get(kind, ()):
        if isinstance(found := getattr(layer, name, None), nn.Module):
            return found
    raise UserError(f"{type(inner).__name__} has no {kind} part in its layers that can be listened to")


def unwrapped(model: nn.Module) -> Any:
    """The causal language model inside DDP and PEFT wrappers."""
    inner: Any = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


@contextmanager
def adapter(model: nn.Module, name: str | None) -> Iterator[nn.Module]:
    """A PEFT model with another adapter switched on, or with none (`name` None), while the block lasts.

    Raises: UserError for an adapter that the model does not have.
    """
    inner: Any = getattr(model, "module", model)
    if not hasattr(inner, "peft_config"):
        raise UserError("an adapter can be switched only on a PEFT model, and this model has none")
    if name is not None and name not in inner.peft_config:
        raise UserError(f"the model has no adapter {name!r}, only {', '.join(inner.peft_config)}")
    active, together = inner.active_adapter, inner.active_adapters
    trained = [p for p in inner.parameters() if p.requires_grad]
    try:
        with inner.disable_adapter() if name is None else nullcontext():
            if name is not None:
                inner.set_adapter(name)
            yield model
    finally:
        if name is not None:
            inner.set_adapter(active)
            if together != [active]:  # several adapters at once are known to the inner model only
                inner.base_model.set_adapter(together)
        inner.requires_grad_(False)  # switching decides what is trained; put back what was
        for p in trained:
            p.requires_grad_(True)
