"""The digit chain: reasoning in small, one running sum per step, where the value of every token is known exactly.

A prompt is N digits. The policy emits running sums modulo 10, one digit per prompt digit, and between them fillers that
change nothing. A wrong digit becomes the new running value, so one slip dooms the answer unless a second one makes up for
it. The episode ends with the N-th digit, or unfinished at `limit` tokens; reward 1 if the last digit is the prompt's sum.

    prompt 3 9 4      3 2 6          right: 3, 3 + 9 = 2, 2 + 4 = 6 (modulo 10)
                      3 filler 2 6   right as well
                      3 1 5          a slip at the second digit; the third goes on from it

A policy that looks at the running value, the prompt's digit, the position and whether the last token was a filler has so
few states that backward recursion over them gives its success probability, and the advantage of each token it said.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from torch.nn import functional as F

from locum.errors import UserError
from locum.method import require
from locum.tokens.rollouts import Generated, Rollouts
from locum.tokens.sampling import Sampling
from locum.tokens.tiles import Scores

__all__ = [
    "FILLER",
    "START",
    "ChainPolicy",
    "DigitChain",
    "Walk",
    "exact_advantages",
    "mean_entropy",
    "pass_at",
    "pass_at_1",
    "pretrained",
    "success",
    "values",
]

FILLER, VOCAB = 10, 11
START = 10  # what stands for the running value before the first digit; it counts as 0

Prompts = Int[Tensor, "n length"]
Table = Float64[Tensor, "n used digits last filler"]
ROWS = 1024  # rollouts whose tables of values exist at a time


@dataclass(frozen=True)
class DigitChain:
    """The task, and how wrong the teacher is that policies are warmed up on.

    Args:
        length: N, digits of a prompt and of an answer.
        eps: probability that the teacher's digit is wrong, all nine wrong ones alike; a number, or one per prompt digit.
        filler: probability that the teacher emits a filler; likewise.
        cap: most tokens of an episode; None means 2 N.
        warm_steps: steps of the warm start.
    """

    length: int = 8
    eps: float | tuple[float, ...] = 0.25
    filler: float | tuple[float, ...] = 0.15
    cap: int | None = None
    warm_steps: int = 400

    def __post_init__(self) -> None:
        require(self, "length", self.length >= 1, ">= 1")
        for name in ("eps", "filler"):
            given = getattr(self, name)
            each = given if isinstance(given, tuple) else (given,) * 10
            ok = len(each) == 10 and all(0 <= x <= 1 for x in each)
            require(self, name, ok, "in [0, 1], or ten such numbers, one per prompt digit")
        require(self, "cap", self.cap is None or self.cap >= self.length, "at least length, or None")
        require(self, "warm_steps", self.warm_steps >= 0, ">= 0")

    @staticmethod
    def hetero(length: int = 8, cap: int | None = None) -> "DigitChain":
        """Digits from 7 on are hard (wrong with .7, filler with .1), the others easy (wrong with .03, no filler)."""
        return DigitChain(length, (0.03,) * 7 + (0.7,) * 3, (0.0,) * 7 + (0.1,) * 3, cap, warm_steps=500)

    @property
    def limit(self) -> int:
        """Most tokens of an episode."""
        return 2 * self.length if self.cap is None else self.cap

    def prompts(self, n: int, generator: torch.Generator) -> Prompts:
        """Uniform digits."""
        return torch.randint(10, (n, self.length), generator=generator)

    def reward(self, rollouts: Rollouts) -> Float[Tensor, " rows"]:
        """1 where an episode ended with the prompt's sum, else 0. What a prefix holds beyond the prompt counts as emitted."""
        walk = Walk.of(self, rollouts)
        last = walk.digits + (rollouts.ids != FILLER) == self.length  # true on the token that ends an episode
        done = (last & rollouts.mask & (walk.used < self.limit)).any(-1)
        return (done & (walk.final == walk.prompts.sum(-1) % 10)).float()

    def score(self, prefix: Sequence[int], completion: Sequence[int]) -> float:
        """`reward` of one text, given as token ids."""
        prompt, emitted = prefix[: self.length], [*prefix[self.length :], *completion]
        digits = [token for token in emitted if token != FILLER]
        ended = len(digits) == self.length and len(emitted) <= self.limit
        return float(ended and digits[-1] == sum(prompt) % 10)

    def teacher(self) -> Float[Tensor, "2 10"]:
        """The probabilities of a wrong digit and of a filler, per prompt digit."""
        return torch.stack([torch.as_tensor(x, dtype=torch.float32).expand(10) for x in (self.eps, self.filler)])


@dataclass(frozen=True, eq=False)
class Walk:
    """The state before each token of the completions; anything outside their mask.

    Args:
        prompts: the prompts' digits.
        used: tokens emitted so far.
        digits: digits emitted so far.
        last: the last of them, START before the first.
        filler: 1 if the last token was a filler.
        final: the last digit of the whole text.
    """

    prompts: Int[Tensor, "rows length"]
    used: Int[Tensor, "rows tokens"]
    digits: Int[Tensor, "rows tokens"]
    last: Int[Tensor, "rows tokens"]
    filler: Int[Tensor, "rows tokens"]
    final: Int[Tensor, " rows"]

    @staticmethod
    def of(task: DigitChain, rollouts: Rollouts) -> "Walk":
        """Read off the texts: what stands behind a prompt's digits was emitted."""
        length = task.length
        ids, real, _ = rollouts.texts()
        rank = real.long().cumsum(-1)
        asked = real & (rank <= length)
        if not bool((rollouts.prefix_mask.sum(-1) >= length).all()):
            raise UserError(f"a prefix of a digit chain begins with the prompt's {length} digits; one here is shorter")
        said = real & ~asked
        digit, filler = said & (ids != FILLER), (said & (ids == FILLER)).long()
        column = torch.arange(ids.shape[1], device=ids.device)
        latest = torch.where(digit, column, -1).cummax(-1).values  # where the last digit stands, -1 before the first
        last = torch.where(latest >= 0, ids.gather(-1, latest.clamp(min=0)), START)

        def before(x: Tensor, first: int = 0) -> Tensor:
            return F.pad(x, (1, 0), value=first)[:, :-1][:, rollouts.prefix.shape[1] :]

        used, digits = said.long().cumsum(-1), digit.long().cumsum(-1)
        prompts = ids[asked].view(len(ids), length)
        return Walk(prompts, before(used), before(digits), before(last, START), before(filler), last[:, -1])


class ChainPolicy(nn.Module):
    """An MLP over one-hot (last digit, prompt digit, position) and the filler flag; token ids 0..9 are digits, 10 a filler.

    A prefix is a prompt's digits and what was emitted so far. All of the states fit in one small batch, so sampling looks
    laws up in a table: a text is drawn the same whatever is drawn beside it.

    Args:
        task: whose prompts it answers.
    """

    states: Tensor  # every state's features

    def __init__(self, task: DigitChain) -> None:
        super().__init__()
        self.task = task
        n = task.length
        at = torch.cartesian_prod(torch.arange(n), torch.arange(10), torch.arange(VOCAB), torch.arange(2)).view(-1, 4)
        hot = [F.one_hot(at[:, i], k) for i, k in enumerate((n, 10, VOCAB))]
        self.register_buffer("states", torch.cat([*hot, at[:, 3:]], -1).float(), persistent=False)
        self.body = nn.Sequential(nn.Linear(n + 10 + VOCAB + 1, 96), nn.GELU(), nn.Linear(96, 48), nn.GELU())
        self.lm_head = nn.Linear(48, VOCAB, bias=False)

    def forward(self, states: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        """Last hidden states; `lm_head` makes logits of them."""
        return self.body(self.states[states])

    def logits(self) -> Float[Tensor, "length 10 last 2 V"]:
        """Of every state: position, prompt digit, last digit (START at the end), filler flag."""
        return self.lm_head(self.body(self.states)).view(self.task.length, 10, VOCAB, 2, VOCAB)

    def laws(self, prompts: Prompts) -> Float64[Tensor, "n length 10 2 V"]:
        """Laws of the next token by prompt, digits emitted, running value (0 before the first digit) and filler flag."""
        law = self.logits().double().softmax(-1)
        law = torch.cat([law[:1, :, START:].expand(-1, -1, 10, -1, -1), law[1:, :, :START]])
        return law[torch.arange(self.task.length, device=prompts.device), prompts]

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
        """Go on from prefixes until the N-th digit, the room, or the task's limit of emitted tokens.

        Args:
            prefixes: token ids; the copies of one are adjacent rows.
            room: most new tokens of each prefix.
            draws: the uniform number that picks token t of row r: the first id whose cumulated probability exceeds it.
            heat: temperatures from the logits about to be sampled, of the rows that still run.
        """
        device, n = self.lm_head.weight.device, self.task.length
        blank = torch.zeros(len(prefixes), 1, dtype=torch.long, device=device)
        nothing = Generated(blank, blank == 0, blank[:, 0] == 0)
        walk = Walk.of(
            self.task, Rollouts.of(prefixes, nothing, blank[:, 0])
        )  # the state after a prefix: before one more token
        most = torch.minimum(torch.as_tensor(room, device=device), self.task.limit - walk.used[:, 0])
        for i in ((most < 1) | (walk.digits[:, 0] >= n)).nonzero()[:1, 0].tolist():
            used, done = walk.used[i, 0], walk.digits[i, 0]
            raise UserError(
                f"prefix {i} cannot be gone on from: room {room[i]}, {done} of {n} digits, {used} of {self.task.limit} tokens"
            )
        width = int(most.max()) if len(most) else 0
        if draws.shape[1] < width:
            raise UserError(f"{width} tokens may come but draws has {draws.shape[1]} columns")
        start = torch.cat([walk.digits, walk.last, walk.filler], -1)
        start, free, prompts = (x.repeat_interleave(copies, 0) for x in (start, most, walk.prompts))
        digits, last, filler = start.unbind(-1)

        logits = self.logits().view(-1, VOCAB)
        table = sampling.law(logits).cumsum(-1)
        ids = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        ended = torch.zeros_like(free, dtype=torch.bool)
        live = torch.arange(len(prompts), device=device)
        for t in range(width):
            at = _state(digits, prompts[live, digits], last, filler)
            rising = table[at] if heat is None else _heated(logits[at], heat, sampling).cumsum(-1)
            token = (rising <= draws[live, t, None]).sum(-1).clamp(max=VOCAB - 1)
            ids[live, t], mask[live, t] = token, True
            filler = (token == FILLER).long()
            digits, last = digits + 1 - filler, torch.where(filler.bool(), last, token)
            ended[live] = digits == n
            stay = (digits < n) & (free[live] > t + 1)
            if not stay.any():
                break
            live, digits, last, filler = live[stay], digits[stay], last[stay], filler[stay]
        long = int(mask.sum(-1).max()) if len(mask) else 0
        return Generated(ids[:, :long], mask[:, :long], ended)

    def scores(self, rollouts: Rollouts) -> Scores:
        """What the logits of the completions' tokens are made of, row by row. Each state that was met goes through once."""
        walk, m = Walk.of(self.task, rollouts), rollouts.mask
        asked = walk.prompts.gather(-1, walk.digits.clamp(max=self.task.length - 1))
        met, which = _state(walk.digits, asked, walk.last, walk.filler)[m].unique(return_inverse=True)
        return Scores(self(met).index_select(0, which), self.lm_head.weight)


def _state(digits: Tensor, asked: Tensor, last: Tensor, filler: Tensor) -> Tensor:
    """The number of a state in the policy's table."""
    return ((digits * 10 + asked) * VOCAB + last) * 2 + filler


def _heated(logits: Tensor, heat: Callable[[Tensor], Tensor], sampling: Sampling) -> Tensor:
    return sampling.law(logits / heat(logits)[:, None])


def pretrained(seed: int, task: DigitChain) -> ChainPolicy:
    """A policy warmed up on the teacher: batches of 512 prompts, Adam 5e-3. Each call gives a copy of its own."""
    return copy.deepcopy(_pretrained(seed, task))


@functools.cache
def _pretrained(seed: int, task: DigitChain) -> ChainPolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = ChainPolicy(task)
    g = torch.Generator().manual_seed(seed)
    risk = task.teacher()[[0, 1, 1]]
    optimizer = torch.optim.Adam(policy.parameters(), 5e-3)
    for _ in range(task.warm_steps):
        asked = task.prompts(512, g)
        wrong, pause, paused = torch.rand(3, *asked.shape, generator=g) < risk[:, asked]
        said = (asked + wrong * torch.randint(1, 10, asked.shape, generator=g)).cumsum(-1) % 10
        last = F.pad(said[:, :-1], (1, 0), value=START)
        at = _state(torch.arange(task.length), asked, last, paused.long())
        pairs = (at * VOCAB + torch.where(pause, FILLER, said)).flatten()
        counts = pairs.bincount(minlength=len(policy.states) * VOCAB).float()  # of states and what follows them
        optimizer.zero_grad()
        (-(counts @ policy.logits().log_softmax(-1).flatten()) / counts.sum()).backward()
        optimizer.step()
    return policy


@torch.no_grad()
def values(policy: ChainPolicy, prompts: Prompts) -> Table:
    """The probability of success from each state: by prompt, tokens used, digits emitted, running value, filler flag."""
    return _backward(policy, prompts, F.one_hot(prompts.sum(-1) % 10, 10).double())


def _backward(
    policy: ChainPolicy, prompts: Prompts, final: Float64[Tensor, "n 10"], earned: Tensor | float = 0.0
) -> Table:
    """Expected sums from each state: `final` at the end, by the last digit, and `earned` at each token on the way."""
    n, limit = policy.task.length, policy.task.limit
    law = policy.laws(prompts)
    table = law.new_zeros(len(prompts), limit + 1, n + 1, 10, 2)
    table[:, :, n] = final[:, None, :, None]
    for used in reversed(range(limit)):
        after = table[:, used + 1]
        by_digit = torch.einsum("npvfd,npd->npvf", law[..., :FILLER], after[:, 1:, :, 0])
        table[:, used, :n] = earned + by_digit + law[..., FILLER] * after[:, :n, :, 1, None]
    return table


def success(policy: ChainPolicy, prompts: Prompts) -> Float64[Tensor, " n"]:
    """The probability that an answer is right, per prompt."""
    return values(policy, prompts)[:, 0, 0, 0, 0]


def pass_at_1(policy: ChainPolicy, prompts: Prompts) -> float:
    """The expected reward, exactly."""
    return pass_at(policy, prompts, 1)


def pass_at(policy: ChainPolicy, prompts: Prompts, k: int) -> float:
    """The probability that one of k answers is right, mean over prompts, exactly."""
    return float((1 - (1 - success(policy, prompts)) ** k).mean())


def mean_length(policy: ChainPolicy, prompts: Prompts) -> float:
    """Expected tokens of an episode, exactly."""
    return _expected(policy, prompts, 1.0)


@torch.no_grad()
def mean_entropy(policy: ChainPolicy, prompts: Prompts) -> float:
    """Nats per token that the policy says: expected entropy of an episode over its expected length, exactly."""
    entropy = torch.special.entr(policy.laws(prompts)).sum(-1)
    return _expected(policy, prompts, entropy) / mean_length(policy, prompts)


@torch.no_grad()
def mean_kl(policy: ChainPolicy, other: ChainPolicy, prompts: Prompts) -> float:
    """KL(policy || other) of an episode, in nats, mean over prompts, exactly."""
    p, q = policy.laws(prompts), other.laws(prompts)
    return _expected(policy, prompts, (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1))


@torch.no_grad()
def _expected(policy: ChainPolicy, prompts: Prompts, earned: Tensor | float) -> float:
    """The expected sum over an episode of what is earned at each token, mean over prompts."""
    final = torch.zeros(len(prompts), 10, dtype=torch.float64, device=prompts.device)
    return float(_backward(policy, prompts, final, earned)[:, 0, 0, 0, 0].mean())


@torch.no_grad()
def exact_advantages(policy: ChainPolicy, rollouts: Rollouts) -> Float64[Tensor, "rows tokens"]:
    """Q - V of each token said: the value after it less the value before; 0 outside the mask."""
    return torch.cat([_advantages(policy, rollouts[i : i + ROWS]) for i in range(0, max(1, len(rollouts)), ROWS)])


def _advantages(policy: ChainPolicy, rollouts: Rollouts) -> Tensor:
    walk, mask = Walk.of(policy.task, rollouts), rollouts.mask
    prompts, which = walk.prompts.unique(dim=0, return_inverse=True)
    table = values(policy, prompts)
    row = which[:, None].expand_as(mask)[mask]
    used, digits, last, filler = (x[mask] for x in (walk.used, walk.digits, walk.last, walk.filler))
    value, token = last.where(digits > 0, 0), rollouts.ids[mask]
    pause = token == FILLER
    after = table[row, used + 1, digits + (~pause).long(), torch.where(pause, value, token), pause.long()]
    return table.new_zeros(mask.shape).masked_scatter(mask, after - table[row, used, digits, value, filler])
