"""Running sums modulo 7: solutions with a slip whose place is known, and a small policy that writes them.

A problem is a row of digits below 7. Its solution repeats each digit and writes the sum so far behind it; the last sum is
the answer, and a token of its own ends it:

    problem 3 1 5      solution 3 3  1 4  5 2  end      (3, 3 + 1, 4 + 5 = 9 = 2 modulo 7)

A slip adds one too many, and every sum after it is off: the first wrong token dooms the solution. Slips are systematic:
frequent after certain digits, rare after the others, so that a policy which learned from slipped solutions finds its
worst errors likely.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from locum.errors import UserError
from locum.method import require

__all__ = ["END", "MODULUS", "RunningSums", "Solver"]

MODULUS, END = 7, 7

Digits = Int[Tensor, "n length"]
Solutions = Int[Tensor, "n tokens"]


@dataclass(frozen=True)
class RunningSums:
    """The task.

    Args:
        length: digits of a problem.
        hard: the digits after which slips are frequent.
        slip: probability of a slip after such a digit.
        stray: and after any other.
    """

    length: int = 6
    hard: tuple[int, ...] = (3, 5)
    slip: float = 0.55
    stray: float = 0.01

    def __post_init__(self) -> None:
        require(self, "length", self.length >= 1, ">= 1")
        require(self, "hard", set(self.hard) <= set(range(MODULUS)), f"digits below {MODULUS}")
        require(self, "slip", 0 <= self.slip <= 1, "in [0, 1]")
        require(self, "stray", 0 <= self.stray <= 1, "in [0, 1]")

    def problems(self, n: int, generator: torch.Generator) -> Digits:
        """Uniform digits."""
        return torch.randint(MODULUS, (n, self.length), generator=generator)

    def late_problems(self, n: int, generator: torch.Generator, last: int = 2) -> Digits:
        """Problems with one hard digit, among the last ones: all that comes before it is easy."""
        easy = torch.tensor([d for d in range(MODULUS) if d not in self.hard])
        hard = torch.tensor(self.hard)
        if not (len(easy) and len(hard) and 1 <= last <= self.length):
            raise UserError(
                f"late_problems: needs hard and easy digits and last in 1..{self.length}, got hard {self.hard}, last {last}"
            )
        digits = easy[torch.randint(len(easy), (n, self.length), generator=generator)]
        at = self.length - 1 - torch.randint(last, (n, 1), generator=generator)
        return digits.scatter(1, at, hard[torch.randint(len(hard), (n, 1), generator=generator)])

    def solutions(self, digits: Digits, generator: torch.Generator | None = None) -> Solutions:
        """The right solutions; with a generator slipped ones."""
        added = digits
        if generator is not None:
            risk = torch.where(torch.isin(digits, torch.tensor(self.hard)), self.slip, self.stray)
            added = digits + (torch.rand(digits.shape, generator=generator) < risk).long()
        sums = added.cumsum(1) % MODULUS
        return F.pad(torch.stack([digits, sums], -1).flatten(1), (0, 1), value=END)

    def answers(self, solutions: Solutions) -> Int[Tensor, " n"]:
        """The last sum, -1 where none stands before the end."""
        answer = solutions[:, 2 * self.length - 1]
        return torch.where((answer != END) & (solutions[:, -1] == END), answer, -1)

    def correct(self, digits: Digits, solutions: Solutions) -> Bool[Tensor, " n"]:
        """Whether the answer is right, whatever stands before it."""
        return self.answers(solutions) == digits.sum(1) % MODULUS

    def first_wrong(self, digits: Digits, solutions: Solutions) -> Int[Tensor, " n"]:
        """The place of the first token that is not the right solution's; the number of tokens where all are."""
        wrong = solutions != self.solutions(digits)
        return torch.where(wrong.any(1), wrong.long().argmax(1), wrong.shape[1])


class Solver(nn.Module):
    """A GRU that writes solutions token by token. Beside its last token it reads the digit it is at.

    Args:
        width: of its state and embeddings.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.token, self.digit = nn.Embedding(MODULUS + 1, width), nn.Embedding(MODULUS + 1, width)
        self.body, self.head = nn.GRU(width, width, batch_first=True), nn.Linear(width, MODULUS + 1)

    def forward(self, digits: Digits, solutions: Solutions) -> Float[Tensor, "n tokens width"]:
        """Hidden states; column t predicts token t of the solutions. `head` makes logits of them."""
        before = F.pad(solutions[:, :-1], (1, 0), value=END)
        seen = self._seen(digits)[:, : solutions.shape[1]]
        return self.body(self.token(before) + self.digit(seen))[0]

    @torch.no_grad()
    def sample(
        self, digits: Digits, generator: torch.Generator, beginnings: Int[Tensor, "n begun"] | None = None
    ) -> Solutions:
        """A solution per problem, of full length, drawn from the policy's law; `beginnings` are gone on from."""
        seen, state = self._seen(digits), None
        y = torch.full_like(digits[:, :1], END)
        if beginnings is not None:
            y = torch.cat([y, beginnings], 1)
        while y.shape[1] <= seen.shape[1]:
            done = 0 if state is None else y.shape[1] - 1
            out, state = self.body(self.token(y[:, done:]) + self.digit(seen[:, done : y.shape[1]]), state)
            law = self.head(out[:, -1]).softmax(-1)
            y = torch.cat([y, torch.multinomial(law, 1, generator=generator)], 1)
        return y[:, 1:]

    @staticmethod
    def _seen(digits: Digits) -> Tensor:
        """The digit that each token of a solution is about; END at its end."""
        return F.pad(digits.repeat_interleave(2, 1), (0, 1), value=END)
