"""What a row of a data set holds: its columns by their part, and the text or the conversation made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from moe_ext.storage.formats import shown


class UnreadableRowError(ValueError):
    """A row that holds no text, or not as it should."""


class Row(NamedTuple):
    """A row and where it stands.

    Attributes:
        content: its columns; a text; or why it could not be read.
        place: the file or data set.
        unit: "line", "row" or "" for a file that is one row.
        number: from 1.
    """

    content: Mapping[str, Any] | str | UnreadableRowError
    place: str
    unit: str = ""
    number: int = 0

    @property
    def where(self) -> str:
        """As a message names it."""
        return f"{self.place}, {self.unit} {self.number}" if self.unit else self.place


@dataclass(frozen=True)
class Conversation:
    """Messages, and the tools that they may call, as chat templates take them."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Columns:
    """Names of columns by their part; those that are None are recognised by their usual names.

    Attributes:
        text: a text, or a list of token ids is refused.
        messages: a list of messages, with ``role`` and ``content`` or with ``from`` and ``value``.
        prompt, response: a pair; either a text or a list of messages.
        input: what is appended to the prompt.
        system: the system message of a pair, or of messages without one.
        tools: a list of tools, or JSON of one.
        domain: the row's domain, in the place of its source's name; never recognised.
    """

    text: str | None = None
    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    input: str | None = None
    system: str | None = None
    tools: str | None = None
    domain: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.response is None):
            raise ValueError("columns: prompt and response go together")
        if [self.text, self.messages, self.prompt].count(None) < 2:
            raise ValueError("columns: give text, messages, or prompt and response, one of them")

    @classmethod
    def parse(cls, given: str) -> Columns:
        """Of a text such as ``"prompt=question,response=answer"``; ValueError for another."""
        known = [field.name for field in fields(cls)]
        found: dict[str, str] = {}
        for part in given.split(","):
            name, equals, column = part.partition("=")
            if not equals or name not in known or name in found or not column:
                raise ValueError(f"columns: expected {' or '.join(known)}, each once, = a column, got {shown(part)}")
            found[name] = column
        return cls(**found)

    @property
    def says_what(self) -> bool:
        """Whether it names the columns of the text."""
        return [self.text, self.messages, self.prompt].count(None) < 3


MESSAGES = ("messages", "conversations", "conversation")
PAIRS = (
    ("instruction", ("output", "response", "completion", "answer")),
    ("prompt", ("response", "completion", "output", "answer")),
    ("question", ("answer", "response", "solution")),
    ("query", ("response", "answer")),
    ("problem", ("solution", "answer")),
)
TEXTS = ("text", "content", "document", "code")
SYSTEMS = ("system", "system_prompt")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant"}


def recognised(names: Iterable[str], given: Columns) -> Columns:
    """The parts of the columns with these names: what is given, or else messages before pairs before a text.

    Raises:
        UnreadableRowError: a given column is not there, or none is known.
    """
    there = set(names)
    for field in fields(given):
        column = getattr(given, field.name)
        if column is not None and column not in there:
            raise UnreadableRowError(f"has no column {shown(column)}, only {_listed(there)}")
    extra = {
        "system": given.system or next((name for name in SYSTEMS if name in there), None),
        "tools": given.tools or ("tools" if "tools" in there else None),
        "domain": given.domain,
    }
    if given.says_what:
        return Columns(given.text, given.messages, given.prompt, given.response, given.input, **extra)
    for name in MESSAGES:
        if name in there:
            return Columns(messages=name, **extra)
    for prompt, responses in PAIRS:
        if prompt in there and (response := next((name for name in responses if name in there), None)):
            more = given.input or ("input" if prompt == "instruction" and "input" in there else None)
            return Columns(prompt=prompt, response=response, input=more, **extra)
    for name in TEXTS:
        if name in there:
            return Columns(text=name, **extra)
    raise UnreadableRowError(
        f"has no column that holds text or messages by a known name, only {_listed(there)}; say which (columns, "
        "--columns)"
    )


def _listed(names: Iterable[str]) -> str:
    return shown(sorted(map(str, names)), 200)


def content_of(row: Mapping[str, Any], columns: Columns) -> str | Conversation:
    """A row's text, or its conversation.

    Raises:
        UnreadableRowError: a column holds something else.
    """
    if columns.text is not None:
        return _text(row, columns.text)
    tools = None if columns.tools is None else _tools(row[columns.tools])
    system = [] if columns.system is None else _system(row[columns.system], columns.system)
    if columns.messages is not None:
        messages = list(_messages(row[columns.messages], columns.messages))
        return Conversation(messages if messages[0]["role"] == "system" else system + messages, tools)
    assert columns.prompt is not None and columns.response is not None  # noqa: PT018
    prompt, response = row[columns.prompt], row[columns.response]
    if isinstance(prompt, list) or isinstance(response, list):
        asked = _side(prompt, columns.prompt, "user")
        return Conversation(system + asked + _side(response, columns.response, "assistant"), tools)
    question, more = _text(row, columns.prompt), row.get(columns.input) if columns.input else None
    if more is not None and not isinstance(more, str):
        raise UnreadableRowError(f"{shown(columns.input)} is {type(more).__name__}; expected a text")
    if more and more.strip():
        question = f"{question}\n\n{more}"
    answer = {"role": "assistant", "content": _text(row, columns.response)}
    return Conversation([*system, {"role": "user", "content": question}, answer], tools)


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise UnreadableRowError(f"{shown(column)} is {type(value).__name__}; expected a text")
    return value


def _side(value: object, column: str, role: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return list(_messages(value, column))


def _system(value: object, column: str) -> list[dict[str, Any]]:
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, str):
        raise UnreadableRowError(f"{shown(column)} is {type(value).__name__}; expected a text")
    return [{"role": "system", "content": value}]


def _tools(value: object) -> list[Any] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise UnreadableRowError("its tools are no JSON") from None
    if value is None or value == "" or value == []:
        return None
    if not isinstance(value, list):
        raise UnreadableRowError(f"its tools are {type(value).__name__}; expected a list")
    return [_without_nulls(tool) for tool in value]


def _messages(value: object, column: str) -> Iterator[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise UnreadableRowError(f"{shown(column)} is {shown(value, 40)}; expected a list of messages")
    for index, message in enumerate(value):
        what = f"message {index} of {shown(column)}"
        if not isinstance(message, Mapping):
            raise UnreadableRowError(f"{what} is {type(message).__name__}; expected role and content")
        if message.get("role") is not None:
            role, content = message["role"], message.get("content")
        else:
            role, content = message.get("from"), message.get("value")
        if not isinstance(role, str):
            raise UnreadableRowError(f"{what} has the role {shown(role, 40)}; expected a text")
        kept = {name: part for name, part in _without_nulls(message).items() if name not in ("from", "value", "weight")}
        calls = kept.get("tool_calls")
        if not isinstance(content, str | list) and not calls:
            raise UnreadableRowError(f"{what} has the content {shown(content, 40)}; expected a text")
        if calls:
            kept["tool_calls"] = [_called(call) for call in calls]
        yield {**kept, "role": _ROLES.get(role, role), "content": content if content is not None else ""}


def _called(call: Any) -> Any:
    """A call of a tool, its arguments as an object where they were JSON: what most templates take."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("arguments"), str):
        return call
    try:
        arguments = json.loads(inner["arguments"])
    except ValueError:
        return call
    changed = {**inner, "arguments": arguments}
    return {**call, "function": changed} if "function" in call else changed


def _without_nulls(value: Any) -> Any:
    """Without the entries that Arrow fills in where rows differ in theirs."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
