"""Which of ten options are true: questions with several answers, on which partial credit is a dense reward.

An option is eight Gaussian numbers x, and true if w.x > 0 for a w that is fixed and never shown; where none is, the first is.
A policy writes four tokens of boilerplate and then one token per option: CHOSEN, LEFT, or one that is no answer.

    question 17      2 3 4 5   1 0 0 1 0 1 1 0 0 1      "the answer is", then options 1, 4, 6, 7 and 10

A prefix is the number of a question (and what was written so far): questions come from a bank that the task's seed fixes. What
the policy looks at is the option, and where it stands; its laws do not depend on what it wrote before. So all completions of a
question share all their laws, and the probability that an answer is right is a product.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from locum.errors import UserError
from locum.method import require
from locum.tokens.rollouts import Generated, Rollouts
from locum.tokens.sampling import Sampling
from locum.tokens.tiles import Scores

__all__ = ["BOILERPLATE", "CHOSEN", "LEFT", "SubsetChoice", "SubsetPolicy", "strict_accuracy", "warmed_up"]

LEFT, CHOSEN, VOCAB = 0, 1, 6
BOILERPLATE = (2, 3, 4, 5)

Numbers = Int[Tensor, " n"]


@dataclass(frozen=True)
class SubsetChoice:
    """The task.

    Args:
        options: of a question, >= 1.
        features: numbers that an option is made of, >= 1.
        bank: how many questions there are, >= 1.
        seed: of the questions and of what makes an option true.
    """

    options: int = 10
    features: int = 8
    bank: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("options", "features", "bank"):
            require(self, name, getattr(self, name) >= 1, ">= 1")

    @property
    def length(self) -> int:
        """Tokens of a completion."""
        return len(BOILERPLATE) + self.options

    @functools.cached_property
    def questions(self) -> Float[Tensor, "bank options features"]:
        """All of them."""
        return self._drawn[0]

    @functools.cached_property
    def truth(self) -> Bool[Tensor, "bank options"]:
        """Which options are true; at least one of each question."""
        x, w = self._drawn
        true = x @ w > 0
        true[:, 0] |= ~true.any(-1)
        return true

    @functools.cached_property
    def _drawn(self) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(self.seed)
        w = torch.randn(self.features, generator=g)
        return torch.randn(self.bank, self.options, self.features, generator=g), w

    def letters(self, number: int) -> list[str]:
        """The right options as letters."""
        return [_letter(i) for i in self.truth[number].nonzero()[:, 0].tolist()]

    def named(self, completion: Sequence[int]) -> str:
        """The chosen options as text, "A,D"; what is no answer is "?"."""
        said = list(completion[len(BOILERPLATE) :])
        broken = len(said) < self.options or any(token > CHOSEN for token in said)
        return "?" if broken else ",".join(_letter(i) for i, token in enumerate(said) if token == CHOSEN)


class SubsetPolicy(nn.Module):
    """An MLP over an option's features (0 in the boilerplate) and one-hot position; two layers of 64, GELU, six tokens.

    Args:
        task: whose questions it answers.
    """

    questions: Tensor

    def __init__(self, task: SubsetChoice) -> None:
        super().__init__()
        self.task = task
        self.register_buffer("questions", task.questions, persistent=False)
        self.body = nn.Sequential(nn.Linear(task.features + task.length, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        self.lm_head = nn.Linear(64, VOCAB, bias=False)

    def forward(self, numbers: Numbers) -> Float[Tensor, "n length d"]:
        """Last hidden states of every token of a completion; `lm_head` makes logits of them."""
        options = F.pad(self.questions[numbers], (0, 0, len(BOILERPLATE), 0))
        place = torch.eye(self.task.length, dtype=options.dtype, device=options.device).expand(len(numbers), -1, -1)
        return self.body(torch.cat([options, place], -1))

    @torch.no_grad()
    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        copies: int,
        room: Sequence[int],
        draws: Float[Tensor, "rows _T"],
        heat: Callable[[Float[Tensor, "r V"]], Float[Tensor, " r"]] | None = None,
        sampling: Sampling = Sampling(temperature=1.0),  # noqa: B008 (frozen)
    ) -> Generated:
        """Go on from prefixes to the last option, or as far as there is room.

        Args:
            prefixes: a question's number, and what was written so far; the copies of one are adjacent rows.
            room: most new tokens of each prefix.
            draws: the uniform number that picks token t of row r: the first id whose cumulated probability exceeds it.
            heat: temperatures from the logits about to be sampled, column by column.
        """
        device, length = self.questions.device, self.task.length
        for i, (prefix, most) in enumerate(zip(prefixes, room, strict=True)):
            if not 1 <= len(prefix) <= length or most < 1:
                raise UserError(f"prefix {i} cannot be gone on from: {len(prefix) - 1} of {length} tokens, room {most}")
        start = torch.tensor([len(p) - 1 for p in prefixes], device=device, dtype=torch.long).repeat_interleave(copies)
        free = torch.minimum(torch.tensor(room, device=device).repeat_interleave(copies), length - start)
        width = int(free.max()) if len(free) else 0
        if draws.shape[1] < width:
            raise UserError(f"{width} tokens may come but draws has {draws.shape[1]} columns")
        numbers = torch.tensor([p[0] for p in prefixes], device=device, dtype=torch.long)
        logits = self.lm_head(self(numbers)).repeat_interleave(copies, 0)
        at = (start[:, None] + torch.arange(width, device=device)).clamp(max=length - 1)
        logits = logits.gather(1, at[..., None].expand(-1, -1, VOCAB))
        if heat is not None:
            logits = torch.stack([z / heat(z)[:, None] for z in logits.unbind(1)], 1)
        rising = sampling.law(logits).cumsum(-1)
        ids = (rising <= draws[:, :width, None].to(rising)).sum(-1).clamp(max=VOCAB - 1)
        mask = torch.arange(width, device=device) < free[:, None]
        return Generated(torch.where(mask, ids, 0), mask, start + free == length)

    def scores(self, rollouts: Rollouts) -> Scores:
        """What the logits of the completions' tokens are made of, row by row. Each question goes through once."""
        first = rollouts.prefix_mask.long().argmax(-1, keepdim=True)
        numbers, which = rollouts.prefix.gather(-1, first)[:, 0].unique(return_inverse=True)
        said = (
            rollouts.prefix_mask.sum(-1, keepdim=True) - 1 + torch.arange(rollouts.mask.shape[1], device=which.device)
        )
        place = (which[:, None] * self.task.length + said)[rollouts.mask]
        return Scores(self(numbers).flatten(0, 1).index_select(0, place), self.lm_head.weight)

    def right(self, numbers: Numbers) -> Float[Tensor, "n length"]:
        """log-probabilities of the one strictly right completion of each question, token by token."""
        truth = self.task.truth.to(numbers.device)[numbers].long()
        written = torch.tensor(BOILERPLATE, device=numbers.device).expand(len(numbers), -1)
        law = self.lm_head(self(numbers)).log_softmax(-1)
        return law.gather(-1, torch.cat([written, truth], 1)[..., None])[..., 0]


@torch.no_grad()
def strict_accuracy(policy: SubsetPolicy, numbers: Numbers) -> float:
    """The probability that exactly the true options are chosen, mean over questions, exactly."""
    return float(policy.right(numbers)[:, len(BOILERPLATE) :].sum(-1).exp().mean())


def warmed_up(seed: int, task: SubsetChoice, steps: int = 200) -> SubsetPolicy:
    """A policy that writes the boilerplate, and chooses by the toss of a coin: cross-entropy on 64 texts a step, Adam 2e-3."""
    return copy.deepcopy(_warmed_up(seed, task, steps))


@functools.cache
def _warmed_up(seed: int, task: SubsetChoice, steps: int) -> SubsetPolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = SubsetPolicy(task)
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters(), 2e-3)
    written = torch.tensor(BOILERPLATE).expand(64, -1)
    for _ in range(steps):
        text = torch.cat([written, torch.randint(2, (64, task.options), generator=g)], 1)
        logits = policy.lm_head(policy(torch.randint(task.bank, (64,), generator=g)))
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), text.flatten()).backward()
        optimizer.step()
    return policy


def _letter(i: int) -> str:
    return chr(ord("A") + i)
