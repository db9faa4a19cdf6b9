"""Positions: the only place that finds the line of each value in a JSON text."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openagents_worker.jsontext import MAX_NESTING, BadValue, check

__all__ = ["JsonText", "NotJson", "Path", "json_path", "read_json"]

Path = tuple[str | int, ...]
"""The place of a value in a document: keys of objects and indexes of lists."""

MAX_DEPTH = MAX_NESTING
NOT_ALLOWED = "a value that is not allowed"
SHORT_NUMBER_CHARS = 18  # so short a number without an exponent needs no check
LONGEST_NUMBER_CHARS = 4_000  # Python converts integers of at most 4,300 digits
LONE_SURROGATE = "half of a surrogate pair (U+D800 to U+DFFF)"
MAX_DUPLICATE_KEYS = 20  # in one error
SHOWN_CHARS = 80  # of a key in a message
TOO_DEEP = f"it is nested too deeply; at most {MAX_DEPTH} levels of objects and lists are allowed"

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')
_NOT_JSON = ("NaN", "Infinity", "-Infinity")  # Python's parser accepts these values, but they are not JSON


class NotJson(ValueError):
    """The text is not JSON, an object has a key twice, or a value is not allowed. `what` says which.

    `line` and `column` count from 1.
    """

    def __init__(self, problem: str, *, line: int, column: int, offset: int, what: str = "not JSON") -> None:
        super().__init__(problem)
        self.line, self.column, self.offset, self.what = line, column, offset, what


@dataclass(frozen=True, slots=True)
class JsonText:
    """A parsed JSON text: its value, and the line at which each value in it begins."""

    value: Any
    lines: Mapping[Path, int]

    def line(self, path: Path) -> int:
        """The line, from 1, of the value at this path. For a missing value, the line of its container."""
        while path not in self.lines:
            path = path[:-1]
        return self.lines[path]


def read_json(text: str) -> JsonText:
    """Parse a JSON text strictly: no NaN, and no duplicate keys. Raises `NotJson`.

    >>> read_json('{"a":\\n [1,\\n 2]}').line(("a", 1))
    3
    """
    _check_characters(text)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise NotJson(error.msg, line=error.lineno, column=error.colno, offset=error.pos) from error
    except RecursionError as error:
        raise NotJson(TOO_DEEP, line=1, column=1, offset=0) from error
    except ValueError as error:  # a number of thousands of digits
        raise _long_number_error(text) from error
    return JsonText(value, _LineScanner(text).lines)


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _error_at(text, error.start, f"{LONE_SURROGATE}, which is not a character") from error


def _long_number_error(text: str) -> NotJson:
    for match in _TOKEN.finditer(text):
        if len(match[0]) > LONGEST_NUMBER_CHARS and match[0][0] in "-0123456789":
            return _error_at(
                text, match.start(), f"a number of {len(match[0]):,} characters; write it as text"
            )
    return _error_at(text, 0, "a number of too many digits")


def _error_at(text: str, offset: int, problem: str) -> NotJson:
    before = text[:offset]
    line_start = before.rfind("\n") + 1
    return NotJson(
        problem,
        line=before.count("\n") + 1,
        column=offset - line_start + 1,
        offset=offset,
        what=NOT_ALLOWED,
    )


@dataclass(slots=True)
class _OpenContainer:
    """An object or a list whose end has not been read yet."""

    path: Path
    index: int | None
    """For a list, the index of the next value. For an object, None."""
    key: str | None = None
    """For an object, the key of the next value. None: the next token is a key."""
    keys: dict[str, int] = field(default_factory=dict)
    """The keys so far, with their lines."""

    @property
    def next_path(self) -> Path:
        return (*self.path, self.key or "" if self.index is None else self.index)


class _LineScanner:
    """Scans a text that is valid JSON for the lines of its values: token by token, without recursion."""

    def __init__(self, text: str) -> None:
        self.lines: dict[Path, int] = {}
        self._line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self._open: list[_OpenContainer] = []
        self._duplicate_keys: dict[int, str] = {}
        for match in _TOKEN.finditer(text):
            self._read_token(match[0], match.start())
        if self._duplicate_keys:
            shown = list(self._duplicate_keys.values())[:MAX_DUPLICATE_KEYS]
            raise self._problem("; ".join(shown), min(self._duplicate_keys))

    def _read_token(self, token: str, offset: int) -> None:
        """Process one token of the text. Raises `NotJson` for a token that is not allowed."""
        inner = self._open[-1] if self._open else None
        match token[0]:
            case "{" | "[":
                if len(self._open) == MAX_DEPTH:
                    raise self._problem(TOO_DEEP, offset)
                path = self._record_line(offset)
                self._open.append(_OpenContainer(path, {"[": 0, "{": None}[token]))
            case "}" | "]":
                self._open.pop()
            case "," if inner is not None and inner.index is not None:
                inner.index += 1
            case "," if inner is not None:
                inner.key = None
            case ":":
                pass
            case '"' if inner is not None and inner.index is None and inner.key is None:
                self._read_key(inner, self._checked(token, offset), offset)
            case _:
                if token in _NOT_JSON:
                    raise self._problem(f"{token} is not JSON", offset)
                if token[0] == '"':
                    if "\\u" in token:
                        self._checked(token, offset)
                elif len(token) > SHORT_NUMBER_CHARS or "e" in token.lower():
                    self._checked(token, offset)
                self._record_line(offset)

    def _checked(self, token: str, offset: int) -> Any:
        """The value of a string or number token. Raises `NotJson` for a value that is not allowed."""
        value = json.loads(token)
        try:
            check(value)
        except BadValue as error:
            problem = self._problem(str(error), offset)
            problem.what = NOT_ALLOWED
            raise problem from error
        return value

    def _read_key(self, inner: _OpenContainer, key: str, offset: int) -> None:
        """Record the line of a key, and of a key that occurs twice."""
        line = self._line(offset)
        if key in inner.keys:
            where = json_path(inner.path)
            self._duplicate_keys[offset] = (
                f"an object{f' ({where})' if where else ''} has the key {_shown(key)!r} twice, "
                f"at line {inner.keys[key]} and at line {line}"
            )
        inner.keys[key] = line
        inner.key = key
        self.lines[inner.next_path] = line

    def _record_line(self, offset: int) -> Path:
        """Record the line of a value that begins at `offset`, and return its path. The line of a value in an
        object is that of its key."""
        path = self._open[-1].next_path if self._open else ()
        self.lines.setdefault(path, self._line(offset))
        return path

    def _line(self, offset: int) -> int:
        return bisect_right(self._line_starts, offset)

    def _problem(self, problem: str, offset: int) -> NotJson:
        line = self._line(offset)
        column = offset - self._line_starts[line - 1] + 1
        return NotJson(problem, line=line, column=column, offset=offset)


def json_path(path: Path) -> str:
    """The path in the notation of error messages.

    >>> json_path(("agents", 2, "tools", 0, "config", "root"))
    'agents[2].tools[0].config.root'
    """
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" for part in path)
    return text.removeprefix(".")


def _shown(key: str) -> str:
    return key if len(key) <= SHOWN_CHARS else f"{key[:SHOWN_CHARS]}…"
