"""Conversations of a data set as text: one form of messages, through the tokenizer's chat template, and nothing lost.

A template reads ``role`` and ``content`` and says nothing where they are missing: it renders special tokens alone. So
messages are brought into that form or refused, and what was said must be found in what was rendered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chronomoe_hf.errors import DataError

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}


def render(messages: Sequence[Any], tokenizer: Any, where: str) -> str:
    """A conversation as the text that the chat template makes of it.

    Args:
        messages: ``{"role", "content"}`` each, or ``{"from", "value"}`` (ShareGPT); contents are text or parts of it.
        tokenizer: with a chat template.
        where: domain and row, for messages.

    Raises:
        DataError: messages of another form, a template that does not take them, or text that does not arrive.
    """
    told = [_message(message, where) for message in messages]
    said = [message["content"].strip() for message in told if message["content"].strip()]
    text = _template(told, tokenizer, where)
    if not _arrived(said, text):  # some templates take only parts
        parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in told]
        text = _template(parts, tokenizer, where)
    if not _arrived(said, text):
        lost = next(each for each in said if each not in text)
        raise DataError(
            f"{where}: the chat template leaves out what is said in the conversation, for example {lost[:60]!r}: it "
            f"gives {text[:80]!r}; check the roles ({', '.join(sorted({each['role'] for each in told}))}), or name a "
            "column of plain text"
        )
    return text


def _arrived(said: Sequence[str], text: str) -> bool:
    """Whether most of what is said is in the text: templates drop thoughts, or earlier system messages, on purpose."""
    return sum(each in text for each in said) * 2 >= len(said)


def _message(message: Any, where: str) -> dict[str, Any]:
    if isinstance(message, Mapping) and "role" in message and ("content" in message or "tool_calls" in message):
        return {**message, "content": _content(message.get("content"), where)}
    if isinstance(message, Mapping) and "from" in message and "value" in message:
        speaker = str(message["from"])
        return {"role": _ROLES.get(speaker.lower(), speaker), "content": _content(message["value"], where)}
    keys = ", ".join(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
    raise DataError(
        f"{where}: a message is {{role, content}} or {{from, value}}, got {keys}; rename the fields, or name a "
        "column of plain text"
    )


def _content(content: Any, where: str) -> str:
    """Text as it is; parts of text joined; nothing beside a tool call."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content):
        kinds = {str(part.get("type", "text")) for part in content if not isinstance(part.get("text"), str)}
        if not kinds:
            return "".join(part["text"] for part in content)
        raise DataError(f"{where}: the conversation holds {', '.join(sorted(kinds))}, and a profile reads text alone")
    raise DataError(f"{where}: the content of a message is text or a list of parts, got {type(content).__name__}")


def _template(messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{where}: the tokenizer's chat template does not take the conversation: {first}; name a column of plain "
            "text, or bring the roles into the order that the template wants"
        ) from error
