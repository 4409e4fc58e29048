"""The store: what is written stays, half a line does not, and nobody writes beside another."""

import json

import pytest

from locum.bench.store import Lines, Store, latest
from locum.errors import UserError
from locum.files import write_atomically


def test_lines_come_back(tmp_path):
    rows = [{"a": 1, "text": "ünï\u2028\n"}, {"b": None}]
    lines = Lines(tmp_path / "x" / "r.jsonl")
    for row in rows:
        lines.append(row)
    lines.close()
    assert Lines(tmp_path / "x" / "r.jsonl").rows == rows


@pytest.mark.parametrize("keep", range(1, 12))
def test_half_a_line_is_cut_off_wherever_it_ends(tmp_path, keep):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a":1}\n' + b'{"b":"\xc3\xbc"}\n'[:keep])  # one of the cuts is inside a character
    lines = Lines(path)
    whole = keep == 11
    assert len(lines.rows) == 1 + whole
    lines.append({"c": 3})
    lines.close()
    assert [json.loads(line) for line in path.read_bytes().splitlines()][-1] == {"c": 3}
    assert len(path.read_bytes().splitlines()) == 2 + whole


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"a":1}\nnot json\n{"b":2}\n', "utf-8")
    with pytest.raises(UserError, match=r"damaged at line 2"):
        Lines(path)


def test_two_writers_are_refused(tmp_path):
    first = Lines(tmp_path / "r.jsonl")
    with pytest.raises(UserError, match="written by another process"):
        Lines(tmp_path / "r.jsonl")
    first.close()
    Lines(tmp_path / "r.jsonl").close()


def test_nan_is_not_json(tmp_path):
    lines = Lines(tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        lines.append({"a": float("nan")})
    lines.close()
    assert Lines(tmp_path / "r.jsonl").rows == []


def test_config_survives_yaml_whatever_the_text(tmp_path):
    config = {"prompts": ["a: b # c", "line\nline\u2028\ttab", "no", "1e3", "\x07bell", "ünï 🦊"], "t": 1e-5, "n": None}
    with Store(tmp_path, "a", config):
        pass
    with Store(tmp_path, "a", config, resume=True) as store:
        assert store.rows == []


def test_a_config_that_is_no_config(tmp_path):
    with Store(tmp_path, "a", {"x": 1}):
        pass
    (tmp_path / "a" / "config.yaml").write_text("[1, 2", "utf-8")
    with pytest.raises(UserError, match="cannot be read as a run's config"):
        Store(tmp_path, "a", {"x": 1}, resume=True)


def test_atomic_writing_leaves_nothing_beside(tmp_path):
    write_atomically(tmp_path / "d" / "f.txt", "one")
    write_atomically(tmp_path / "d" / "f.txt", "two")
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["f.txt"]
    assert (tmp_path / "d" / "f.txt").read_text("utf-8") == "two"


def test_latest_of_nothing(tmp_path):
    assert latest(tmp_path / "absent", "decode-") is None
