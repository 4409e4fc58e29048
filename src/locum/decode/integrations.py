"""Our decoding inside transformers: a callable for `model.generate(**inputs, custom_generate=...)`.

`generate` prepares the generation config, the processors of the logits and the criteria of the end, and hands them over. What they ask
for is done exactly or refused by name: nothing is left out in silence.

Example:
    >>> from locum import decode, models
    >>> import torch
    >>> model, ids = models.tiny(vocab_size=32).model, torch.tensor([[1, 2, 3]])
    >>> ours = decode.integrations.custom_generate(drafter=decode.Lookup())
    >>> theirs, drafted = (model.generate(ids, max_new_tokens=20, custom_generate=c, pad_token_id=0) for c in (None, ours))
    >>> bool((theirs == drafted).all())
    True
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from locum.decode.base import Drafter, Verifier
from locum.decode.engine import generate
from locum.decode.plain import Plain
from locum.errors import UserError
from locum.models import LM
from locum.tokens import Sampling

__all__ = ["custom_generate"]

Ids = Int64[Tensor, "batch tokens"]
Text = Int64[Tensor, "1 longer"]

# What the four filters of a sampling law and the two ends of a text are called there; everything else is refused.
_WARPERS = {"TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"}
_ENDS = {"MaxLengthCriteria", "EosTokenCriteria"}
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass(frozen=True, eq=False)
class _Called(LM):
    """A model with the end-of-sequence ids of one call."""

    ends: frozenset[int] = frozenset()

    @property
    def eos_ids(self) -> frozenset[int]:
        return self.ends


def custom_generate(
    drafter: Drafter = Plain(),  # noqa: B008  a frozen value
    *,
    verifier: Verifier | None = None,
    draft: LM | None = None,
    state: Any = None,
    seed: int | None = None,
) -> Callable[..., Text | GenerateDecoderOnlyOutput]:
    """A `custom_generate` for transformers' `generate`.

    It follows the generation config: `max_new_tokens` or `max_length`, `do_sample` with `temperature`, `top_k`, `top_p`, `min_p`, the
    end-of-sequence ids, `return_dict_in_generate`.

    Args:
        drafter: where drafts come from.
        verifier: the rule that checks them; default the exact one that accepts most.
        draft: the draft model, for drafters that need one.
        state: a state of the drafter, `drafter.start(LM(model), draft)`, to go on with what it learned in earlier calls.
        seed: of the random choices; None draws it from torch's generator, so that `torch.manual_seed` fixes the text.

    Returns: a callable that gives the ids `[1, prompt + new]`, or a `GenerateDecoderOnlyOutput` that holds them.
    Raises: UserError, when called, for more than one sequence, padding, and every setting that is not one of the above.
    """

    def decode(
        model: Any,
        input_ids: Ids,
        logits_processor: Any = (),
        stopping_criteria: Any = (),
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Text | GenerateDecoderOnlyOutput:
        _require_supported(input_ids, generation_config, logits_processor, stopping_criteria, model_kwargs)
        ends = generation_config._eos_token_tensor
        lm = _Called(
            model,
            name=getattr(model, "name_or_path", "") or "model",
            ends=frozenset(ends.flatten().tolist() if ends is not None else ()),
        )
        [out] = generate(
            lm,
            input_ids[0].tolist(),
            drafter=drafter,
            verifier=verifier,
            draft=draft,
            state=state,
            sampling=_sampling(logits_processor, generation_config),
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            seed=int(torch.randint(2**31, ())) if seed is None and generation_config.do_sample else seed or 0,
        )
        new = torch.tensor([out.ids], dtype=input_ids.dtype, device=input_ids.device)
        ids = torch.cat([input_ids, new], 1)
        return GenerateDecoderOnlyOutput(sequences=ids) if generation_config.return_dict_in_generate else ids

    return decode


def _sampling(processors: Any, config: Any) -> Sampling:
    """The law that the prepared processors make of the logits; they are there only if they change something."""
    if not config.do_sample:
        return Sampling()
    active = {type(p).__name__: p for p in processors}
    top_k, top_p = active.get("TopKLogitsWarper"), active.get("TopPLogitsWarper")
    temperature, min_p = active.get("TemperatureLogitsWarper"), active.get("MinPLogitsWarper")
    return Sampling(
        temperature.temperature if temperature else 1.0,
        top_k.top_k if top_k else None,
        top_p.top_p if top_p else None,
        min_p.min_p if min_p else None,
    )


def _require_supported(ids: Tensor, config: Any, processors: Any, criteria: Any, model_kwargs: dict[str, Any]) -> None:
    """Refuse by name what would change the text or the output and is not done here."""
    if (config.num_beams or 1) > 1:
        raise UserError(f"num_beams must be 1 with this custom_generate, got {config.num_beams}")
    if (config.num_return_sequences or 1) > 1:
        raise UserError(
            f"num_return_sequences must be 1 with this custom_generate, got {config.num_return_sequences}: call it several times"
        )
    if ids.shape[0] != 1:
        raise UserError(
            f"this custom_generate decodes one prompt at a time (batch size 1), got a batch of {ids.shape[0]}"
        )
    if model_kwargs.get("attention_mask") is not None:
        raise UserError("attention_mask must be all ones: this custom_generate takes one prompt without padding")
    if model_kwargs.get("inputs_embeds") is not None:
        raise UserError("inputs_embeds are not supported by this custom_generate: pass input_ids")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise UserError("past_key_values must be empty: this custom_generate keeps its own cache")
    for name in _OUTPUTS:
        if config.return_dict_in_generate and getattr(config, name, False):
            raise UserError(
                f"{name} is not supported by this custom_generate: most tokens come without a forward of their own"
            )
    wrong = [type(p).__name__ for p in processors if type(p).__name__ not in _WARPERS]
    wrong += [type(c).__name__ for c in criteria if type(c).__name__ not in _ENDS]
    if wrong:
        raise UserError(
            "this custom_generate supports temperature, top_k, top_p, min_p, a maximal length and end-of-sequence ids, "
            f"not {', '.join(wrong)}"
        )
