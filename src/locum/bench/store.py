"""Raw results on disk, one line per measurement, so that a killed run goes on where it was.

A run is a folder: ``config.yaml`` (what was asked), ``results.jsonl`` (what came out, raw; figures are computed later) and
``report.html``. A line is flushed to the disk as it ends. A process that is killed in the middle of a line leaves half of
one; it is cut off when the run is opened again.
"""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from locum.errors import UserError
from locum.files import write_atomically

__all__ = ["Lines", "Row", "Store", "fingerprint", "latest"]

Row = dict[str, Any]


class Lines:
    """A file of JSON lines that is only ever added to, by one process at a time.

    Args:
        path: the file; made when absent. Half a line at its end, left by a killed process, is cut off.

    Raises:
        UserError: when another process holds it, or a line inside it is not JSON.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        try:
            self._lock(path)
            self.rows = self._read(path)
        except BaseException:
            self._file.close()
            raise

    def append(self, row: Row) -> None:
        """Add a row; when this returns it is on the disk."""
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.append(row)

    def close(self) -> None:
        self._file.close()

    def _lock(self, path: Path) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{path} is being written by another process: wait for it, or choose another --name"
            ) from None

    def _read(self, path: Path) -> list[Row]:
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self._file.truncate(len(whole))
        rows = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise UserError(
                    f"{path} is damaged at line {number}, which is not JSON: delete that line to go on"
                ) from None
        return rows


class Store:
    """One run's folder, open for adding rows.

    Args:
        folder: where runs are kept.
        name: the run's name, a plain folder name.
        config: what was asked, as plain data.
        resume: go on with a run that exists (or start it when it does not).

    Raises:
        UserError: when the run exists and `resume` is false, or its config is another one.
    """

    def __init__(self, folder: Path, name: str, config: Row, *, resume: bool = False) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UserError(f"a run's name is made of letters, digits, '.', '_' and '-', got {name!r}")
        self.folder = folder / name
        self.config = json.loads(json.dumps(config))
        written = self.folder / "config.yaml"
        if written.exists():
            if not resume:
                raise UserError(f"{self.folder} exists: add --resume to go on with it, or choose another --name")
            self._same(written)
        else:
            write_atomically(written, yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
        self._lines = Lines(self.folder / "results.jsonl")

    @property
    def rows(self) -> list[Row]:
        """All rows so far, in the order in which they were measured."""
        return self._lines.rows

    def append(self, row: Row) -> None:
        self._lines.append(row)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def _same(self, written: Path) -> None:
        try:
            before = yaml.safe_load(written.read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            before = None
        if not isinstance(before, dict):
            raise UserError(f"{written} cannot be read as a run's config: choose another --name")
        if different := [k for k in {**before, **self.config} if before.get(k) != self.config.get(k)]:
            key = different[0]
            was, now = (_short(c.get(key)) for c in (before, self.config))
            more = f" (and {', '.join(different[1:])})" if different[1:] else ""
            raise UserError(
                f"{self.folder} was begun with another {key}{more}: it was {was}, now {now}; "
                "resume with the same settings, or choose another --name"
            )


def latest(folder: Path, prefix: str) -> str | None:
    """The name of the run begun last among those whose names begin with `prefix`."""
    found = []
    for config in folder.glob(f"{prefix}*/config.yaml"):
        with contextlib.suppress(OSError):
            found.append((config.stat().st_mtime, config.parent.name))
    return max(found)[1] if found else None


def fingerprint(source: str, train: list[Row], held_out: list[Row]) -> Row:
    """What a run's config keeps of a user's own data: where it came from, how much of it, and a hash of all."""
    whole = json.dumps([train, held_out], sort_keys=True, default=str)
    sha256 = hashlib.sha256(whole.encode()).hexdigest()
    return {"file": source, "train": len(train), "held_out": len(held_out), "sha256": sha256}


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
