"""Responses of a causal language model to many prompts, in batches.

transformers' `generate` does the decoding. Around it stands what a training loop needs: the law of a token is the one
asked for and nothing of the model's own generation config; a run can be repeated from a `torch.Generator` without the
process's random state being touched; the model, which may be in the middle of training or wrapped by PEFT or DDP, comes
back as it was; and a response is its own tokens, with its end of sequence only where the model said one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from locum.errors import UserError
from locum.models.language_model import LM
from locum.models.scoring import unwrapped
from locum.tokens.sampling import Sampling

__all__ = ["Response", "sample_responses"]


@dataclass(frozen=True)
class Response:
    """What a model answered.

    Args:
        ids: at least one token; the last is an end of sequence unless the response was cut.
        truncated: true where the response ran to the limit without an end of sequence.
    """

    ids: list[int]
    truncated: bool


def sample_responses(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    *,
    max_new_tokens: int = 256,
    generator: torch.Generator | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[Response]:
    """One response per prompt, in the prompts' order.

    Batches are padded on the left and hold prompts of like length, the longest ones first. What is drawn depends on the
    generator's state, the prompts, their order and the batch size; greedy responses on the prompts alone.

    Args:
        lm: the model (DDP and PEFT wrappers are fine); `LM(model, tokenizer)` where it is not one yet. `lm.eos_ids` end a response.
        prompts: token ids, at least one each.
        sampling: the law that tokens are drawn from; plain sampling at temperature 1 unless given. Temperature 0 is greedy.
        max_new_tokens: limit of a response, its end of sequence included.
        generator: gives one seed for the whole call; None draws that seed from the process's random state.
        batch_size: prompts at a time.
        progress: ``progress(done, total)``, after every batch.

    Raises: UserError for an empty prompt (with its number), or one too long for the model's positions.
    """
    sampling = sampling or Sampling(temperature=1.0)
    _check(lm, prompts, max_new_tokens, batch_size)
    wrapper: Any = getattr(lm.model, "module", lm.model)  # DDP has no generate
    stop = sorted(lm.eos_ids)
    pad = stop[0] if stop else 0
    config = _generation_config(sampling, max_new_tokens, stop, pad)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found: dict[int, Response] = {}
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device if generator else None))
    with _as_for_inference(lm.model), _seeded(wrapper.device, seed):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            texts = [torch.tensor(list(prompts[i]), dtype=torch.long) for i in rows]
            ids = pad_sequence(texts, batch_first=True, padding_value=pad, padding_side="left")
            real = pad_sequence([torch.ones_like(t) for t in texts], batch_first=True, padding_side="left")
            out = wrapper.generate(
                input_ids=ids.to(wrapper.device), attention_mask=real.to(wrapper.device), generation_config=config
            )
            found |= zip(rows, _responses(out[:, ids.shape[1] :], stop), strict=True)
            if progress is not None:
                progress(len(found), len(prompts))
    return [found[i] for i in range(len(prompts))]


def _responses(out: Tensor, stop: Sequence[int]) -> list[Response]:
    """Rows of new tokens as responses: what stands behind the first end of sequence is padding."""
    ends = torch.isin(out, torch.tensor(stop, dtype=torch.long, device=out.device))
    lengths = torch.where(ends.any(-1), ends.long().argmax(-1) + 1, out.shape[1])
    table = zip(out.tolist(), lengths.tolist(), (~ends.any(-1)).tolist(), strict=True)
    return [Response(row[:length], cut) for row, length, cut in table]


def _check(lm: LM, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} must be >= 1, got {value}")
    room = getattr(unwrapped(lm.model).config.get_text_config(), "max_position_embeddings", None)
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {number} has no tokens; a response needs at least one to go on from")
        if room is not None and len(prompt) + max_new_tokens > room:
            raise UserError(
                f"prompt {number} of {len(prompt)} tokens and {max_new_tokens} new ones exceed the {room} positions "
                f"of model {lm.name!r}"
            )


def _generation_config(sampling: Sampling, max_new_tokens: int, stop: list[int], pad: int) -> Any:
    from transformers import GenerationConfig

    law: dict[str, Any] = {"do_sample": False}
    if not sampling.greedy:
        law = {
            "do_sample": True,
            "temperature": float(sampling.temperature),
            "top_k": sampling.top_k or 0,  # 0, because transformers takes 50 where nothing is said
            "top_p": 1.0 if sampling.top_p is None else float(sampling.top_p),
            "min_p": sampling.min_p,
        }
    return GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stop or None, pad_token_id=pad, **law)


@contextmanager
def _as_for_inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and an empty generation config, while the block lasts; every module's own mode is put back."""
    from transformers import GenerationConfig

    inner = unwrapped(model)
    modes = [(module, module.training) for module in model.modules()]
    config = inner.generation_config
    model.eval()
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = config
        for module, training in modes:
            module.training = training


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The process's random state, seeded while the block lasts and put back afterwards, on the CPU and on the devices."""
    cpu = device.type == "cpu"
    devices = range(0 if cpu else torch.get_device_module(device).device_count())
    with torch.random.fork_rng(devices, device_type="cuda" if cpu else device.type):
        torch.manual_seed(seed)
        yield
