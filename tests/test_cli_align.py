"""`locum align`: every method from a file of pairs to a folder, and mistakes told in one sentence before any work."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from locum.cli import main
from locum.method import names

WORDS = ("sea", "sky", "tide")
ROWS = [{"prompt": f"the {a}", "chosen": f" is {b}, good", "rejected": f" was {b}"} for a in WORDS for b in WORDS]
MORE = {  # what a method must be told beyond its name
    "sft": None,  # it reads single responses, and is no method on pairs
    "selm": ["--reward", "vader", "--rounds", "2"],
    "rto": ["--reward", "vader", "--rounds", "2"],
    "onlinealigndistil": ["--rounds", "2"],
    "sparsepo": ["--mask", "common", "--mask-init", "ones"],
}


@pytest.fixture
def files(tmp_path, model_folders, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return ["--data", "pairs.jsonl", "--out", "out", "--model", model_folders["target"], "--device", "cpu"]


SMALL = ["--batch-size", "3", "--max-new-tokens", "4", "--learning-rate", "1e-3"]


@pytest.mark.parametrize("method", [m for m in names("align", "Method") if MORE.get(m, ()) is not None])
def test_every_method_trains_from_a_file_of_pairs(method, files, capsys, model_folders):
    code = main(["align", "--method", method, *files, *SMALL, *(MORE.get(method) or ()), "--lora", "--merge", "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    made = json.loads(out)
    assert made["method"] == method
    assert made["steps"] >= 2
    assert made["counts"]["examples"] == 9
    assert made["figures"]["loss"] == made["figures"]["loss"]  # a number
    again, start = (AutoModelForCausalLM.from_pretrained(x) for x in ("out", model_folders["target"]))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert not torch.allclose(again(ids).logits, start(ids).logits, atol=1e-5)


def test_help_tells_the_methods_own_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["align", "--method", "tdpo2", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "--alpha" in said
    assert "--lora-rank" in said


def test_what_people_see(files, capsys):
    assert main(["align", *files, *SMALL]) == 0
    said = capsys.readouterr().out
    assert "rewards/accuracies" in said
    assert "3 steps on 9 examples" in said


BAD = [
    (["--method", "tdpo3"], "unknown method of align 'tdpo3'"),
    (["--alpha", "-1"], "TDPO2.alpha must be finite and >= 0, got -1"),
    (["--batch-size", "0"], "batch_size must be >= 1, got 0"),
    (["--merge"], "needs --lora"),
    (["--models", "guide"], "name=model, got 'guide'"),
    (["--models", "guide=x"], "no use for the model 'guide'"),
    (["--method", "selm"], "give a labeller"),
    (["--data", "none.jsonl"], "none.jsonl"),
    (["--max-length", "5"], "line"),
    (["--out", "full"], "not empty"),
]


@pytest.mark.parametrize(("more", "said"), BAD)
def test_a_mistake_is_one_sentence(more, said, files, capsys, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    assert main(["align", *files, *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


ROW = {"prompt": "a", "chosen": " b", "rejected": " c"}
LINES = [
    ({"prompt": "a", "chosen": " b"}, "rejected"),
    (ROW | {"rejected": ""}, "rejected"),
    (ROW | {"rejected": " b"}, "same"),
    (ROW | {"chosen": 3}, "chosen"),
    ('{"prompt": "a", "chosen": " b"', "JSON"),
]


def test_bad_rows_are_told_with_their_lines_before_a_model_is_loaded(files, capsys, tmp_path):
    lines = [json.dumps(ROW)] + [line if isinstance(line, str) else json.dumps(line) for line, _ in LINES]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    files[files.index("--model") + 1] = "no/such-model-anywhere"
    assert main(["align", *files]) == 2
    said = capsys.readouterr().err
    for number, (_, what) in enumerate(LINES, 2):
        assert f"line {number}" in said
        assert what in said
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_run_is_not_written_over(files, capsys):
    assert main(["align", *files, *SMALL, "--json"]) == 0
    capsys.readouterr()
    assert main(["align", *files, *SMALL]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["align", "--method", "dpo", *files, *SMALL, "--resume"]) == 2
    assert "another method" in capsys.readouterr().err
    assert main(["align", *files, *SMALL, "--resume", "--json"]) == 0
