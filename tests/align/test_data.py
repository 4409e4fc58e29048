"""Preference data: every form rows come in, every way they can be wrong, and token ids that are TRL's."""

import functools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.align import DPO
from locum.align.data import encode, read_pairs
from locum.align.statistics import collate, statistics
from locum.errors import UserError

CHATML = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


PLAIN = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
TALK = {"prompt": [user("Sky?")], "chosen": [bot("Blue.")], "rejected": [bot("Green.")]}


@functools.cache
def letters(chat_template=None, end="<end>"):
    """A tokenizer of bytes with a few merges, so that a prompt's last token can grow into the response."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ue", "bl", "blue", "is", "<end>"]
    merges = [("u", "e"), ("b", "l"), ("bl", "ue"), ("i", "s")]
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(known)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, chat_template=chat_template)


def chat():
    return letters(CHATML)


def trl_ids(rows, tokenizer):
    """What TRL's trainer makes of the rows."""
    from trl import DPOTrainer

    class Prepare(DPOTrainer):
        def __init__(self):
            self._tokenizer = tokenizer

    config = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    return ids_of(Prepare()._prepare_dataset(Dataset.from_list(rows), tokenizer, config, "train"))


def ids_of(examples):
    return [{k: e[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for e in examples]


def refused(source, **options):
    with pytest.raises(UserError) as error:
        read_pairs(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ----------------------------------------------------------------------------------------------------------- token ids


@pytest.mark.parametrize(
    "rows",
    [
        [PLAIN, {"prompt": "I", "chosen": "s it<end>", "rejected": "t was"}],  # an end that is there already
        [{"prompt": "It is bl", "chosen": "ue", "rejected": "ack"}],  # the prompt's last token is not the text's
        [{"chosen": "Q: Why? A: so it is", "rejected": "Q: Why? A: not known"}],
        [{"chosen": "the same but longer", "rejected": "the same"}],
        [TALK, {"prompt": [user("a"), bot("b"), user("c")], "chosen": [bot("d")], "rejected": [bot("e")]}],
        [{"chosen": [user("Sky?"), bot("Blue.")], "rejected": [user("Sky?"), bot("Green.")]}],
        [{"prompt": [{"role": "system", "content": "s"}, user("x")], "chosen": [bot("y")], "rejected": [bot("z")]}],
    ],
)
def test_ids_are_those_of_trl(rows):
    assert ids_of(encode(read_pairs(rows), chat())) == trl_ids(rows, chat())


def test_ids_of_the_shipped_pairs_are_those_of_trl():
    from locum.models import load
    from locum.tasks import sentiment

    tokenizer = load("smollm2-draft").tokenizer
    rows = sentiment.pairs()[:20]
    assert ids_of(encode(rows, tokenizer)) == trl_ids(rows, tokenizer)
    talks = [
        {"prompt": [user(r["prompt"])], "chosen": [bot(r["chosen"])], "rejected": [bot(r["rejected"])]} for r in rows
    ]
    assert ids_of(encode(talks, tokenizer)) == trl_ids(talks, tokenizer)


def test_where_tokens_merge_over_the_boundary_the_response_begins_earlier():
    (example,) = encode([{"prompt": "It is bl", "chosen": "ue", "rejected": "ack"}], letters())
    tokens = letters().convert_ids_to_tokens
    assert tokens(example["chosen_ids"]) == ["blue", "<end>"]
    assert tokens(example["rejected_ids"]) == ["bl", "a", "c", "k", "<end>"]
    assert letters().decode(example["prompt_ids"]) == "It is "


short = st.text(alphabet="isblue .", min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=30)
@given(st.lists(st.tuples(short, short, short), min_size=1, max_size=5))
def test_no_character_is_lost_and_only_responses_end(texts):
    rows = [{"prompt": f"x{p}", "chosen": c, "rejected": r} for p, c, r in texts]
    for row, e in zip(rows, encode(read_pairs(rows, needs_different=False), letters()), strict=True):
        for block in ("chosen", "rejected"):
            assert letters().decode(e["prompt_ids"] + e[f"{block}_ids"]) == row["prompt"] + row[block] + "<end>"
            assert (e["prompt_ids"] + e[f"{block}_ids"]).count(letters().eos_token_id) == 1


def test_kinds_of_rows_may_be_mixed_and_their_order_stays():
    rows = [PLAIN, TALK] * 3
    alone = [encode([row], chat())[0] for row in (PLAIN, TALK)]
    assert encode(rows, chat()) == alone * 3


def test_texts_are_kept_for_people():
    plain, talk = encode([PLAIN, TALK | {"prompt": [user("Sky?"), bot("What?"), user("Well?")]}], chat())
    assert [plain[k] for k in PLAIN] == list(PLAIN.values())
    assert talk["prompt"] == "user: Sky?\n\nassistant: What?\n\nuser: Well?"
    assert talk["chosen"] == "Blue."


def test_template_settings_and_tools_of_a_row_reach_the_template():
    tokenizer = letters("{{ tools | length if tools else 0 }}{{ mood }}" + CHATML)
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    rows = [TALK | {"tools": json.dumps([tool]), "chat_template_kwargs": {"mood": "!"}}, TALK]
    first, second = encode(rows, tokenizer)
    assert tokenizer.decode(first["prompt_ids"]).startswith("1!<|user|>")
    assert tokenizer.decode(second["prompt_ids"]).startswith("0<|user|>")


def test_examples_make_a_batch_whose_loss_is_dpo(tmp_path):
    from locum.align.statistics import ModelScorer
    from locum.models import tiny

    model = tiny(vocab_size=len(letters())).model
    batch = collate(encode([PLAIN, TALK], chat()), pad_id=0)
    loss, _ = DPO()(statistics(DPO(), batch, ModelScorer(model), {"ref": ModelScorer(model)}))
    assert loss.item() == pytest.approx(np.log(2), abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- sources


def test_all_sources_give_the_same_rows(tmp_path):
    rows = [PLAIN, PLAIN | {"prompt": "The sea is"}]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n", "utf-8")
    data = Dataset.from_list(rows)
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.save_to_disk(str(tmp_path / "folder"))
    DatasetDict(train=data, test=data).save_to_disk(str(tmp_path / "parts"))
    for source in (tmp_path / "a.jsonl", str(tmp_path / "a.parquet"), tmp_path / "folder", data, rows, iter(rows)):
        assert list(read_pairs(source)) == rows
    assert list(read_pairs(data.to_iterable_dataset())) == rows
    assert list(read_pairs(data.with_format("torch"))) == rows
    assert list(read_pairs(tmp_path / "parts", split="test")) == rows
    assert read_pairs(tmp_path / "a.jsonl").numbers == [1, 3]
    assert read_pairs(data).numbers == [0, 1]


def test_conversations_survive_a_table_that_fills_up_with_none(tmp_path):
    rows = [TALK, TALK | {"prompt": [user("a") | {"name": "Ann"}]}]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "talk.parquet"))
    assert list(read_pairs(tmp_path / "talk.parquet")) == rows


def test_a_prompt_beside_whole_conversations_is_found_in_them():
    row = {"prompt": "Sky?", "chosen": [user("Sky?"), bot("Blue.")], "rejected": [user("Sky?"), bot("Green.")]}
    assert list(read_pairs([row])) == [TALK]
    assert read_pairs([row], blocks=())[0]["prompt"] == TALK["prompt"]


def test_prompts_alone_are_enough_for_methods_that_sample(tmp_path):
    rows = [{"prompt": "The sky is"}, {"prompt": [user("Sky?")], "answer": 3}]
    read = read_pairs(rows, blocks=())
    assert read[1]["answer"] == 3
    plain, talk = encode(read, chat(), blocks=())
    assert plain == {"prompt_ids": chat()("The sky is")["input_ids"], "prompt": "The sky is"}
    assert chat().decode(talk["prompt_ids"]) == "<|user|>Sky?<end>\n<|assistant|>"
    with pytest.raises(UserError, match="the data was read without 'chosen'"):
        encode(read, chat())


def test_a_part_of_the_rows_keeps_their_numbers():
    part = read_pairs([PLAIN, TALK, PLAIN])[1:]
    assert (list(part), part.numbers) == ([TALK, PLAIN], [1, 2])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "does not exist: give a .jsonl or .parquet file"),
        ("pairs.csv", b"a,b", "must be a .jsonl or .parquet file"),
        ("empty.jsonl", b"\n \n", "is empty: give at least one row"),
        ("bad.parquet", b"nothing", "cannot be read: "),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in (said := refused(tmp_path / name))
    assert name in said


def test_other_sources_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    assert "folder' cannot be read: " in refused(tmp_path / "folder")
    parts = DatasetDict(train=Dataset.from_list([PLAIN]), test=Dataset.from_list([PLAIN]))
    assert "has several parts, and name one of its splits: train, test" in refused(parts)
    assert "and it has no split 'dev': train, test" in refused(parts, split="dev")
    assert refused(3) == "data must be a path, a datasets.Dataset or a list of dicts, got int"
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'locum[align]'" in refused(tmp_path / "a.parquet")


# ------------------------------------------------------------------------------------------------------------ bad rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "must be an object with prompt, chosen, rejected, got list"),
        ({"prompt": "a", "chosen": "b"}, "has no 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "has no 'rejected'"),
        ({"chosen": "ab", "rejected": "cd"}, "has no 'prompt', and chosen and rejected begin with nothing in common"),
        ({"chosen": "", "rejected": "cd"}, "chosen is empty"),
        ({"chosen": "cd", "rejected": TALK["chosen"]}, "chosen and rejected must both be strings or both lists"),
        (PLAIN | {"prompt": " \n"}, "prompt is empty"),
        (PLAIN | {"rejected": ""}, "rejected is empty"),
        (PLAIN | {"rejected": " blue."}, "chosen and rejected are the same"),
        (PLAIN | {"chosen": 3}, "chosen must be a string or a list of messages, got int"),
        (PLAIN | {"chosen": TALK["chosen"]}, "prompt and chosen must both be strings or both lists"),
        (TALK | {"prompt": []}, "prompt is empty"),
        (TALK | {"chosen": []}, "chosen is empty"),
        (TALK | {"chosen": ["Blue."]}, "a message of chosen must have role and content, got str"),
        (TALK | {"chosen": [bot(" ")]}, "a message of chosen is empty"),
        (TALK | {"chosen": [bot([{"type": "text"}])]}, "a message of chosen must have a text as content, got list"),
        (
            TALK | {"prompt": [{"role": "human", "content": "a"}]},
            "a message of prompt has the role 'human'; it must be",
        ),
        (TALK | {"prompt": [{"content": "a"}]}, "a message of prompt has the role None; it must be one of system,"),
        (TALK | {"prompt": [user("a"), bot("b")]}, "the prompt's last message is the assistant's"),
        (TALK | {"chosen": [user("a"), bot("b")]}, "chosen holds a message of the role 'user'; a response is"),
    ],
)
def test_a_bad_row_is_named_with_what_is_wrong(row, message):
    assert refused([PLAIN, row]).startswith(f"the data has 1 row that cannot be used: row 1: {message}")


def test_all_bad_lines_are_told_at_once_ten_of_them_in_words(tmp_path):
    lines = [json.dumps(PLAIN), "{", "", json.dumps({"prompt": "a"}), *["[]"] * 12]
    (tmp_path / "bad.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"prompt": "\xff"}\n')
    said = refused(tmp_path / "bad.jsonl")
    assert "bad.jsonl has 15 lines that cannot be used: line 2: is not JSON (" in said
    assert "; line 4: has no 'chosen'; line 5: must be an object" in said
    assert said.endswith("got list; and 5 more")
    assert said.count("; line") == 9
    (tmp_path / "byte.jsonl").write_bytes(b'\n{"prompt": "\xff"}\n')
    assert "1 line that cannot be used: line 2: is not UTF-8" in refused(tmp_path / "byte.jsonl")


def test_equal_responses_are_fine_where_they_do_not_matter():
    row = PLAIN | {"rejected": " blue."}
    assert len(read_pairs([row], needs_different=False)) == 1
    assert len(encode(read_pairs([{k: row[k] for k in ("chosen", "rejected")}], needs_different=False), letters())) == 1


# ----------------------------------------------------------------------------------------------------------- too long


LONG = PLAIN | {
    "prompt": "Now it was",
    "chosen": " blue" * 9,
    "chosen_w": list(range(19)),
    "rejected_w": [0.5] * 8,
}  # 10, 18 + end, 7 + end
FINE = PLAIN | {"prompt": "Now it was", "chosen_w": [1.0] * 4, "rejected_w": [2.0] * 8}


def lengths(examples):
    return [[len(e[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids")] for e in examples]


def test_too_long_rows_are_named_or_cut_or_left_out(caplog):
    rows = read_pairs([LONG, FINE, LONG])
    assert lengths(encode(rows, letters(), max_length=29)) == [[10, 19, 8], [10, 4, 8], [10, 19, 8]]
    with pytest.raises(
        UserError, match=r"has 2 rows .*: row 0: prompt and response have 29 tokens, more than 28; row 2"
    ):
        encode(rows, letters(), max_length=28)
    assert lengths(encode(rows, letters(), 28, overlong="truncate")) == [[10, 18, 8], [10, 4, 8], [10, 18, 8]]
    assert lengths(encode(rows, letters(), 28, overlong="drop")) == [[10, 4, 8]]
    assert "the data: 2 of 3 rows are too long and left out" in caplog.text
    with pytest.raises(UserError, match="every row is longer than 12 tokens"):
        encode(rows, letters(), 12, overlong="drop")


def test_prompts_are_never_cut():
    for overlong in ("error", "truncate"):
        for limits in ({"max_length": 10}, {"max_length": 100, "max_prompt_length": 9}):
            with pytest.raises(UserError, match="row 0: the prompt has 10 tokens, more than 9"):
                encode([FINE], letters(), overlong=overlong, **limits)
    with pytest.raises(UserError, match="row 0: the prompt has 10 tokens, more than 9"):
        encode(read_pairs([FINE], blocks=()), letters(), 9, blocks=())
    assert lengths(encode([FINE], letters(), 11, overlong="truncate")) == [[10, 1, 1]]


def test_truncated_examples_are_the_beginning_of_whole_ones():
    whole, cut = (encode([LONG], letters(), n, overlong="truncate", columns=("w",))[0] for n in (100, 15))
    for block in ("chosen", "rejected"):
        assert cut[f"{block}_ids"] == whole[f"{block}_ids"][:5]
        assert cut[f"{block}_w"].tolist() == whole[f"{block}_w"][:5].tolist()
    assert collate([cut], columns=("w",)).columns["w"][0, 9:].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen_w": [1.0] * 3}, "chosen_w has 3 values for 4 response tokens"),
        ({"chosen_w": [[1.0]] * 4}, "chosen_w has 4 values for 4 response tokens"),
        ({"chosen_w": "many"}, "chosen_w must be a list of numbers"),
        ({"chosen_w": [1.0, None, {}, 2.0]}, "chosen_w must be a list of numbers"),
        ({"rejected_w": [float("nan")] * 8}, "rejected_w holds a value that is not finite"),
        ({"rejected_w": None}, "has no 'rejected_w'"),
    ],
)
def test_a_column_that_does_not_fit_its_response_is_named(change, message):
    with pytest.raises(UserError, match=f"1 row that cannot be used: row 1: {message}"):
        encode([FINE, FINE | change], letters(), columns=("w",))


# ---------------------------------------------------------------------------------------------------- what cannot work


def test_a_tokenizer_that_cannot_do_it_is_told_so():
    with pytest.raises(UserError, match="conversations and the tokenizer has no chat template"):
        encode([TALK], letters())
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode([PLAIN], letters(end=None))
    row = TALK | {"prompt": [user("a"), {"role": "tool", "content": "b"}]}
    with pytest.raises(UserError, match=r"row 1: the chat template refuses it \(no tools here\)"):
        encode([TALK, row], chat())
    with pytest.raises(UserError, match="row 0: chosen has no tokens of its own"):
        encode([TALK], letters("<|x|>"))
    with pytest.raises(UserError, match="row 0: nothing of the prompt is left"):
        encode([{"prompt": "bl", "chosen": "ue", "rejected": "ack"}], letters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length must be > 1, got 1"),
        (
            {"max_length": 8, "max_prompt_length": 8},
            r"max_prompt_length must be from 1 to 7 \(max_length is 8\), got 8",
        ),
        ({"max_prompt_length": 0}, "max_prompt_length must be from 1 to 1023"),
        ({"overlong": "cut"}, "overlong must be one of error, truncate, drop, got 'cut'"),
    ],
)
def test_limits_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        encode([PLAIN], letters(), **options)


def test_many_rows_take_few_calls_of_the_tokenizer(monkeypatch):
    calls = []

    class Counted:
        eos_token = "<end>"

        def __call__(self, texts, **settings):
            calls.append(len(texts))
            return letters()(texts, **settings)

    assert len(encode([PLAIN] * 1500, Counted())) == 1500
    assert calls == [3 * 1024, 3 * 476]
