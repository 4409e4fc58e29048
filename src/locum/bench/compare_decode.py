"""``locum compare decode``: our decoders, plain decoding and transformers' own, on the same prompts, side by side."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from locum.bench.compare import Kind, Task
from locum.bench.decode_measures import MEASURES, PEERS
from locum.bench.decode_report import decode_part
from locum.bench.engines import Runner, Unit
from locum.bench.measures import Measure
from locum.bench.report import Page, Part
from locum.bench.store import Row
from locum.errors import UserError, unknown
from locum.method import names, require
from locum.tasks.prompts import prompts, read_prompts

__all__ = ["DecodeTask", "decode_methods"]

ASSISTED = "transformers-assisted"
SHIPPED = {"smollm2-135m-instruct": "smollm2-draft"}  # models that come with a draft
ORDER = ("plain", *PEERS, "lookup", "chain", "spectr", "dyspec", "tokenrecycling", "graft", "auto")


def decode_methods() -> list[str]:
    """All methods that can be compared: our drafters by their names, and transformers' own."""
    known = [*PEERS, *names("decode", "Drafter")]
    return [*(m for m in ORDER if m in known), *sorted(set(known) - set(ORDER))]


@dataclass(frozen=True)
class DecodeTask(Task):
    """Decoders on the same prompts.

    Args:
        model: the model that is decoded: a shipped name, a path, or a hub name.
        draft: the small model that some methods draft with; it must have the model's vocabulary. When left out, the shipped draft
            for the shipped model; other models run without, and without the methods that need one.
        prompts: a file, one prompt a line, or .jsonl with "prompt" and "group"; the shipped prompts when left out.
        per_group: how many of the shipped prompts to take of each group; 0 for all. A file is always taken whole.
        methods: which to compare; all when left out. Plain decoding and transformers' generate always run: the ratios need them.
        max_new_tokens: how many tokens to generate for each prompt, >= 1.
        temperature: 0 is greedy; above, tokens are sampled.
        seeds: how many times to run, with other random numbers each, >= 1.
        dtype: the models' type, e.g. float32 or bfloat16; the device's usual one when left out.
        device: e.g. cpu or cuda; the best there is when left out.
    """

    family: ClassVar[str] = "decode"
    measures: ClassVar[tuple[Measure, ...]] = MEASURES
    references: ClassVar[tuple[str, ...]] = ("plain", "transformers")
    main: ClassVar[str] = "vs_transformers"
    note: ClassVar[str] = (
        "Over all prompts. Ratios are medians over pairs measured beside each other, with 95 % bootstrap intervals. Point at a "
        "column's head to see how it is computed, at a method's name to see its settings."
    )

    model: str = "smollm2-135m-instruct"
    draft: str | None = None
    prompts: str | None = None
    per_group: int = 2
    methods: tuple[str, ...] = ()
    max_new_tokens: int = 64
    temperature: float = 0.0
    seeds: int = 1
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        require(self, "max_new_tokens", self.max_new_tokens >= 1, ">= 1")
        require(self, "temperature", 0 <= self.temperature < float("inf"), "finite and >= 0")
        require(self, "seeds", self.seeds >= 1, ">= 1")
        require(self, "per_group", self.per_group >= 0, ">= 0")
        require(self, "model", bool(self.model.strip()), "a model's name or path")
        for method in self.methods:
            if method.lower() not in decode_methods():
                raise unknown("method of decode", method, decode_methods())
        _ = self.examples  # read now, so that a bad file is refused now, and sent along to a worker

    @cached_property
    def examples(self) -> tuple[tuple[str, str], ...]:
        """(group, text) of every prompt."""
        every = prompts() if self.prompts is None else read_prompts(self.prompts)
        few = self.per_group if self.prompts is None else 0
        groups = Counter[str]()
        chosen = []
        for prompt in every:
            groups[prompt.group] += 1
            if not few or groups[prompt.group] <= few:
                chosen.append((prompt.group, prompt.text))
        return tuple(chosen)

    @cached_property
    def chosen(self) -> tuple[str, ...]:
        """The methods that run, in the order of the table.

        Raises:
            UserError: for a method that needs a draft model where there is none.
        """
        asked = {m.lower() for m in self.methods}
        if self.draft_name is None:
            ours = names("decode", "Drafter")  # looking one up loads torch: not before it must be known
            needy = {m for m in asked or decode_methods() if m == ASSISTED or (m in ours and ours[m]().needs_draft)}
            if refused := asked & needy:
                raise UserError(
                    f"method {min(refused)} needs a draft model with the vocabulary of {self.model!r}: give --draft"
                )
            asked = asked or set(decode_methods()) - needy
        return tuple(m for m in decode_methods() if not asked or m in asked or m in self.references)

    @property
    def draft_name(self) -> str | None:
        """The draft model that is used."""
        return self.draft or SHIPPED.get(self.model)

    @property
    def columns(self) -> tuple[str, ...]:
        text = "identical_to_greedy" if self.temperature == 0 else "law"
        return (
            "tokens_per_forward",
            "tokens_per_second",
            "vs_plain",
            "vs_transformers",
            text,
            "draft_share",
            "peak_memory_mb",
        )

    @property
    def cores(self) -> int:
        import torch

        return torch.get_num_threads()

    @property
    def gpus(self) -> int:
        import torch

        return int(torch.cuda.is_available() if self.device is None else self.device.startswith("cuda"))

    def config(self) -> Row:
        how = "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}"
        return {
            "family": self.family,
            "task": f"{len(self.examples)} prompts, {self.max_new_tokens} new tokens each, {how}",
            "model": self.model,
            "draft": self.draft_name,
            "methods": list(self.chosen),
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seeds": self.seeds,
            "dtype": self.dtype,
            "device": self.device,
            "prompts": [{"group": g, "text": t} for g, t in self.examples],
        }

    def units(self) -> list[Unit]:
        items = [(i, group) for i, (group, _) in enumerate(self.examples)]
        return [Unit(m, seed, i, group) for seed in range(self.seeds) for i, group in items for m in self.chosen]

    def open(self) -> Runner:
        from locum.bench.decode_runner import DecodeRunner  # brings torch

        return DecodeRunner(
            model=self.model,
            draft=self.draft_name,
            methods=self.chosen,
            prompts=self.items(),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            dtype=self.dtype,
            device=self.device,
        )

    def part(self, page: Page) -> Part:
        ideal = "speed = tokens per forward: drafting and wide forwards would cost nothing"
        return decode_part(page, axes=("tokens_per_forward", "vs_plain"), ideal=ideal)

    def items(self) -> list[str]:
        return [text for _, text in self.examples]

    def kind(self, method: str) -> Kind:
        return "plain" if method in self.references else "peer" if method in PEERS else "ours"

    def headline(self, overall: Sequence[Row], groups: Sequence[Row]) -> str:
        """The fastest method whose text is the model's own; speed against transformers' generate."""
        known = [r for r in overall if r["ratios"].get(self.main) is not None and r["method"] != "transformers"]
        sound = [r for r in known if r["fidelity"]["identical_to_greedy"] is not False]
        if not sound:
            return "Nothing to say yet: no method has given the right text beside transformers' generate."
        best = max(sound, key=lambda r: r["ratios"][self.main])
        value, limits = best["ratios"][self.main], best["ratios"][f"{self.main}_interval"]
        shown = f"{value:.2f}×" + (f" (95 % interval {limits[0]:.2f}–{limits[1]:.2f})" if limits else "")
        if value <= 1 or (limits and limits[0] <= 1):
            name = best["method"]
            return f"Nothing here is surely faster than transformers' generate: the best, {name}, runs at {shown} its speed."
        mine = {r["group"]: r["ratios"][self.main] for r in groups if r["method"] == best["method"]}
        spread = ", ".join(f"{v:.2f}× on {g}" for g, v in mine.items() if v is not None) if len(mine) > 1 else ""
        same = {True: "the text is greedy decoding's, token for token", None: "the text has exactly the model's law"}
        return (
            f"Use {best['method']}: {shown} the speed of transformers' generate{' (' + spread + ')' if spread else ''}; "
            + (same[best["fidelity"]["identical_to_greedy"]] + ".")
        )
