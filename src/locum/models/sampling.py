"""Responses of a causal language model to many prompts, in batches.

What a training loop needs around `generate`: one response per prompt; a call that can be repeated from a `torch.Generator`
without the process's random state being touched; and a response that is its own tokens, with its end of sequence only where
the model said one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from locum.errors import UserError
from locum.models.generate import generate, require_room
from locum.models.language_model import LM
from locum.tokens.rollouts import uniforms
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

    What is drawn depends on the generator's state, the prompt and its number; greedy responses on the prompt alone.

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
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} must be >= 1, got {value}")
    room = [max_new_tokens] * len(prompts)
    require_room(lm.model, prompts, room, what="prompt")
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device if generator else None))
    made = generate(
        lm.model,
        prompts,
        1,
        room,
        uniforms(seed, torch.arange(len(prompts)), max_new_tokens),
        eos_ids=lm.eos_ids,
        sampling=sampling or Sampling(temperature=1.0),
        batch_rows=batch_size,
        progress=progress,
    )
    return [Response(ids, not ended) for ids, ended in zip(made.lists(), made.ended.tolist(), strict=True)]
