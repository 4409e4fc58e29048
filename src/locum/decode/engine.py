"""The loop: propose a tree, score it in one forward, verify it, commit the accepted path; until the text ends."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from locum.decode.base import Context, Drafter, Rows, Tree, Verifier, check_pair
from locum.decode.dyspec import RecursiveRejection
from locum.decode.plain import Plain
from locum.decode.spectr import KSEQ
from locum.decode.verifiers import ChainRejection, Match
from locum.errors import UserError
from locum.models import LM, Session
from locum.tokens import Sampling

Prompt = str | Sequence[int]
Finish = Literal["eos", "length", "stop"]
Source = Literal["draft", "model"]

# The verifier that is exact for each way of drawing and accepts most.
DEFAULT: dict[str, Verifier] = {
    "fixed": Match(),
    "chain": ChainRejection(),
    "iid": KSEQ(),
    "without replacement": RecursiveRejection(),
}


@dataclass(frozen=True)
class Step:
    """One forward of the target: how many tokens were drafted, how many of them accepted, and the seconds of each part."""

    drafted: int
    accepted: int
    draft_seconds: float
    seconds: float
    kind: str = ""


@dataclass
class Generation:
    """A text and how it came about.

    `ids` are the new tokens (an end-of-sequence token included), `sources` says of each whether it was an accepted draft or the
    model's own, `steps` holds one entry per forward after the prompt's.
    """

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    text: str = ""
    finish: Finish = "length"
    seconds: float = 0.0

    @property
    def forwards(self) -> int:
        """Forwards of the target: the prompt's, which gives the first token, and one per step."""
        return len(self.steps) + bool(self.ids)

    @property
    def tokens_per_forward(self) -> float:
        return len(self.ids) / max(self.forwards, 1)

    @property
    def draft_seconds(self) -> float:
        return sum(step.draft_seconds for step in self.steps)


def generate(
    model: LM,
    prompts: Prompt | Sequence[Prompt],
    *,
    drafter: Drafter = Plain(),  # noqa: B008  a frozen value
    verifier: Verifier | None = None,
    draft: LM | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008
    max_new_tokens: int = 128,
    seed: int = 0,
    stop: Sequence[str] = (),
    chat: bool = False,
    state: Any = None,
    stream: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Continue each prompt, with drafts checked so that the text has exactly the model's law.

    Args:
        model: the target.
        prompts: texts or lists of token ids; they are continued one after the other, at batch size 1.
        drafter: where drafts come from.
        verifier: the rule that checks them; default the one that is exact for the drafter's trees and accepts most.
        draft: the draft model, for drafters that need one.
        sampling: the law of the text; greedy by default.
        max_new_tokens: per prompt; >= 0.
        seed: with the prompt's number, fixes every random choice.
        stop: the text ends before the first of these strings.
        chat: put each text prompt into the model's chat template.
        state: a state of the drafter from an earlier call, to go on with what it has learned.
        stream: receives the text piece by piece as it is settled.
        progress: receives (tokens so far, max_new_tokens).

    Returns: one `Generation` per prompt.
    Raises: UserError for an empty prompt, ids outside the vocabulary, a text longer than the model can hold, a verifier that is not
        exact for the drafter, a missing or foreign draft model, a model whose cache cannot be cut back.
    """
    tokens = [_prompt_ids(model, prompt, chat, max_new_tokens) for prompt in _as_list(prompts)]
    stop = _stops(model, stop)
    if seed < 0:
        raise UserError(f"seed must be >= 0, got {seed}")
    if verifier is not None:
        check_pair(drafter.draws, verifier)
    state = drafter.start(model, draft) if state is None else state
    results = []
    for number, ids in enumerate(tokens):
        rng = np.random.default_rng([seed, number])
        generation = Generation(ids)
        shown = ""
        for _ in decode_steps(model, generation, drafter, state, verifier, sampling, max_new_tokens, rng, stop):
            if progress:
                progress(len(generation.ids), max_new_tokens)
            if stream and not stop:
                shown = _emit(model.decode(generation.ids), shown, stream)
        if model.tokenizer is not None:
            generation.text = _cut(model.decode(generation.ids), stop)
            if stream:
                _emit(generation.text, shown, stream, final=True)
        results.append(generation)
    return results


def decode_steps(
    model: LM,
    out: Generation,
    drafter: Drafter,
    state: Any,
    verifier: Verifier | None,
    sampling: Sampling,
    max_new_tokens: int,
    rng: np.random.Generator,
    stop: Sequence[str] = (),
    session: Session | None = None,
) -> Iterator[list[int]]:
    """Fill `out` step by step; yields the new tokens of each step. The loop behind `generate`."""
    began = time.perf_counter()
    if max_new_tokens == 0:
        return
    session = session or model.session(len(out.prompt_ids) + max_new_tokens + 96)
    logits = session.prefill(out.prompt_ids, partial(drafter.read, state) if drafter.reads_prompt else None)
    text = list(out.prompt_ids)
    new = [Rows(logits[None], sampling).draw(0, rng)]
    sources: list[Source] = ["model"]
    while not _append(model, out, new, sources, stop, max_new_tokens):
        out.seconds = time.perf_counter() - began
        yield new
        started = time.perf_counter()
        text += out.ids[len(text) - len(out.prompt_ids) :]
        limit = max_new_tokens - len(out.ids) - 1
        tree = drafter.propose(state, Context(text, limit, sampling, rng)) if limit else Tree.root(text[-1])
        drafted = time.perf_counter()
        rows = Rows(session.extend(tree.tokens, tree.parents), sampling)
        path, token = (verifier or DEFAULT[tree.draws]).select(tree, rows, rng)
        session.commit([0, *path])
        drafter.observe(state, tree, rows, path)
        new = [tree.tokens[node] for node in path] + [token]
        drafts: list[Source] = ["draft"] * len(path)
        sources = [*drafts, "model"]
        ended = time.perf_counter()
        out.steps.append(Step(len(tree), len(path), drafted - started, ended - started, tree.kind))
    out.seconds = time.perf_counter() - began
    yield new


def _append(
    model: LM,
    out: Generation,
    new: list[int],
    sources: list[Source],
    stop: Sequence[str],
    max_new_tokens: int,
) -> bool:
    """Take over tokens one by one, as a plain decoder would, and say whether the text has ended."""
    for token, source in zip(new, sources, strict=True):
        out.ids.append(token)
        out.sources.append(source)
        if token in model.eos_ids:
            out.finish = "eos"
            return True
        if stop and _stopped(model, out.ids, stop):
            out.finish = "stop"
            return True
        if len(out.ids) >= max_new_tokens:
            out.finish = "length"
            return True
    return False


def _stopped(model: LM, ids: list[int], stop: Sequence[str]) -> bool:
    window = ids[-(4 * max(map(len, stop)) + 8) :]  # a character takes at most four byte-level tokens
    return any(s in model.decode(window) for s in stop)


def _cut(text: str, stop: Sequence[str]) -> str:
    ends = [text.find(s) for s in stop if s in text]
    return text[: min(ends)] if ends else text


def _emit(text: str, shown: str, stream: Callable[[str], None], final: bool = False) -> str:
    settled = text if final else text.rstrip("\ufffd")  # half a character waits for its other bytes
    if len(settled) > len(shown) and settled.startswith(shown):
        stream(settled[len(shown) :])
        return settled
    return shown


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _stops(model: LM, stop: Sequence[str]) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in strings:
        raise UserError("a stop string must not be empty, got ''")
    if strings and model.tokenizer is None:
        raise UserError(f"stop strings need a tokenizer, and model {model.name!r} has none")
    return strings


def _prompt_ids(model: LM, prompt: Prompt, chat: bool, max_new_tokens: int) -> list[int]:
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens must be >= 0, got {max_new_tokens}")
    if isinstance(prompt, str):
        ids = model.chat(prompt) if chat else model.encode(prompt)
    else:
        ids = [int(token) for token in prompt]
    if not ids:
        raise UserError(f"a prompt must hold at least one token, got {prompt!r}")
    wrong = next((token for token in ids if not 0 <= token < model.vocab_size), None)
    if wrong is not None:
        raise UserError(
            f"token {wrong} is outside the vocabulary of model {model.name!r}, which has {model.vocab_size} tokens"
        )
    room = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and len(ids) + max_new_tokens > room:
        raise UserError(
            f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the {room} positions of model {model.name!r}"
        )
    return ids
