"""Prompts: the small set that ships, and those of a user's file.

The shipped ones come in three groups, because drafters differ most between them: `free` text, `code`, and `copy`, where
most of the answer stands in the prompt already.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from locum.errors import UserError

__all__ = ["Prompt", "prompts", "read_prompts"]

SHIPPED = Path(__file__).with_name("prompts.jsonl")
UNGROUPED = "file"


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        group: what kind of text it asks for; tables are broken down by it.
        text: what the user says, without any chat template.
    """

    group: str
    text: str


def prompts(group: str | None = None) -> list[Prompt]:
    """The shipped prompts, four of each group: "free", "code" and "copy".

    Args:
        group: only this one.

    Raises: UserError for a group that does not exist.
    """
    every = read_prompts(SHIPPED)
    groups = list(dict.fromkeys(p.group for p in every))
    if group is not None and group not in groups:
        raise UserError(f"prompt group must be one of {', '.join(groups)}, got {group!r}")
    return [p for p in every if group in (None, p.group)]


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file: a line each (.txt), or a JSON object each with "text" and, if wanted, "group" (.jsonl).

    Empty lines are left out. A .jsonl text may hold line breaks, a .txt prompt cannot. A prompt without a group gets
    the group "file".

    Raises: UserError for a file that is missing, empty, not UTF-8 or of another kind, and for a line that cannot be
        read, with its number.
    """
    path = Path(path)
    if path.suffix not in {".txt", ".jsonl"}:
        raise UserError(
            f"prompt file {str(path)!r} must end in .txt (a prompt per line) or .jsonl (an object with 'text' per line)"
        )
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"prompt file {str(path)!r} does not exist") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(
            f"prompt file {str(path)!r} is not UTF-8: line {line} holds a byte that cannot be read; save it as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"prompt file {str(path)!r} cannot be read: {error.strerror}") from None
    lines = [(n, line) for n, line in enumerate(content.replace("\r\n", "\n").split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"prompt file {str(path)!r} is empty: give at least one prompt")
    if path.suffix == ".txt":
        return [Prompt(UNGROUPED, line.strip()) for _, line in lines]
    return [_from_json(line, f"prompt file {str(path)!r}, line {n}") for n, line in lines]


def _from_json(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise UserError(f'{where}: must be an object like {{"text": "..."}}, got {type(row).__name__}')
    text, group = row.get("text"), row.get("group", UNGROUPED)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where}: needs a "text" that is a string and not empty, got {text!r}')
    if not isinstance(group, str) or not group.strip():
        raise UserError(f'{where}: "group" must be a string that is not empty, got {group!r}')
    return Prompt(group, text)
