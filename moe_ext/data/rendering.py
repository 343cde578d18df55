"""Conversations to texts, with a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from moe_ext.data.rows import Conversation, UnreadableRowError
from moe_ext.data.tokens import Templated
from moe_ext.storage.formats import shortened, shown


class ChatTemplate:
    """What writes conversations as a model reads them.

    Args:
        tokenizer: its own template is taken if there is no other.
        template: a file with another one, the name of one of the tokenizer's, or the template itself (a text with
            ``{``).

    Raises:
        ValueError: no such file or template.
    """

    def __init__(self, tokenizer: Any, template: str | Path | None = None) -> None:
        self._tokenizer = tokenizer
        own = getattr(tokenizer, "chat_template", None)
        names = sorted(own) if isinstance(own, dict) else []
        self._template: str | None = None
        if template is None:
            self._known = bool(own)
            return
        self._known = True
        if isinstance(template, Path) or (template not in names and "{" not in template):
            self._template = _read(Path(template), names)
        else:
            self._template = template

    def render(self, conversation: Conversation) -> Templated:
        """The text of a conversation.

        Raises:
            ValueError: there is no template.
            UnreadableRowError: the template refuses the conversation.
        """
        if not self._known:
            raise ValueError(
                "the tokenizer has no chat template, and the data holds conversations: give one (template, --template "
                "FILE), or name a column of text (columns, --columns text=NAME)"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                conversation.messages, tools=conversation.tools, chat_template=self._template, tokenize=False
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise UnreadableRowError(f"the chat template refuses it: {shortened(str(error), 200)}") from None
        return Templated(text)


def _read(file: Path, names: list[str]) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = f", and the tokenizer has {', '.join(names)}" if names else ""
        raise ValueError(f"template: {shown(str(file))} is no file with a template{known} ({error})") from None
