"""A family without models: methods that answer at once, one that fails, one that can be made slow."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from locum.bench.compare import Task
from locum.bench.decode_report import decode_part
from locum.bench.engines import Unit
from locum.bench.measures import Measure, median, paired, total
from locum.bench.report import Page, Part
from locum.bench.store import Row

SPEED = {"plain": 10.0, "twice": 20.0, "broken": 0.0, "<i>odd</i>": 5.0}
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028 ünï"


def _rate(line: Row) -> float | None:
    return line["raw"].get("rate")


_vs = paired("rate", "plain")


@dataclass(frozen=True)
class FakeTask(Task):
    family: ClassVar[str] = "fake"
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("rate", "cost", "items/s", "1/s", "higher", "how fast", median(_rate), _rate),
        Measure("seconds", "cost", "seconds", "s", "lower", "how long", total("seconds")),
        Measure("vs_plain", "ratios", "vs plain", "", "higher", "by plain's rate", median(_vs), _vs),
    )
    references: ClassVar[tuple[str, ...]] = ("plain",)
    main: ClassVar[str] = "vs_plain"

    methods: tuple[str, ...] = ("plain", "twice", "broken", "<i>odd</i>")
    seeds: int = 1
    per_group: int = 2
    delay: float = 0.0
    log: str | None = None  # every unit that runs adds a line here
    interrupt_at: int = -1

    @property
    def columns(self) -> tuple[str, ...]:
        return "rate", "vs_plain"

    def config(self) -> Row:
        return {
            "task": "fake",
            "model": "none",
            "methods": list(self.methods),
            "seeds": self.seeds,
            "n": self.per_group,
        }

    def units(self) -> list[Unit]:
        items = range(2 * self.per_group)
        return [Unit(m, s, i, ("calm", "rough")[i % 2]) for s in range(self.seeds) for i in items for m in self.methods]

    def open(self) -> "FakeRunner":
        return FakeRunner(self)

    def part(self, page: Page) -> Part:
        return decode_part(page, axes=("rate", "vs_plain"))

    def items(self) -> list[str]:
        return [f"item {i} {NASTY}" for i in range(2 * self.per_group)]

    def headline(self, overall: Sequence[Row], groups: Sequence[Row]) -> str:
        return f"Use {max(overall, key=lambda r: r['ratios'].get('vs_plain') or 0)['method']} {NASTY}"


class FakeRunner:
    environment: dict[str, Any] = {"dtype": "none"}  # noqa: RUF012

    def __init__(self, task: FakeTask) -> None:
        self.task, self.ran = task, 0

    def __call__(self, unit: Unit) -> Row:
        if self.task.log:
            with Path(self.task.log).open("a", encoding="utf-8") as file:
                file.write(f"{unit.method} {unit.seed} {unit.item}\n")
        if self.ran == self.task.interrupt_at:
            raise KeyboardInterrupt
        self.ran += 1
        time.sleep(self.task.delay)
        rate = SPEED[unit.method] * (1 + 0.1 * unit.item)
        if not rate:
            raise RuntimeError(f"broken on {NASTY}")
        sample = {"pieces": [NASTY, " b", " c"], "step": [0, 0, 1], "depth": [1, 0, 0], "times": [0.1, 0.2]}
        return {"rate": rate, "seconds": 1 / rate, "sample": sample}
