"""What a user can get wrong on the command line: one clear sentence on standard error, exit code 2, no traceback."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from locum.cli import main
from locum.decode.integrations import custom_generate
from locum.errors import UserError
from locum.models import tiny

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": None}
ATTENTION = {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


def tokenizer(last: str = "<end>", first: str = "") -> PreTrainedTokenizerFast:
    """Bytes and an end; `first` moves one character to the front, which gives every id another meaning."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (c != first, c))
    inner = Tokenizer(BPE({c: i for i, c in enumerate([*alphabet, last])}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=last)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder of models and files, each good or bad in its own way."""
    here = tmp_path_factory.mktemp("place")
    llama = tiny(vocab_size=257, hidden_size=16, layers=1, heads=2, kv_heads=1)
    wide = tiny(vocab_size=300, hidden_size=16, layers=1, heads=2, kv_heads=1)
    sliding = MistralForCausalLM(MistralConfig(vocab_size=257, sliding_window=8, **SIZES, **ATTENTION))
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=257, state_size=4, **SIZES))
    for name, model, words in (
        ("good", llama.model, tokenizer()),
        ("wide", wide.model, tokenizer()),
        ("shuffled", llama.model, tokenizer(first="z")),
        ("sliding", sliding, tokenizer()),
        ("recurrent", recurrent, tokenizer()),
    ):
        model.save_pretrained(here / name)
        words.save_pretrained(here / name)
    (here / "no-model").mkdir()
    (here / "empty.txt").write_text("")
    (here / "blank.txt").write_text("\n \n")
    (here / "latin1.txt").write_bytes("Grüße".encode("latin-1"))
    (here / "broken.jsonl").write_text('{"text": \n')
    (here / "file.csv").write_text("a,b\n")
    (here / "grammar.lark").write_text("start: (")
    (here / "endless.lark").write_text('start: "a" start')
    (here / "schema.json").write_text("{")
    (here / "table").write_text("no table")
    (here / "method.yaml").write_text("method: decode.nothing")
    return here


DECODE = ["decode", "--model", "{good}", "--prompt", "go", "--max-new-tokens", "4", "--device", "cpu"]
AWRS = [*DECODE, "--method", "awrs"]
BAD = {
    # names
    "unknown command": (["deocde"], "unknown command 'deocde': did you mean 'decode'?"),
    "unknown method": ([*DECODE, "--method", "tokenrecyling"], "did you mean 'tokenrecycling'?"),
    "unknown method to compare": (["compare", "decode", "--methods", "plain,lokup"], "did you mean 'lookup'?"),
    "unknown family": (["compare", "decoding"], "unknown family 'decoding': did you mean 'decode'?"),
    "family without code": (["compare", "search"], "nothing of the family search can be compared yet"),
    "unknown verifier": ([*DECODE, "--method", "lookup", "--verifier", "macth"], "did you mean 'match'?"),
    "unknown option": ([*DECODE, "--tempratur", "1"], "--tempratur"),
    "unknown claim": (["verify", "spectre"], "unknown paper 'spectre': did you mean 'spectr'?"),
    "unknown method in a file": ([*DECODE, "--method", "{here}/method.yaml"], "nothing"),
    # models
    "unknown model": ([*DECODE, "--model", "smollm2"], "no model 'smollm2'"),
    "missing folder": ([*DECODE, "--model", "{here}/nowhere"], "nowhere'"),
    "folder without a model": ([*DECODE, "--model", "{here}/no-model"], "cannot load model"),
    "sliding window": ([*DECODE, "--model", "{sliding}"], "sliding_attention in its cache, which cannot be cut back"),
    "recurrent": ([*DECODE, "--model", "{recurrent}"], "linear_attention in its cache, which cannot be cut back"),
    "draft of another size": ([*DECODE, "--method", "chain", "--draft", "{wide}"], "300 tokens and model"),
    "draft with other tokens": (
        [*DECODE, "--method", "chain", "--draft", "{shuffled}"],
        "must share one vocabulary, but token",
    ),
    "unknown type": ([*DECODE, "--dtype", "float31"], "dtype must be one of"),
    "unknown device": ([*DECODE, "--device", "gpux"], "device must be"),
    # prompts
    "no prompt": (DECODE[:3], "--prompt"),
    "empty prompt": ([*DECODE, "--prompt", ""], "prompt"),
    "missing file": ([*DECODE[:3], "--prompts", "{here}/nowhere.txt"], "nowhere.txt"),
    "empty file": ([*DECODE[:3], "--prompts", "{here}/empty.txt"], "is empty"),
    "blank file": ([*DECODE[:3], "--prompts", "{here}/blank.txt"], "is empty"),
    "not UTF-8": ([*DECODE[:3], "--prompts", "{here}/latin1.txt"], "is not UTF-8"),
    "not JSON": ([*DECODE[:3], "--prompts", "{here}/broken.jsonl"], "not JSON"),
    "other kind of file": ([*DECODE[:3], "--prompts", "{here}/file.csv"], ".txt"),
    "a folder": ([*DECODE[:3], "--prompts", "{here}"], "prompt file"),
    "missing file to compare": (["compare", "decode", "--prompts", "{here}/nowhere.txt"], "does not exist"),
    "empty file to compare": (["compare", "decode", "--prompts", "{here}/empty.txt"], "is empty"),
    "not UTF-8 to compare": (["compare", "decode", "--prompts", "{here}/latin1.txt"], "is not UTF-8"),
    # numbers
    "negative budget": ([*DECODE, "--max-new-tokens", "-1"], "max_new_tokens must be >= 1, got -1"),
    "negative budget to compare": (
        ["compare", "decode", "--max-new-tokens", "-3"],
        "max_new_tokens must be >= 1, got -3",
    ),
    "negative tree": ([*DECODE, "--method", "dyspec", "--budget", "-1"], "DySpec.budget must be >= 0, got -1"),
    "temperature below 0": ([*DECODE, "--temperature", "-0.5"], "temperature must be finite and >= 0, got -0.5"),
    "temperature below 0 to compare": (["compare", "decode", "--temperature", "-1"], "temperature must be"),
    "no number": ([*DECODE, "--temperature", "hot"], "hot"),
    "top-p above 1": ([*DECODE, "--top-p", "1.5"], "top_p must be in (0, 1] or None, got 1.5"),
    "negative seed": ([*DECODE, "--seed", "-1"], "seed must be >= 0, got -1"),
    "too long": ([*DECODE, "--max-new-tokens", "100000"], "exceed the 4096 positions"),
    # methods
    "verifier that is not exact": ([*DECODE, "--method", "lookup", "--verifier", "kseq"], "KSEQ is exact only for"),
    "field of another method": ([*DECODE, "--method", "lookup", "--budget", "3"], "--budget"),
    "no token table": ([*DECODE, "--method", "tokenrecycling", "--table", "{here}/table"], "holds no token table"),
    # constraints
    "constraint without awrs": ([*DECODE, "--method", "lookup", "--regex", "a"], "a constraint needs --method awrs"),
    "awrs without a constraint": (AWRS, "awrs needs a constraint"),
    "two constraints": ([*AWRS, "--regex", "a", "--grammar", "x"], "only one of"),
    "grammar that does not parse": ([*AWRS, "--grammar", "{here}/grammar.lark"], "grammar does not parse"),
    "grammar without a text": ([*AWRS, "--grammar", "{here}/endless.lark"], "grammar has no valid text"),
    "expression that does not parse": ([*AWRS, "--regex", "a("], "regular expression"),
    "constraint without a text": ([*AWRS, "--regex", r"a[^\s\S]b"], "has no valid text"),
    "expression that looks ahead": ([*AWRS, "--regex", "a(?!a)a"], "look-ahead is not supported"),
    "schema that is no JSON": ([*AWRS, "--json-schema", "{here}/schema.json"], "schema"),
    "missing grammar": ([*AWRS, "--grammar", "{here}/nowhere.lark"], "nowhere.lark"),
    "greedy awrs": ([*AWRS, "--regex", "a+", "--temperature", "0"], "temperature must be > 0"),
}


@pytest.mark.parametrize(("args", "said"), BAD.values(), ids=BAD.keys())
def test_one_sentence_and_exit_code_2(place, capsys, args, said):
    folders = {p.name: str(p) for p in place.iterdir() if p.is_dir()}
    code = main([arg.format(here=place, **folders) if "{" in arg else arg for arg in args])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("locum: ")]
    assert code == 2, (out, err)
    assert len(lines) == 1
    assert said in lines[0]
    assert err.splitlines()[-1] == lines[0]  # it is the last thing said
    assert "Traceback" not in err
    assert out.strip() == ""


def test_the_good_model_is_good(place, capsys):
    """So that the cases above fail for the reason that they name."""
    args = [a.format(good=place / "good") if "{" in a else a for a in DECODE]
    for more in (
        ["--method", "lookup"],
        ["--method", "chain", "--draft", str(place / "good")],
        ["--method", "awrs", "--regex", "[ab]+"],
    ):
        assert main([*args, *more]) == 0, capsys.readouterr().err


def test_more_than_one_prompt_at_a_time_is_refused_where_it_is_not_supported():
    """The command line has no batches; transformers' `generate` has."""
    with pytest.raises(UserError, match=r"one prompt at a time \(batch size 1\), got a batch of 2"):
        tiny().model.generate(
            torch.tensor([[1], [2]]), custom_generate=custom_generate(), pad_token_id=0, max_new_tokens=2
        )
