"""How far long work is: a bar with the time left on a terminal, plain lines elsewhere; always on stderr."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

__all__ = ["Bar"]

_EVERY = 5.0  # seconds between two plain lines


class Bar:
    """Progress of `total` steps of work; `percent` says how much of it instead of how many, where steps are unlike.

    with Bar("compare decode", total=99) as bar:
        bar.step("lookup on code 2")
    """

    def __init__(self, title: str, total: float, percent: bool = False) -> None:
        self.title, self.total, self.percent, self.done = title, total, percent, 0.0
        self._began = self._said = time.monotonic()
        self._progress: Progress | None = None
        if sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("{task.description:<36.36}", markup=False),
                BarColumn(bar_width=24),
                TaskProgressColumn() if percent else MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._progress.add_task(title, total=total)

    def say(self, text: str) -> None:
        """Tell what is being done now."""
        if self._progress is not None:
            self._progress.update(self._task, description=f"{self.title}: {text}")

    def step(self, text: str, advance: float = 1) -> None:
        """Some more work is done."""
        self.at(self.done + advance, text)

    def at(self, done: float, text: str) -> None:
        """So much work is done in all."""
        self.done = min(done, self.total)
        if self._progress is not None:
            self._progress.update(self._task, description=f"{self.title}: {text}", completed=self.done)
            return
        now = time.monotonic()
        if now - self._said >= _EVERY or self.done >= self.total:
            self._said = now
            so_far = f"{self.done / self.total:.0%}" if self.percent else f"{self.done:.0f}/{self.total:.0f}"
            left = (now - self._began) / self.done * (self.total - self.done) if self.done > 0 else None
            print(
                f"{self.title}: {so_far} {text}" + (f", about {left:.0f} s left" if left is not None else ""),
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> "Bar":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
