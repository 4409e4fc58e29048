"""``compare align``: every method on the tables, some on a tiny language model with LoRA; its promise, resuming, bad input."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from locum.bench.align_table import run_table
from locum.bench.align_world import PAIRS, World
from locum.bench.compare import Comparison, compare
from locum.bench.compare_align import TABLES_ONLY, AlignTask, align_methods
from locum.bench.engines import Unit
from locum.cli import main
from locum.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from fake import NASTY
from reading import Reader, assert_self_contained

FIGURES = {
    "quality": {"reward", "gained", "entropy", "length"},
    "cost": {"seconds", "preparation_seconds", "tokens_per_second", "peak_memory_mb"},
    "fidelity": {"kl", "accuracy"},
    "ratios": {"vs_dpo", "vs_dpo_interval", "gain_vs_dpo", "time_vs_dpo"},
}


def promised(result, methods, groups, seeds):
    found = json.loads(json.dumps(result.json()))
    assert set(found) == {"family", "task", "model", "rows"}
    assert found["family"] == "align"
    asked = [(m, g, s) for m in methods for g in groups for s in range(seeds)]
    assert [(r["method"], r["group"], r["seed"]) for r in found["rows"]] == asked
    for row in found["rows"]:
        assert set(row) == {"method", "group", "seed", *FIGURES}, row.get("error")
        for section, keys in FIGURES.items():
            assert set(row[section]) == keys
    return found["rows"]


# On the tables.


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    task = AlignTask(methods=("tdpo2", "tgdpo"), task="token-mdp", seeds=2, steps=20)
    return compare(task, name="t", runs=tmp_path_factory.mktemp("runs"))


def test_tables_give_the_promised_rows(tables):
    rows = promised(tables, ("dpo", "tdpo2", "tgdpo"), ("token-mdp",), 2)
    for row in rows:
        assert row["quality"]["gained"] > 0.1
        assert row["fidelity"]["kl"] > 0.01
        assert 0.6 < row["fidelity"]["accuracy"] < 0.9
        assert row["quality"]["length"] == 8
        assert row["cost"]["seconds"] > 0
        assert (row["cost"]["preparation_seconds"] > 0.3 * row["cost"]["seconds"]) == (row["method"] == "tgdpo")
        assert (row["ratios"]["vs_dpo"] == 0) == (row["method"] == "dpo")
    assert len({r["quality"]["reward"] for r in rows}) == 6  # two worlds, three methods


def test_a_table_s_curve_is_its_training_from_the_reference_on(tables):
    [first, *_] = [line["raw"] for line in tables.lines if line["method"] == "dpo"]
    curve = first["curve"]
    assert curve["step"] == list(range(21))
    assert {len(values) for values in curve.values()} == {21}
    assert curve["kl"][0] == pytest.approx(0, abs=1e-12)
    starts = {(line["seed"], line["raw"]["curve"]["reward"][0]) for line in tables.lines}
    assert len(starts) == 2  # one start per seed, the same for all methods
    assert first["settings"].startswith("DPO(beta=0.1")


def test_the_terminal_s_table_is_group_by_group_and_fits(tables):
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(tables.table())
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "token-mdp" in text
    assert re.search(r"tdpo2 .*[+-]0\.\d{3} \([+-]0\.\d{3} to [+-]0\.\d{3}\)", text)


def test_the_headline_is_honest(tables):
    task = tables.task

    def said(*rows):
        rows = [
            {"method": m, "group": "token-mdp", "ratios": {"vs_dpo": v, "vs_dpo_interval": limits}}
            for m, v, limits in [("dpo", 0.0, None), *rows]
        ]
        return task.headline([], rows)

    sure = said(("a", 0.3, [-0.1, 0.7]), ("b", 0.2, [0.1, 0.3]))
    assert sure.startswith(
        "On token-mdp b beats DPO at equal KL: reward +0.200 (95 % interval +0.100 to +0.300 over 2 seeds)."
    )
    assert said(("a", 0.3, [-0.1, 0.7])).startswith(
        "On token-mdp no method surely beats DPO at equal KL: a has reward +0.300"
    )
    assert "no method beats DPO" in said(("a", -0.2, [-0.3, -0.1]), ("b", -0.4, [-0.5, -0.3]))
    assert "so no interval" in said(("a", 0.3, None))
    assert said(("a", 0.3, [0.1, 0.5]), ("b", 0.2, [0.1, 0.3])).endswith("; so does b.")
    assert said().startswith("Nothing to say yet")
    more = said(("rto", 0.9, [0.8, 1.0]), ("b", 0.2, [0.1, 0.3]))  # it was given more: it does not win
    assert more.startswith("On token-mdp b beats DPO")
    assert more.endswith("Not on the same budget, with samples of their own: rto +0.900.")


@pytest.fixture(scope="module")
def world():
    return World.of(0, steps=8, batch_size=16, lr=0.02, beta=0.1)


@pytest.mark.parametrize("method", align_methods())
def test_every_method_trains_on_a_table(method, world):
    row = json.loads(json.dumps(run_table(method, world), allow_nan=False))
    curve = row["curve"]
    assert curve["step"] == list(range(9))
    assert curve["kl"][-1] > 1e-4
    assert curve["reward"][0] == pytest.approx(float(world.mdp.value(world.mdp.ref_logits).mean()))
    assert row["tokens"] % (8 * 16 * 9) == 0
    notes = {"selm": "samples and labels", "rto": "samples its own", "treg": "cannot be asked", "tgdpo": "guide is DPO"}
    assert notes.get(method, "") in row["settings"]
    if method in ("dpo", "selm", "rto"):
        assert run_table(method, world)["curve"] == curve


def test_worlds_have_the_same_pairs_for_all():
    a, b = (World.of(3, 10, 8, 0.02, 0.1) for _ in range(2))
    assert torch.equal(a.pairs.chosen, b.pairs.chosen)
    assert len(a.pairs.prompt) == PAIRS
    assert not torch.equal(a.pairs.chosen[: len(a.held_out.prompt)], a.held_out.chosen)


KILLED = """
from locum.bench.compare import compare
from locum.bench.compare_align import AlignTask
compare(AlignTask(methods=("tdpo1",), task="token-mdp", seeds=3, steps=30), name="a", runs={runs!r})
"""


@pytest.mark.slow
def test_killed_then_resumed_measures_only_what_is_missing(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(runs=str(tmp_path))], stderr=subprocess.DEVNULL)
    results = tmp_path / "a" / "results.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (results.exists() and results.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = [json.loads(line) for line in results.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 3 <= len(kept) < 6
    task = AlignTask(methods=("tdpo1",), task="token-mdp", seeds=3, steps=30)
    result = compare(task, name="a", resume=True, runs=tmp_path)
    assert result.rows[: len(kept)] == kept
    assert [(r["method"], r["seed"]) for r in result.rows] == [(m, s) for s in range(3) for m in ("dpo", "tdpo1")]
    assert all(line["refs"] for line in result.lines)  # paired with DPO's run of the seed, whichever process it was
    whole = compare(task, name="b", runs=tmp_path).json()["rows"]
    for one, other in zip(result.json()["rows"], whole, strict=True):
        for section in ("quality", "fidelity"):
            assert one[section] == other[section]


# On a language model.


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs that can be told apart by their letters; two prompts have two pairs each."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"say {i // 2 if i < 4 else i}:", "chosen": "abc"[i % 3] * 4, "rejected": "xyz"[i % 3] * (3 + i % 2)}
        for i in range(30)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return str(path)


def on_data(model_folders, pairs, **settings):
    usual = {"methods": ("dpo", "tdpo2", "tgdpo"), "steps": 12, "batch_size": 4, "lr": 0.01, "max_new_tokens": 6}
    usual |= {"lora_rank": 4, "checkpoints": 2}
    return AlignTask(model=model_folders["target"], data=pairs, **usual | settings)


@pytest.fixture(scope="module")
def on_pairs(model_folders, pairs, tmp_path_factory):
    """A comparison on a user's own pairs, and the ids of every batch that a method was trained on."""
    from locum.align.trainer import Trainer

    seen: dict[str, list] = {}
    plain = Trainer.compute_loss

    def watched(self, model, inputs, *args, **more):
        seen.setdefault(type(self.method).__name__, []).append(inputs["input_ids"].tolist())
        return plain(self, model, inputs, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "compute_loss", watched)
        result = compare(on_data(model_folders, pairs), name="d", runs=tmp_path_factory.mktemp("runs"))
    return result, seen


def test_own_pairs_give_the_promised_rows(on_pairs):
    result, _ = on_pairs
    for row in promised(result, ("dpo", "tdpo2", "tgdpo"), ("data",), 1):
        assert row["quality"]["reward"] is None
        assert row["quality"]["gained"] is None
        assert row["fidelity"]["accuracy"] > 0.9  # the letters give it away
        assert row["fidelity"]["kl"] > 0.01
        assert 1 <= row["quality"]["length"] <= 6
        assert row["ratios"]["vs_dpo"] is not None
    assert "accuracy on held-out pairs" in result.headline
    assert "reward" not in result.task.columns
    for line in result.lines:
        curve = line["raw"]["curve"]
        assert curve["step"] == [0, 6, 12]
        assert curve["accuracy"][0] == 0.5
        assert curve["kl"][0] == 0
        assert curve["reward"] is None
        assert [len(x) for x in line["raw"]["by_prompt"]["score"]] == [len(result.task.rows[1])] * 3


def test_all_methods_get_the_same_batches(on_pairs):
    _, seen = on_pairs
    assert set(seen) == {"DPO", "TDPO2", "TGDPO"}
    assert len(seen["DPO"]) == 12  # once: TGDPO's guide is DPO's own run
    assert seen["DPO"] == seen["TDPO2"] == seen["TGDPO"]


def test_no_prompt_is_trained_on_and_held_out(model_folders, pairs):
    train, held_out = on_data(model_folders, pairs).rows
    assert len(train) + len(held_out) == 30
    assert 2 <= len(held_out) <= 7
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}


def test_the_base_comes_back_and_a_lost_guide_is_trained_again(model_folders, pairs):
    from locum.bench.align_runner import AlignRunner

    task = on_data(model_folders, pairs, steps=4, checkpoints=1)
    whole, alone = AlignRunner(task.plan), AlignRunner(task.plan)
    before = {name: p.clone() for name, p in whole.lm.model.named_parameters()}
    rows = {m: whole(Unit(m, 0, 0, "data")) for m in task.chosen}
    after = dict(whole.lm.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = alone(Unit("tgdpo", 0, 0, "data"))  # as in a run that is gone on with, or on another worker
    assert again["curve"]["kl"] == pytest.approx(rows["tgdpo"]["curve"]["kl"], rel=1e-5)
    assert again["preparation_seconds"] > rows["dpo"]["preparation_seconds"]


@pytest.mark.slow
def test_methods_with_adapters_of_their_own(model_folders, pairs, tmp_path):
    methods = [m for m in align_methods() if m not in (*TABLES_ONLY, "dpo", "tdpo2", "tgdpo")]
    task = on_data(model_folders, pairs, methods=tuple(methods), steps=2, checkpoints=1, held_out=2)
    result = compare(task, name="m", runs=tmp_path)
    promised(result, task.chosen, ("data",), 1)
    assert {"sft", "treg", "sparsepo", "cdpo", "aligndistil"} <= set(task.chosen)


def test_sentiment_is_rewarded_sentence_by_sentence(model_folders, tmp_path):
    pytest.importorskip("vaderSentiment", reason="needs the extra 'align'")
    task = AlignTask(
        model=model_folders["target"],
        task="sentiment",
        methods=("dpo",),
        steps=2,
        batch_size=2,
        held_out=3,
        checkpoints=1,
    )
    [row] = compare(task, name="s", runs=tmp_path).lines
    assert row["raw"]["score"] == "reward"
    assert all(-1 <= r <= 1 for s in row["raw"]["samples"] for r in s["reward"])
    assert len(row["raw"]["samples"]) == 3
    assert row["raw"]["curve"]["length"][0] <= 28


def test_a_response_ends_with_its_first_sentence(model_folders):
    from locum.bench.align_runner import AlignRunner

    runner = AlignRunner(AlignTask(model=model_folders["target"], task="sentiment", held_out=2).plan)
    texts = [" it was much better than before. And then", " it goes on and on", " it was a very good day indeed!"]
    cut, ids = runner.observer.ends([runner.lm.encode(text) for text in texts])
    assert cut == [" it was much better than before.", texts[1], texts[2]]
    assert [runner.lm.decode(y) for y in ids] == cut


def test_progress_is_told_within_a_training(model_folders, pairs):
    from locum.bench.align_runner import AlignRunner

    runner = AlignRunner(on_data(model_folders, pairs, steps=4).plan)
    heard = []
    runner.tell = lambda unit, share, what: heard.append((share, what))
    runner(Unit("dpo", 0, 0, "data"))
    shares = [share for share, _ in heard]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert heard[0] == (0.0, "measuring the reference")
    assert "step 3 of 4" in [what for _, what in heard]


# The report.


def test_the_report_shows_curves_differences_and_samples(tables):
    page = tables.report.read_text("utf-8")
    assert_self_contained(page)
    data = json.loads(Reader(page).data["script application/json"])
    assert data["methods"] == ["dpo", "tdpo2", "tgdpo"]
    [group] = data["groups"]
    assert group["name"] == "token-mdp"
    assert set(group["after"]) == {"dpo", "tdpo2", "tgdpo"}
    assert len(group["before"]) == len(group["after"]["dpo"]) == 8
    assert {"What distance buys", "Against DPO at equal KL", "Step by step", "What it costs"} <= set(
        re.findall(r"<h2>([^<]*)</h2>", page)
    )
    assert page.count('class="line c1"') == 5  # the frontier, DPO's distance, and reward, KL and entropy step by step
    assert page.count('class="line c0"') == 4


def test_nothing_of_a_text_becomes_markup(on_pairs, tmp_path):
    result, _ = on_pairs
    rows = json.loads(json.dumps(result.rows))
    for row in rows:
        row["raw"]["settings"] = NASTY
        row["environment"]["machine"] = NASTY
        for sample in row["raw"]["samples"]:
            sample |= {"prompt": NASTY, "before": NASTY, "after": NASTY}
    rows[1] = {k: v for k, v in rows[1].items() if k != "raw"} | {"error": NASTY}
    page = Comparison(result.task, tmp_path, rows).html()
    assert_self_contained(page)
    data = json.loads(Reader(page).data["script application/json"])
    assert data["groups"][0]["before"][0] == {"prompt": NASTY, "text": NASTY, "reward": None}
    assert "What failed" in page


def test_a_run_with_nothing_in_it_still_has_a_report(tables, tmp_path):
    page = Comparison(tables.task, tmp_path, []).html()
    assert_self_contained(page)
    assert "Nothing to say yet" in page


# What a user asks for.


def test_the_task_is_cheap_to_make_and_needs_no_torch():
    code = "import sys; from locum.bench.compare_align import AlignTask; AlignTask(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_compared():
    usual = AlignTask()
    assert usual.chosen == ("dpo", "tdpo2", "tgdpo")
    assert usual.groups == ("token-mdp", "sentiment")
    assert len(usual.units()) == 3 * 3 + 3
    every = AlignTask(methods=("all",))
    assert set(every.chosen) == set(align_methods())
    assert {u.method for u in every.units() if u.group == "sentiment"} == set(align_methods()) - set(TABLES_ONLY)
    assert AlignTask(methods=("TDPO1",)).chosen == ("dpo", "tdpo1")
    assert json.loads(json.dumps(usual.config())) == usual.config()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("tdpo3",)}, "unknown method of align 'tdpo3': did you mean"),
        ({"methods": ("selm",)}, "method selm samples and labels in rounds"),
        ({"seeds": 0}, "seeds must be >= 1, got 0"),
        ({"steps": -1}, "steps must be >= 1, got -1"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"lr": 0.0}, "lr must be finite and > 0, got 0.0"),
        ({"lr": math.nan}, "lr must be finite and > 0, got nan"),
        ({"beta": math.inf}, "beta must be finite and > 0, got inf"),
        ({"lora_rank": 0}, "lora_rank must be >= 1, got 0"),
        ({"checkpoints": 0}, "checkpoints must be >= 1, got 0"),
        ({"held_out": 1}, "held_out must be >= 2, got 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"model": " "}, "model must be a model's name"),
        ({"data": "absent.jsonl"}, "'absent.jsonl' does not exist"),
        ({"data": "absent.jsonl", "task": "sentiment"}, "give --data or --task sentiment, not both"),
    ],
)
def test_bad_input_is_refused_when_the_task_is_made(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        AlignTask(**settings)


def test_too_few_pairs_and_a_model_that_is_not_there(model_folders, pairs, tmp_path):
    few = tmp_path / "few.jsonl"
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    few.write_text("\n".join([json.dumps(row)] * 30), "utf-8")
    with pytest.raises(UserError, match="30 pairs over 1 prompts: too few to hold"):
        AlignTask(data=str(few))
    with pytest.raises(UserError, match="no model"):
        compare(on_data(model_folders | {"target": "./absent"}, pairs), name="a", runs=tmp_path / "runs")


def test_a_mistake_on_the_command_line_is_one_sentence(capsys):
    for args, said in ((["--lr", "0"], "lr must be"), (["--methods", "tdpo3"], "tdpo3"), (["--task", "x"], "task")):
        assert main(["compare", "align", *args]) == 2
        err = capsys.readouterr().err
        assert err.startswith("locum: ")
        assert said in err
        assert err.count("\n") == 1


def test_help_names_every_method_and_flag(capsys):
    for args in ([], ["align"]):
        with pytest.raises(SystemExit, match="0"):
            main(["compare", *args, "--help"])
    words = set(re.findall(r"[\w-]+", capsys.readouterr().out))
    assert {"align", "decode"} <= words
    assert set(align_methods()) <= words
    assert {"--methods", "--task", "--data", "--steps", "--lora-rank", "--resume", "--engine", "--json"} <= words
