"""Prompts as token ids: plain text as the tokenizer encodes it, conversations in the form of its chat template."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from locum.errors import UserError
from locum.tasks.rows import BadRow, first_line

__all__ = ["as_text", "encode", "render", "template_settings"]

Prompt = str | Sequence[Mapping[str, Any]]


def encode(lm: Any, prompt: Prompt, **settings: Any) -> list[int]:
    """The ids that a completion continues.

    A conversation ends with the opening of the assistant's turn. Special tokens that the tokenizer puts in front of plain
    text stay; an end of sequence that it puts behind does not: there is nothing to continue after it.

    Args:
        lm: a tokenizer, or an `LM` that has one.
        settings: what the chat template is told beside the messages (see `template_settings`).

    Raises: UserError without a tokenizer or chat template, for messages that the template refuses, and for no ids at all.
    """
    tokenizer = getattr(lm, "tokenizer", lm)
    if tokenizer is None:
        raise UserError(f"model {lm.name!r} has no tokenizer, and prompts are texts: give an LM with a tokenizer")
    if isinstance(prompt, str):
        ids = _ids(tokenizer, prompt, special=True)
        if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
            ids.pop()
    else:
        try:
            ids = _ids(tokenizer, render(tokenizer, prompt, add_generation_prompt=True, **settings), special=False)
        except BadRow as fault:
            raise UserError(f"a prompt cannot be used: {fault}") from None
    if not ids:
        raise UserError(f"a prompt has no tokens: {as_text(prompt)!r}")
    return ids


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"])


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **settings: Any) -> str:
    """A conversation as its tokenizer's chat template writes it.

    Raises: UserError for a tokenizer without a template; BadRow for messages that the template refuses.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the rows are conversations and the tokenizer has no chat template: set one, or give plain strings"
        )
    write: Callable[..., str] = tokenizer.apply_chat_template
    try:
        return write(list(messages), tokenize=False, **settings)
    except TemplateError as error:
        raise BadRow(f"the chat template refuses it ({first_line(error)})") from None


def template_settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row's columns "tools" and "chat_template_kwargs" tell the chat template. Either may be JSON.

    Raises: BadRow for JSON that cannot be read.
    """
    found = {}
    for name in ("tools", "chat_template_kwargs"):
        value = row.get(name)
        try:
            found[name] = json.loads(value) if isinstance(value, str) else value
        except json.JSONDecodeError as error:
            raise BadRow(f"{name} is not JSON ({error.msg} at column {error.colno})") from None
    return {"tools": found["tools"]} | (found["chat_template_kwargs"] or {})


def as_text(prompt: Prompt) -> str:
    """For people: a text as it is; messages one below the other, with their roles where there are several."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0].get("content", "")
    return "\n\n".join(f"{m['role']}: {m.get('content', '')}" for m in prompt)
