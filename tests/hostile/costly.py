"""Texts that take quadratic time in careless code, made for regular expressions and parsers."""

from __future__ import annotations

__all__ = ["COSTLY", "LARGE"]

LARGE = 20_000  # characters: what needs the square of it takes seconds

_PIECES = {
    "names of secrets": "password=",
    "names that never end": "secret_",
    "names and colons": "api_key:",
    "values that never end": "token='",
    "escaped quotes": 'client_secret=\\"',
    "elements that never end": "<password>",
    "elements that end nothing": "<key>x</",
    "flags": "--password ",
    "flags in lists": "'--token', ",
    "dashes": "-",
    "schemes": "https://",
    "users": "redis://:x",
    "users that never end": "a:b@",
    "beginnings of tokens": "eyJ",
    "tokens without a signature": "eyJhbGciOi.",
    "beginnings of keys": "-----BEGIN RSA PRIVATE KEY-----\n",
    "halves of beginnings": "-----BEGIN ",
    "schemes of authorization": "Bearer ",
    "headers": "Authorization: ",
    "prefixes": "sk-",
    "one letter": "A",
    "hex digits": "0x",
    "queries": "?api_key=&",
    "cookies": "Set-Cookie: a=b;",
    "blanks": " ",
    "line ends": "\n",
    "combined characters": "e\u0301",
    "backslashes": "\\",
    "fences": "```json\n",
    "escape sequences": "\x1b]0;",
}
COSTLY = {name: piece * (LARGE // len(piece)) for name, piece in _PIECES.items()}
