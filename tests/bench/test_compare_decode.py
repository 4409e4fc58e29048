"""``compare decode`` on a tiny random model: every method, its text, its forwards, its tokens' origin; and bad input."""

import json
import math
import re

import pytest

from locum.bench.compare import compare
from locum.bench.compare_decode import DecodeTask, decode_methods
from locum.bench.decode_measures import PEERS
from locum.errors import UserError

TOKENS = 14


def save(folder, seed, vocab_size=256):
    """A random model over bytes, with its tokenizer, as `from_pretrained` reads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from locum.models import tiny

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:vocab_size]
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    tiny(vocab_size=vocab_size, seed=seed).model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return save(tmp_path_factory.mktemp("draft"), seed=1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    texts = [("free", "Once upon a time"), ("copy", "abc abc abc abc"), ("copy", "ünï <b>")]
    rows = [{"group": group, "text": text} for group, text in texts]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def greedy(model, other, prompts, tmp_path_factory):
    task = DecodeTask(model=model, draft=other, prompts=prompts, max_new_tokens=TOKENS)
    return compare(task, name="g", runs=tmp_path_factory.mktemp("runs"))


def test_every_method_gives_greedy_text_and_the_promised_row(greedy):
    found = greedy.json()
    assert (found["family"], found["model"]) == ("decode", greedy.task.model)
    assert {r["method"] for r in found["rows"]} == set(decode_methods()) >= {"plain", "lookup", "chain", *PEERS}
    assert len(found["rows"]) == len(decode_methods()) * 2
    for row in found["rows"]:
        assert set(row) == {"method", "group", "seed", "quality", "cost", "fidelity", "ratios"}, row.get("error")
        assert row["fidelity"]["identical_to_greedy"] is True, row["method"]
        assert row["fidelity"]["tokens_per_forward"] >= 1
        assert row["cost"]["seconds"] > 0
        assert row["cost"]["tokens_per_second"] > 0
        assert row["ratios"]["vs_plain"] > 0
        assert row["ratios"]["vs_transformers"] > 0
    for row in found["rows"]:
        if row["method"] == "plain":
            assert row["ratios"]["vs_plain"] == 1
            assert row["fidelity"]["tokens_per_forward"] == 1
        if row["method"] == "transformers":
            assert row["ratios"]["vs_transformers"] == 1
            assert row["fidelity"]["tokens_per_forward"] == 1


def test_the_origin_of_every_token_is_told(greedy):
    for line in greedy.lines:
        raw, sample = line["raw"], line["raw"]["sample"]
        assert (
            len(raw["ids"])
            == raw["tokens"]
            == len(sample["step"])
            == len(sample["depth"])
            == len(sample["pieces"])
            == TOKENS
        )
        assert sample["step"] == sorted(sample["step"])
        assert set(sample["step"]) == set(range(raw["forwards"]))
        assert len(sample["times"]) == raw["forwards"]
        assert sample["times"] == sorted(sample["times"])
        assert sample["times"][-1] <= raw["seconds"] + 1e-3
        assert raw["accepted"] == sum(d > 0 for d in sample["depth"]) == raw["tokens"] - raw["forwards"]
        assert math.isfinite(raw["log_likelihood"])
        assert raw["memory_how"]
    accepted = {line["method"]: 0 for line in greedy.lines}
    for line in greedy.lines:
        accepted[line["method"]] += line["raw"]["accepted"]
    assert accepted["plain"] == accepted["transformers"] == 0


def test_pieces_are_the_text_also_where_a_character_is_several_tokens():
    from locum.bench.decode_runner import pieces

    def decode(ids):
        return bytes(ids).decode("utf-8", "replace")

    text = "a ü🦊 b€"
    made = pieces(decode, list(text.encode()))
    assert "".join(made) == text
    assert made[:5] == ["a", " ", "", "ü", ""]
    assert "".join(pieces(decode, list("a🦊".encode())[:-1])) == "a\ufffd"  # cut off inside a character


def test_a_perfect_draft_is_accepted(model, prompts, tmp_path):
    task = DecodeTask(
        model=model, draft=model, prompts=prompts, max_new_tokens=TOKENS, methods=("chain", "transformers-assisted")
    )
    result = compare(task, name="a", runs=tmp_path)
    by = {r["method"]: r for r in result.by("method")}
    assert by["chain"]["fidelity"]["tokens_per_forward"] > 2
    assert by["transformers-assisted"]["fidelity"]["tokens_per_forward"] > 1.3
    assert 0 < by["chain"]["cost"]["draft_share"] < 1
    assert 0 < by["transformers-assisted"]["cost"]["draft_share"] < 1
    assert list(by) == ["plain", "transformers", "transformers-assisted", "chain"]  # the references always run


def test_sampling_says_exact_law_and_repeats(model, other, prompts, tmp_path):
    task = DecodeTask(
        model=model, draft=other, prompts=prompts, max_new_tokens=8, temperature=0.8, methods=("chain", "lookup")
    )
    first, again = (compare(task, name=n, runs=tmp_path) for n in "ab")
    assert [line["raw"]["ids"] for line in first.lines] == [line["raw"]["ids"] for line in again.lines]
    for row in first.json()["rows"]:
        assert row["fidelity"]["identical_to_greedy"] is None
        assert row["fidelity"]["law"] == "exact law"
    assert "law" in first.task.columns


def test_the_report_shows_the_tokens(greedy):
    page = greedy.report.read_text("utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert set(data["methods"]) == set(decode_methods())
    assert [i["text"] for i in data["items"]] == ["Once upon a time", "abc abc abc abc", "ünï <b>"]
    assert "ünï <b>" not in page  # only escaped
    assert greedy.headline.endswith(".")


def test_the_task_is_cheap_to_make_and_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; from locum.bench.compare_decode import DecodeTask; DecodeTask(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shipped_prompts_are_taken_by_group():
    groups = [g for g, _ in DecodeTask(per_group=2).examples]
    assert sorted(groups) == ["code", "code", "copy", "copy", "free", "free"]
    assert len(DecodeTask(per_group=0).examples) > len(DecodeTask(per_group=2).examples)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_new_tokens", 0, "max_new_tokens must be >= 1, got 0"),
        ("max_new_tokens", -5, "max_new_tokens must be >= 1, got -5"),
        ("temperature", -0.1, "temperature must be finite and >= 0, got -0.1"),
        ("temperature", math.nan, "temperature must be finite and >= 0, got nan"),
        ("temperature", math.inf, "temperature must be finite and >= 0, got inf"),
        ("seeds", 0, "seeds must be >= 1, got 0"),
        ("per_group", -1, "per_group must be >= 0, got -1"),
        ("methods", ("plian",), "unknown method of decode 'plian': did you mean 'plain'"),
        ("prompts", "absent.txt", "'absent.txt' does not exist"),
        ("model", "", "model must be"),
    ],
)
def test_bad_input_is_refused_when_the_task_is_made(field, value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        DecodeTask(**{field: value})


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"\n \n", "is empty"), (b"caf\xe9\n", "not UTF-8")]
)
def test_bad_prompt_files_are_refused(tmp_path, content, message):
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        DecodeTask(prompts=str(path))


def test_models_that_do_not_fit_are_refused(model, prompts, tmp_path):
    foreign = save(tmp_path / "foreign", seed=2, vocab_size=128)
    with pytest.raises(UserError, match="vocabulary"):
        compare(DecodeTask(model=model, draft=foreign, prompts=prompts), name="a", runs=tmp_path / "runs")
    with pytest.raises(UserError, match="no model"):
        compare(DecodeTask(model="./absent", prompts=prompts), name="b", runs=tmp_path / "runs")
    task = DecodeTask(model=model, draft=model, prompts=prompts, max_new_tokens=5000)
    with pytest.raises(UserError, match="exceed the 4096 positions"):
        compare(task, name="c", runs=tmp_path / "runs")
