"""Sums of reasoning-gym, and a small language model that writes out how it gets to them, often wrongly: text to reinforce.

A problem is one of reasoning-gym's `chain_sum`, without its words and spaces. A solution adds term by term and repeats what
is left to add; the answer stands behind the last "=", and an end-of-sequence token of its own behind that:

    prompt 8-1+7-5=      completion 7+7-5=14-5=9<end>
                                    7+7-5=4-5=-1<end>      the carry of 7 + 7 was forgotten

The model (a Llama of 0.1 million parameters over characters) is trained from scratch on solutions of a `Teacher`, whose
errors come at known rates: every step of a solution has something to gain. It is made once, in about a minute on one core,
and kept in the cache directory. Sampled at temperature 1 it is right on 0.48 of the held-out problems, greedily on 0.83
(seeds 0 and 1); 100 steps of group-relative policy gradients (16 problems x 8, AdamW at 5e-4) bring that to 0.79 and 0.91.

    lm, train, held_out = world(seed=0)
    reward([row["prompt"] for row in train], completions, entry=[row["entry"] for row in train])

A prompt whose checksum is a multiple of ten is held out, always: no model of this module was taught on one.
"""

import functools
import importlib.metadata
import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from locum.errors import MissingExtra, UserError
from locum.method import require
from locum.models import LM
from locum.tasks.made import Batch, Progress, fit, kept, llama, require_sizes

__all__ = ["NEW_TOKENS", "Teacher", "reward", "tokenizer", "world"]

NEW_TOKENS = 30  # no solution of the teacher's is longer
CHARACTERS = "0123456789+-="
END, PAD, UNKNOWN = "<end>", "<pad>", "<unk>"
HEAD = 16  # width of an attention head
HELD_OUT = 10  # one prompt of so many is held out
CONFIG = {"min_terms": 4, "max_terms": 5, "min_digits": 1, "max_digits": 1}  # of chain_sum
MOST = 10_000  # rows; one in 170 of all problems

Row = dict[str, str]


@dataclass(frozen=True)
class Teacher:
    """Writes solutions with errors. What comes after a wrong sum goes on from it.

    Args:
        carry: probability that all carries and borrows of an addition that needs one are forgotten (7 + 8 = 5, 12 - 5 = 17).
        stray: probability that a sum is off by one, where no carry was forgotten.
    """

    carry: float = 0.4
    stray: float = 0.1

    def __post_init__(self) -> None:
        require(self, "carry", 0 <= self.carry <= 1, "in [0, 1]")
        require(self, "stray", 0 <= self.stray <= 1, "in [0, 1]")

    def write(self, prompt: str, rng: random.Random) -> str:
        """A solution of "8-1+7-5=", such as "7+7-5=14-5=9"."""
        first, *terms = _terms(prompt)
        total, said = int(first), []
        for i, term in enumerate(terms, 1):
            right, careless = total + int(term), _without_carry(total, int(term))
            if careless != right and rng.random() < self.carry:
                total = careless
            else:
                total = right + (rng.choice((-1, 1)) if rng.random() < self.stray else 0)
            said.append(str(total) + "".join(terms[i:]))
        return "=".join(said)

    def flawless(self, prompt: str) -> float:
        """The probability of a solution without an error. The answer is right a little more often: errors can cancel."""
        total, *terms = map(int, _terms(prompt))
        p = 1.0
        for term in terms:
            p *= (1 - self.stray) * (1 - self.carry if _without_carry(total, term) != total + term else 1)
            total += term
        return p


def world(
    seed: int = 0,
    *,
    train: int = 1024,
    held_out: int = 256,
    teacher: Teacher = Teacher(),
    layers: int = 2,
    width: int = 64,
    steps: int = 2000,
    batch: int = 32,
    learning_rate: float = 4e-3,
    progress: Progress | None = None,
) -> tuple[LM, list[Row], list[Row]]:
    """A model that has read `steps * batch` solutions of the teacher, problems to reinforce it on, and held-out ones.

    A row has "prompt", "answer" and "entry", the problem as reasoning-gym made it, as JSON. All prompts differ.

    Args:
        seed: of weights, solutions and problems.
        train, held_out: how many problems.
        layers, width: the model's size; width is a multiple of 16 (heads of 16).
        steps, batch, learning_rate: of AdamW, with a cosine.
        progress: called as progress("training the sums", done, total) at every step, if there is no such model yet.

    Raises: MissingExtra without reasoning-gym; UserError for sizes that are not positive, or more than 10 000 problems.
    """
    sizes = {"layers": layers, "width": width, "steps": steps, "batch": batch}
    require_sizes("gym_sums.world", HEAD, train=train, held_out=held_out, **sizes)
    if max(train, held_out) > MOST or seed < 0:
        raise UserError(
            f"gym_sums.world: train and held_out must be at most {MOST} and seed >= 0, got {train}, {held_out} and {seed}"
        )
    _gym()
    characters = tokenizer()
    settings = {
        **sizes,
        "seed": seed,
        "learning_rate": learning_rate,
        "teacher": asdict(teacher),
        "problems": CONFIG,
        "reasoning_gym": importlib.metadata.version("reasoning-gym"),
        "torch": torch.__version__,
        "recipe": 1,  # raised when the training below, the teacher or the characters change
    }

    def make() -> Any:
        ends = {"eos_token_id": characters.eos_token_id, "pad_token_id": characters.pad_token_id}
        # Texts are short: with the usual base of 10 000 most rotations would hardly tell their positions apart.
        rope = {"rope_type": "default", "rope_theta": 30.0}
        model = llama(len(characters), layers, width, HEAD, seed, rope_parameters=rope, **ends)
        batches = _lessons(teacher, seed, steps, batch)
        return fit(model, batches, steps, learning_rate, "training the sums", progress)

    model = kept("gym-sums", f"{layers}x{width}", settings, make, characters)
    rows = _rows(seed, 1, train, kept_apart=False), _rows(seed, 2, held_out, kept_apart=True)
    return LM(model, characters, f"gym-sums-{seed}"), *rows


def reward(prompts: Sequence[str], completions: Sequence[str], *, entry: Sequence[str], **columns: Any) -> list[float]:
    """1.0 where reasoning-gym gives full marks to what stands behind the last "=" of a completion, else 0.0.

    It gives part of them to an answer that merely holds the right digits, such as 14 for 4. A policy would learn to write
    such answers, so they count for nothing here.

    Raises: MissingExtra without reasoning-gym.
    """
    score = _gym().get_score_answer_fn("chain_sum")
    answers = (text.rpartition("=")[2] for text in completions)
    return [float(score(a, json.loads(e)) == 1.0) for a, e in zip(answers, entry, strict=True)]


def tokenizer() -> Any:
    """One token per character of a sum, "<end>" that ends a text, "<pad>", and "<unk>" for any other character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*CHARACTERS, END, PAD, UNKNOWN])}
    made = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=END, pad_token=PAD, unk_token=UNKNOWN, padding_side="left"
    )


@functools.cache
def _gym() -> Any:
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ModuleNotFoundError:
        raise MissingExtra("the sums of reasoning-gym", "reinforce") from None
    return reasoning_gym


def _terms(prompt: str) -> list[str]:
    """The terms of "8-1+7-5=": "8", "-1", "+7", "-5"."""
    return re.findall(r"[+-]?\d+", prompt)


def _without_carry(a: int, b: int) -> int:
    """a + b column by column, nothing carried into the next column or borrowed from it."""
    if abs(a) < abs(b):
        a, b = b, a
    sign, way = (-1 if a < 0 else 1), (1 if a * b >= 0 else -1)
    return sign * sum((abs(a) // p + way * (abs(b) // p)) % 10 * p for p in (1, 10, 100))


def _problems(seed: int, part: int, kept_apart: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prompts and entries without end; `part` numbers what a seed makes them for."""
    size = 1 << 32  # problem i of a data set depends on its seed + i alone, so seeds lie that far apart
    found = _gym().create_dataset("chain_sum", seed=(3 * seed + part) * size, size=size, **CONFIG)
    for i in range(size):
        entry = found[i]
        prompt = entry["metadata"]["expression"].replace(" ", "") + "="
        if (zlib.crc32(prompt.encode()) % HELD_OUT == 0) is kept_apart:
            yield prompt, entry


def _rows(seed: int, part: int, n: int, kept_apart: bool) -> list[Row]:
    rows: dict[str, Row] = {}
    for prompt, entry in _problems(seed, part, kept_apart):
        rows.setdefault(prompt, {"prompt": prompt, "answer": entry["answer"], "entry": json.dumps(entry)})
        if len(rows) == n:
            break
    return list(rows.values())


def _lessons(teacher: Teacher, seed: int, steps: int, batch: int) -> Iterator[Batch]:
    """Batches of problems with the teacher's solutions. Only the solutions are to be predicted."""
    characters, rng, problems = tokenizer(), random.Random(f"{seed}/teacher"), _problems(seed, 0, kept_apart=False)
    for _ in range(steps):
        prompts = [next(problems)[0] for _ in range(batch)]
        texts = [p + teacher.write(p, rng) + END for p in prompts]
        made = characters(texts, padding=True, padding_side="right", return_tensors="pt")
        ids, mask = made["input_ids"], made["attention_mask"].bool()
        begins = torch.tensor([len(p) for p in prompts])[:, None]  # a character is a token
        told = mask & (torch.arange(ids.shape[1]) >= begins)
        yield ids[:, :-1], torch.where(told, ids, -100)[:, 1:]
