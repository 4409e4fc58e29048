"""Guidance: steer a base model with the ratio of two others, token by token.

    pi(a|s) ~ base(a|s) (proxy(a|s) / ref(a|s))^kappa                                      (arXiv 2404.12358, eq. 10)

The proxy is a tuned model, usually smaller than the base, and ref what it was tuned from; all three share a vocabulary.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locum.errors import UserError
from locum.models import LM, Session, require_same_vocabulary

__all__ = ["Guide", "guide", "guided", "require_vocabulary"]


def guided(
    base: Float[Tensor, "*rows V"], proxy: Float[Tensor, "*rows V"], ref: Float[Tensor, "*rows V"], kappa: float
) -> Float[Tensor, "*rows V"]:
    """Log-probabilities of eq. 10 from three sets of logits; kappa = 0 returns `base` as it is.

    A token that ref never says has no ratio: it gets probability 0.
    """
    if kappa == 0:
        return base
    wide = torch.promote_types(base.dtype, torch.float32)
    logp, logr = proxy.to(wide).log_softmax(-1), ref.to(wide).log_softmax(-1)
    never = logr == -torch.inf
    z = base.to(wide) + kappa * (logp.masked_fill(never, 0.0) - logr.masked_fill(never, 0.0))
    return z.masked_fill(never, -torch.inf).log_softmax(-1)


class Guide:
    """A logits processor that steers a base model with a policy and its reference (eq. 10).

    `model.generate(..., logits_processor=[guide(policy, ref)])` in transformers; anywhere else
    `guide(policy, ref)(input_ids, logits)`. It keeps both models' caches between calls, so a call costs one
    token each; rows may be dropped, repeated and reordered (beams), and a text it has not seen starts a new cache.

    Args: see `guide`.
    """

    def __init__(self, proxy: LM, ref: LM, kappa: float, pad_id: int | None) -> None:
        require_vocabulary(proxy, ref)
        self.kappa, self.pad_id, self.vocab_size = kappa, pad_id, proxy.vocab_size
        self._proxy, self._ref = _Follower(proxy), _Follower(ref)

    def __call__(self, input_ids: Int[Tensor, "B L"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        if scores.shape[-1] != self.vocab_size:
            raise UserError(
                f"the base model has {scores.shape[-1]} tokens and the guide {self.vocab_size}; "
                "they must share one vocabulary"
            )
        if self.kappa == 0:
            return scores
        rows = []
        for row in input_ids.tolist():
            start = next((i for i, t in enumerate(row) if t != self.pad_id), 0)
            rows.append(tuple(row[start:]))
        proxy, ref = (f(rows).to(scores.device) for f in (self._proxy, self._ref))
        return guided(scores, proxy, ref, self.kappa)


def guide(proxy: LM, ref: LM, kappa: float = 1.0, pad_id: int | None = None) -> Guide:
    """Steer another base model of the same vocabulary: base * (proxy / ref)^kappa.

    Args:
        proxy: the DPO-trained policy, usually smaller than the base model.
        ref: its reference.
        kappa: strength; 0 is the base model, 1 the paper's; with base = ref and 1 it is the proxy exactly.
        pad_id: padding token in front of shorter prompts, in batches that are padded left.

    Raises: UserError if kappa is not finite or the vocabularies differ.
    """
    if not -torch.inf < kappa < torch.inf:
        raise UserError(f"kappa must be finite, got {kappa}")
    return Guide(proxy, ref, kappa, pad_id)


class _Follower:
    """Next-token logits of a model for rows of ids that grow by a token from call to call; equal rows are run once."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.rows: dict[tuple[int, ...], tuple[Session, int, Tensor]] = {}  # text -> session, node, logits after it

    def __call__(self, rows: Sequence[tuple[int, ...]]) -> Float[Tensor, "B V"]:
        known, self.rows = self.rows, {}
        grown: dict[Session, list[tuple[int, ...]]] = {}
        for row in dict.fromkeys(rows):
            if row in known:
                self.rows[row] = known[row]
            elif row[:-1] in known:
                grown.setdefault(known[row[:-1]][0], []).append(row)
            else:
                session = self.lm.session(len(row) + 256)
                self.rows[row] = (session, -1, session.prefill(row))
        for session, texts in grown.items():
            parents = [known[text[:-1]][1] for text in texts]
            again = {text: node for text, (s, node, _) in self.rows.items() if s is session}
            living = {*parents, *again.values()} - {-1}
            if len(living) < sum(s is session for s, _, _ in known.values()):  # some row was dropped
                moved = session.keep(sorted(living)) | {-1: -1}
                parents = [moved[p] for p in parents]
                self.rows.update({t: (session, moved[n], self.rows[t][2]) for t, n in again.items()})
            first = session.size
            logits = session.extend([text[-1] for text in texts], parents)
            for i, text in enumerate(texts):
                self.rows[text] = (session, first + i, logits[i])
        return torch.stack([self.rows[row][2] for row in rows])


def require_vocabulary(policy: LM, ref: LM) -> None:
    """Refuse a reference whose ids mean something else than the policy's."""
    if policy.vocab_size != ref.vocab_size:
        raise UserError(
            f"policy {policy.name!r} has {policy.vocab_size} tokens and reference {ref.name!r} has {ref.vocab_size}; "
            "they must share one vocabulary"
        )
    require_same_vocabulary(policy, ref)
