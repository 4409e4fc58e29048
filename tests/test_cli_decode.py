"""``locum decode`` and ``locum compare`` on tiny models that lie on the disk: what they print, and what they refuse."""

import json

import pytest

from locum.cli import main
from locum.cli.decode import methods


def run(capsys, *args):
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def decode(capsys, folders, *args, method="plain"):
    models = ("--model", folders["target"], "--draft", folders["draft"])
    return run(capsys, "decode", "--method", method, *models, "--max-new-tokens", 12, *args)


DRAFTERS = [m for m in methods() if m not in ("awrs", "rtoq", "plain")]


@pytest.mark.parametrize("method", DRAFTERS)
def test_every_drafter_prints_the_same_greedy_text(capsys, model_folders, method):
    _, plain, _ = decode(capsys, model_folders, "--prompt", "abab")
    code, out, err = decode(capsys, model_folders, "--prompt", "abab", method=method)
    assert code == 0, err
    assert out == plain
    assert f"[{method}: 12 tokens" in err


def test_json_is_one_document(capsys, model_folders):
    _, streamed, _ = decode(capsys, model_folders, "--prompt", "abab")
    code, out, _ = decode(capsys, model_folders, "--prompt", "abab", "--json")
    assert code == 0
    document = json.loads(out)
    assert document.keys() == {"method", "model", "texts"}
    assert document["texts"][0]["text"] + "\n" == streamed
    assert document["texts"][0].keys() == {"prompt", "text", "finish", "tokens", "forwards", "seconds"}


def test_a_file_of_prompts(capsys, model_folders, tmp_path):
    (tmp_path / "two.txt").write_text("abab\ncdcd\n")
    code, out, _ = decode(capsys, model_folders, "--prompts", tmp_path / "two.txt", "--json")
    assert code == 0
    assert [t["prompt"] for t in json.loads(out)["texts"]] == ["abab", "cdcd"]


def test_the_method_in_a_file(capsys, model_folders, tmp_path):
    (tmp_path / "m.yaml").write_text("method: decode.lookup\nlength: 3\n")
    code, out, _ = decode(capsys, model_folders, "--prompt", "abab", "--json", method=tmp_path / "m.yaml")
    assert code == 0
    assert json.loads(out)["method"] == "lookup"


def test_a_constraint_is_obeyed(capsys, model_folders):
    args = ("decode", "--model", model_folders["target"], "--prompt", "ab", "--json", "--n-particles", 4)
    code, out, _ = run(capsys, *args, "--regex", "(19|20)[0-9]{2}")
    assert code == 0
    posterior = json.loads(out)["texts"][0]["posterior"]
    assert posterior
    assert all(len(text) == 4 and text[:2] in ("19", "20") for text in posterior)
    assert sum(posterior.values()) == pytest.approx(1, abs=1e-9)


def test_the_search_of_rtoq(capsys, model_folders):
    code, out, _ = decode(capsys, model_folders, "--prompt", "ab", "--beams", 3, "--json", method="rtoq")
    assert code == 0
    scores = [t["score"] for t in json.loads(out)["texts"][0]["texts"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


def test_flags_of_the_method_with_names_of_general_ones(capsys, model_folders):
    args = ("--prompt", "abab", "--tokenrecycling-top-k", 2, "--nodes", 4)
    assert decode(capsys, model_folders, *args, method="tokenrecycling")[0] == 0
    args = ("--prompt", "abab", "--first", "lookup", "--second", "tokenrecycling")
    assert decode(capsys, model_folders, *args, method="graft")[0] == 0


@pytest.fixture
def files(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    (tmp_path / "bad.lark").write_text("start: (")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "none.json").write_text('{"enum": []}')
    return tmp_path


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--method", "plan"], "unknown method of decode 'plan': did you mean 'plain'?"),
        (["--method", "{files}/no.yaml"], "no.yaml cannot be read"),
        (["--method", "plain", "--model", "/no/such/model"], "no model '/no/such/model'"),
        (["--method", "plain", "--model", "smollm"], "no model 'smollm'"),
        (["--method", "plain", "--prompts", "{files}/missing.txt"], "missing.txt"),
        (["--method", "plain", "--prompts", "{files}/empty.txt"], "empty.txt"),
        (["--method", "plain", "--prompts", "{files}/latin.txt"], "is not UTF-8"),
        (["--method", "plain", "--prompt", "a", "--prompts", "x"], "give one of --prompt TEXT and --prompts FILE"),
        (["--method", "plain", "--prompt", ""], "at least one character"),
        (["--method", "chain", "--draft", "{foreign}"], "must share one vocabulary"),
        (["--method", "dyspec", "--budget", "-1"], "DySpec.budget must be"),
        (["--method", "dyspec", "--budget", "many"], "--budget"),
        (["--method", "plain", "--max-new-tokens", "0"], "max_new_tokens must be >= 1, got 0"),
        (["--method", "plain", "--temperature", "-0.5"], "Sampling.temperature must be finite and >= 0, got -0.5"),
        (["--method", "plain", "--temperature", "nan"], "Sampling.temperature must be finite and >= 0, got nan"),
        (["--method", "plain", "--top-p", "1.5"], "Sampling.top_p must be in (0, 1] or None, got 1.5"),
        (["--method", "plain", "--stop", ""], "a stop string must not be empty"),
        (["--method", "plain", "--verifier", "mach"], "unknown method of decode 'mach': did you mean 'match'?"),
        (["--method", "tokenrecycling", "--verifier", "kseq"], "KSEQ is exact only for drafts that are"),
        (["--method", "plain", "--max-new-tokens", "600"], "exceed the 512 positions"),
        (["--method", "plain", "--regex", "a"], "a constraint needs --method awrs"),
        (["--method", "awrs"], "awrs needs a constraint"),
        (["--regex", "(a"], "(a"),
        (["--regex", "a", "--grammar", "x"], "give only one of"),
        (["--grammar", "{files}/bad.lark"], "grammar"),
        (["--grammar", "{files}/missing.lark"], "missing.lark cannot be read"),
        (["--json-schema", "{files}/bad.json"], "does not parse"),
        (["--json-schema", "{files}/none.json"], "no valid text"),
        (["--method", "lookup", "--model", "{sliding}"], "cache"),
        (["--method", "lookup", "--model", "{recurrent}"], "cache"),
        (["--method", "plain", "--unheard-of", "1"], "--unheard-of"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(capsys, model_folders, files, args, said):
    args = [a.format(files=files, **model_folders) if "{" in a else a for a in args]
    if "--model" not in args:
        args += ["--model", model_folders["target"]]
    if "--draft" not in args:
        args += ["--draft", model_folders["draft"]]
    if "--prompt" not in args and "--prompts" not in args:
        args += ["--prompt", "abab"]
    code, out, err = run(capsys, "decode", *args)
    assert said in err
    assert (code, out) == (2, "")
    assert err.startswith("locum: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["compare"], "say which family to compare: "),
        (["compare", "decod"], "unknown family 'decod': did you mean 'decode'?"),
        (["compare", "search"], "nothing of the family search can be compared yet"),
        (["compare", "decode", "--methods", "plain,lokup"], "unknown method of decode 'lokup': did you mean 'lookup'?"),
        (["compare", "decode", "--prompts", "{files}/missing.txt"], "missing.txt"),
        (["compare", "decode", "--prompts", "{files}/empty.txt"], "empty.txt"),
        (["compare", "decode", "--prompts", "{files}/latin.txt"], "is not UTF-8"),
        (["compare", "decode", "--temperature", "-1"], "DecodeTask.temperature must be finite and >= 0, got -1.0"),
        (["compare", "decode", "--max-new-tokens", "-5"], "DecodeTask.max_new_tokens must be >= 1, got -5"),
        (["compare", "decode", "--seeds", "0"], "DecodeTask.seeds must be >= 1, got 0"),
        (["compare", "decode", "--engine", "rai"], "'rai'"),
        (["verify"], "say which claims"),
        (["verify", "spectre"], "unknown paper 'spectre': did you mean 'spectr'?"),
        (["verify", "sso"], "sso has no claim that runs yet"),
    ],
)
def test_mistakes_of_compare_and_verify(capsys, files, args, said):
    code, out, err = run(capsys, *(a.format(files=files) for a in args))
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_compare_prints_a_table_and_json_prints_one_document(capsys, model_folders, tmp_path):
    (tmp_path / "p.txt").write_text("abab\n")
    models = ("--model", model_folders["target"], "--draft", model_folders["draft"], "--prompts", tmp_path / "p.txt")
    run_ = ("--max-new-tokens", 8, "--methods", "plain,lookup", "--runs", tmp_path / "runs", "--name", "first")
    code, out, err = run(capsys, "compare", "decode", *models, *run_)
    assert code == 0, err
    assert "lookup" in out
    assert max(map(len, out.splitlines()[:-1])) <= 100
    assert (tmp_path / "runs/first/report.html").is_file()
    code, out, _ = run(capsys, "compare", "decode", *models, *run_, "--resume", "--json")
    assert code == 0
    document = json.loads(out)
    assert document.keys() == {"family", "task", "model", "rows"}
    assert {"method", "group", "seed", "quality", "cost", "fidelity", "ratios"} <= document["rows"][0].keys()
    code, _, err = run(capsys, "compare", "decode", *models, *run_)
    assert code == 2
    assert "--resume" in err


def test_verify_json_is_one_document(capsys, monkeypatch):
    row = dict.fromkeys(("slug", "claim", "measured", "criterion", "machine"), "x")
    row |= {"verdict": "holds", "seeds": [0], "seconds": 1.0}
    asked = []
    monkeypatch.setattr(
        "locum.cli.bench.run_claims", lambda slugs, fast: asked.append((slugs, fast)) or {"claims": [row]}
    )
    code, out, _ = run(capsys, "verify", "--all", "--fast", "--json")
    assert code == 0
    assert json.loads(out) == {"claims": [row]}
    assert asked == [(None, True)]
    assert run(capsys, "verify", "spectr")[0] == 0
    monkeypatch.setattr(
        "locum.cli.bench.run_claims", lambda slugs, fast: {"claims": [row | {"error": "e", "traceback": "t"}]}
    )
    assert run(capsys, "verify", "spectr", "--json")[0] == 1
