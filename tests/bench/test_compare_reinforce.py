"""``compare reinforce``: recipes on the digit chain and on texts; its promise, equal tokens, resuming, the report, bad input."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from locum.bench.compare import Comparison, compare
from locum.bench.compare_reinforce import ReinforceTask
from locum.bench.engines import Unit
from locum.bench.measures import summary
from locum.bench.reinforce_measures import MEASURES, along
from locum.bench.reinforce_plan import CHAIN, DATA, GYM, RECIPES
from locum.cli import main
from locum.errors import UserError
from locum.tasks import gym_sums
from locum.tasks.digit_chain import DigitChain

sys.path.insert(0, str(Path(__file__).parent))
from fake import NASTY
from reading import Reader, assert_self_contained

FIGURES = {
    "quality": {"reward", "area", "best"},
    "cost": {
        "sampled_tokens",
        "trained_tokens",
        "seconds",
        "rollout_seconds",
        "old_policy_seconds",
        "update_seconds",
        "peak_memory_mb",
    },
    "fidelity": {"level_groups", "kept_rows", "kept_tokens", "clipped", "drift", "kl", "entropy", "length"},
    "ratios": {
        *(f"vs_grpo{at}{interval}" for at in ("", "_trained", "_end") for interval in ("", "_interval")),
        "sign_p",
        "time_vs_grpo",
        "sampled_vs_grpo",
        "trained_vs_grpo",
    },
}
COMBINED = "dapo + hapo.clip + d3s(rows=(2, 4))"


def promised(result, methods, groups, seeds):
    found = json.loads(json.dumps(result.json()))
    assert set(found) == {"family", "task", "model", "rows"}
    assert found["family"] == "reinforce"
    asked = [(m, g, s) for m in methods for g in groups for s in range(seeds)]
    assert [(r["method"], r["group"], r["seed"]) for r in found["rows"]] == asked
    for row in found["rows"]:
        assert set(row) == {"method", "group", "seed", *FIGURES}, row.get("error")
        for section, keys in FIGURES.items():
            assert set(row[section]) == keys
    return found["rows"]


# The figures, on curves whose answer is known.


def raw(sampled, reward, trained=None, **more):
    curve = {"step": list(range(len(reward))), "sampled": sampled, "trained": trained or sampled, "reward": reward}
    curve |= dict.fromkeys(("best", "entropy", "kl", "length"), reward)
    cost = {"sampled_tokens": sampled[-1], "trained_tokens": 1.0, "seconds": 2.0, "phases": {}, "peak_memory_mb": None}
    return {"curve": curve, "log": {}, **cost, **more}


def line(mine, theirs, method="mine"):
    return {"method": method, "raw": mine, "refs": {} if theirs is None else {"grpo": theirs}}


def figures(*lines):
    found = summary(list(lines), MEASURES)
    return {key: value for section in found.values() for key, value in section.items()}


def test_at_equal_tokens_the_one_who_spends_less_is_ahead():
    frugal, lavish = raw([0, 50, 100], [0.0, 0.4, 0.8]), raw([0, 100, 200], [0.0, 0.4, 0.8])
    found = figures(line(frugal, lavish))
    # Levels 25, 50, 75, 100 of the common 100: slopes .008 and .004, mean level 62.5.
    assert found["vs_grpo"] == pytest.approx(0.004 * 62.5, abs=1e-12)
    assert found["vs_grpo_end"] == 0  # at the end they are alike
    assert found["area"] == pytest.approx(0.4)
    assert found["sampled_vs_grpo"] == 0.5
    back = figures(line(lavish, frugal))
    assert back["vs_grpo"] == pytest.approx(-0.004 * 62.5, abs=1e-12)


def test_sampled_and_trained_tokens_are_two_comparisons():
    selective = raw([0, 100], [0.0, 0.5], trained=[0, 10])
    plain = raw([0, 100], [0.0, 0.8], trained=[0, 100])
    found = figures(line(selective, plain))
    assert found["vs_grpo"] == pytest.approx(-0.003 * 62.5)
    assert found["vs_grpo_trained"] == pytest.approx((0.05 - 0.008) * 6.25)
    assert found["vs_grpo_end"] == pytest.approx(-0.3)


def test_intervals_are_of_paired_differences_over_seeds():
    lines = []
    for offset, gap in ((0.0, 0.1), (0.5, 0.2), (0.3, 0.3)):
        mine, theirs = raw([0, 8], [offset, offset + gap]), raw([0, 8], [offset, offset])
        lines.append(line(mine, theirs))
    found = figures(*lines)
    assert found["vs_grpo_end"] == pytest.approx(0.2)
    low, high = found["vs_grpo_end_interval"]
    assert 0.1 - 1e-9 <= low < 0.2 < high <= 0.3 + 1e-9
    assert found["sign_p"] == 1 / 8
    alone = figures(lines[0])
    assert alone["vs_grpo_interval"] is None
    assert alone["sign_p"] is None
    itself = figures(*(line(li["refs"]["grpo"], li["refs"]["grpo"], "grpo") for li in lines))
    assert (itself["vs_grpo"], itself["vs_grpo_interval"], itself["sign_p"]) == (0, None, None)


def test_of_samples_the_interval_is_over_prompts_too():
    start, later = [0.0, 1.0, 0.0, 1.0], [0.5, 1.0, 0.5, 1.0]
    theirs = raw([0, 8], [0.5, 0.5], by_prompt={"reward": [start, start]})
    mine = raw([0, 8], [0.5, 0.75], by_prompt={"reward": [start, later]})
    low, high = figures(line(mine, theirs))["vs_grpo_end_interval"]
    assert 0 <= low < 0.25 < high <= 0.5


def test_nothing_is_compared_where_nothing_was_spent():
    idle = raw([0, 100], [0.5, 0.5], trained=[0, 0])
    found = figures(line(idle, raw([0, 100], [0.5, 0.6])))
    assert found["vs_grpo_trained"] is None
    assert found["vs_grpo_end"] == pytest.approx(-0.1)
    assert figures(line(idle, None))["vs_grpo"] is None


def test_a_curve_goes_as_far_as_all_seeds_went():
    lines = [line(raw([0, 10, 20], [0.0, 0.5, 1.0]), None), line(raw([0, 20, 40], [0.0, 0.5, 1.0]), None)]
    found = along(lines, "sampled", points=3)
    assert [x for x, _, _ in found] == [0, 10, 20]
    assert [y for _, y, _ in found] == pytest.approx([0, 0.375, 0.75])
    assert [x for x, _, _ in along(lines, "step")] == [0, 1, 2]


def test_a_curve_s_band_is_the_distance_from_grpo_of_the_same_seed():
    lines = []
    for offset, gap in ((0.0, 0.1), (0.5, 0.3)):  # worlds apart
        mine, theirs = raw([0, 10, 20], [offset, offset + gap, offset + gap]), raw([0, 10], [offset, offset])
        lines.append(line(mine, theirs))
    start, middle, end = along(lines, "sampled")
    assert start == (0, 0.25, (0.25, 0.25))
    assert middle[1] == pytest.approx(0.45)
    assert middle[2] == pytest.approx((0.35, 0.55))
    assert end[2] is None  # GRPO did not go so far


# On the digit chain.


@pytest.fixture(scope="module", autouse=True)
def quick_chain():
    """The digit chain with a policy that is warmed up in a moment."""
    short = replace(DigitChain.hetero(), warm_steps=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DigitChain, "hetero", staticmethod(lambda: short))
        yield


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    task = ReinforceTask(
        methods=("d3s", COMBINED, "spotree", "ppo", "grpo + kl"),
        task="digit-chain",
        seeds=2,
        steps=4,
        checkpoints=2,
        held_out=20,
    )
    return compare(task, name="c", runs=tmp_path_factory.mktemp("runs"))


def test_the_chain_gives_the_promised_rows(chain):
    trained = Comparison(chain.task, chain.folder, [r for r in chain.rows if "raw" in r])
    methods = ("grpo", "d3s", COMBINED, "spotree", "grpo + kl")
    for row in promised(trained, methods, (CHAIN,), 2):
        assert 0.01 < row["quality"]["reward"] < row["quality"]["best"] < 1
        assert row["cost"]["seconds"] > 0
        assert row["fidelity"]["kl"] > 0
        assert 8 <= row["fidelity"]["length"] <= 16
        assert (row["fidelity"]["kept_tokens"] < 1) == (row["method"] not in ("grpo", "grpo + kl"))
        assert (row["ratios"]["trained_vs_grpo"] < 0.5) == (row["method"] not in ("grpo", "grpo + kl"))
        assert row["cost"]["peak_memory_mb"] is None


def test_a_recipe_that_cannot_run_there_is_a_row_with_the_reason(chain):
    failed = [r for r in chain.rows if "error" in r]
    assert {(r["method"], r["seed"]) for r in failed} == {("ppo", 0), ("ppo", 1)}
    assert all("the recipe ppo needs a critic, and the digit chain's policy has none" in r["error"] for r in failed)
    assert "What failed" in chain.report.read_text("utf-8")


def test_all_recipes_begin_alike_and_grpo_is_paired(chain):
    rows = [r for r in chain.lines if "raw" in r]
    for seed in range(2):
        of_seed = [r for r in rows if r["seed"] == seed]
        assert len({r["raw"]["curve"]["reward"][0] for r in of_seed}) == 1
        assert len({tuple(s["before"] for s in r["raw"]["samples"]) for r in of_seed}) == 1
        assert all(r["refs"]["grpo"] == of_seed[0]["raw"] for r in of_seed)
    [first, *_] = [r["raw"] for r in rows]
    assert first["curve"]["step"] == [0, 2, 4]
    assert first["curve"]["kl"][0] == pytest.approx(0, abs=1e-12)
    assert first["curve"]["sampled"][-1] == first["sampled_tokens"]
    assert {len(values) for values in first["log"].values()} == {4}


def test_rows_are_those_of_another_process_and_another_order(chain, tmp_path):
    task = ReinforceTask(methods=(COMBINED,), task="digit-chain", seeds=2, steps=4, checkpoints=2, held_out=20)
    again = compare(task, name="c", runs=tmp_path)
    mine, theirs = ([r for r in c.json()["rows"] if r["method"] == COMBINED] for c in (again, chain))
    for a, b in zip(mine, theirs, strict=True):
        assert a["quality"] == b["quality"]
        assert a["fidelity"] == b["fidelity"]
        assert a["ratios"]["vs_grpo"] == b["ratios"]["vs_grpo"]


def test_a_run_goes_on_where_it_was(chain, tmp_path):
    for name in ("config.yaml", "results.jsonl"):
        (tmp_path / "c").mkdir(exist_ok=True)
        text = (chain.folder / name).read_text("utf-8")
        kept = "".join(text.splitlines(keepends=True)[:5]) if name == "results.jsonl" else text
        (tmp_path / "c" / name).write_text(kept, "utf-8")
    result = compare(chain.task, name="c", resume=True, runs=tmp_path)
    done = [r for r in result.rows if "raw" in r]
    assert len(done) == 10
    assert [r["method"] for r in result.rows[:5]] == [r["method"] for r in chain.rows[:5]]
    for a, b in zip(result.json()["rows"], chain.json()["rows"], strict=True):
        assert a["quality"] == b["quality"]


def test_the_terminal_s_table_fits(chain):
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(chain.table())
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"d3s .*[+-]0\.\d{3} \([+-]0\.\d{3} to [+-]0\.\d{3}\)", text)
    assert re.search(r"ppo .*failed", text)


def test_the_headline_is_honest(chain):
    def said(*rows):
        rows = [
            {"method": m, "group": CHAIN, "ratios": {"vs_grpo": v, "vs_grpo_interval": limits}}
            for m, v, limits in [("grpo", 0.0, None), *rows]
        ]
        return chain.task.headline([], rows)

    assert said(("a", 0.3, [-0.1, 0.7]), ("b", 0.2, [0.1, 0.3])) == (
        "On digit-chain b beats GRPO at equal sampled tokens: reward +0.200 (95 % interval +0.100 to +0.300 over 2 seeds)."
    )
    assert said(("a", 0.3, [-0.1, 0.7])).startswith("On digit-chain no method surely beats GRPO")
    assert said().startswith("Nothing to say yet")


# On texts.


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Problems without an answer, and a reward for small letters."""
    folder = tmp_path_factory.mktemp("problems")
    rows = [{"prompt": f"say {i // 2 if i < 4 else i}:"} for i in range(30)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    said = "def small(prompts, completions, **columns):\n    return [float(c[:1].islower()) for c in completions]\n"
    (folder / "letters.py").write_text(said, "utf-8")
    return {"data": str(folder / "problems.jsonl"), "reward": f"{folder}/letters.py:small"}


def on_data(model_folders, problems, **settings):
    usual = {"methods": ("rloo", "ppo"), "steps": 4, "prompts": 4, "lr": 0.02, "max_new_tokens": 4, "checkpoints": 2}
    return ReinforceTask(model=model_folders["target"], **problems, **usual | {"lora_rank": 4} | settings)


@pytest.fixture(scope="module")
def on_texts(model_folders, problems, tmp_path_factory):
    return compare(on_data(model_folders, problems, answers=2), name="d", runs=tmp_path_factory.mktemp("runs"))


def test_own_problems_give_the_promised_rows(on_texts):
    for row in promised(on_texts, ("grpo", "rloo", "ppo"), (DATA,), 1):
        assert 0 <= row["quality"]["reward"] <= row["quality"]["best"] <= 1
        assert row["fidelity"]["kl"] > 1e-4
        assert 1 <= row["fidelity"]["length"] <= 4
        assert row["cost"]["peak_memory_mb"] is None or row["cost"]["peak_memory_mb"] >= 0
        assert (row["ratios"]["vs_grpo_interval"] is None) == (row["method"] == "grpo")
    few = len(on_texts.task.rows[1])
    for made in on_texts.lines:
        assert made["raw"]["curve"]["step"] == [0, 2, 4]
        assert made["raw"]["curve"]["kl"][0] == pytest.approx(0, abs=1e-5)
        assert [len(x) for x in made["raw"]["by_prompt"]["reward"]] == [few] * 3
    assert "over held-out problems" in on_texts.headline


def test_no_prompt_is_trained_on_and_held_out(on_texts):
    train, held_out = on_texts.task.rows
    assert len(train) + len(held_out) == 30
    assert 2 <= len(held_out) <= 7
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}


@pytest.fixture
def tiny_sums(monkeypatch, tmp_path_factory):
    """The sums with a model that is made in a moment."""
    pytest.importorskip("reasoning_gym", reason="needs the extra 'reinforce'")
    monkeypatch.setenv("LOCUM_CACHE", str(tmp_path_factory.mktemp("cache")))
    small = {"train": 40, "layers": 1, "width": 16, "steps": 3, "batch": 4}
    monkeypatch.setattr(gym_sums, "world", partial(gym_sums.world, **small))


def test_sums_are_learnt_by_a_model_of_the_seed_s_own(tiny_sums, tmp_path):
    settings = {"seeds": 2, "steps": 2, "prompts": 2, "group_size": 4, "held_out": 6, "answers": 2, "checkpoints": 2}
    task = ReinforceTask(methods=("rloo",), task="gym-sums", max_new_tokens=6, **settings)
    result = compare(task, name="g", runs=tmp_path)
    rows = promised(result, ("grpo", "rloo"), (GYM,), 2)
    assert all(row["cost"]["trained_tokens"] == 2 * row["cost"]["sampled_tokens"] for row in rows)  # two epochs
    starts = {line["seed"]: line["raw"]["samples"] for line in result.lines}
    assert [s["prompt"] for s in starts[0]] != [s["prompt"] for s in starts[1]]
    assert all(re.fullmatch(r"-?\d([+-]\d){3,4}=", s["prompt"]) for s in starts[0])
    assert all("device" not in line["environment"] for line in result.lines)
    said = []
    runner = task.open()
    runner.tell = lambda unit, share, what: said.append(what)
    runner(Unit("grpo", 2, 1, GYM))
    assert said[0] == "training the sums, 1 of 3"


def test_a_model_that_is_named_gets_sums_in_words(model_folders, tmp_path):
    pytest.importorskip("reasoning_gym", reason="needs the extra 'reinforce'")
    settings = {"steps": 1, "prompts": 2, "held_out": 3, "checkpoints": 1, "max_new_tokens": 3}
    task = ReinforceTask(methods=("grpo",), model=model_folders["target"], **settings)
    [row] = compare(task, name="n", runs=tmp_path).lines
    assert "arithmetic" in row["raw"]["samples"][0]["prompt"]
    assert row["environment"]["device"] == "cpu"
    assert task.config()["model"] == model_folders["target"]


@pytest.mark.parametrize("rank", [0, 4])
def test_the_model_comes_back_as_it_was(model_folders, problems, rank):
    from locum.bench.reinforce_runner import ReinforceRunner

    runner = ReinforceRunner(on_data(model_folders, problems, steps=2, checkpoints=1, lora_rank=rank).plan)
    model = runner.worlds[DATA].lm.model
    before = {name: p.clone() for name, p in model.named_parameters()}
    rows = [runner(Unit(m, 0, 0, DATA)) for m in ("ppo", "grpo", "ppo")]
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert rows[0]["curve"] == rows[2]["curve"]
    assert rows[1]["curve"]["kl"][-1] > 0


def test_a_group_size_is_for_independent_completions(model_folders, problems):
    from locum.bench.reinforce_plan import recipe_of

    assert recipe_of("dapo + d3s", 4).sample.group_size == 4
    assert recipe_of("ppo", 4).sample.group_size == 1
    assert recipe_of("spotree", 4) == recipe_of("spotree", None)


def test_progress_is_told_within_a_training(chain):
    from locum.bench.reinforce_runner import ReinforceRunner

    runner, heard = ReinforceRunner(chain.task.plan), []
    runner.tell = lambda unit, share, what: heard.append((share, what))
    runner(Unit("grpo", 0, 0, CHAIN))
    shares = [share for share, _ in heard]
    assert shares == sorted(shares)
    assert heard[0] == (0.0, "measuring at step 0 of 4")
    assert "step 3 of 4" in [what for _, what in heard]


# The report.


def test_the_report_shows_curves_pipelines_and_samples(chain):
    page = chain.report.read_text("utf-8")
    assert_self_contained(page)
    data = json.loads(Reader(page).data["script application/json"])
    assert data["start"] == "before training"
    [group] = data["groups"]
    assert set(group["after"]) == {"grpo", "d3s", COMBINED, "spotree", "grpo + kl"}
    assert len(group["before"]) == len(group["after"]["d3s"]) == 12
    headings = set(re.findall(r"<h2>([^<]*)</h2>", page))
    assert {"What tokens buy", "Against GRPO at equal tokens", "What it stands on", "What it costs"} <= headings
    for own in ("hapoclip", "d3s(rows=(2, 4))"):
        assert re.search(rf'class="stage own"[^>]*><small>[^<]*</small><span>{re.escape(own)}</span>', page)
    assert re.search(r'class="stage other"[^>]*><small>group filter</small><span>informative</span>', page)
    assert page.count("<small>every minibatch</small>") == 5
    assert "method: reinforce." in page or "method: locum.reinforce." in page


def test_nothing_of_a_text_becomes_markup(on_texts, tmp_path):
    rows = json.loads(json.dumps(on_texts.rows))
    for row in rows:
        row["raw"]["settings"] = row["raw"]["recipe"]["yaml"] = NASTY
        row["raw"]["recipe"]["pipeline"] = [
            {"slot": NASTY, "stage": NASTY, "from": NASTY, "each": each} for each in ("batch", "minibatch")
        ]
        row["environment"]["machine"] = NASTY
        for sample in row["raw"]["samples"]:
            sample |= {"prompt": NASTY, "before": NASTY, "after": NASTY}
    rows[1] = {k: v for k, v in rows[1].items() if k != "raw"} | {"error": NASTY}
    page = Comparison(on_texts.task, tmp_path, rows).html()
    assert_self_contained(page)
    data = json.loads(Reader(page).data["script application/json"])
    assert data["groups"][0]["before"][0]["prompt"] == NASTY


def test_a_run_with_nothing_in_it_still_has_a_report(chain, tmp_path):
    page = Comparison(chain.task, tmp_path, []).html()
    assert_self_contained(page)
    assert "Nothing to say yet" in page


# What a user asks for.


def test_the_task_is_cheap_to_make_and_needs_no_torch():
    code = "import sys; from locum.bench.compare_reinforce import ReinforceTask as T; T(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_compared():
    usual = ReinforceTask()
    assert usual.groups == (CHAIN, GYM)
    assert usual.recipes(CHAIN) == RECIPES[CHAIN]
    assert usual.recipes(GYM) == RECIPES[GYM]
    assert len(usual.units()) == 5 * len(RECIPES[CHAIN]) + 3 * len(RECIPES[GYM])
    assert usual.chosen == RECIPES[CHAIN]
    assert json.loads(json.dumps(usual.config())) == usual.config()
    named = ReinforceTask(model="smollm2-135m-instruct")
    assert named.groups == (GYM,)
    assert named.chosen == RECIPES[DATA]
    own = ReinforceTask(methods=("dapo  +  d3s", "grpo", "dapo + d3s"), task="digit-chain")
    assert own.chosen == ("grpo", "dapo + d3s")


def test_every_usual_recipe_is_one():
    from locum.bench.reinforce_plan import recipe_of

    for text in {m for group in RECIPES.values() for m in group}:
        assert recipe_of(text, None).advantage is not None


def test_recipes_on_the_command_line_may_hold_commas(capsys, tmp_path):
    args = ["--methods", "d3s(rows=(2, 4)),rloo; dapo + clip(low=0.1, high=0.3)", "--task", "digit-chain", "--json"]
    tiny = ["--seeds", "1", "--steps", "1", "--checkpoints", "1", "--held-out", "4"]
    assert main(["compare", "reinforce", *args, *tiny, "--runs", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["method"] for r in rows] == ["grpo", "d3s(rows=(2, 4))", "rloo", "dapo + clip(low=0.1, high=0.3)"]
    assert all("error" not in r for r in rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("d3z",)}, "unknown piece of a recipe 'd3z': did you mean"),
        ({"methods": ("grpo + d3s(rows=(0, 2))",)}, "D3S.rows must be two numbers"),
        ({"methods": ("gdpo",)}, "the recipe gdpo asks another kind of policy than one that writes from left to right"),
        ({"seeds": 0}, "seeds must be >= 1, got 0"),
        ({"steps": -1}, "steps must be >= 1, got -1"),
        ({"prompts": 0}, "prompts must be >= 1, got 0"),
        ({"group_size": 1}, "group_size must be >= 2, got 1"),
        ({"lr": 0.0}, "lr must be finite and > 0, got 0.0"),
        ({"lr": math.nan}, "lr must be finite and > 0, got nan"),
        ({"lora_rank": -1}, "lora_rank must be >= 0, got -1"),
        ({"max_prompt_length": 0}, "max_prompt_length must be >= 1, got 0"),
        ({"checkpoints": 0}, "checkpoints must be >= 1, got 0"),
        ({"held_out": 1}, "held_out must be >= 2, got 1"),
        ({"answers": 0}, "answers must be >= 1, got 0"),
        ({"model": " "}, "model must be a model's name"),
        (
            {"model": "x", "task": "digit-chain"},
            "the task digit-chain has a policy of its own: give --task gym-sums with --model x",
        ),
        ({"data": "absent.jsonl"}, "'absent.jsonl' does not exist"),
        ({"data": "absent.jsonl", "reward": "mathh"}, "unknown reward 'mathh': did you mean 'math'"),
        ({"data": "absent.jsonl", "task": "gym-sums"}, "give --data or --task gym-sums, not both"),
    ],
)
def test_bad_input_is_refused_when_the_task_is_made(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ReinforceTask(**settings)


def test_too_few_problems_and_a_model_that_is_not_there(model_folders, problems, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(json.dumps({"prompt": f"a {i}"}) for i in range(9)), "utf-8")
    with pytest.raises(UserError, match="9 problems: too few to hold"):
        ReinforceTask(data=str(few))
    [row] = compare(on_data(model_folders, problems, methods=("grpo",), max_prompt_length=3), runs=tmp_path).rows
    assert "nearly every prompt has more than 3 tokens: set max_prompt_length higher" in row["error"]
    with pytest.raises(UserError, match="no model"):
        compare(on_data(model_folders | {"target": "./absent"}, problems), name="a", runs=tmp_path / "runs")


def test_a_mistake_on_the_command_line_is_one_sentence(capsys):
    for args, said in ((["--lr", "0"], "lr must be"), (["--methods", "d3z"], "d3z"), (["--task", "x"], "task")):
        assert main(["compare", "reinforce", *args]) == 2
        err = capsys.readouterr().err
        assert err.startswith("locum: ")
        assert said in err
        assert err.count("\n") == 1


def test_help_names_every_flag(capsys):
    for args in ([], ["reinforce"]):
        with pytest.raises(SystemExit, match="0"):
            main(["compare", *args, "--help"])
    words = set(re.findall(r"[\w-]+", capsys.readouterr().out))
    assert {"align", "decode", "reinforce", "digit-chain", "gym-sums", "d3s", "spotree"} <= words
    assert {"--methods", "--task", "--data", "--reward", "--group-size", "--steps", "--lora-rank", "--json"} <= words
