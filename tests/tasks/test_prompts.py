"""The shipped prompts, and every way a prompt file can be wrong."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from locum.errors import UserError
from locum.tasks import Prompt, prompts, read_prompts


def test_twelve_prompts_four_of_each_group():
    every = prompts()
    assert Counter(p.group for p in every) == {"free": 4, "code": 4, "copy": 4}
    assert len({p.text for p in every}) == 12
    assert prompts("copy") == [p for p in every if p.group == "copy"]


def test_copy_prompts_hold_what_is_to_be_copied_and_stay_short():
    for p in prompts("copy"):
        passage = p.text.split("\n\n", 1)[1]
        assert 40 <= len(passage.split()) <= 180, p.text[:40]


def test_an_unknown_group_is_refused():
    with pytest.raises(UserError, match=r"one of free, code, copy, got 'poem'"):
        prompts("poem")


def test_reading_prompts_loads_no_torch():
    code = "import sys, locum.tasks as t; t.prompts(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_text_file_has_a_prompt_per_line(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffFirst one.\r\n\r\n  Der zweite: Grüße  \n".encode())
    assert read_prompts(path) == [Prompt("file", "First one."), Prompt("file", "Der zweite: Grüße")]


def test_a_jsonl_file_may_name_groups_and_hold_line_breaks(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"text": "one\n\ntwo"}, {"group": "code", "text": "x", "source": "kept out"}]
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n", "utf-8")
    assert read_prompts(str(path)) == [Prompt("file", "one\n\ntwo"), Prompt("code", "x")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "does not exist"),
        ("empty.txt", b"\n  \n", "is empty"),
        ("empty.jsonl", b"", "is empty"),
        ("latin.txt", "fine\nGrüße\n".encode("latin-1"), "is not UTF-8: line 2"),
        ("mine.csv", b"a,b\n", r"must end in \.txt .* or \.jsonl"),
        ("cut.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', r"line 3: not JSON \("),
        ("list.jsonl", b'["a"]\n', r"line 1: must be an object like \{.* got list"),
        ("other.jsonl", b'{"prompt": "a"}\n', r'line 1: needs a "text" .* got None'),
        ("number.jsonl", b'{"text": 3}\n', r'line 1: needs a "text" .* got 3'),
        ("blank.jsonl", b'{"text": " "}\n', r'line 1: needs a "text"'),
        ("group.jsonl", b'{"text": "a", "group": 1}\n', r'line 1: "group" must be a string'),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_prompts(path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_directory_is_no_prompt_file(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "folder.txt")
