"""Who scores responses in rounds: VADER's sentiment, or a reward model that `transformers` can load."""

from collections.abc import Sequence

import torch

from locum.align.driver import TextLabeller
from locum.errors import UserError

__all__ = ["labeller"]

VADER = "vader"


def labeller(name: str, device: str | torch.device = "cpu", batch_size: int = 8) -> TextLabeller:
    """The labeller of a name.

    Args:
        name: "vader" (the sentiment of the response, in [-1, 1]), or a path or hub name of a sequence classifier with one
            output, a reward model.
        batch_size: texts scored at a time.

    Raises: UserError for a model that cannot be had or has more than one output.
    """
    if name == VADER:
        from locum.tasks import sentiment

        return lambda prompts, responses: sentiment.rewards(responses)
    return _reward_model(name, device, batch_size)


def _reward_model(name: str, device: str | torch.device, batch_size: int) -> TextLabeller:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        model = AutoModelForSequenceClassification.from_pretrained(name).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load the reward model {name!r}: {first}") from error
    if model.config.num_labels != 1:
        raise UserError(f"a reward model has one output, and {name!r} has {model.config.num_labels}")

    @torch.inference_mode()
    def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(prompts), batch_size):
            texts = [_text(tokenizer, *pair) for pair in zip(prompts, responses, strict=True)][
                start : start + batch_size
            ]
            batch = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1, truncation=True).to(device)
            found += model(**batch).logits[:, 0].float().tolist()
        return found

    return score


def _text(tokenizer: object, prompt: str, response: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        return prompt + response
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False)  # type: ignore[attr-defined]
    return text
