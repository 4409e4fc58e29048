"""A user's prompts from a file: one a line, or JSON lines with a group each."""

import json
from pathlib import Path

from locum.errors import UserError

__all__ = ["read_prompts"]


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """The (group, text) pairs of a file.

    ``.jsonl``: one object a line with "prompt" (or "text") and optionally "group". Anything else: one prompt a line.
    Empty lines are left out; where no group is given it is the file's name without its ending.

    Raises:
        UserError: when the file is missing, no file, not UTF-8, without prompts, or a line of it is not what it should be.
    """
    if not path.exists():
        raise UserError(f"prompt file {path} does not exist")
    if not path.is_file():
        raise UserError(f"prompt file {path} is not a file")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path} is not UTF-8 (at byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"prompt file {path} cannot be read: {error.strerror}") from None
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"prompt file {path} is empty: put one prompt on a line")
    if path.suffix == ".jsonl":
        return [_object(path, n, line) for n, line in lines]
    return [(path.stem, line.strip()) for _, line in lines]


def _object(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except ValueError:
        raise UserError(f"prompt file {path}, line {number}: this is not JSON") from None
    text = entry.get("prompt", entry.get("text")) if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'prompt file {path}, line {number}: it must be an object with a text under "prompt"')
    return str(entry.get("group", path.stem)), text
