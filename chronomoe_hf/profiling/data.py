"""Text for a profile: named domains from files, Hub names, data sets or plain sequences, read through `datasets`.

A source yields token sequences of at most `length` tokens, and no more than the budget, so nothing larger than one
document is in memory.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chronomoe_hf.errors import DataError
from chronomoe_hf.profiling.chats import render

TEXT, TOKENS = "text", "input_ids"
FORMATS: dict[str, str] = {
    **dict.fromkeys((".txt", ".md", ".rst", ".py", ".log", ".tex", ".html", ".xml", ".yaml", ".yml"), "text"),
    **dict.fromkeys((".jsonl", ".json"), "json"),
    ".parquet": "parquet",
    ".csv": "csv",
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*){0,2}")
_UNKNOWN_FROM = 64  # tokens after which a share of unknown ones says something
_DOCUMENT_CHARS = 32_768  # lines of a text file are joined to documents of about this size

Source = Any
"""A path, a Hub name, a ``datasets`` object, or an iterable of strings, of mappings or of token sequences."""


@dataclass(frozen=True)
class Domain:
    """Text under one name.

    Args:
        name: for records and reports; letters, digits, ``.``, ``-`` and ``_``.
        source: see :data:`Source`.
        column: of the text in a table.
    """

    name: str
    source: Source
    column: str = TEXT

    def describe(self) -> str:
        """The source for people."""
        return str(self.source) if isinstance(self.source, str | Path) else type(self.source).__name__


def named_domains(data: Source, column: str) -> list[Domain]:
    """Domains of what a caller passed: a mapping of names to sources, or one source.

    Raises:
        DataError: no source, or a name that cannot be a directory.
    """
    given: Mapping[str, Source] = (
        data if isinstance(data, Mapping) and TOKENS not in data else {domain_name(data): data}
    )
    if not given:
        raise DataError('no data: pass {"name": source, ...} with a file, a Hub name or a data set for each domain')
    for name in given:
        if not re.fullmatch(r"[\w.-]+", name) or set(name) == {"."}:
            raise DataError(f"a domain needs a name of letters, digits, '.', '-' and '_', got {name!r}")
    return [Domain(name, source, column) for name, source in given.items()]


def check_sources(data: Source, column: str = TEXT) -> None:
    """Whether named files are there, before anything is loaded. Hub names are looked up later.

    Raises:
        DataError: a file is missing, or a name cannot be a directory.
    """
    for domain in named_domains(data, column):
        name = str(domain.source)
        if not isinstance(domain.source, str | Path) or Path(name).exists():
            continue
        if Path(name).suffix in FORMATS or not _HUB_NAME.fullmatch(name):
            raise DataError(f"domain {domain.name!r}: there is no file {name}")


def domain_name(source: Source) -> str:
    """Name of a domain whose caller gave none: that of its file."""
    if isinstance(source, str | Path):
        return re.sub(r"[^\w.-]+", "-", Path(str(source)).stem).strip(".") or "text"
    return "text"


def sequences(domain: Domain, tokenizer: Any, length: int, budget: int | None) -> Iterator[list[int]]:
    """Token sequences of a domain, in its order: each document cut every `length` tokens, `budget` tokens in all.

    Raises:
        DataError: the source cannot be read, has no such column, or holds no text at all.
    """
    left = budget
    found = False
    for tokens in _documents(domain, tokenizer):
        for start in range(0, len(tokens), length):
            piece = tokens[start : start + length]
            piece = piece if left is None else piece[:left]
            found = True
            yield piece
            if left is not None:
                left -= len(piece)
                if left <= 0:
                    return
    if not found:
        raise DataError(
            f"domain {domain.name!r}: {domain.describe()} holds no text (column {domain.column!r}); "
            "check the file, or name the column"
        )


def raw_documents(domain: Domain) -> Iterator[Any]:
    """The documents of a domain before any tokenizer: strings, conversations (lists of messages) or token ids.

    Raises:
        DataError: the source cannot be read or has no such column.
    """
    for row in _rows(domain):
        value = row[_column(domain, row)] if isinstance(row, Mapping) else row
        if value:
            yield value


def _documents(domain: Domain, tokenizer: Any) -> Iterator[list[int]]:
    seen = _Unknown(domain, tokenizer)
    for number, row in enumerate(_rows(domain), start=1):
        value = row
        if isinstance(row, Mapping):
            value = row[_column(domain, row)]
        if value is None or isinstance(value, str):
            if value and value.strip():
                yield seen.passed(list(_tokenize(domain, tokenizer, value)))
        elif isinstance(value, Sequence) and value and isinstance(value[0], Mapping):
            yield seen.passed(list(_chat(domain, tokenizer, value, number)))
        elif (tokens := _token_ids(value)) is not None:
            yield tokens
        else:
            raise DataError(
                f"domain {domain.name!r}, row {number}: expected text, a conversation or token ids, got "
                f"{type(value).__name__}; name the column that holds the text"
            )


class _Unknown:
    """Notices a tokenizer that does not know the text: most of it would be profiled as one token."""

    def __init__(self, domain: Domain, tokenizer: Any) -> None:
        self.domain = domain
        self.unknown_id = getattr(tokenizer, "unk_token_id", None)
        self.tokens = self.unknown = 0

    def passed(self, tokens: list[int]) -> list[int]:
        """The tokens of a document, counted."""
        if self.unknown_id is not None and self.tokens < 100 * _UNKNOWN_FROM:
            self.tokens += len(tokens)
            self.unknown += tokens.count(self.unknown_id)
            if self.tokens >= _UNKNOWN_FROM and 2 * self.unknown > self.tokens:
                raise DataError(
                    f"domain {self.domain.name!r}: {self.unknown} of the first {self.tokens} tokens are unknown to the "
                    "tokenizer: it is another model's, or not of this text; give the right one (--tokenizer)"
                )
        return tokens


def _token_ids(value: Any) -> list[int] | None:
    """`value` as a list of ints, None where it is something else."""
    tokens = value.tolist() if hasattr(value, "tolist") else value
    return list(tokens) if isinstance(tokens, list | tuple) and all(type(token) is int for token in tokens) else None


def _column(domain: Domain, row: Mapping[str, Any]) -> str:
    if domain.column in row:
        return domain.column
    if domain.column == TEXT and TOKENS in row:
        return TOKENS
    close = difflib.get_close_matches(domain.column, list(row), n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise DataError(
        f"domain {domain.name!r}: {domain.describe()} has no column {domain.column!r}, it has {', '.join(row)}{hint}"
    )


def _tokenize(domain: Domain, tokenizer: Any, text: str) -> Sequence[int]:
    if tokenizer is None:
        raise DataError(f"domain {domain.name!r} holds text, and no tokenizer was given; pass one, or token ids")
    _require_vocabulary(domain, tokenizer)
    return tokenizer(text, verbose=False)[TOKENS]


def _require_vocabulary(domain: Domain, tokenizer: Any) -> None:
    """Transformers makes an empty tokenizer of a directory without tokenizer files, for some families."""
    special = getattr(tokenizer, "all_special_ids", None)
    if special is not None and len(tokenizer) <= len(set(special)) + 1:
        where = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise DataError(
            f"domain {domain.name!r}: the tokenizer of {where} has no vocabulary ({len(tokenizer)} entries): it has no "
            "tokenizer files, as a checkpoint of a Trainer without processing_class; name another one (--tokenizer)"
        )


def _chat(domain: Domain, tokenizer: Any, messages: Sequence[Any], row: int) -> Sequence[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"domain {domain.name!r}: column {domain.column!r} holds conversations, and the tokenizer has no chat "
            "template; name a column of plain text"
        )
    _require_vocabulary(domain, tokenizer)
    text = render(messages, tokenizer, f"domain {domain.name!r}, row {row}")
    return tokenizer(text, add_special_tokens=False, verbose=False)[TOKENS]  # the template writes them itself


def _rows(domain: Domain) -> Iterable[Any]:
    source = domain.source
    if not isinstance(source, str | Path):
        if not isinstance(source, Iterable):
            raise DataError(f"domain {domain.name!r}: cannot read text from a {type(source).__name__}")
        return source
    path = Path(source)
    if path.is_file():
        return _file_rows(domain, path)
    if path.is_dir():
        return _saved_rows(domain, path)
    name = str(source)
    if path.suffix in FORMATS or not _HUB_NAME.fullmatch(name):
        raise DataError(f"domain {domain.name!r}: there is no file {name}")
    return _hub_rows(domain, name)


def _file_rows(domain: Domain, path: Path) -> Iterator[Any]:
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise DataError(
            f"domain {domain.name!r}: {path} has the suffix {path.suffix!r}; known are {', '.join(FORMATS)}. Convert "
            "it, or pass the strings themselves from Python"
        )
    if path.stat().st_size == 0:
        return
    options: dict[str, Any] = {"keep_linebreaks": True} if kind == "text" else {}
    rows = _load(domain, kind, data_files=str(path), split="train", **options)
    yield from _joined(rows) if kind == "text" else rows


def _joined(rows: Iterable[Mapping[str, str]]) -> Iterator[str]:
    """Lines of a text file as documents of about `_DOCUMENT_CHARS` characters."""
    lines: list[str] = []
    size = 0
    for row in rows:
        lines.append(row[TEXT])
        size += len(row[TEXT])
        if size >= _DOCUMENT_CHARS:
            yield "".join(lines)
            lines, size = [], 0
    yield "".join(lines)


def _saved_rows(domain: Domain, path: Path) -> Iterable[Any]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"domain {domain.name!r}: {path} is a directory that datasets cannot load ({_first(error)}); name a file"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        raise DataError(f"domain {domain.name!r}: {path} holds the splits {', '.join(loaded)}; name one of its folders")
    return loaded


def _hub_rows(domain: Domain, name: str) -> Iterator[Any]:
    repository, config, split = [*name.split(":"), "", ""][:3]
    yield from _load(domain, repository, config or None, split=split or "train")


def _load(domain: Domain, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """Stream a data set; whatever goes wrong in reading it is one DataError."""
    import datasets

    try:
        yield from datasets.load_dataset(*args, streaming=True, **kwargs)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, json.JSONDecodeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"domain {domain.name!r}: {domain.describe()} cannot be read: {_first(error)} (a Hub name is "
            "owner/name:config:split and needs the network)"
        ) from error


def _first(error: BaseException) -> str:
    text = str(error.__cause__ or error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
