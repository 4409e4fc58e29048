"""Distil the tiny draft model from the embedded default model: sample, train, write the card.

    python scripts/distill_draft.py sample      # text written by the teacher, with the teacher's law at every position
    python scripts/distill_draft.py train       # fit the draft to those laws
    python scripts/distill_draft.py export      # the draft and its card into src/locum/models/draft
    python scripts/distill_draft.py all         # one after the other

Sampling and training can be killed at any time and go on where they were when started again: samples are written shard by
shard and training keeps a checkpoint, each by an atomic rename. SIGTERM and Ctrl-C write the shard in progress as far as it
is. The same seeds, threads and versions give the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from locum.tasks import prompts

DRAFT = Path(__file__).resolve().parents[1] / "src" / "locum" / "models" / "draft"
TEACHER = "smollm2-135m-instruct"
TOP = 16  # entries of the teacher's law that are kept per position
HEAT = (0.7, 0.8, 0.9, 1.0), (0.2, 0.5, 0.7, 0.9)  # temperatures of the first two shards, and of the others
POOL = 64  # the text is sampled from the POOL most likely tokens

# ---------------------------------------------------------------------------------------------------------------- prompts


def items(table: str) -> list[str]:
    """The entries of a table, set apart by bars and line ends; a line break inside an entry is written \\n."""
    return table.strip("\n").replace("\n", "|").replace("\\n", "\n").split("|")


TOPICS = items("""
photosynthesis|black holes|the water cycle|volcanoes|vaccines|the immune system|DNA|gravity|electric cars
solar panels|climate change|recycling|the Roman Empire|the French Revolution|ancient Egypt|the Silk Road
the Industrial Revolution|the moon landing|the printing press|chess|football|running a marathon|yoga|meditation
sleep|a healthy breakfast|baking bread|making pizza|growing tomatoes|coffee|tea|chocolate|dogs|cats|elephants
honey bees|penguins|whales|rain forests|coral reefs|deserts|rivers|mountains|the ocean|the weather|earthquakes|Paris
Tokyo|New York|India|Brazil|Kenya|a small village|public libraries|museums|jazz|classical music|painting|photography
poetry|theatre|saving money|inflation|starting a business|job interviews|teamwork|public speaking|time management
learning a language|online courses|artificial intelligence|machine learning|neural networks|the internet|databases
computer security|operating systems|open source software|smartphones|robots|space travel|the solar system|telescopes
atoms|chemical reactions|magnets|sound waves|light|probability|prime numbers|fractions|geometry|statistics|logic
ethics|democracy|human rights|friendship|family|kindness|fear|happiness|dreams|memory|language|writing|bicycles
trains|airplanes|bridges|houses|cities|farming|fishing|forests|winter|summer|birthdays|travel|camping|gardening
cooking|history
""")

FREE = items("""
Explain {t} to a ten-year-old child.|What is {t}?|Why is {t} important?|Write a short story about {t}.
Write a poem about {t}.|Tell me three facts about {t}.|Give me five tips about {t}.
What are the advantages and disadvantages of {t}?|Compare {t} and {u}.|How does {t} relate to {u}?
Write an email to a friend about {t}.|Describe {t} in one paragraph.|List ten words related to {t}.
What is the history of {t}?|Write a blog post about {t}.|Write a dialogue between a teacher and a student about {t}.
Give a step-by-step guide to {t}.|What questions should I ask about {t}?
Write a product review about something to do with {t}.|What do people often get wrong about {t}?
Summarize what is known about {t} in three sentences.|Plan a weekend around {t}.
Write a letter to the mayor about {t}.|How can a beginner learn about {t}?
Write the introduction of an essay on {t}.|What would happen without {t}?
Make a quiz with four questions about {t} and give the answers.|Who is interested in {t} and why?
Imagine a world in which {t} matters more than {u}. Describe it.|Give me a definition of {t} and an example.
Can you recommend a book about {t}?|Write a news report about {t}.
""")

TASKS = items("""
reverses a string|checks whether a number is prime|computes the factorial of n|returns the n-th Fibonacci number
sorts a list of numbers|finds the largest element of a list|counts the words in a text
removes duplicates from a list|reads a CSV file and prints every row|merges two sorted lists
checks whether a string is a palindrome|computes the average of a list|converts Celsius to Fahrenheit
finds the greatest common divisor of two numbers|flattens a nested list|counts the vowels in a string
validates an email address|downloads a web page|groups a list of words by their first letter
implements binary search|implements a stack|implements a queue|implements a linked list|implements a bank account
implements bubble sort|parses a date|generates a random password|multiplies two matrices|transposes a matrix
computes the sum of the digits of a number|prints a multiplication table|inverts a dictionary
writes a dictionary to a JSON file|finds all files with a given extension|measures the time a function takes
rolls a dice|plays rock, paper, scissors|counts how often each letter occurs
""")

CODE = items("""
Write a Python function that {c}.|Write a function in Python that {c}, with a docstring and an example.
Write a Python class that {c}.|Write a JavaScript function that {c}.
Show me Python code that {c} and explain it line by line.|How do I write a program that {c}?
Write a Java method that {c}.|Write a C function that {c}.|Write unit tests for a Python function that {c}.
Write a short Python script that {c}. Only give the code.
What is the time complexity of a function that {c}? Give the code too.|Write a SQL query about {t}.
Write an HTML page about {t}.
""")

COPY = items(r"""
Repeat the following text exactly:\n\n{p}|Fix the spelling in the following text:\n\n{p}
Rewrite the following text in a formal tone:\n\n{p}|Summarize the following text:\n\n{p}
Translate the following text into simple English:\n\n{p}|Rewrite this text and replace "{t}" with "{u}":\n\n{p}
List the main points of this text:\n\n{p}|Continue the following text:\n\n{p}
Add a docstring to this function:\n\n{f}|Rename the variable {v} to {w} in this code:\n\n{f}
Copy this code and add a comment to every line:\n\n{f}|Explain what this code does:\n\n{f}
""")

SENTENCES = items("""
Many people like {t} because it brings them closer to {u}.
In the last ten years, {t} has changed the way we think about {u}.
The first thing to know about {t} is that it takes time.
My grandmother used to tell me stories about {t} every evening.
Scientists are still trying to understand how {t} works.|There are {n} good reasons to care about {t}.
It began on a Monday in {y}, when nobody expected it.
Some say that {u} is more useful, but they have never tried {t}.|At school we learned about {t} for {n} weeks.
The report, written in {y}, lists {n} examples.|However, not everyone agrees with this view.
A small group of students started a club for {t} and {u}.|Nothing is as simple as it looks.
The city opened a new center for {t} in {y}.|We hope that this will help others as well.
""")

FUNCTIONS = items(r"""
def add({v}, {w}):\n    total = {v} + {w}\n    return total
def count_{v}({v}):\n    n = 0\n    for x in {v}:\n        if x > {n}:\n            n += 1\n    return n
def read_{v}(path):\n    with open(path) as f:\n        {v} = f.read()\n    return {v}.split()
def is_valid({v}):\n    if len({v}) < {n}:\n        return False\n    return True
class {W}:\n    def __init__(self, {v}):\n        self.{v} = {v}\n\n    def get(self):\n        return self.{v}
{v} = [1, 2, 3]\nfor i in range(len({v})):\n    print({v}[i] * {n})
def average({v}):\n    total = 0\n    for value in {v}:\n        total = total + value\n    return total / len({v})
def find({v}, {w}):\n    for i, x in enumerate({v}):\n        if x == {w}:\n            return i\n    return -1
""")

NAMES = items("items|values|data|numbers|words|users|prices|result|name|text|key|score|rows|names|records|lines")

STARTS = items(r"""
The|In|A|It is|There are|When I was|Once upon a time|In {y},|According to|This article|{T} is|{T}|The history of {t}
How to|Introduction\n\n|Chapter 1\n\n|Abstract\n\n|Question:|Dear|def |import |# |class |for i in range(|```python\n
from typing import|if __name__|function |#include <|SELECT |<html>|{{"name":|- |1.|We |You |They |He |She |I |What is
Why do|{T} and {u}|def main():\n|import os\nimport sys\n|import numpy as np\n|class Node:\n|# {T}\n\n
## {T}\n\n|The best way to learn about {t}|Students will|In this lesson,|In conclusion,|For example,
""")


Tick = Callable[[int], None]
STOP: list[bool] = []  # set by SIGTERM: the shard in progress is written as far as it is


@dataclass(frozen=True)
class Seed:
    """Where one sampled sequence starts: `ids` are given, the teacher writes on from there."""

    ids: list[int]
    max_new: int
    temperature: float
    stops: int  # the sequence ends at this many end-of-turn tokens among the sampled ones


def fill(template: str, rng: random.Random) -> str:
    """A template with its {fields} drawn at random."""
    t, u = rng.sample(TOPICS, 2)
    v, w = rng.sample(NAMES, 2)
    words = {
        "t": t,
        "u": u,
        "T": t[0].upper() + t[1:],
        "c": rng.choice(TASKS),
        "v": v,
        "w": w,
        "W": w.capitalize(),
        "n": rng.randint(2, 30),
        "y": rng.randint(1850, 2024),
    }
    if "{f}" in template:
        words["f"] = fill(rng.choice(FUNCTIONS), rng)
    if "{p}" in template:
        words["p"] = " ".join(s.format(**words) for s in rng.sample(SENTENCES, rng.randint(2, 5)))
    return template.format(**words)


def opening_of(lm) -> str:
    """What every chat begins with, up to the user's words."""
    return lm.tokenizer.decode(lm.chat("\0")).split("\0")[0]


def seeds(lm, n: int, heat: Sequence[float], longest: int, rng: random.Random) -> list[Seed]:
    """n starting points: chat prompts from templates, prompts the teacher makes up itself, and plain text to go on with.

    Args: heat: temperatures to choose from; longest: new tokens at most.
    """
    opening = lm.encode(opening_of(lm))
    out = []
    for _ in range(n):
        kind = rng.choices(["free", "code", "copy", "asks", "text"], [26, 22, 14, 20, 18])[0]
        temperature = rng.choice(heat)
        if kind == "asks":
            out.append(Seed(opening, min(longest, rng.randint(160, 256)), temperature, 2))
        elif kind == "text":
            head = [0] if rng.random() < 0.5 else []
            out.append(
                Seed(
                    head + lm.encode(fill(rng.choice(STARTS), rng)), min(longest, rng.randint(96, 224)), temperature, 1
                )
            )
        else:
            text = fill(rng.choice({"free": FREE, "code": CODE, "copy": COPY}[kind]), rng)
            out.append(Seed(list(lm.chat(text)), min(longest, rng.randint(96, 256)), temperature, 1))
    return out


# ---------------------------------------------------------------------------------------------------------------- sampling


class Batched:
    """A Llama forward for many rows, one token each, at a position of its own per row: float32, on the CPU.

    Activations are kept as columns, [features, rows], because `W @ x` of a row-major W is the faster product here. A row that
    has ended is given a new sequence at once, so that every step has all its rows.
    """

    def __init__(self, model, rows: int, capacity: int) -> None:
        c = model.config
        self.heads, self.kv = c.num_attention_heads, c.num_key_value_heads
        self.dim = c.hidden_size // self.heads
        self.eps = c.rms_norm_eps
        self.embed, self.head = model.model.embed_tokens.weight, model.lm_head.weight
        self.norm = model.model.norm.weight[:, None]
        self.layers = []
        for layer in model.model.layers:
            a, m = layer.self_attn, layer.mlp
            qkv = torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]) * layer.input_layernorm.weight
            up = torch.cat([m.gate_proj.weight, m.up_proj.weight]) * layer.post_attention_layernorm.weight
            self.layers.append((qkv, a.o_proj.weight.contiguous(), up, m.down_proj.weight.contiguous()))
        position = torch.arange(capacity)
        cos, sin = model.model.rotary_emb(torch.zeros(1, 1), position[None])
        self.cos, self.sin = cos[0, :, None], sin[0, :, None]
        self.k = torch.zeros(len(self.layers), rows, self.kv, capacity, self.dim)
        self.v = torch.zeros_like(self.k)
        self.column = position

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def rms(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(0, keepdim=True) + self.eps)

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions [rows] -> logits [rows, V] after each row's token."""
        n, width = len(tokens), int(positions.max()) + 1
        row = torch.arange(n)
        cos, sin = self.cos[positions], self.sin[positions]
        bias = torch.zeros(n, 1, 1, width).masked_fill_(self.column[:width] > positions[:, None, None, None], -math.inf)
        x = self.embed[tokens].t().contiguous()
        for i, (w_qkv, w_o, w_up, w_down) in enumerate(self.layers):
            q, k, v = (w_qkv @ self.rms(x)).t().reshape(n, -1, self.dim).split([self.heads, self.kv, self.kv], 1)
            self.k[i, row, :, positions] = self.rope(k, cos, sin)
            self.v[i, row, :, positions] = v
            q = self.rope(q, cos, sin).view(n, self.kv, -1, self.dim)
            scores = (q * self.dim**-0.5) @ self.k[i, :, :, :width].transpose(-1, -2)
            y = torch.softmax(scores.add_(bias), -1) @ self.v[i, :, :, :width]
            x = x + w_o @ y.reshape(n, -1).t().contiguous()
            gate, up = (w_up @ self.rms(x)).chunk(2)
            x = x + w_down @ (F.silu(gate) * up)
        return (self.head @ (self.rms(x) * self.norm)).t()


def law(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The POOL largest log-probs and their tokens, [rows, POOL] each, largest first."""
    logits = logits.contiguous()
    values, tokens = logits.topk(POOL, -1)
    return values - logits.logsumexp(-1, keepdim=True), tokens


def kept(logp: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What is stored of a law: (tokens, log-probs) of the TOP most likely ones."""
    return ids[:, :TOP].to(torch.uint16), logp[:, :TOP].to(torch.float16)


@torch.inference_mode()
def sample_shard(lm, starts: Sequence[Seed], generator: torch.Generator, rows: int, tick: Tick) -> dict[str, Tensor]:
    """Write every sequence of `starts` to its end, `rows` at a time.

    Returns flat arrays over all positions of all sequences: `ids`, the law of the NEXT token (`law_ids`, `law_logp`, [*, TOP]),
    and per sequence its `length` and `prompt` (how many ids were given).
    """
    rows = min(rows, len(starts))
    engine = Batched(lm.model, rows, max(len(s.ids) + s.max_new for s in starts))
    written: list[list[int]] = [list(s.ids) for s in starts]
    opening = lm.encode(opening_of(lm))
    single = Batched(lm.model, 1, len(opening))
    known = [kept(*law(single.step(torch.tensor([t]), torch.tensor([p])))) for p, t in enumerate(opening)]
    laws: list[list[tuple[Tensor, Tensor]]] = [[] for _ in starts]
    ended = [0] * len(starts)
    queue = sorted(
        range(len(starts)), key=lambda s: len(starts[s].ids) + starts[s].max_new
    )  # long ones first: a short tail
    live = [-1] * rows

    def begin(r: int) -> None:
        """Give row r the next sequence; what all chats open with is computed once."""
        s = live[r] = queue.pop()
        if starts[s].ids[: len(opening)] == opening:
            engine.k[:, r, :, : len(opening) - 1] = single.k[:, 0, :, :-1]
            engine.v[:, r, :, : len(opening) - 1] = single.v[:, 0, :, :-1]
            laws[s] = [(i[0], p[0]) for i, p in known[:-1]]

    for r in range(rows):
        begin(r)
    while live and not STOP:
        fed = torch.tensor([len(laws[s]) for s in live])
        tokens = torch.tensor([written[s][p] for s, p in zip(live, fed.tolist(), strict=True)])
        logp, ids = law(engine.step(tokens, fed))
        heat = torch.tensor([[starts[s].temperature] for s in live])
        drawn = (
            ids.gather(1, torch.multinomial(torch.softmax(logp / heat, -1), 1, generator=generator)).flatten().tolist()
        )
        keep_ids, keep_logp = kept(logp, ids)
        gone = []
        for r, s in enumerate(live):
            laws[s].append((keep_ids[r], keep_logp[r]))
            start = starts[s]
            if len(laws[s]) < len(written[s]):
                continue  # still inside the given ids
            ended[s] += drawn[r] in lm.eos_ids
            if ended[s] >= start.stops or drawn[r] == 0 or len(written[s]) >= len(start.ids) + start.max_new:
                gone.append(r)
            else:
                written[s].append(drawn[r])
        tick(len(live))
        for r in gone:
            live[r] = -1
            if queue:
                begin(r)
        alive = [r for r, s in enumerate(live) if s >= 0]
        if len(alive) < len(live):
            engine.keep(torch.tensor(alive, dtype=torch.long))
            live = [live[r] for r in alive]
    seen = [s for s in range(len(starts)) if len(laws[s]) > len(starts[s].ids)]  # all, unless it was stopped
    written = [written[s][: len(laws[s])] for s in seen]
    flat = [law for s in seen for law in laws[s]]
    return {
        "ids": torch.tensor([t for w in written for t in w]).to(torch.uint16),
        "law_ids": torch.stack([i for i, _ in flat]),
        "law_logp": torch.stack([p for _, p in flat]),
        "length": torch.tensor([len(w) for w in written], dtype=torch.int32),
        "prompt": torch.tensor([len(starts[s].ids) for s in seen], dtype=torch.int32),
    }


@torch.inference_mode()
def sample_bigrams(lm, last: int, rows: int, tick: Tick) -> dict[str, Tensor]:
    """The law after every single token below `last` at the start of a document: a cheap prior for rare tokens."""
    before = Batched(lm.model, 1, 1)
    before.step(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    ids, logp = [], []
    for at in range(0, last, rows):
        tokens = torch.arange(at, min(at + rows, last))
        engine = Batched(lm.model, len(tokens), 2)
        engine.k[:, :, :, :1], engine.v[:, :, :, :1] = before.k, before.v
        i, p = kept(*law(engine.step(tokens, torch.ones_like(tokens))))
        ids.append(i)
        logp.append(p)
        tick(len(tokens))
    return {"law_ids": torch.cat(ids), "law_logp": torch.cat(logp)}


def save_atomic(tensors: dict[str, Tensor], path: Path) -> None:
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part)
    part.replace(path)


def bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )


def sample(args: argparse.Namespace) -> None:
    """Make every shard that is missing, with `--processes` processes of `--threads` threads each."""
    Path(args.work).mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    others = [spawn.Process(target=sample_shards, args=(args, w)) for w in range(1, args.processes)]
    for process in others:
        process.start()
    sample_shards(args, 0)
    for process in others:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a sampling process ended with exit code {process.exitcode}; start again to go on")


def sample_shards(args: argparse.Namespace, worker: int) -> None:
    """One process's share: every `--processes`-th shard. The first process shows the bar, and makes the bigrams last."""
    from locum.models import load

    torch.set_num_threads(args.threads)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: STOP.append(True))
    work = Path(args.work)
    lm = load(TEACHER, dtype=torch.float32, device="cpu")
    with bar() as progress:
        progress.disable = worker > 0
        task = progress.add_task("sampling", total=args.shards, note="")
        for shard in range(worker, args.shards, args.processes):
            path = work / f"sample-{shard:03d}.safetensors"
            if not path.exists() and not STOP:
                positions = 0

                def tick(n: int) -> None:
                    nonlocal positions
                    positions += n
                    done = sum(1 for _ in work.glob("sample-*.safetensors"))
                    progress.update(task, completed=done, note=f"{positions} positions of shard {shard}")  # noqa: B023

                starts = seeds(lm, args.sequences, HEAT[shard > 1], args.longest, random.Random(f"{args.seed}/{shard}"))
                generator = torch.Generator().manual_seed(args.seed * 100_003 + shard)
                save_atomic(sample_shard(lm, starts, generator, args.rows, tick), path)
        progress.update(task, completed=args.shards)
        path = work / "bigrams.safetensors"
        if worker == 0 and args.bigrams and not path.exists() and not STOP:
            task = progress.add_task("single tokens", total=args.bigrams, note="")
            save_atomic(sample_bigrams(lm, args.bigrams, 256, lambda n: progress.advance(task, n)), path)
    if STOP:
        raise SystemExit("stopped; start again to go on")


# ------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Text:
    """A sampled sequence: ids [n], the law after each ([n, TOP] tokens and log-probs), and what each position counts."""

    ids: Tensor
    law_ids: Tensor
    law_logp: Tensor
    weight: Tensor

    @property
    def label(self) -> Tensor:
        """The token that came after each position, -1 at the end."""
        return torch.cat([self.ids[1:], torch.tensor([-1])])


def read_shards(work: Path) -> tuple[list[Text], list[Text]]:
    """(to train on, held out: every twentieth). Positions inside a chat's template count a tenth: nobody drafts those."""
    texts = []
    for path in sorted(work.glob("sample-*.safetensors")):
        shard = load_file(path)
        parts = [shard[k].split(shard["length"].tolist()) for k in ("ids", "law_ids", "law_logp")]
        for ids, law_ids, law_logp, prompt in zip(*parts, shard["prompt"].tolist(), strict=True):
            weight = torch.ones(len(ids))
            weight[: prompt - 1] = 0.1
            texts.append(Text(ids.long(), law_ids, law_logp, weight))
    if len(texts) < 20:
        raise SystemExit(f"{work} holds {len(texts)} sequences and training needs 20: run the stage 'sample' first")
    return [t for i, t in enumerate(texts) if i % 20], texts[::20]


def initial_draft(lm, texts: Sequence[Text], width: int, layers: int, seed: int):
    """A small Llama whose tied embedding is the teacher's, projected on its `width` main directions.

    The directions are those of the tokens that occur: each token counts with the root of its frequency. The mean is taken
    off first, as it moves all logits alike. The blocks start large against the embedding, or the residual path would make
    every token predict itself, input and output being tied.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    teacher = lm.model.config
    config = LlamaConfig(
        vocab_size=teacher.vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=teacher.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=teacher.bos_token_id,
        eos_token_id=teacher.eos_token_id,
        pad_token_id=teacher.pad_token_id,
    )
    draft = LlamaForCausalLM(config)
    embed = lm.model.get_input_embeddings().weight.detach().float()
    count = torch.bincount(torch.cat([t.ids for t in texts]), minlength=len(embed)) + 0.1
    share = (count.sqrt() / count.sqrt().sum())[:, None]
    embed = embed - (share * embed).sum(0)
    _, directions = torch.linalg.eigh(embed.t() @ (share * embed))
    small = embed @ directions[:, -width:]
    with torch.no_grad():
        draft.get_input_embeddings().weight.copy_(small * (0.1 / small.std()))
        draft.model.norm.weight.fill_(3.0)
    return draft


def candidates(vocabulary: int, law_ids: Tensor, label: Tensor, extra: int, seed: int) -> tuple[Tensor, Tensor]:
    """The tokens a batch speaks of, and `extra` of the others that stand for all others.

    Returns: tokens [C] in rising order and a log-weight each: 0, or log(others / extra), so that the sum of exp(logit +
    log-weight) has the whole vocabulary's sum as its mean.
    """
    named = torch.zeros(vocabulary, dtype=torch.bool)
    named[law_ids.long().flatten()] = True
    named[label[label >= 0]] = True
    others = (~named).nonzero().flatten()
    drawn = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:extra]]
    tokens = torch.cat([named.nonzero().flatten(), drawn]).sort().values
    weight = torch.full((len(tokens),), math.log(max(len(others), 1) / max(len(drawn), 1)))
    return tokens, weight.masked_fill(named[tokens], 0.0)


@dataclass(frozen=True)
class Batch:
    """What a loss needs, N positions flat: hidden [N, d], law_ids and law_logp [N, TOP], label [N] (-1: none), weight [N]."""

    hidden: Tensor
    law_ids: Tensor
    law_logp: Tensor
    label: Tensor
    weight: Tensor

    @classmethod
    def of(cls, draft, packs: Sequence[Sequence[Text]]) -> Batch:
        """Run the draft over packed rows; padding is removed."""
        rows = [torch.cat([t.ids for t in pack]) for pack in packs]
        hidden = draft.model(input_ids=pad_sequence(rows, batch_first=True)).last_hidden_state
        flat = torch.cat([h[: len(row)] for h, row in zip(hidden, rows, strict=True)])
        texts = [t for pack in packs for t in pack]
        fields = ("law_ids", "law_logp", "label", "weight")
        return cls(flat, *(torch.cat([getattr(t, f) for t in texts]) for f in fields))

    @classmethod
    def of_singles(cls, draft, single: dict[str, Tensor], tokens: Tensor) -> Batch:
        """Single tokens at the start of a document; each counts a tenth."""
        past = draft.model(input_ids=torch.stack([torch.zeros_like(tokens), tokens], 1)).last_hidden_state[:, 1]
        label, weight = torch.full_like(tokens, -1), torch.full((len(tokens),), 0.1)
        return cls(past, single["law_ids"][tokens], single["law_logp"][tokens], label, weight)

    def and_(self, other: Batch) -> Batch:
        return Batch(*(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))


@dataclass(frozen=True)
class Mix:
    """Weights of the three parts of the loss."""

    kl: float
    tv: float
    hard: float


def head_loss(batch: Batch, embed: Tensor, bias: Tensor, mix: Mix, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients, chunk by chunk: N x vocabulary logits are never held.

    The teacher's law is known on TOP tokens; all others are one more outcome, whose probability is what is left:

        KL part  = - sum_top p log q - p_rest log q_rest        (cross-entropy of that coarser law)
        TV part  = 1/2 sum_top |p - q| + 1/2 |p_rest - q_rest|  (1 - TV is what speculative sampling accepts)
        hard     = - log q(token that came)

    Args: embed [V, d] and bias [V] give the logits; `batch.law_ids` and `batch.label` count rows of embed.
    Returns: the weighted sums (loss, cross-entropy, mass accepted within TOP, same first token; the last only without
        gradients), and the gradients of the loss by hidden and embed (zeros without).
    """
    sums = torch.zeros(4, dtype=torch.float64)
    grad_hidden, grad_embed = torch.zeros_like(batch.hidden), torch.zeros_like(embed)
    for part in torch.arange(len(batch.hidden)).split(128):
        h, w, label = batch.hidden[part], batch.weight[part], batch.label[part]
        z = torch.addmm(bias, h, embed.t())
        tokens = torch.cat([batch.law_ids[part].long(), label[:, None].clamp(min=0)], 1)
        same = torch.zeros_like(w) if grad else (z.argmax(-1) == tokens[:, 0]).float()
        total = z.logsumexp(-1, keepdim=True).requires_grad_(grad)
        picked = z.gather(1, tokens).requires_grad_(grad)
        p = batch.law_logp[part].float().exp()
        p_rest = (1 - p.sum(-1)).clamp(min=0)
        logq = picked[:, :-1] - total
        q = logq.exp()
        q_rest = (1 - q.sum(-1)).clamp(min=1e-6)
        cross = -(p * logq).sum(-1) - p_rest * q_rest.log()
        distance = 0.5 * ((p - q).abs().sum(-1) + (p_rest - q_rest).abs())
        hard = (total[:, 0] - picked[:, -1]) * (label >= 0)
        loss = mix.kl * cross + mix.tv * distance + mix.hard * hard
        figures = (loss, cross, torch.minimum(p, q).sum(-1), same)
        sums += torch.stack([(w * x.detach()).sum() for x in figures]).double()
        if grad:
            by_total, by_picked = torch.autograd.grad((w * loss).sum(), (total, picked))
            z.sub_(total.detach()).exp_().mul_(by_total).scatter_add_(1, tokens, by_picked)
            grad_hidden[part] = z @ embed
            grad_embed.addmm_(z.t(), h)
    return sums, grad_hidden, grad_embed


@torch.no_grad()
def evaluate(draft, texts: Sequence[Text]) -> dict[str, float]:
    """Means over the positions that count in full; acceptance is counted within the TOP tokens only, so it is a lower bound."""
    embed, sums, n = draft.lm_head.weight, torch.zeros(4, dtype=torch.float64), 0.0
    for at in range(0, len(texts), 8):
        batch = Batch.of(draft, [[t] for t in texts[at : at + 8]])
        batch = replace(batch, weight=(batch.weight == 1).float())
        sums += head_loss(batch, embed, torch.zeros(1), Mix(1.0, 0.0, 0.0), grad=False)[0]
        n += batch.weight.sum().item()
    _, cross, accepted, same = (sums / n).tolist()
    return {"cross_entropy": cross, "acceptance": accepted, "top1": same, "positions": n}


def batch_of(texts: Sequence[Text], step: int, size: int, seed: int) -> list[list[Text]]:
    """The step's texts, epoch by epoch, in rows of one or two: behind another text a position has a long past, as in use."""
    rng = random.Random(f"{seed}/{step}")
    chosen = []
    for i in range(size * step, size * (step + 1)):
        epoch, at = divmod(i, len(texts))
        order = random.Random(f"{seed}/epoch/{epoch}").sample(range(len(texts)), len(texts))
        chosen.append(texts[order[at]])
    packs: list[list[Text]] = []
    while chosen:
        n = rng.choice([1, 2])
        packs.append(chosen[:n])
        chosen = chosen[n:]
    return packs


class Run:
    """Draft, optimiser and history, kept in a folder: `train.json` names the step, `train-STEP.safetensors` holds the rest."""

    def __init__(self, draft, args: argparse.Namespace) -> None:
        self.work = Path(args.work)
        self.draft = draft
        self.optimizer = torch.optim.AdamW(draft.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=args.decay)
        self.step, self.history = 0, []
        if (self.work / "train.json").exists():
            saved = json.loads((self.work / "train.json").read_text("utf-8"))
            self.step, self.history = saved["step"], saved["history"]
            tensors = load_file(self.work / f"train-{self.step}.safetensors")
            for name, p in draft.named_parameters():
                p.data.copy_(tensors[name])
                first, second = tensors[f"{name}.first"], tensors[f"{name}.second"]
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": first,
                    "exp_avg_sq": second,
                }

    def save(self) -> None:
        tensors = {}
        for name, p in self.draft.named_parameters():
            state = self.optimizer.state[p]
            tensors |= {name: p.detach(), f"{name}.first": state["exp_avg"], f"{name}.second": state["exp_avg_sq"]}
        path = self.work / f"train-{self.step}.safetensors"
        save_atomic(tensors, path)
        part = self.work / "train.part"
        part.write_text(json.dumps({"step": self.step, "history": self.history}), "utf-8")
        part.replace(self.work / "train.json")
        for old in self.work.glob("train-*.safetensors"):
            if old != path:
                old.unlink()


def train(args: argparse.Namespace) -> None:
    """Fit the draft; every `--every` steps measure it on what is held out and keep a checkpoint."""
    from locum.models import load

    torch.set_num_threads(args.threads)
    work = Path(args.work)
    texts, held = read_shards(work)
    single = load_file(work / "bigrams.safetensors") if (work / "bigrams.safetensors").exists() else None
    draft = initial_draft(load(TEACHER, dtype=torch.float32, device="cpu"), texts, args.width, args.layers, args.seed)
    run = Run(draft, args)
    embed = draft.get_input_embeddings().weight
    with bar() as progress:
        task = progress.add_task("training", total=args.steps, completed=run.step, note="")
        while run.step < args.steps:
            share = run.step / args.steps
            for group in run.optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (run.step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * share))
            batch = Batch.of(draft, batch_of(texts, run.step, args.batch, args.seed))
            if single is not None:
                known = len(single["law_ids"])
                tokens = random.Random(f"{args.seed}/{run.step}/singles").sample(range(known), min(128, known))
                batch = batch.and_(Batch.of_singles(draft, single, torch.tensor(tokens)))
            rows, bias = candidates(len(embed), batch.law_ids, batch.label, 4096, args.seed * 1_000_003 + run.step)
            place = torch.zeros(len(embed), dtype=torch.long)
            place[rows] = torch.arange(len(rows))
            local = Batch(
                batch.hidden.detach(),
                place[batch.law_ids.long()],
                batch.law_logp,
                torch.where(batch.label >= 0, place[batch.label], -1),
                batch.weight / batch.weight.sum(),
            )
            mix = Mix(1 - args.tv * share, args.tv * share, 0.1)
            sums, by_hidden, by_embed = head_loss(local, embed.detach()[rows], bias, mix, grad=True)
            run.optimizer.zero_grad()
            batch.hidden.backward(by_hidden)
            embed.grad.index_add_(0, rows, by_embed)
            torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
            run.optimizer.step()
            run.step += 1
            progress.update(task, completed=run.step, note=f"cross-entropy {sums[1]:.3f}, accepted {sums[2]:.3f}")
            if run.step % args.every == 0 or run.step == args.steps:
                run.history.append({"step": run.step, **evaluate(draft, held)})
                run.save()
                h = run.history[-1]
                progress.console.print(
                    f"step {run.step}: held out: cross-entropy {h['cross_entropy']:.3f}, "
                    f"acceptance {h['acceptance']:.3f}, top-1 {h['top1']:.3f}"
                )


# -------------------------------------------------------------------------------------------------------------- export


@torch.no_grad()
def exact(lm, draft, texts: Sequence[Text]) -> dict[str, float]:
    """Acceptance (1 - total variation, whole vocabulary, temperature 1) and top-1 agreement against the teacher itself."""
    accepted = same = n = 0.0
    for text in texts:
        keep = text.weight == 1
        p = lm.model(input_ids=text.ids[None]).logits[0, keep].softmax(-1)
        q = draft(input_ids=text.ids[None]).logits[0, keep].float().softmax(-1)
        accepted += torch.minimum(p, q).sum().item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        n += len(p)
    return {"acceptance": accepted / n, "top1": same / n, "positions": n}


def answers(lm, new_tokens: int, store: Path) -> dict[str, list[Text]]:
    """The teacher's own greedy answers to the shipped prompts, per group: what a decoder will meet. Written once, to `store`."""
    if not store.exists():
        made = []
        for prompt in track(prompts(), "greedy answers"):
            ids = torch.tensor([lm.chat(prompt.text)])
            pad = lm.tokenizer.eos_token_id
            out = lm.model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad)[0].tolist()
            made.append({"group": prompt.group, "ids": out, "prompt": ids.shape[1]})
        part = store.with_suffix(".part")
        part.write_text(json.dumps(made), "utf-8")
        part.replace(store)
    groups: dict[str, list[Text]] = {}
    for answer in json.loads(store.read_text("utf-8")):
        ids = torch.tensor(answer["ids"])
        weight = (torch.arange(len(ids)) >= answer["prompt"] - 1).float()
        weight[-1] = 0.0  # nothing came after the last one
        groups.setdefault(answer["group"], []).append(Text(ids, torch.empty(0), torch.empty(0), weight))
    return groups


CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
tags: [speculative-decoding, draft-model]
---

# smollm2-draft

A tiny draft model for SmolLM2-135M-Instruct: it proposes tokens that the big model then checks. It is no use on its own.

    from locum.models import load
    draft = load("smollm2-draft")

| | |
|---|---|
| architecture | Llama, {layers} layers of width {width}, 4 heads, tied embedding, {parameters} M parameters, stored in bfloat16 |
| vocabulary | SmolLM2's, {vocabulary} tokens; the tokenizer is the target's and is not repeated here |
| start | the target's embedding, projected on its {width} main directions |
| data | {sequences} texts, {positions} positions, written by the target itself{singles} |
| seen per position | the target's {top} most likely tokens with their log-probs |
| training | {steps} steps of {batch} texts, AdamW, learning rate {lr}, cosine |
| loss | cross-entropy to the target's law, moving towards total variation, plus a tenth of that of the token that came |
| made by | `scripts/distill_draft.py`, seed {seed} |

The texts are answers to chat prompts from templates (free text, code, text to copy or change), prompts that the target made
up itself, and plain continuations, sampled at temperatures from 0.2 to 1.0 among the 64 most likely tokens.

## How well it stands in

Acceptance is the share of its proposals that speculative sampling keeps at temperature 1 (1 - total variation, mean over
positions); top-1 is how often its most likely token is the target's.

| text | positions | acceptance | top-1 |
|---|---|---|---|
{rows}

Held-out cross-entropy to the target's law: {cross:.2f} nats per token (the target's own entropy in the same terms: {entropy:.2f}).
{limits}
"""

LIMITS = """
It knows short-range regularities only: which word goes with which, the shape of code and lists. It does not copy from the
prompt; on text that repeats its prompt an n-gram lookup drafts better. Where the target is this small itself, drafting with
a model saves forwards of the target but need not save time.
"""


def mean_entropy(texts: Sequence[Text]) -> float:
    """Entropy of the stored laws, all tokens beyond TOP being one outcome: the least cross-entropy a draft can reach."""
    p = torch.cat([t.law_logp[t.weight == 1] for t in texts]).float().exp()
    p = torch.cat([p, (1 - p.sum(-1, keepdim=True)).clamp(min=0)], -1)
    return torch.special.entr(p).sum(-1).mean().item()


def export(args: argparse.Namespace) -> None:
    """Write the trained draft in bfloat16, with its card, into --out."""
    from locum.models import load

    torch.set_num_threads(args.threads)
    texts, held = read_shards(Path(args.work))
    lm = load(TEACHER, dtype=torch.float32, device="cpu")
    draft = initial_draft(lm, texts, args.width, args.layers, args.seed)
    run = Run(draft, args)
    draft = draft.to(torch.bfloat16).eval()
    draft.save_pretrained(args.out)
    (Path(args.out) / "model.safetensors").chmod(0o644)  # safetensors lets only its maker read it
    shipped = draft.float()  # the figures are those of the rounded weights
    figures = {"held-out samples": exact(lm, shipped, held[: args.measured])}
    for group, texts_of_group in answers(lm, args.longest // 4, Path(args.work) / "answers.json").items():
        figures[f"greedy answers to the shipped prompts, {group}"] = exact(lm, shipped, texts_of_group)
    singles = Path(args.work) / "bigrams.safetensors"
    known = (
        f"; and the law after each of {len(load_file(singles)['law_ids'])} single tokens" if singles.exists() else ""
    )
    card = CARD.format(
        layers=args.layers,
        width=args.width,
        parameters=round(sum(p.numel() for p in draft.parameters()) / 1e6, 2),
        vocabulary=lm.vocab_size,
        sequences=len(texts) + len(held),
        positions=sum(len(t.ids) for t in texts + held),
        singles=known,
        top=TOP,
        steps=run.step,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
        rows="\n".join(
            f"| {k} | {f['positions']:.0f} | {f['acceptance']:.2f} | {f['top1']:.2f} |" for k, f in figures.items()
        ),
        cross=run.history[-1]["cross_entropy"],
        entropy=mean_entropy(held),
        limits=LIMITS.strip(),
    )
    (Path(args.out) / "README.md").write_text(card, "utf-8")
    print(json.dumps(figures, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["sample", "train", "export", "all"])
    parser.add_argument("--work", default="runs/distill", help="where shards and checkpoints are kept")
    parser.add_argument("--out", default=str(DRAFT), help="where the draft is written")
    parser.add_argument("--quick", action="store_true", help="a few sequences and steps, to see that everything runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="processes that sample")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=128, help="sequences per shard")
    parser.add_argument("--longest", type=int, default=256, help="new tokens per sequence at most")
    parser.add_argument("--rows", type=int, default=64, help="sequences written at the same time")
    parser.add_argument("--bigrams", type=int, default=49152, help="how many single tokens; 0: none")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay")
    parser.add_argument("--tv", type=float, default=0.5, help="weight of the total variation at the end of training")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument(
        "--measured", type=int, default=30, help="held-out texts on which the card's figures are measured"
    )
    args = parser.parse_args()
    if args.quick:
        args.processes, args.shards, args.sequences, args.rows, args.bigrams = 1, 1, 24, 24, 64
        args.longest, args.steps, args.every, args.measured = 8, 4, 2, 1
        if args.out == str(DRAFT):
            args.out = str(Path(args.work) / "draft")
    for stage in (sample, train, export):
        if args.stage in (stage.__name__, "all"):
            stage(args)


if __name__ == "__main__":
    main()
