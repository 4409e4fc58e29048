"""Where measurements run: in this process, or as tasks on a Ray cluster. Both give the same rows.

The unit of work is one method on one item with one seed. Units that are to be compared run in one **pass**, one after the
other in one process, so that each has its references beside it. Everything sent to an engine is plain, picklable data.
"""

import functools
import traceback
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from locum.bench.machine import environment
from locum.bench.store import Row
from locum.errors import MissingExtra, unknown

__all__ = ["ENGINES", "Engine", "Local", "Pass", "Ray", "Runner", "Tell", "Unit", "engine"]


@dataclass(frozen=True)
class Unit:
    """One method on one item (of a group of items) with one seed."""

    method: str
    seed: int
    item: int
    group: str

    @property
    def key(self) -> tuple[str, int, int]:
        return self.method, self.seed, self.item


Tell = Callable[[Unit, float, str], None]


@dataclass(frozen=True)
class Pass:
    """Units measured one after the other. A unit not in `wanted` runs only to be a reference to the others."""

    units: tuple[Unit, ...]
    wanted: frozenset[tuple[str, int, int]]


@runtime_checkable
class Runner(Protocol):
    """What a task opens once per process: it holds the models and measures one unit at a time.

    `environment` is added to that of every row (dtype, threads, ...); the result is the row's raw figures, JSON-able. One
    whose units take long has a field `tell`, which is set to what is to be called on the way: (unit, share done, what).
    """

    environment: dict[str, Any]

    def __call__(self, unit: Unit) -> Row: ...


@runtime_checkable
class Opens(Protocol):
    """A task, as far as an engine knows it."""

    @property
    def references(self) -> tuple[str, ...]: ...

    @property
    def timed(self) -> bool: ...

    def open(self) -> Runner: ...


def measure(run: Runner, batch: Pass) -> Iterator[Row]:
    """The rows of one pass, as they end. A unit that fails is a row with its error."""
    name = uuid.uuid4().hex[:12]
    for order, unit in enumerate(batch.units):
        row = asdict(unit) | {"pass": name, "order": order, "role": "unit" if unit.key in batch.wanted else "pairing"}
        try:
            row["raw"] = run(unit)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
            row["traceback"] = traceback.format_exc(limit=-5)
        yield row | {"environment": environment() | run.environment}


def turn(units: Sequence[Unit], index: int) -> tuple[Unit, ...]:
    """The order within pass number `index`: rotated by it, and every other pass backwards, so that nobody is always first."""
    at = index % len(units) if units else 0
    order = (*units[at:], *units[:at])
    return order[::-1] if index % 2 else order


def passes(units: Iterable[Unit], references: Sequence[str], timed: bool = True) -> list[Pass]:
    """One pass per seed and item. If `timed`, a reference that is not among the units runs again beside them, and the order
    changes from pass to pass; otherwise it is that of the units.
    """
    cells: dict[tuple[int, int], list[Unit]] = {}
    for unit in units:
        cells.setdefault((unit.seed, unit.item), []).append(unit)
    made = []
    for index, members in enumerate(cells.values()):
        if not timed:
            made.append(Pass(tuple(members), frozenset(u.key for u in members)))
            continue
        present = {u.method for u in members}
        beside = [Unit(r, members[0].seed, members[0].item, members[0].group) for r in references if r not in present]
        made.append(Pass(turn([*beside, *members], index), frozenset(u.key for u in members)))
    return made


@runtime_checkable
class Engine(Protocol):
    """Runs units of a task and gives their rows as they end."""

    def run(self, task: Any, units: Sequence[Unit], tell: Tell | None = None) -> Generator[Row, None, None]: ...


class Local:
    """In this process: the models are loaded once, and a pass holds every method."""

    def run(self, task: Opens, units: Sequence[Unit], tell: Tell | None = None) -> Generator[Row, None, None]:
        if units:
            run = task.open()
            if tell is not None and hasattr(run, "tell"):
                run.tell = tell
            for batch in passes(units, task.references, task.timed):
                yield from measure(run, batch)


class Ray:
    """On a Ray cluster: one task per method and seed, the references beside it in each.

    It joins the cluster that ``RAY_ADDRESS`` names, or starts one on this machine. A task takes all cores of a worker's
    torch (``task.cores``), so that two never share them while the clock runs.

    Raises:
        MissingExtra: when ray is not installed.
    """

    def __init__(self) -> None:
        try:
            import ray
        except ImportError:
            raise MissingExtra("--engine ray", "ray") from None
        self._ray = ray

    def run(self, task: Any, units: Sequence[Unit], tell: Tell | None = None) -> Generator[Row, None, None]:
        ray = self._ray
        started = not ray.is_initialized()
        if started:
            ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        cells: dict[tuple[str, int], list[Unit]] = {}
        for unit in units:
            cells.setdefault((unit.method, unit.seed), []).append(unit)
        cores = min(task.cores, max((n["Resources"].get("CPU", 1) for n in ray.nodes() if n["Alive"]), default=1))
        remote = ray.remote(num_cpus=cores, num_gpus=task.gpus, max_retries=0)(_on_worker)
        try:
            waiting = {remote.remote(task, members): members for members in cells.values()}
            while waiting:
                (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
                members = waiting.pop(ready)
                yield from self._rows(ready, members)
        finally:
            if started:
                ray.shutdown()

    def _rows(self, ready: Any, members: Sequence[Unit]) -> list[Row]:
        try:
            return list(self._ray.get(ready))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None  # what the user did wrong is said as it is said without Ray
        except self._ray.exceptions.RayError as error:  # the worker died: out of memory, a node gone
            text = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            lost = {
                "pass": uuid.uuid4().hex[:12],
                "order": 0,
                "role": "unit",
                "error": text,
                "environment": environment(),
            }
            return [asdict(u) | lost for u in members]


@functools.lru_cache(maxsize=1)
def _opened(task: Any) -> Runner:
    run: Runner = task.open()
    return run


def _on_worker(task: Any, units: Sequence[Unit]) -> list[Row]:
    run = _opened(task)
    return [row for batch in passes(units, task.references, task.timed) for row in measure(run, batch)]


ENGINES: dict[str, Callable[[], Engine]] = {"local": Local, "ray": Ray}


def engine(name: str) -> Engine:
    """The engine of a name.

    Raises:
        UserError: for a name that there is not.
        MissingExtra: when ray is asked for and not installed.
    """
    if name not in ENGINES:
        raise unknown("engine", name, ENGINES)
    return ENGINES[name]()
