"""From a row to a text or a conversation, and to what a chat template makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_ext.data import Columns, batches, documents
from moe_ext.data.reading import Counts
from moe_ext.data.rendering import ChatTemplate
from moe_ext.data.rows import Conversation, UnreadableRowError, content_of, recognised
from moe_ext.data.tokens import token_ids, token_lists
from tests.support.letters import letter_tokenizer

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TEMPLATE = "{{ bos_token }}{% if tools %}t{% endif %}{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"


def content(row: dict[str, Any], columns: str = "") -> Any:
    given = Columns.parse(columns) if columns else Columns()
    return content_of(row, recognised(row, given))


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": TURNS}, TURNS),
        ({"messages": TURNS, "prompt": "a", "text": "no"}, TURNS),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, TURNS),
        ({"conversation": TURNS, "system": "s"}, [{"role": "system", "content": "s"}, *TURNS]),
        ({"messages": TURNS, "system": " "}, TURNS),
        ({"instruction": "a", "output": "b"}, TURNS),
        ({"instruction": "a", "input": "", "output": "b", "text": "no"}, TURNS),
        ({"instruction": "a", "input": "c", "output": "b"}, [{"role": "user", "content": "a\n\nc"}, TURNS[1]]),
        ({"prompt": "a", "completion": "b"}, TURNS),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, TURNS),
        ({"prompt": TURNS[:1], "response": "b"}, TURNS),
        ({"question": "a", "answer": "b"}, TURNS),
        ({"query": "a", "response": "b", "id": 3}, TURNS),
        ({"problem": "a", "solution": "b"}, TURNS),
        # Arrow fills in what other rows have.
        ({"messages": [{**turn, "tool_calls": None, "name": None} for turn in TURNS]}, TURNS),
    ],
)
def test_conversations_are_recognised(row: dict[str, Any], messages: list[dict[str, str]]) -> None:
    assert content(row) == Conversation(messages)


@pytest.mark.parametrize("name", ["text", "content", "document", "code"])
def test_texts_are_recognised(name: str) -> None:
    assert content({name: "a", "url": "u", "score": 0.5}) == "a"


def test_given_columns_come_before_all_others() -> None:
    row = {"text": "t", "messages": TURNS, "q": "a", "a": "b", "more": "c"}
    assert content(row, "text=text") == "t"
    assert content(row, "prompt=q,response=a") == Conversation(TURNS)
    assert content(row, "prompt=q,response=a,input=more").messages[0]["content"] == "a\n\nc"


def test_tools_and_their_calls_are_as_templates_take_them() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": None}}}
    for tools in ([tool], json.dumps([tool])):
        found = content({"messages": [TURNS[0], asked], "tools": tools})
        assert found.tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        assert found.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
        assert found.messages[1]["content"] == ""
    assert content({"messages": TURNS, "tools": "[]"}).tools is None


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"body": "a"}, "", r"no column that holds text or messages by a known name, only \['body'\]; say which"),
        ({"text": "a"}, "text=body", r"has no column 'body', only \['text'\]"),
        ({"text": None}, "", "'text' is NoneType; expected a text"),
        ({"text": [1, 2]}, "", "'text' is list; expected a text"),
        ({"messages": []}, "", r"'messages' is \[\]; expected a list of messages"),
        ({"messages": "a"}, "", "'messages' is 'a'; expected a list of messages"),
        ({"messages": ["a"]}, "", "message 0 of 'messages' is str; expected role and content"),
        ({"messages": [TURNS[0], {"role": 3}]}, "", "message 1 of 'messages' has the role 3"),
        ({"messages": [{"role": "user"}]}, "", "message 0 of 'messages' has the content None"),
        ({"prompt": "a", "response": None}, "", "'response' is NoneType; expected a text"),
        ({"instruction": "a", "input": 3, "output": "b"}, "", "'input' is int; expected a text"),
        ({"messages": TURNS, "system": 3}, "", "'system' is int; expected a text"),
        ({"messages": TURNS, "tools": "{"}, "", "its tools are no JSON"),
        ({"messages": TURNS, "tools": {"a": 1}}, "", "its tools are dict; expected a list"),
    ],
)
def test_a_row_that_cannot_be_read_says_why(row: dict[str, Any], columns: str, message: str) -> None:
    with pytest.raises(UnreadableRowError, match=message):
        content(row, columns)


def test_a_templated_text_gets_the_special_tokens_of_its_template_only() -> None:
    tokenizer = letter_tokenizer(bos=True)
    tokenizer.chat_template = TEMPLATE
    text = ChatTemplate(tokenizer).render(Conversation(TURNS))
    assert text == "<s>uaab"
    assert token_ids(text, tokenizer) == [0, 0, 1, 1, 2]  # u is unknown, which is token 0
    assert token_ids("ab", tokenizer) == [0, 1, 2]
    assert token_lists(["ab", text, "<s>ab", "a"], tokenizer) == [[0, 1, 2], [0, 0, 1, 1, 2], [0, 1, 2], [0, 1]]
    bare = ChatTemplate(tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}").render(Conversation(TURNS))
    assert token_ids(bare, tokenizer) == [1, 2]


def test_another_template_is_a_file_or_a_name(tmp_path: Path) -> None:
    tokenizer = letter_tokenizer(bos=False)
    tokenizer.chat_template = {"default": "d", "short": "s"}
    (tmp_path / "a.jinja").write_text("{{ messages[1].content }}")
    given = Conversation(TURNS)
    assert ChatTemplate(tokenizer).render(given) == "d"
    assert ChatTemplate(tokenizer, "short").render(given) == "s"
    assert ChatTemplate(tokenizer, tmp_path / "a.jinja").render(given) == "b"
    assert ChatTemplate(tokenizer, str(tmp_path / "a.jinja")).render(given) == "b"
    with pytest.raises(ValueError, match="'other' is no file with a template, and the tokenizer has default, short"):
        ChatTemplate(tokenizer, "other")


def test_a_model_without_a_template_says_what_to_pass_and_no_row_is_skipped_for_it() -> None:
    for skip in (False, True):
        with pytest.raises(ValueError, match=r"has no chat template.*--template FILE\), or name a column of text"):
            documents({"chat": [{"messages": TURNS}]}, letter_tokenizer(bos=False), skip_bad_rows=skip)


BAD = [
    {"text": "ab"},
    {"text": 3},
    {"text": " "},
    {"body": "x"},
    {"messages": [{"role": "user", "content": "c"}, {"role": "user", "content": "d"}]},
    {"text": "\ud800"},
    ["a"],
    {"text": "ba"},
]


@pytest.mark.parametrize("ahead", [0, 4])
def test_bad_rows_are_an_error_that_names_them_or_are_counted(tmp_path: Path, ahead: int) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in BAD))
    tokenizer = letter_tokenizer(bos=False)
    tokenizer.chat_template = "{% if messages[1].role == 'user' %}{{ raise_exception('twice the user') }}{% endif %}"
    with pytest.raises(ValueError, match=rf"^{file}, line 2: 'text' is int; .*skip_bad_rows \(--skip-bad-rows\)$"):
        list(batches(file, tokenizer, ahead=ahead))
    found = batches(file, tokenizer, skip_bad_rows=True, ahead=ahead)
    (batch,) = found
    assert batch["input_ids"].tolist() == [[1, 2], [2, 1]]
    counts = found.counts
    assert (counts.rows, counts.bad, counts.empty) == (8, 5, 1)
    assert [bad.split(": ")[0] for bad in counts.first_bad] == [f"{file}, line {line}" for line in (2, 4, 5, 6, 7)]
    assert "twice the user" in counts.first_bad[2]


def test_a_column_can_name_the_domain() -> None:
    rows = [{"text": "ab", "from": "x"}, {"text": "cd", "from": "y"}, {"text": "ef", "from": "x"}]
    found, counts = documents({"all": rows}, letter_tokenizer(bos=False), columns="domain=from")
    assert found == {"x": ["ab", "ef"], "y": ["cd"]}
    assert counts == Counts(rows=3)
    with pytest.raises(ValueError, match="all, row 1: 'from' is None; expected a domain's name"):
        documents({"all": [{"text": "a", "from": None}]}, letter_tokenizer(bos=False), columns="domain=from")
    with pytest.raises(ValueError, match="data 'all': holds no text"):
        documents({"all": [""]}, letter_tokenizer(bos=False))
