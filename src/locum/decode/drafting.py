"""What drafters with a draft model share: its session, and the law that a draft is drawn from."""

from torch import Tensor

from locum.decode.base import Drafter, Law
from locum.errors import UserError
from locum.models import LM, Session, require_same_vocabulary
from locum.tokens import Sampling


def start_draft(drafter: Drafter, target: LM, draft: LM | None) -> Session:
    """The draft model's session, a drafter's state; it finds its place in a new text by itself.

    Raises: UserError if there is no draft model or it has another vocabulary.
    """
    if draft is None:
        raise UserError(
            f"drafter {type(drafter).__name__} needs a draft model with the target's vocabulary; pass draft=..."
        )
    require_same_vocabulary(target, draft)
    return draft.session()


def law_of(logits: Tensor, sampling: Sampling) -> Law:
    """The law `[vocab]` that drafts are drawn from, as the very numbers that the verifier will replay."""
    law: Law = sampling.law(logits).cpu().numpy()
    return law
