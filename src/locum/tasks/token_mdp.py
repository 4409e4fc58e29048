"""The token MDP, solved exactly: where value, advantage and optimal policy of a text are known to the last digit.

A state is the text so far, an action the next token, the reward r(s, a) any number; the episode ends at the horizon or
after an end-of-sequence token, with value 0 there. Of all policies the best one maximises

    J(pi) = E_pi sum_t [ r(s_t, a_t) - beta log pi(a_t|s_t)/ref(a_t|s_t) ]

and is known in closed form (arXiv 2404.12358, eqs. 1-4; rewards and values in nats times beta):

    Q(s, a) = r(s, a) + beta log ref(a|s) + V(s'),   V(s) = beta log sum_a exp(Q(s, a)/beta),   V = 0 at the end
    pi*(a|s) = exp((Q(s, a) - V(s))/beta)

Two forms. A **tree** holds every text of length <= H as a list of levels, level t a tensor [A^t, A]: row = the text
read as a number in base A, so that row s with token a leads to row s A + a of the next level. A **table**
(`TableMDP`) looks only at the prompt, the position and the previous token, so it costs H V^2 and can be long. Both use
float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor
from torch.nn import functional as F

from locum.errors import UserError
from locum.tokens.logprobs import dpo_loss

MAX_LEAVES = 10**6
Levels = list[Tensor]  # one [A^t, A] per position t


@dataclass(frozen=True, eq=False)
class TreeSolution:
    """Q and log pi* per level [A^t, A]; V per level [A^t], one level more, the last one 0."""

    Q: Levels
    V: list[Tensor]
    logpi: Levels


def solve_tree(reward: Sequence[Tensor], logref: Sequence[Tensor], beta: float, eos: int | None = None) -> TreeSolution:
    """The optimal policy on a tree, backwards from the leaves.

    Args:
        reward, logref: one [A^t, A] per position; log-probabilities of the reference may be -inf.
        beta: temperature, > 0.
        eos: an action after which the text is over.

    Raises: UserError for beta <= 0, a level of another shape, or a tree of more than a million leaves (with its size).
    """
    _check_beta(beta)
    A, H = _size(reward)
    _size(logref)
    V = [torch.zeros(A**H, dtype=torch.float64)]
    Q: Levels = []
    for r, lr in zip(reversed(reward), reversed(logref), strict=True):
        Q.insert(0, r.double() + beta * lr.double() + _next(V[0], A, eos))
        V.insert(0, beta * (Q[0] / beta).logsumexp(-1))
    return TreeSolution(Q, V, [(q - v[:, None]) / beta for q, v in zip(Q, V, strict=False)])


def inverse_bellman(Q: Sequence[Tensor], logref: Sequence[Tensor], beta: float, eos: int | None = None) -> Levels:
    """The one reward under which Q is optimal: r(s, a) = Q(s, a) - beta log ref(a|s) - V(s') (eq. 4)."""
    _check_beta(beta)
    A, H = _size(Q)
    V = [beta * (q.double() / beta).logsumexp(-1) for q in Q[1:]] + [torch.zeros(A**H, dtype=torch.float64)]
    return [q.double() - beta * lr.double() - _next(v, A, eos) for q, lr, v in zip(Q, logref, V, strict=True)]


def along_paths(levels: Sequence[Tensor], eos: int | None = None) -> Float64[Tensor, "leaves H"]:
    """What every full path meets on its way, [A^H, H]; 0 after an end-of-sequence token."""
    A, H = _size(levels)
    leaf = torch.arange(A**H)
    columns, over = [], torch.zeros(A**H, dtype=torch.bool)
    for t, level in enumerate(levels):
        edge = leaf // A ** (H - 1 - t)  # row of level t times A, plus the action
        columns.append(torch.where(over, 0.0, level.double().reshape(-1)[edge]))
        if eos is not None:
            over = over | (edge % A == eos)
    return torch.stack(columns, -1)


def tree_value(
    reward: Sequence[Tensor],
    logref: Sequence[Tensor],
    logpi: Sequence[Tensor],
    beta: float,
    eos: int | None = None,
) -> float:
    """J(pi), exactly: the expectation over every path. At pi* it equals V(s_0)."""
    _size(reward)
    reach, total = torch.ones(1, dtype=torch.float64), 0.0
    for r, lr, lp in zip(reward, logref, logpi, strict=True):
        edge = reach[:, None] * lp.exp()
        gain = r.double() - beta * (lp - lr)
        total += float((edge * torch.where(edge > 0, gain, 0.0)).sum())
        if eos is not None:
            edge[:, eos] = 0
        reach = edge.reshape(-1)
    return total


def _next(V: Tensor, A: int, eos: int | None) -> Tensor:
    value = V.view(-1, A).clone()
    if eos is not None:
        value[:, eos] = 0
    return value


def _size(levels: Sequence[Tensor]) -> tuple[int, int]:
    if not levels:
        raise UserError("a token tree needs at least one level, got none")
    A, H = levels[0].shape[-1], len(levels)
    if A**H > MAX_LEAVES:
        raise UserError(
            f"a tree of {A} actions and {H} steps has {A**H} leaves; at most {MAX_LEAVES} are solved exactly"
        )
    for t, level in enumerate(levels):
        if tuple(level.shape) != (A**t, A):
            raise UserError(f"level {t} of a tree of {A} actions must have shape {[A**t, A]}, got {list(level.shape)}")
    return A, H


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise UserError(f"beta must be > 0, got {beta}")


@dataclass(frozen=True, eq=False)
class Pairs:
    """Preference pairs: prompt [N] and two responses [N, H], the preferred one first."""

    prompt: Int[Tensor, " N"]
    chosen: Int[Tensor, "N H"]
    rejected: Int[Tensor, "N H"]


def tied(rows: Float64[Tensor, "P V1 F"], length: int) -> Float64[Tensor, "P H V F"]:
    """A table that is the same at all positions, of logits or of anything that belongs to a state.

    Row = previous token, the last row for none. Gradients flow through.
    """
    first = rows[:, -1:, None, :].expand(-1, 1, rows.shape[1] - 1, -1)
    rest = rows[:, None, :-1].expand(-1, length - 1, -1, -1)
    return torch.cat([first, rest], 1)


@dataclass(frozen=True, eq=False)
class TableMDP:
    """A token MDP that sees prompt, position and previous token only.

    Args:
        ref_logits: the reference policy's logits [prompts, H, V, V], indexed prompt, position, previous, token.
            Policies are tensors of this shape as well. Position 0 has no previous token and uses row 0.
        reward: r(s, a), the same shape; unknown to the methods, known to the test.
    """

    ref_logits: Float64[Tensor, "P H V V"]
    reward: Float64[Tensor, "P H V V"]

    @classmethod
    def random(
        cls,
        seed: int,
        prompts: int = 4,
        vocab: int = 6,
        length: int = 8,
        ref_std: float = 0.7,
        reward_std: float = 0.5,
    ) -> "TableMDP":
        g = torch.Generator().manual_seed(seed)
        shape = (prompts, length, vocab, vocab)
        ref = ref_std * torch.randn(shape, generator=g, dtype=torch.float64)
        return cls(ref, reward_std * torch.randn(shape, generator=g, dtype=torch.float64))

    @classmethod
    def scored(
        cls,
        seed: int,
        prompts: int = 4,
        vocab: int = 16,
        length: int = 8,
        ref_std: float = 0.7,
        shy: float = 0.7,
    ) -> "TableMDP":
        """A task with one rule for all positions: tokens 0-3 score +1, 4-7 score -1, the others 0.

        The reference's logits are N(0, ref_std^2) per prompt and previous token, and `shy` lower on the good tokens.
        """
        g = torch.Generator().manual_seed(seed)
        ref = ref_std * torch.randn((prompts, vocab + 1, vocab), generator=g, dtype=torch.float64)
        ref[..., :4] -= shy
        score = torch.zeros(vocab, dtype=torch.float64)
        score[:4], score[4:8] = 1, -1
        return cls(tied(ref, length), score.expand(prompts, length, vocab, vocab).clone())

    @property
    def prompts(self) -> int:
        return self.reward.shape[0]

    @property
    def length(self) -> int:
        return self.reward.shape[1]

    @property
    def vocab(self) -> int:
        return self.reward.shape[-1]

    def solve(
        self, beta: float
    ) -> tuple[Float64[Tensor, "P H V V"], Float64[Tensor, "P H V"], Float64[Tensor, "P H V V"]]:
        """Q, V and log pi* of the optimal policy, in H V^2 steps."""
        _check_beta(beta)
        logref = self.ref_logits.log_softmax(-1)
        after = torch.zeros(self.prompts, self.vocab, dtype=torch.float64)
        Q: list[Tensor] = []
        V: list[Tensor] = []
        for t in reversed(range(self.length)):
            Q.insert(0, self.reward[:, t] + beta * logref[:, t] + after[:, None, :])
            after = beta * (Q[0] / beta).logsumexp(-1)
            V.insert(0, after)
        q, v = torch.stack(Q, 1), torch.stack(V, 1)
        return q, v, (q - v[..., None]) / beta

    def value(self, logits: Float64[Tensor, "P H V V"]) -> Float64[Tensor, " P"]:
        """Mean total reward of the policy per prompt, exactly (no sampling)."""
        return self.expect(logits, self.reward)

    def measure(
        self, logits: Float64[Tensor, "P H V V"]
    ) -> tuple[Float64[Tensor, " P"], Float64[Tensor, " P"], Float64[Tensor, " P"]]:
        """Mean total reward, KL(pi || ref) of whole responses and entropy of whole responses, per prompt, exactly."""
        logpi = logits.log_softmax(-1)
        gap, surprise = logpi - self.ref_logits.log_softmax(-1), -logpi
        return self.expect(logits, self.reward), self.expect(logits, gap), self.expect(logits, surprise)

    def expect(self, logits: Float64[Tensor, "P H V V"], table: Float64[Tensor, "P H V V"]) -> Float64[Tensor, " P"]:
        """Sum over the positions of the mean entry that the policy's responses meet, per prompt, exactly."""
        return (self.occupancy(logits)[..., None] * logits.softmax(-1) * table).sum((1, 2, 3))

    def occupancy(self, logits: Float64[Tensor, "P H V V"]) -> Float64[Tensor, "P H V"]:
        """How likely the policy's responses are to have each token before each position; position 0 has them in entry 0."""
        pi = logits.softmax(-1)
        at = [F.one_hot(torch.zeros(self.prompts, dtype=torch.long), self.vocab).to(pi)]
        for t in range(self.length - 1):
            at.append((at[-1][..., None] * pi[:, t]).sum(1))
        return torch.stack(at, 1)

    def along(
        self, table: Float64[Tensor, "P H V V"], prompt: Int[Tensor, " N"], y: Int[Tensor, "N H"]
    ) -> Float64[Tensor, "N H"]:
        """The entries of a table that responses meet, token by token."""
        previous = F.pad(y[:, :-1], (1, 0))
        return table[prompt[:, None], torch.arange(self.length), previous, y]

    def sample(
        self, logits: Float64[Tensor, "P H V V"], prompt: Int[Tensor, " N"], generator: torch.Generator
    ) -> Int[Tensor, "N H"]:
        """One response per entry of `prompt`."""
        pi, y = logits.softmax(-1), torch.zeros(len(prompt), 1, dtype=torch.long)
        for t in range(self.length):
            law = pi[prompt, t, y[:, -1]]
            y = torch.cat([y, torch.multinomial(law, 1, generator=generator)], 1)
        return y[:, 1:]

    def pairs(self, n: int, generator: torch.Generator) -> Pairs:
        """n Bradley-Terry pairs: two responses of the reference, P(first preferred) = sigmoid(reward gap)."""
        prompt = torch.randint(self.prompts, (n,), generator=generator)
        a, b = (self.sample(self.ref_logits, prompt, generator) for _ in range(2))
        gap = self.along(self.reward, prompt, a).sum(-1) - self.along(self.reward, prompt, b).sum(-1)
        first = (torch.rand(n, generator=generator, dtype=torch.float64) < gap.sigmoid())[:, None]
        return Pairs(prompt, torch.where(first, a, b), torch.where(first, b, a))

    def fit_dpo(
        self,
        pairs: Pairs,
        beta: float,
        lr: float = 0.05,
        steps: int = 60,
        ref_logits: Float64[Tensor, "P H V V"] | None = None,
    ) -> Float64[Tensor, "P H V V"]:
        """Logits of a policy trained by DPO from the reference (or `ref_logits`), full batch, Adam."""
        _check_beta(beta)
        ref = self.ref_logits if ref_logits is None else ref_logits
        prompt, y = pairs.prompt.repeat(2), torch.cat([pairs.chosen, pairs.rejected])
        logp_ref = self.along(ref.log_softmax(-1), prompt, y)
        mask = torch.ones_like(y, dtype=torch.bool)
        return _adam(
            lambda z: dpo_loss(self.along(z.log_softmax(-1), prompt, y) - logp_ref, mask, beta)[0], ref, lr, steps
        )

    def fit_sft(self, pairs: Pairs, lr: float = 0.05, steps: int = 60) -> Float64[Tensor, "P H V V"]:
        """Logits of the reference trained further on the chosen responses by maximum likelihood, full batch, Adam."""
        return _adam(
            lambda z: -self.along(z.log_softmax(-1), pairs.prompt, pairs.chosen).sum(-1).mean(),
            self.ref_logits,
            lr,
            steps,
        )

    def fit_reward(self, pairs: Pairs, lr: float = 0.05, steps: int = 60) -> Float64[Tensor, "P H V V"]:
        """A reward table by Bradley-Terry on whole responses, from 0, full batch, Adam: their sums are what it is fitted to."""
        prompt, y = pairs.prompt.repeat(2), torch.cat([pairs.chosen, pairs.rejected])
        mask = torch.ones_like(y, dtype=torch.bool)
        return _adam(
            lambda z: dpo_loss(self.along(z, prompt, y), mask, 1.0)[0], torch.zeros_like(self.reward), lr, steps
        )

    def session(self, logits: Float64[Tensor, "P H V V"]) -> "TableSession":
        """A policy of this MDP as a session to decode with; the text starts with one token, the prompt's number."""
        return TableSession(logits)


def _adam(loss_of: Callable[[Tensor], Tensor], start: Tensor, lr: float, steps: int) -> Tensor:
    z = start.clone().requires_grad_()
    adam = torch.optim.Adam([z], lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        loss_of(z).backward()
        adam.step()
    return z.detach()


class TableSession:
    """A table policy with the interface of a model's session: `prefill`, `extend`, `keep`."""

    def __init__(self, logits: Float64[Tensor, "P H V V"]) -> None:
        self.logits, self.prompt = logits, 0
        self.nodes: list[tuple[int, int, int]] = []  # depth, token, parent

    @property
    def size(self) -> int:
        return len(self.nodes)

    def prefill(self, ids: Sequence[int]) -> Float64[Tensor, " V"]:
        (self.prompt,) = ids
        return self.logits[self.prompt, 0, 0]

    def extend(self, tokens: Sequence[int], parents: Sequence[int]) -> Float64[Tensor, "nodes V"]:
        new = len(self.nodes)
        for token, parent in zip(tokens, parents, strict=True):
            self.nodes.append((self.nodes[parent][0] + 1 if parent >= 0 else 1, token, parent))
        return torch.stack([self.logits[self.prompt, depth, token] for depth, token, _ in self.nodes[new:]])

    def keep(self, nodes: Sequence[int]) -> dict[int, int]:
        return {i: i for i in range(self.size)}  # nodes cost nothing here, so all of them stay
