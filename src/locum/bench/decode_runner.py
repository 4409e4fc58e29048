"""Runs one decoder on one prompt and writes down what can be known of it: times, forwards, where each token came from."""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from locum.bench.decode_measures import PEERS
from locum.bench.engines import Unit
from locum.bench.machine import PeakMemory
from locum.bench.store import Row
from locum.decode import Drafter, Lookup, TokenRecycling, generate
from locum.errors import UserError
from locum.method import names
from locum.models import LM, load, require_same_vocabulary
from locum.tokens import Sampling

__all__ = ["DecodeRunner", "Text", "pieces"]

WARM_TOKENS = 8

# The papers size their trees for a GPU, where a forward of 80 tokens costs little more than one of a single token. On a
# CPU it costs about five times as much, so smaller trees of the same methods are compared there.
CPU_SIZES: dict[str, dict[str, Any]] = {
    "chain": {"length": 4},
    "spectr": {"K": 4, "L": 4},
    "dyspec": {"budget": 10},
    "tokenrecycling": {"nodes": 15},
    "graft": {"first": TokenRecycling(nodes=11), "second": Lookup(length=4)},
}


@dataclass
class Text:
    """What a decoder gave: token ids, and per forward of the model how many of them it brought and when it ended.

    Args:
        ids: the new tokens.
        gains: new tokens of each forward; the last of them is the model's own, those before it are an accepted draft's.
        ends: seconds from the start of the call to the end of each forward, draft included.
        draft_seconds: time spent in drafting; None where it cannot be told apart.
        cut: the text ended inside the last forward's draft, whose last token is a draft's too.
    """

    ids: list[int]
    gains: list[int]
    ends: list[float]
    draft_seconds: float | None = None
    cut: bool = False

    @property
    def depth(self) -> list[int]:
        """For each token its place in the accepted draft of its forward, from 1; 0 for the model's own."""
        depth = [place for gain in self.gains for place in (*range(1, gain), 0)]
        if self.cut:
            depth[-1] = self.gains[-1]
        return depth


class DecodeRunner:
    """Holds the models and measures one unit at a time. Each method runs a few tokens first, off the clock.

    Raises:
        UserError: for a model that cannot be had, a draft with another vocabulary, or a prompt that the model cannot hold.
    """

    def __init__(
        self,
        model: str,
        draft: str | None,
        methods: Sequence[str],
        prompts: Sequence[str],
        max_new_tokens: int,
        temperature: float,
        dtype: str | None = None,
        device: str | None = None,
    ) -> None:
        self.lm = load(model, dtype=dtype, device=device)
        ours = names("decode", "Drafter")
        sizes = CPU_SIZES if self.lm.device.type == "cpu" else {}
        self.drafters: dict[str, Drafter] = {m: ours[m](**sizes.get(m, {})) for m in methods if m not in PEERS}
        self.draft: LM | None = None
        if draft is not None and set(methods) - {"plain", "transformers", "transformers-lookup", "lookup"}:
            self.draft = load(draft, dtype=dtype, device=device)
            require_same_vocabulary(self.lm, self.draft)
        self.max_new_tokens = max_new_tokens
        self.prompts = [self._encode(text) for text in prompts]
        self.sampling = Sampling(temperature=temperature)
        self.environment = {
            "dtype": str(self.lm.dtype).removeprefix("torch."),
            "device": str(self.lm.device),
            "threads": torch.get_num_threads(),
        }
        self._warm: set[str] = set()
        self._likely: dict[tuple[int, tuple[int, ...]], float | None] = {}

    def __call__(self, unit: Unit) -> Row:
        if unit.method not in self._warm:
            self._run(unit.method, self.prompts[0], min(WARM_TOKENS, self.max_new_tokens), seed=0)
            self._warm.add(unit.method)
        gc.collect(1)  # what the last unit left; a full collection would cost more than a short unit
        with PeakMemory(self.lm.device.type) as memory:
            began = time.perf_counter()
            text = self._run(
                unit.method, self.prompts[unit.item], self.max_new_tokens, seed=1000 * unit.seed + unit.item
            )
            seconds = time.perf_counter() - began
        return {
            "settings": repr(self.drafters.get(unit.method, unit.method)),
            "ids": text.ids,
            "greedy": self.sampling.greedy,
            "tokens": len(text.ids),
            "forwards": len(text.gains),
            "accepted": sum(d > 0 for d in text.depth),
            "seconds": seconds,
            "tokens_per_second": len(text.ids) / seconds,
            "draft_seconds": text.draft_seconds,
            "peak_memory_mb": memory.megabytes,
            "memory_how": memory.how,
            "log_likelihood": self._log_likelihood(unit.item, text.ids),
            "sample": {
                "pieces": pieces(partial(self.lm.decode, skip_special_tokens=False), text.ids),
                "step": [step for step, gain in enumerate(text.gains) for _ in range(gain)],
                "depth": text.depth,
                "times": [round(t, 4) for t in text.ends],
            },
        }

    def _encode(self, text: str) -> list[int]:
        ids = self.lm.chat(text)
        limit = getattr(self.lm.model.config, "max_position_embeddings", None)
        if limit is not None and len(ids) + self.max_new_tokens > limit:
            raise UserError(
                f"a prompt of {len(ids)} tokens and max_new_tokens={self.max_new_tokens} "
                f"exceed the {limit} positions of model {self.lm.name!r}: {text[:40]!r}"
            )
        return ids

    def _run(self, method: str, prompt: list[int], tokens: int, seed: int) -> Text:
        text = self._peer(method, prompt, tokens, seed) if method in PEERS else self._ours(method, prompt, tokens, seed)
        if self.lm.device.type == "cuda":
            torch.cuda.synchronize()
        return text

    def _ours(self, method: str, prompt: list[int], tokens: int, seed: int) -> Text:
        drafter = self.drafters[method]
        [made] = generate(
            self.lm,
            [prompt],
            drafter=drafter,
            draft=self.draft,
            sampling=self.sampling,
            max_new_tokens=tokens,
            seed=seed,
        )
        lengths = [0]  # tokens of each forward: the model's own token ends one
        for source in made.sources:
            lengths[-1] += 1
            if source == "model":
                lengths.append(0)
        gains = [n for n in lengths if n]
        steps = [step.seconds for step in made.steps]
        ends = list(accumulate([made.seconds - sum(steps), *steps]))
        return Text(made.ids, gains, ends, made.draft_seconds, cut=made.sources[-1] == "draft")

    def _peer(self, method: str, prompt: list[int], tokens: int, seed: int) -> Text:
        """transformers' generate, with the settings that its documentation gives for each of its ways to speculate."""
        from transformers import GenerationConfig

        config: dict[str, Any] = {"do_sample": False}
        if not self.sampling.greedy:  # no filters, as ours has none
            config = {"do_sample": True, "temperature": self.sampling.temperature, "top_k": 0, "top_p": 1.0}
        if method == "transformers-lookup":
            config["prompt_lookup_num_tokens"] = 10
        eos = sorted(self.lm.eos_ids) or None
        settings = GenerationConfig(
            max_new_tokens=tokens, eos_token_id=eos, pad_token_id=eos[0] if eos else 0, repetition_penalty=1.0, **config
        )
        assisted = {"assistant_model": self.draft.model} if method == "transformers-assisted" and self.draft else {}
        ids = torch.tensor([prompt], device=self.lm.device)
        watch = _Watch(len(prompt))
        with torch.random.fork_rng(), torch.inference_mode(), _timed(self.draft if assisted else None) as drafting:
            torch.manual_seed(seed)
            out = self.lm.model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=watch, **assisted
            )
        new = out[0, len(prompt) :].tolist()
        seconds = drafting[0] if assisted else 0.0 if method == "transformers" else None
        return Text(new, watch.gains, watch.ends, seconds)

    def _log_likelihood(self, item: int, ids: list[int]) -> float | None:
        """Mean log-probability of the new tokens, in nats; each text is scored once, off the clock."""
        key = (item, tuple(ids))
        if ids and key not in self._likely:
            prompt = self.prompts[item]
            whole = torch.tensor([prompt + ids], device=self.lm.device)
            with torch.inference_mode():
                logits = self.lm.model(whole, logits_to_keep=len(ids) + 1).logits[0, :-1].float()
                chosen = logits.log_softmax(-1).gather(-1, whole[0, len(prompt) :, None])
            mean = chosen.mean().item()
            self._likely[key] = mean if math.isfinite(mean) else None
        return self._likely.get(key)


class _Watch:
    """A streamer for transformers' generate: it is handed the prompt, then the tokens of each forward as they come."""

    def __init__(self, prompt: int) -> None:
        self._skip = prompt
        self._began = time.perf_counter()
        self.gains: list[int] = []
        self.ends: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if self._skip:  # the first call is the prompt
            self._skip = 0
            return
        self.gains.append(value.numel())
        self.ends.append(time.perf_counter() - self._began)

    def end(self) -> None:
        pass


@contextmanager
def _timed(lm: LM | None) -> Iterator[list[float]]:
    """Seconds spent in the forwards of a model during the body, as the one element of a list."""
    spent, began = [0.0], [0.0]
    if lm is None:
        yield spent
        return

    def before(*_: object) -> None:
        began[0] = time.perf_counter()

    def after(*_: object) -> None:
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
        spent[0] += time.perf_counter() - began[0]

    hooks = [lm.model.register_forward_pre_hook(before), lm.model.register_forward_hook(after)]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def pieces(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """The text of each token, such that together they are the whole; a character spread over tokens comes with its last."""
    found: list[str] = []
    start = 0
    for end in range(1, len(ids) + 1):
        lead = max(0, start - 4)  # a few tokens before: some tokenizers drop the space of a text's first token
        before = decode(ids[lead:start])
        text = decode(ids[lead:end])
        if text.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        found.append(text[len(before) :])
        start = end
    return found
