"""Numbers per response token, kept on the disk: worked out once, mapped into memory, and gone on with after a kill.

A folder holds one flat float32 file per column, in which the examples lie one behind the other, a file that marks the
examples that are done, and a manifest that says what the numbers were made from. All are `.npy` and JSON; nothing is
pickled. Marks are written behind the numbers they stand for.

What belongs to one cache is named by a fingerprint of model and data; a folder with another one is refused.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from locum.align.base import Example, PairBatch
from locum.align.statistics import LOGP_REF, ModelScorer, Scorer, token_log_probs
from locum.errors import UserError

__all__ = ["TokenCache", "fingerprint", "with_column", "with_reference"]

MANIFEST, MARKS = "manifest.json", "done.npy"
Values = Float32[np.ndarray, " _"]
Compute = Callable[[list[int]], Mapping[str, Sequence[Any]]]
Progress = Callable[[int, int], None]  # (examples done, of how many)


class TokenCache:
    """Columns of numbers for examples of known lengths.

    Args:
        folder: where the files are; made if need be.
        fingerprint: of everything that the numbers depend on.
        lengths: response tokens of each example.
        columns: their names.
        renew: throw away what was made from something else, instead of refusing it.

    Raises: UserError for a folder that holds something else, or a disk without room.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: str,
        lengths: Sequence[int],
        columns: Sequence[str],
        renew: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.columns = tuple(columns)
        self._ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
        self._starts = self._ends - np.asarray(lengths, dtype=np.int64)
        wanted = {
            "fingerprint": fingerprint,
            "columns": list(self.columns),
            "examples": len(lengths),
            "tokens": int(self._ends[-1]) if len(lengths) else 0,
        }
        found = self._manifest()
        if found is not None and found != wanted and not renew:
            raise UserError(
                f"{str(self.folder)!r} holds numbers made from another model or other data; "
                "remove it, give another folder, or have it made anew"
            )
        if found != wanted:
            self._create(wanted)
        self._maps = {name: self._open(name) for name in self.columns}
        self._done = np.load(self.folder / MARKS, mmap_mode="r+", allow_pickle=False)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def done(self) -> int:
        """How many examples have their numbers."""
        return int(np.count_nonzero(self._done))

    def fill(
        self,
        compute: Compute,
        batch_size: int = 16,
        order: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Work out what is missing, batch by batch.

        Args:
            compute: numbers of some examples -> for each column, the values of each of them.
            batch_size: examples at a time.
            order: the examples in the order in which they are to be done; those of one size together save padding.
            progress: is told how many are done, of how many.

        Raises: UserError for values that are not one per response token.
        """
        missing = [i for i in (range(len(self)) if order is None else order) if not self._done[i]]
        done = self.done
        for start in range(0, len(missing), batch_size):
            rows = missing[start : start + batch_size]
            found = compute(rows)
            for name in self.columns:
                for i, values in zip(rows, found[name], strict=True):
                    self._put(name, i, values)
            for values in self._maps.values():
                values.flush()
            self._done[rows] = True
            self._done.flush()
            done += len(rows)
            if progress is not None:
                progress(done, len(self))

    def rows(self, column: str) -> list[Values]:
        """The values of each example: views, nothing is read before it is used. What is written into them stays in memory.

        Raises: UserError while some are missing.
        """
        if self.done < len(self):
            raise UserError(f"{str(self.folder)!r} has {self.done} of {len(self)} examples; fill it first")
        flat = np.asarray(np.load(self._path(column), mmap_mode="c", allow_pickle=False))
        return [flat[start:end] for start, end in zip(self._starts.tolist(), self._ends.tolist(), strict=True)]

    def _path(self, column: str) -> Path:
        return self.folder / f"{column}.npy"

    def _open(self, column: str) -> Any:
        return np.load(self._path(column), mmap_mode="r+", allow_pickle=False)

    def _put(self, column: str, i: int, values: Any) -> None:
        start, end = self._starts[i], self._ends[i]
        values = torch.as_tensor(values).detach().float().cpu().numpy()
        if values.shape != (end - start,):
            raise UserError(f"example {i} has {values.size} values of {column} for {end - start} response tokens")
        self._maps[column][start:end] = values

    def _manifest(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / MANIFEST).read_text("utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def _create(self, manifest: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / MANIFEST).unlink(missing_ok=True)  # first, and written last: without it nothing here counts
        tokens, examples = max(manifest["tokens"], 1), max(manifest["examples"], 1)  # a map cannot be empty
        for path, dtype, n in [(self._path(c), np.float32, tokens) for c in self.columns] + [
            (self.folder / MARKS, np.bool_, examples)
        ]:
            try:
                np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(n,)).flush()
                _reserve(path)
            except OSError as error:
                raise UserError(f"cannot keep {n} numbers in {str(path)!r}: {error.strerror}") from None
        part = self.folder / f"{MANIFEST}.part"
        part.write_text(json.dumps(manifest, indent=1), "utf-8")
        part.replace(self.folder / MANIFEST)


def _reserve(path: Path) -> None:
    """Take the room on the disk now: a map that finds none later ends the process without a word."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def with_reference(
    scorer: Scorer,
    examples: Sequence[Example],
    blocks: Sequence[str],
    folder: str | Path,
    pad_id: int = 0,
    move: Callable[[PairBatch], PairBatch] = lambda batch: batch,
    batch_size: int = 16,
    renew: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """The examples with the reference's log-probability of every response token, "<block>_logp_ref", kept in a folder.

    `statistics` then needs no reference. Gone on with if stopped, and not worked out again for the same weights and tokens.

    Args: as `token_log_probs`; folder, renew, progress as `TokenCache`'s.
    """

    def values(some: Sequence[Example], block: str) -> list[Tensor]:
        return token_log_probs(scorer, some, block, pad_id, batch_size, move)

    name = fingerprint(scorer)
    return with_column(LOGP_REF, values, examples, blocks, folder, name, batch_size, renew, progress)


def with_column(
    column: str,
    values: Callable[[Sequence[Example], str], Sequence[Any]],
    examples: Sequence[Example],
    blocks: Sequence[str],
    folder: str | Path,
    made_from: str,
    batch_size: int = 16,
    renew: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """The examples with "<block>_<column>" added, worked out once and kept in a folder.

    Args:
        values: (examples, block) -> one number per response token, per example; `TokenSignal.values` is one.
        made_from: a `fingerprint` of all that the numbers depend on beside the examples: models, settings.
        batch_size: examples that `values` is given at a time; long ones come first, so that too large a batch is soon known.
    """
    examples = list(examples)
    n = len(examples)
    lengths = [len(e[f"{b}_ids"]) for b in blocks for e in examples]
    cache = TokenCache(folder, fingerprint(made_from, examples, *blocks), lengths, (column,), renew)

    def compute(rows: list[int]) -> dict[str, list[Any]]:
        found: dict[int, Any] = {}
        for place, block in enumerate(blocks):
            mine = [row for row in rows if row // n == place]
            if mine:
                found |= zip(mine, values([examples[row % n] for row in mine], block), strict=True)
        return {column: [found[row] for row in rows]}

    whole = [len(e["prompt_ids"]) for e in examples]
    order = sorted(range(len(cache)), key=lambda row: (row // n, -lengths[row] - whole[row % n]))
    cache.fill(compute, batch_size, order, progress)
    views = cache.rows(column)
    return [
        {**example, **{f"{block}_{column}": views[place * n + i] for place, block in enumerate(blocks)}}
        for i, example in enumerate(examples)
    ]


def fingerprint(*parts: Any) -> str:
    """A short name for what numbers are made from: texts, modules (their weights), examples (their token ids), in order.

    A `ModelScorer` stands for the weights that it uses: of a PEFT model the base, and the adapter that it switches on.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        elif isinstance(part, ModelScorer):
            _hash_weights(digest, part.model, part.adapter)
        elif isinstance(part, nn.Module):
            _hash_weights(digest, part, None)
        else:
            _hash_examples(digest, part)
        digest.update(b"\0")
    return digest.hexdigest()


def _hash_weights(digest: Any, model: nn.Module, adapter: str | None) -> None:
    inner: Any = getattr(model, "module", model)
    others = set() if adapter is None else set(getattr(inner, "peft_config", ())) - {adapter}
    for name, value in inner.state_dict().items():
        if not others.intersection(name.split(".")):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)


def _hash_examples(digest: Any, examples: Sequence[Example]) -> None:
    for example in examples:
        for name in sorted(k for k in example if k.endswith("_ids")):
            ids = np.asarray(example[name], dtype=np.int32)
            digest.update(f"{name} {len(ids)}".encode())
            digest.update(ids.data)
