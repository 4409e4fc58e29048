"""One forward of a causal language model over whole texts, kept only where a response is scored.

What comes out is a `Scores`: the last hidden states at the positions that predict response tokens, and the head that
makes logits of them. Prompts, padding and the vocabulary axis are never scored. It works through wrappers (PEFT
adapters, DDP, autocast): the wrapped model is called as a user would call it, and the hidden states are picked up on
the way. Models whose logits are more than a linear head of the last hidden state (soft caps, scales, adapters on the
head) are found out by comparing one column of logits, and give their logits whole.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

from locum.errors import UserError
from locum.tokens import logprobs as lp
from locum.tokens.logprobs import Scores

__all__ = ["TAPS", "adapter", "score", "unwrapped"]

Reduce = Callable[[Tensor], Tensor]
TAPS = ("residual", "mlp", "attention", "last")  # where a model can be listened to


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
    if not bool(attention_mask[:, 0].all()):  # models count positions from the first column unless told otherwise
        arguments["position_ids"] = lp.positions(attention_mask)
    plain = type(head) is nn.Linear and getattr(inner, "_locum_linear_head", True)
    if plain and "logits_to_keep" in inspect.signature(type(inner).forward).parameters:
        arguments["logits_to_keep"] = 1

    def catch(_: nn.Module, __: Any, out: Any) -> None:
        caught["hidden"] = out[0] if isinstance(out, tuple) else out.last_hidden_state

    with _listening(inner, body, where, taps or {}) as heard:
        hook = body.register_forward_hook(catch)
        try:
            out = model(**arguments)
        finally:
            hook.remove()
        for kind in heard.keys() & {"residual", "last"}:  # the end is heard as the head hears it: after the final norm
            heard[kind][-1:] = [(taps or {})[kind](caught["hidden"].detach()[:, :-1][where])]
    if plain and not hasattr(inner, "_locum_linear_head"):
        inner._locum_linear_head = _is_linear(caught["hidden"][:, -1], head, out.logits[:, -1])
        if not inner._locum_linear_head:
            return score(model, ids, attention_mask, where, taps)
    if not plain:
        return Scores(out.logits[:, :-1][where], taps=heard)
    return Scores(caught["hidden"][:, :-1][where], head.weight, head.bias, heard)


@torch.no_grad()
def _is_linear(hidden: Tensor, head: nn.Linear, logits: Tensor) -> bool:
    """Whether the head's product is all that stands between hidden states and logits; rounding is allowed for."""
    made = head(hidden).float()
    loose = 1e-4 if logits.dtype == torch.float32 and hidden.dtype == torch.float32 else 3e-2
    return bool(torch.allclose(made, logits.float(), atol=loose * float(made.abs().max() + 1), rtol=loose))


@contextmanager
def _listening(
    inner: nn.Module, body: Any, where: Tensor, taps: Mapping[str, Reduce]
) -> Iterator[dict[str, list[Tensor]]]:
    heard: dict[str, list[Tensor]] = {kind: [] for kind in taps}
    hooks = []
    try:
        for kind, reduce in taps.items():
            for layer in _layers(inner, body) if kind != "last" else ():

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
    names = {"residual": ("",), "mlp": ("mlp", "feed_forward"), "attention": ("self_attn", "attn", "attention")}
    for name in names[kind]:
        if not name:
            return layer
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
    if name is None:
        with inner.disable_adapter():
            yield model
        return
    if name not in inner.peft_config:
        raise UserError(f"the model has no adapter {name!r}, only {', '.join(inner.peft_config)}")
    active = inner.active_adapter
    trained = {p for p in inner.parameters() if p.requires_grad}
    inner.set_adapter(name)
    try:
        yield model
    finally:
        inner.set_adapter(active)
        for p in inner.parameters():  # set_adapter decides what is trained; put back what was
            p.requires_grad_(p in trained)
