"""What is said of a decoder: the one table of its measures."""

from collections.abc import Sequence

from locum.bench.measures import Measure, median, paired, ratio, total
from locum.bench.store import Row

__all__ = ["MEASURES", "PEERS"]

PEERS = ("transformers", "transformers-lookup", "transformers-assisted")  # what is measured beside our own methods


def _rate(line: Row) -> float | None:
    return line["raw"].get("tokens_per_second")


def _log_likelihood(line: Row) -> float | None:
    return line["raw"].get("log_likelihood")


def _common(line: Row) -> float | None:
    """Share of the tokens that come before the first difference to transformers' greedy text."""
    beside = line["refs"].get("transformers")
    if not line["raw"]["greedy"] or beside is None:
        return None
    ours, theirs = line["raw"]["ids"], beside["ids"]
    longest = max(len(ours), len(theirs))
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return same / longest if longest else 1.0


def _identical(lines: Sequence[Row]) -> bool | None:
    shares = [_common(line) for line in lines]
    return None if None in shares else all(s == 1 for s in shares)


def _agreement(lines: Sequence[Row]) -> float | None:
    shares = [s for line in lines if (s := _common(line)) is not None]
    return sum(shares) / len(shares) if shares else None


def _law(lines: Sequence[Row]) -> str | None:
    return None if any(line["raw"]["greedy"] for line in lines) else "exact law"


def _memory(lines: Sequence[Row]) -> float | None:
    known = [m for line in lines if (m := line["raw"].get("peak_memory_mb")) is not None]
    return max(known) if known else None


_plain, _transformers = (paired("tokens_per_second", r) for r in ("plain", "transformers"))

MEASURES = (
    Measure(
        "tokens_per_forward", "fidelity", "tokens/ forward", "", "higher",
        "new tokens by forwards of the model, the one over the prompt included",
        ratio("tokens", "forwards"),
    ),
    Measure(
        "tokens_per_second", "cost", "tokens /s", "", "higher",
        "new tokens by wall seconds of the whole call, prompt included; median over prompts",
        median(_rate), _rate, digits=1,
    ),
    Measure(
        "vs_plain", "ratios", "vs plain", "", "higher",
        "tokens/s by those of our plain decoder on the same prompt in the same pass; median over prompts",
        median(_plain), _plain,
    ),
    Measure(
        "vs_transformers", "ratios", "vs transformers", "", "higher",
        "tokens/s by those of transformers' generate on the same prompt in the same pass; median over prompts",
        median(_transformers), _transformers,
    ),
    Measure(
        "identical_to_greedy", "fidelity", "same text", "", "yes",
        "whether every token is that of transformers' greedy generate (temperature 0); in float32 it must be, in half precision "
        "near-ties may fall otherwise",
        _identical,
    ),
    Measure(
        "agreement", "fidelity", "same up to", "%", "higher",
        "share of the tokens before the first difference to transformers' greedy text; mean over prompts",
        _agreement,
    ),
    Measure(
        "law", "fidelity", "law", "", "",
        "exact law: the verifier is exact for the way the drafts were drawn, so sampled text has the model's law; this is by "
        "construction and is tested, not measured here",
        _law,
    ),
    Measure(
        "accepted_share", "fidelity", "from draft", "%", "",
        "share of the new tokens that came from an accepted draft",
        ratio("accepted", "tokens"),
    ),
    Measure(
        "log_likelihood", "quality", "log-likelihood", "nats/token", "higher",
        "mean log-probability of the text's tokens under the model at temperature 1; median over prompts",
        median(_log_likelihood), _log_likelihood, digits=3,
    ),
    Measure("seconds", "cost", "seconds", "s", "lower", "wall seconds of all calls", total("seconds"), digits=1),
    Measure(
        "draft_share", "cost", "draft time", "%", "lower",
        "share of the time spent in drafting; for transformers, in the draft model's forwards",
        ratio("draft_seconds", "seconds"),
    ),
    Measure(
        "peak_memory_mb", "cost", "peak MB", "", "lower",
        "largest growth of memory in a call. CPU: resident memory of the process, peak less start (the kernel's mark), so memory "
        "that it already held does not count. CUDA: the allocator's peak less start",
        _memory, digits=0,
    ),
)  # fmt: skip
