"""A text as tokens that still know which letters they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chronomoe_hf.errors import DataError

Text = str | Sequence[Any]
"""A string, a conversation (messages with a role), or a sequence of either."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of one text.

    Args:
        ids: of the tokens.
        pieces: what each stands for; joined they are the text, where the tokenizer says where its tokens lie.
        special: whether a token stands for no letters of the text (a beginning, an end).
    """

    ids: list[int]
    pieces: list[str]
    special: list[bool]

    def __getitem__(self, at: slice) -> Tokens:
        return Tokens(self.ids[at], self.pieces[at], self.special[at])

    def __len__(self) -> int:
        return len(self.ids)


def texts_of(text: Text, tokenizer: Any) -> list[Tokens]:
    """Every text that a caller passed, as tokens.

    Args:
        text: see `Text`. Conversations go through the tokenizer's chat template.
        tokenizer: of the model.

    Raises:
        DataError: no text, or something that is none; a conversation without a chat template.
    """
    single = isinstance(text, str) or _is_chat(text) or not isinstance(text, Sequence)
    given = [text] if single else list(text)
    if not given:
        raise DataError('there is no text; give a string, for example trace(model, tokenizer, "def f(x):")')
    found = [_chat(one, tokenizer) if _is_chat(one) else _plain(one, tokenizer) for one in given]
    if not any(len(tokens) for tokens in found):
        raise DataError("the text has no token")
    return [tokens for tokens in found if len(tokens)]


def _is_chat(text: Any) -> bool:
    return (
        not isinstance(text, str)
        and isinstance(text, Sequence)
        and bool(text)
        and all(isinstance(message, Mapping) and "role" in message for message in text)
    )


def _plain(text: Any, tokenizer: Any) -> Tokens:
    if not isinstance(text, str):
        raise DataError(
            f"a text is a string or a conversation ([{{'role': ..., 'content': ...}}, ...]), got a "
            f"{type(text).__name__}"
        )
    return _encoded(text, tokenizer, {})


def _chat(messages: Any, tokenizer: Any) -> Tokens:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("this is a conversation, and the tokenizer has no chat template; give its text as a string")
    rendered = tokenizer.apply_chat_template(list(messages), tokenize=False)
    return _encoded(rendered, tokenizer, {"add_special_tokens": False})


def _encoded(text: str, tokenizer: Any, options: dict[str, Any]) -> Tokens:
    if tokenizer is None:
        raise DataError("a text needs the tokenizer of the model; pass it as the second argument")
    if not getattr(tokenizer, "is_fast", False):
        ids = list(tokenizer(text, verbose=False, **options)["input_ids"])
        special = set(tokenizer.all_special_ids)
        return Tokens(ids, [tokenizer.decode([one]) for one in ids], [one in special for one in ids])
    coded = tokenizer(text, verbose=False, return_offsets_mapping=True, **options)
    return _laid_out(text, list(coded["input_ids"]), coded["offset_mapping"], tokenizer)


def _laid_out(text: str, ids: list[int], offsets: Sequence[tuple[int, int]], tokenizer: Any) -> Tokens:
    """Pieces that tile the text: what a tokenizer skips (a space) belongs to the token after it.

    A letter of several tokens stands at the first of them; the others are empty.
    """
    pieces, special, at = [], [], 0
    for one, (start, end) in zip(ids, offsets, strict=True):
        alone = end <= start
        piece = tokenizer.convert_ids_to_tokens(one) if alone else text[min(at, start) if start >= at else at : end]
        pieces.append(piece or "")
        special.append(alone)
        at = at if alone else max(at, end)
    if at < len(text) and pieces and not all(special):
        last = max(index for index, alone in enumerate(special) if not alone)
        pieces[last] += text[at:]
    return Tokens(ids, pieces, special)
