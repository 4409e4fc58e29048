"""AWRS: Fast Controlled Generation from Language Models with Adaptive Weighted Rejection Sampling

Expensive: checking a constraint on every token of the vocabulary at every step, and the wrong law over whole texts
    that masking gives all the same.
Stands in: tokens are drawn from the model and only those are checked; an unbiased weight for the mass of the allowed
    tokens comes with each, and sequential Monte Carlo uses it to reach the model's law given that the text is valid.
Check: the mean of weight * f(token) equals the sum over allowed tokens, enumerated exactly; the mean final weight
    equals P(valid); the distance to the exact posterior falls as particles are added.

Let p be the model's law of the next token, A the allowed tokens, Z = p(A). A draw (x, w) is *properly weighted* if
E[w f(x)] = sum over x in A of p(x) f(x) for every f. All estimators draw without replacement, so that no rejected
token is checked twice, and return x with the law p / Z on A:

    paper       loop 0 draws until a token is allowed: x, n0 rejections of total mass psi0. Loop 1 goes on among all
                tokens not rejected yet (x among them) until one is allowed: n1 rejections.
                w = (1 - psi0) / (n0 + n1 + 1).
                More loops with the like formula are biased: two tokens at 1/2, one allowed, one loop more: 13/24.
    recursive   until x as above, r = 1 - psi0. One more token x' from what is left: w = r if it is allowed or
                nothing is left, else w = p(x). No variance if exactly one token is allowed.
    geometric   the run with replacement is rebuilt: before each draw with mass psi rejected, Geometric(1 - psi) - 1
                rejections that were skipped are counted. Stop at L allowed or R rejected draws:
                w = min(L - 1, accepted) / (accepted + rejected - 1), the chance that the first draw was allowed
                given the counts (Rao and Blackwell).
    auto        geometric if L > 2 or max p >= 2/3, else recursive: lower variance than `paper` for similar checks.

Weights are natural logs of probabilities, without unit; p is float64. Cost: about 2 / Z checks per token at worst and
never more than the support; one forward of at most M tokens per round. Traps: psi0 counts loop 0 only, n both loops;
loop 1 needs fresh randomness; a text that is cut at the limit needs the weight p(end). `recursive` and `geometric` are
those of the authors' library genlm-control, with the same proper weighting.

Example:
    >>> from locum import models
    >>> from locum.decode.awrs import AWRS
    >>> from locum.decode.constraints import Regex
    >>> lm = models.load("smollm2-135m-instruct")
    >>> AWRS(n_particles=5).generate(lm, lm.chat("When did Apollo 11 land?"), Regex(r"\\d{4}-\\d{2}-\\d{2}")).posterior

Authors: Lipkin, LeBrun, Vigly, Loula, MacIver, Du, Eisner, Cotterell, Mansinghka, O'Donnell, Lew, Vieira
Year: 2025
Venue: COLM 2025
arXiv: 2504.05410
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from locum.decode.constraints import Constraint
from locum.decode.constraints.gate import Gate
from locum.decode.smc import Accept, Draw, LogProbs, Samples, SessionBranches, log_sum, smc
from locum.errors import UserError
from locum.method import require
from locum.models import LM
from locum.models.vocabulary import Vocabulary
from locum.tokens.sampling import Sampling

__all__ = ["AWRS", "Chance", "Draw", "geometric", "paper", "recursive", "unweighted"]

FREE = Sampling(temperature=1.0)
FIRST = 64  # tokens of a draw that are put in order at once; more only when these are used up


class Chance:
    """The randomness that an estimator uses."""

    def __init__(self, rng: Generator) -> None:
        self.rng = rng

    def order(self, logp: LogProbs) -> Iterator[int]:
        """The tokens of positive mass, drawn one by one without replacement: by falling log p + Gumbel noise."""
        keys = logp - np.log(self.rng.standard_exponential(len(logp)))  # -log of an exponential is a Gumbel
        top = np.argpartition(keys, -FIRST)[-FIRST:] if len(keys) > FIRST else np.arange(len(keys))
        yield from (int(i) for i in top[np.argsort(-keys[top])] if keys[i] > -np.inf)
        if len(keys) > FIRST:
            keys[top] = -np.inf
            rest = np.flatnonzero(keys > -np.inf)
            yield from map(int, rest[np.argsort(-keys[rest])])

    def skipped(self, rest: float) -> float:
        """Geometric(rest) - 1: how often a run with replacement would have drawn what is rejected already."""
        return math.floor(-self.rng.standard_exponential() / math.log1p(-rest)) if rest > 0 else math.inf


def unweighted(logp: LogProbs, accept: Accept, chance: Chance) -> Draw:
    """The first allowed token, with weight 1: exact masking without a mask."""
    checks = 0
    for checks, token in enumerate(chance.order(logp), 1):
        if accept(token):
            return Draw(token, 0.0, checks)
    return Draw(None, -math.inf, checks)


def paper(logp: LogProbs, accept: Accept, chance: Chance) -> Draw:
    """Definition 2 of the paper: w = (1 - psi0) / (n0 + n1 + 1)."""
    rejected: list[int] = []
    for x in chance.order(logp):
        if accept(x):
            break
        rejected.append(x)
    else:
        return Draw(None, -math.inf, len(rejected))
    n0, log_rest = len(rejected), _log_rest(logp, rejected)
    checks, n1 = n0 + 1, 0
    for token in chance.order(_without(logp, rejected)):
        if token == x:  # known to be allowed
            break
        checks += 1
        if accept(token):
            break
        n1 += 1
    return Draw(x, log_rest - math.log(n0 + n1 + 1), checks)


def recursive(logp: LogProbs, accept: Accept, chance: Chance, max_rejects: int | None = None) -> Draw:
    """w = r if one more token is allowed as well or none is left, else p(x); r is the mass not rejected.

    r is the product of (1 - q_i) over rejected tokens of the recursion E f = q f(x) + (1 - q) E[f | not x]. With at
    most R rejections the one draw left after R - 1 of them decides alone: w = r if it is allowed, else the draw is dead.
    """
    rejected: list[int] = []
    order = chance.order(logp)
    for x in order:
        if accept(x):
            break
        rejected.append(x)
        if len(rejected) == max_rejects:
            return Draw(None, -math.inf, len(rejected))
    else:
        return Draw(None, -math.inf, len(rejected))
    checks, log_rest = len(rejected) + 1, _log_rest(logp, rejected)
    if max_rejects is not None and len(rejected) == max_rejects - 1:
        return Draw(x, log_rest, checks)
    more = next(order, None)
    if more is None:
        return Draw(x, log_rest, checks)
    return Draw(x, log_rest if accept(more) else float(logp[x]), checks + 1)


def geometric(
    logp: LogProbs, accept: Accept, chance: Chance, max_accepts: int = 2, max_rejects: int | None = None
) -> Draw:
    """w = min(L - 1, accepted) / (accepted + rejected - 1) over the rebuilt run with replacement."""
    left = np.exp(logp)  # probabilities of the tokens that are not rejected
    rejected: list[int] = []
    allowed: list[int] = []  # in order of drawing, repeats included
    n, most = 0.0, math.inf if max_rejects is None else max_rejects
    while len(allowed) < max_accepts and n < most:
        for token in chance.order(_without(logp, rejected)):
            if rejected:
                n += chance.skipped(float(left.sum()))
                if n >= most:
                    break
            if token in allowed or accept(token):
                allowed.append(token)
                break
            rejected.append(token)
            left[token] = 0.0
            n += 1
            if n >= most:
                break
        else:
            break  # every token is rejected
    checks = len(rejected) + len(set(allowed))
    if not allowed:
        return Draw(None, -math.inf, checks)
    accepted = min(max_accepts - 1, len(allowed))
    return Draw(allowed[0], math.log(accepted / (len(allowed) + min(n, most) - 1)), checks)


def _without(logp: LogProbs, rejected: list[int]) -> LogProbs:
    left = logp.copy()
    left[rejected] = -np.inf
    return left


def _log_rest(logp: LogProbs, rejected: list[int]) -> float:
    """log(1 - mass rejected); where that is little it is summed anew, so that a last 1e-12 keeps its digits."""
    mass = math.fsum(np.exp(logp[rejected]))
    return math.log1p(-mass) if mass < 0.9 else log_sum(_without(logp, rejected))


@dataclass(frozen=True)
class AWRS:
    """Text that obeys a constraint, sampled by adaptive weighted rejection and sequential Monte Carlo.

    Args:
        n_particles: M, texts that grow side by side; >= 1. Paper 5.
        tau: resample when the effective number of particles falls below tau * M; in [0, 1], 0 never. Paper 0.5.
        estimator: of the local normaliser, see above: "paper" (as published), "recursive", "geometric" or "auto" (the
            better one).
        weights: False keeps the tokens and drops the weights: with one particle, exact locally constrained decoding
            (the law of masking, p(y) / prod Z), at about half the checks.
        max_accepts: L of `geometric`; >= 2.
        max_rejects: R of `geometric` and `recursive`; >= 1, None for no limit. A draw that reaches it is dead.
        lookahead: set aside the tokens whose first byte cannot follow, and the end of an incomplete text, before
            anything is drawn. Their mass is accounted for, so the samples stay exact, with fewer checks and lower
            variance. It asks the constraint which bytes may follow: up to 256 questions per state, cheap for automata,
            not for functions.

    Raises: UserError for a field out of range.
    """

    n_particles: int = 5
    tau: float = 0.5
    estimator: str = "paper"
    weights: bool = True
    max_accepts: int = 2
    max_rejects: int | None = None
    lookahead: bool = False

    def __post_init__(self) -> None:
        require(self, "n_particles", self.n_particles >= 1, ">= 1")
        require(self, "tau", 0 <= self.tau <= 1, "in [0, 1]")
        known = ("paper", "recursive", "geometric", "auto")
        require(self, "estimator", self.estimator in known, f"one of {', '.join(known)}")
        counts = self.estimator in ("geometric", "auto")
        require(self, "max_accepts", self.max_accepts >= 2, ">= 2")
        require(self, "max_accepts", self.max_accepts == 2 or counts, f"2 with the estimator {self.estimator!r}")
        require(self, "max_rejects", self.max_rejects is None or self.max_rejects >= 1, ">= 1 or None")
        require(self, "max_rejects", self.max_rejects is None or self.estimator != "paper", "None with 'paper'")

    def draw(self, logp: LogProbs, accept: Accept, rng: Generator) -> Draw:
        """One properly weighted token; `logp` need not be normalised, and its sum is a part of the weight."""
        log_mass = log_sum(logp)
        if log_mass == -math.inf:
            return Draw(None, -math.inf, 0)
        logp, chance = logp - log_mass, Chance(rng)
        if not self.weights:
            return unweighted(logp, accept, chance)
        kind = self.estimator
        if kind == "auto":
            kind = "geometric" if self.max_accepts > 2 or logp.max() >= math.log(2 / 3) else "recursive"
        if kind == "paper":
            found = paper(logp, accept, chance)
        elif kind == "recursive":
            found = recursive(logp, accept, chance, self.max_rejects)
        else:
            found = geometric(logp, accept, chance, self.max_accepts, self.max_rejects)
        return found._replace(log_weight=found.log_weight + log_mass)

    def generate(
        self,
        model: LM,
        prompt: str | Sequence[int],
        constraint: Constraint,
        *,
        max_new_tokens: int = 100,
        sampling: Sampling = FREE,
        seed: int = 0,
    ) -> Samples:
        """Weighted completions of a prompt.

        Args:
            model: with a tokenizer.
            prompt: text, or token ids as `model.chat` makes them.
            constraint: what the completion must be as a whole, from its first byte to its last.
            max_new_tokens: longest completion; the law is that of texts no longer than this.
            sampling: the law before the constraint: temperature > 0, and filters.
            seed: equal seeds give equal results.

        Raises: UserError for an empty prompt, a limit below 1, temperature 0, or a constraint without valid text.
        """
        return self.generate_all(
            model, [prompt], constraint, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed
        )[0]

    def generate_all(
        self,
        model: LM,
        prompts: Sequence[str | Sequence[int]],
        constraint: Constraint,
        *,
        max_new_tokens: int = 100,
        sampling: Sampling = FREE,
        seed: int = 0,
    ) -> list[Samples]:
        """As `generate` for several prompts, one after the other; what is checked for one is remembered."""
        if not max_new_tokens >= 1:
            raise UserError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
        if sampling.greedy:
            raise UserError("AWRS draws from the model's law, so Sampling.temperature must be > 0, got 0")
        texts = [model.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        if not all(texts):
            raise UserError("the prompt is empty: a completion needs at least one token to go on from")
        gate = Gate(constraint, Vocabulary.of(model.tokenizer, model.vocab_size), model.eos_ids)
        return [
            smc(
                SessionBranches(model.session(len(ids) + self.n_particles * 32), ids, sampling),
                gate,
                self.draw,
                particles=self.n_particles,
                tau=self.tau,
                weighted=self.weights,
                lookahead=self.lookahead,
                max_new_tokens=max_new_tokens,
                rng=rng,
            )
            for ids, rng in zip(texts, np.random.default_rng(seed).spawn(len(texts)), strict=True)
        ]
