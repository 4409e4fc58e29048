"""Prompts as token ids: plain text, conversations, and what cannot be encoded."""

import json

import pytest

from locum.errors import UserError
from locum.models import LM
from locum.tasks.chat import as_text, encode, template_settings
from locum.tasks.rows import BadRow

CHATML = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if quick %}now{% endif %}"
)


def letters(template=CHATML, begin=False, close=False):
    """A tokenizer of single characters that puts <s> in front and </s> behind if told to."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = [chr(c) for c in range(32, 127)]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    if begin or close:
        form = ["<s>"] * begin + ["$A"] + ["</s>"] * close
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(form), special_tokens=[("<s>", 95), ("</s>", 96)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def ids(text):
    return [ord(c) - 32 for c in text]


def test_plain_text_is_encoded_as_it_is():
    assert encode(letters(), "1 + 1") == ids("1 + 1")


def test_a_beginning_stays_and_an_added_end_goes():
    assert encode(letters(begin=True, close=True), "ab") == [95, *ids("ab")]
    assert encode(letters(), "ab</s>") == [*ids("ab"), 96]


def test_a_conversation_ends_with_the_opening_of_the_answer():
    talk = [{"role": "user", "content": "Hi"}]
    want = [*ids("<user>Hi"), 96, *ids("<assistant>")]
    assert encode(letters(begin=True, close=True), talk) == want
    assert encode(LM(None, letters()), talk) == want
    assert encode(letters(), talk, quick=True) == [*want, *ids("now")]


@pytest.mark.parametrize(
    ("lm", "prompt", "message"),
    [
        (LM(None, None, "bare"), "a", "model 'bare' has no tokenizer"),
        (letters(template=None), [{"role": "user", "content": "a"}], "no chat template"),
        (letters(), [{"role": "tool", "content": "a"}], r"the chat template refuses it \(no tools here\)"),
        (letters(), "", "a prompt has no tokens: ''"),
    ],
)
def test_what_cannot_be_encoded_is_named(lm, prompt, message):
    with pytest.raises(UserError, match=message):
        encode(lm, prompt)


def test_columns_tell_the_template():
    assert template_settings({"prompt": "a"}) == {"tools": None}
    row = {"tools": json.dumps([{"name": "f"}]), "chat_template_kwargs": {"quick": True}}
    assert template_settings(row) == {"tools": [{"name": "f"}], "quick": True}
    with pytest.raises(BadRow, match=r"tools is not JSON \(Expecting value at column 1\)"):
        template_settings({"tools": "f"})


def test_texts_for_people():
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert (as_text("a"), as_text(talk[1:]), as_text(talk)) == ("a", "Hi", "system: Be brief.\n\nuser: Hi")
