"""Sentiment: short texts to go on with, pairs of a model's own sentences, and a reward that everyone can recompute.

A prompt is the beginning of a sentence that asks for an opinion, such as "I watched the new thriller last night and".
It is continued as raw text, without a chat template. A response is what comes up to the end of a sentence (`sentence`);
it is complete, so an end-of-sequence token belongs behind it. Its reward is VADER's compound score of the response alone,
in [-1, 1].

The prompts are a grammar's: ten kinds of things, eight things each, four openings each, in a fixed order. One in five is
held out: combinations of things and openings that the other 256 prompts hold too, but never together.

>>> from locum.tasks import sentiment
>>> len(sentiment.prompts()), len(sentiment.prompts(held_out=True)), sentiment.prompts()[0]
(256, 64, 'I watched the new thriller last night and')
>>> sentiment.sentence(" it was better than I had expected. Then we went home")
' it was better than I had expected.'
"""

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locum.errors import MissingExtra

__all__ = ["NEW_TOKENS", "files", "pairs", "prompts", "rewards", "sentence"]

NEW_TOKENS = 28  # a response that has no end by then is not used
_WORDS = 5  # a response has at least so many
_EVERY = 5  # one prompt of so many is held out
_FOLDER = Path(__file__).with_name("data")
_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)[.!?]+[\"'”’)]*(?=\s|$)")

_KINDS = (  # (things, openings)
    (
        "the new thriller|an old western|the animated film|a documentary about whales|the film about the lighthouse"
        "|the spy film|the musical|the last part of the trilogy",
        "I watched {} last night and|We saw {} at the cinema, and honestly|When people ask me about {}, I tell them that it"
        "|My opinion of {}, in one sentence: it",
    ),
    (
        "the hotel by the station|the small guest house|the hotel on the beach|the hostel in the old town|the inn at the harbour"
        "|the airport hotel|the cabin by the lake|the big hotel downtown",
        "We spent two nights at {} and|Our room at {} was|The people at {} were|If you ask me about {}, I would say it is",
    ),
    (
        "the lentil soup|the fried fish|the chocolate cake|the vegetable curry|the pizza with mushrooms|the apple pie"
        "|the noodle salad|the grilled cheese sandwich",
        "I ordered {} for lunch and|We tried {} yesterday, and it tasted|The cook made {} for us, and everybody"
        "|What I remember about {} is that it",
    ),
    (
        "the novel about the two sisters|the detective story|the biography of the painter|the book on gardening"
        "|the collection of poems|the science fiction novel|the history of the railway|the children's book",
        "I finished {} this morning and|A friend gave me {}, and I|Reading {} made me feel|The last chapter of {} was",
    ),
    (
        "my new phone|the cheap tablet|the wireless headphones|the coffee machine|the electric bike|the robot vacuum"
        "|the digital camera|the kitchen scale",
        "I have used {} for a month and|After one week with {}, I|My brother asked how I like {}, and I said that"
        "|Compared with what I had before, {} is",
    ),
    (
        "the forest|the old harbour|the botanical garden|the hills|the park|the vineyards|the market|the sand dunes",
        "We went for a walk through {} and|The weather was changing as we crossed {}, and we|Walking through {} always makes me"
        "|The morning in {} was",
    ),
    (
        "the school concert|the jazz evening|the open-air festival|the piano recital|the rock concert|the choir"
        "|the street musicians|the opera",
        "I went to hear {} and|My parents came along to {}, and they|From the first minute of {}, I felt"
        "|About {} I can only say that it was",
    ),
    (
        "the train to the coast|the night bus|the ferry|the flight home|the tram|the taxi from the airport|the cable car"
        "|the boat tour",
        "We took {} and|The driver and the crew of {} were|My trip with {} was|People who complain about {} should know that it",
    ),
    (
        "the cooking class|the Spanish course|the swimming lessons|the drawing workshop|the first-aid training|the dance class"
        "|the chess club|the yoga course",
        "I signed up for {} and|The teacher of {} is|After the last hour of {}, we all felt|I would tell a friend that {} was",
    ),
    (
        "the dentist|the barber on the corner|the new bakery|the bicycle shop|the public library|the bank|the flower shop"
        "|the garage",
        "I went to {} on Monday and|My neighbour says that {} is|The service at {} was|I have known {} for years, and I",
    ),
)


@functools.cache
def _prompts() -> tuple[str, ...]:
    return tuple(
        opening.format(thing)
        for things, openings in _KINDS
        for thing in things.split("|")
        for opening in openings.split("|")
    )


def prompts(held_out: bool = False) -> list[str]:
    """The 256 training prompts, or the 64 held-out ones, always in the same order."""
    return [p for i, p in enumerate(_prompts()) if (i % _EVERY == _EVERY - 1) is held_out]


def files() -> tuple[Path, Path]:
    """The shipped pairs: a file to train on, and one of pairs for the held-out prompts."""
    return _FOLDER / "sentiment.jsonl", _FOLDER / "sentiment-held-out.jsonl"


def pairs(held_out: bool = False) -> list[dict[str, Any]]:
    """The shipped pairs: prompt, chosen, rejected, reward_chosen, reward_rejected. At most one for each prompt."""
    return [json.loads(line) for line in files()[held_out].read_text("utf-8").splitlines()]


def sentence(text: str) -> str | None:
    """A continuation up to the first end of a sentence behind five words or more; None where its first line has none."""
    line = text.split("\n", 1)[0]
    for end in _END.finditer(line):
        if len(line[: end.end()].split()) >= _WORDS:
            return line[: end.end()]
    return None


def rewards(responses: Sequence[str]) -> list[float]:
    """VADER's compound score of each response: -1 the most negative, 1 the most positive, four decimals.

    Raises: MissingExtra when vaderSentiment is not installed.
    """
    analyser = _analyser()
    return [float(analyser.polarity_scores(text)["compound"]) for text in responses]


@functools.cache
def _analyser() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError:
        raise MissingExtra("the sentiment reward", "align") from None
    return SentimentIntensityAnalyzer()
