"""What is measured of a language model along a training: samples to held-out prompts, and how it tells held-out pairs apart.

A response is what the model says up to its end of sequence or the limit; on the sentiment task up to the end of its first
sentence, which is what is rewarded there. KL and entropy are sums over a response's tokens of what they are at each of
them, exactly; the reference is the model without its adapter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from locum.align.base import Example
from locum.align.statistics import BASE, ModelScorer, collate, token_log_probs
from locum.bench.store import Row
from locum.models import LM
from locum.models.sampling import sample_responses
from locum.tasks import sentiment
from locum.tokens.tiles import divergence, over_tiles, tile_entropy

__all__ = ["BLOCKS", "Observer"]

BLOCKS = ("chosen", "rejected")
SAMPLED = 16  # prompts sampled at a time
SHOWN = 12  # samples kept for the report


@dataclass(eq=False)
class Observer:
    """Measures a policy, which is the base model or the same with an adapter on.

    Args:
        lm: the base, which is the reference.
        prompts: examples to answer, with their texts.
        pairs: held-out pairs.
        rewarded: whether responses are sentences with a reward.
        new_tokens: limit of a response.
    """

    lm: LM
    prompts: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    rewarded: bool
    new_tokens: int
    _reference: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def log_probs(self, model: Any, examples: Sequence[Example], block: str) -> list[torch.Tensor]:
        """log p of each response token."""
        return token_log_probs(ModelScorer(model), examples, block, move=lambda batch: batch.to(self.lm.device))

    def reference(self, seed: int) -> Row:
        """The base itself, while it has no adapter."""
        for block in BLOCKS:
            self._reference.setdefault(block, self.log_probs(self.lm.model, self.pairs, block))
        return self.measure(self.lm.model, seed, step=0)

    def measure(self, model: Any, seed: int, step: int) -> Row:
        """Samples to the held-out prompts, and what they and the held-out pairs say of the policy."""
        generator = torch.Generator().manual_seed(seed)  # the same random numbers at every checkpoint of every method
        policy = LM(model, self.lm.tokenizer, self.lm.name)
        drawn = sample_responses(
            policy,
            [e["prompt_ids"] for e in self.prompts],
            max_new_tokens=self.new_tokens,
            generator=generator,
            batch_size=SAMPLED,
        )
        texts, ids = self.ends([r.ids for r in drawn])
        examples = [{**e, "response_ids": y} for e, y in zip(self.prompts, ids, strict=True)]
        kl, entropy = self._laws(model, examples, reference=step > 0)
        rewards = sentiment.rewards(texts) if self.rewarded else None
        right = self._right(model) if step > 0 else [0.5] * len(self.pairs)
        return {
            "step": step,
            "reward": None if rewards is None else _mean(rewards),
            "kl": _mean(kl),
            "entropy": _mean(entropy),
            "length": _mean([len(y) for y in ids]),
            "accuracy": _mean(right),
            "by_prompt": {"kl": kl, "score": right if rewards is None else rewards},
            "texts": texts,
            "rewards": rewards,
        }

    def ends(self, drawn: list[list[int]]) -> tuple[list[str], list[list[int]]]:
        """Responses as text and tokens; on sentiment up to the end of their first sentence."""
        decode: Callable[[list[int]], str] = self.lm.decode
        texts = [decode(ids) for ids in drawn]
        if not self.rewarded:
            return texts, drawn
        cut, kept = [], []
        for text, ids in zip(texts, drawn, strict=True):
            first = sentiment.sentence(text)
            if first is None:
                cut.append(text)
                kept.append(ids)
                continue
            n = next(n for n in range(1, len(ids) + 1) if len(decode(ids[:n])) >= len(first))
            cut.append(first)
            kept.append(ids[:n])
        return cut, kept

    @torch.no_grad()
    def _laws(self, model: Any, examples: Sequence[Example], reference: bool) -> tuple[list[float], list[float]]:
        """KL(policy || reference) and the policy's entropy along each response: sums of what they are at each token."""
        kl, entropy = [], []
        for start in range(0, len(examples), SAMPLED):
            batch = collate(examples[start : start + SAMPLED], ("response",)).to(self.lm.device)
            policy = ModelScorer(model)(batch)
            (surprise,) = over_tiles(tile_entropy, [policy])
            gap = torch.zeros_like(surprise)
            if reference:
                (gap,) = over_tiles(divergence, [policy, ModelScorer(model, BASE)(batch)])
            kl += batch.spread(gap).sum(-1).tolist()
            entropy += batch.spread(surprise).sum(-1).tolist()
        return kl, entropy

    def _right(self, model: Any) -> list[float]:
        """For each held-out pair 1 where the chosen response has the larger log-ratio to the reference, 1/2 for a tie."""
        margins = torch.zeros(len(self.pairs), dtype=torch.float64)
        for block, sign in (("chosen", 1), ("rejected", -1)):
            now = self.log_probs(model, self.pairs, block)
            gaps = [float((a - b).sum()) for a, b in zip(now, self._reference[block], strict=True)]
            margins += sign * torch.tensor(gaps, dtype=torch.float64)
        return (0.5 + 0.5 * margins.sign()).tolist()

    def samples(self, start: Row, end: Row) -> list[Row]:
        """The first prompts with the reference's answer and the trained policy's, and their rewards."""
        rewards = zip(start["rewards"], end["rewards"], strict=True) if start["rewards"] else iter(())
        return [
            {"prompt": e["prompt"], "before": a, "after": b, "reward": list(next(rewards, ()))}
            for e, a, b in list(zip(self.prompts, start["texts"], end["texts"], strict=True))[:SHOWN]
        ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
