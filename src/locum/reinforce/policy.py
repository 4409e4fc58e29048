"""A causal language model as the pipeline asks it: batched texts from one prefill per prompt, scores where they are needed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from locum.errors import UserError
from locum.models import LM
from locum.models.generate import generate
from locum.models.scoring import adapter, score, unwrapped
from locum.reinforce.base import Heat
from locum.tokens.rollouts import Generated, Rollouts
from locum.tokens.rollouts import seeds as seeds_of
from locum.tokens.sampling import Sampling
from locum.tokens.tiles import Scores

__all__ = ["VLLM", "Critic", "TextPolicy", "reference_of"]

CRITIC = "locum_critic"  # the critic, as a part of the trained model


class Critic(nn.Module):
    """The value of a state: a linear function of the policy's last hidden state, 0 at first."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.value = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
        return self.value(hidden.to(self.value.weight.dtype))[:, 0]


class TextPolicy:
    """A language model that is trained (`locum.reinforce.base.Policy`).

    Args:
        lm: the model, possibly wrapped by PEFT, and its tokenizer.
        batch_rows: completions that are sampled at once.
        engine: what samples in the model's place: an object with the `generate` of a policy, and `load(model)`, which is
            called with the model after every update (`locum.models.vllm`).
    """

    def __init__(self, lm: LM, batch_rows: int = 256, engine: Any = None) -> None:
        self.model: Any = lm.model
        self.lm, self.batch_rows, self.engine = lm, batch_rows, engine

    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        copies: int,
        room: Sequence[int],
        draws: Float[Tensor, "rows _T"] | None,
        heat: Heat | None = None,
        sampling: Sampling = Sampling(temperature=1.0),  # noqa: B008 (frozen)
    ) -> Generated:
        """`copies` completions of each prefix, adjacent; each ends with an end of sequence or at its room."""
        if self.engine is not None:
            if heat is not None:
                raise UserError("a temperature per token needs the model's own sampling: leave the engine out")
            return self.engine.generate(prefixes, copies, room, draws, sampling)
        return generate(
            self._inner(),
            prefixes,
            copies,
            room,
            draws,
            eos_ids=self.lm.eos_ids,
            heat=heat,
            sampling=sampling,
            batch_rows=self.batch_rows,
        )

    def scores(self, rollouts: Rollouts) -> Scores:
        """The scores that the completions' tokens were drawn from. Without gradient past the wrapper that binds processes."""
        ids, real, where = rollouts.texts()
        model = self.model if torch.is_grad_enabled() else self._inner()
        return score(model, ids, real, where)

    def critic(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
        """Values of states, in float32 at least."""
        return getattr(unwrapped(self.model), CRITIC)(hidden)

    def add_critic(self) -> None:
        """Give the model a critic, for advantages that need one."""
        inner = unwrapped(self.model)
        head = inner.get_output_embeddings()
        critic = Critic(head.weight.shape[1])
        inner.add_module(CRITIC, critic.to(head.weight.device))

    def refresh(self) -> None:
        """Tell the engine that the model has changed."""
        if self.engine is not None:
            self.engine.load(self._inner())

    def _inner(self) -> Any:
        """Without the wrapper that binds processes: their numbers of forwards differ where there is no gradient."""
        return getattr(self.model, "module", self.model)


class VLLM:
    """vLLM in the place of the model's own sampling: quicker on a GPU, with random numbers of its own.

    Args:
        lm: the model that is trained; the engine reads the folder or hub name that it came from.
        settings: as `vllm.LLM` takes them.

    Raises: MissingExtra without vLLM.
    """

    def __init__(self, lm: LM, **settings: Any) -> None:
        from locum.models.vllm import vllm_engine

        self.lm = lm
        self.engine = vllm_engine(str(unwrapped(lm.model).name_or_path), **settings)

    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        copies: int,
        room: Sequence[int],
        draws: Float[Tensor, "rows _T"],
        sampling: Sampling,
    ) -> Generated:
        """As a policy's; the draws make the seeds."""
        from locum.models.vllm import vllm_generate

        seeds = seeds_of(draws[::copies]).tolist()
        made = vllm_generate(self.engine, prefixes, copies, room, sampling, seeds, self.lm.eos_ids)
        device = self.lm.device
        return Generated(made.ids.to(device), made.mask.to(device), made.ended.to(device))

    def load(self, model: nn.Module) -> None:
        """Put the model's weights into the engine."""
        from locum.models.vllm import vllm_update

        vllm_update(self.engine, model)


def reference_of(policy: TextPolicy, frozen: nn.Module | None = None) -> Any:
    """What opens the reference policy: another model, or the policy's own base where it is a PEFT model."""
    if frozen is None and not hasattr(getattr(policy.model, "module", policy.model), "peft_config"):
        raise UserError("the reference of a model without adapters is a model of its own: give one")
    other = TextPolicy(LM(frozen, name="reference")) if frozen is not None else None

    @contextmanager
    def opened() -> Iterator[TextPolicy]:
        if other is not None:
            yield other
            return
        with adapter(policy.model, None):
            yield policy

    return opened
