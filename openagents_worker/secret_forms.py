"""Secrets by their form. The only place that recognizes a secret by its characters.

It masks keys and tokens of the well-known providers, `Bearer …`, private keys, logins and parameters of URLs,
and the known secrets of this process.

Every pattern begins with a fixed character, which is found as fast as with `in`. Each repetition is bounded
or never reads a character twice. Therefore the time is proportional to the length of any text.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import lru_cache
from urllib.parse import quote, unquote

from openagents_worker.secret_names import ValueKind, value_kind

__all__ = [
    "MASK",
    "PLACEHOLDER",
    "has_digit",
    "mask_secrets",
    "mask_short",
    "mask_url",
    "on_secret_remembered",
    "remember_secret",
    "remember_secret_for_a_while",
    "remember_secrets_of_url",
]

MASK = "***"

# Each pattern finds the last character of its prefix, which is rare in texts, and then looks back and ahead.
_DASHED = re.compile(r"-(?<=(?<![A-Za-z0-9])[prs]k-)([A-Za-z0-9_-]{8,})")
_DASHED_OF_PROVIDERS = re.compile(
    r"-(?:(?<=(?<![A-Za-z0-9])gl[dfpr]t-)|(?<=(?<![A-Za-z0-9])glpat-)|(?<=(?<![A-Za-z0-9])xox[a-z]-)"
    r"|(?<=(?<![A-Za-z0-9])xapp-)|(?<=(?<![A-Za-z0-9])pypi-)|(?<=(?<![A-Za-z0-9])xai-)"
    r"|(?<=(?<![A-Za-z0-9])pplx-)|(?<=(?<![A-Za-z0-9])nvapi-)|(?<=(?<![A-Za-z0-9])tvly-)"
    r"|(?<=(?<![A-Za-z0-9])key-)|(?<=PMAK-))([A-Za-z0-9_-]{16,})"
)
_UNDERSCORED = re.compile(
    r"_(?:(?<=(?<![A-Za-z0-9])[prs]k_)|(?<=(?<![A-Za-z0-9])gh[oprsu]_)|(?<=github_pat_)"
    r"|(?<=(?<![A-Za-z0-9])hf_)|(?<=(?<![A-Za-z0-9])npm_)|(?<=whsec_)|(?<=do[opr]_v1_)"
    r"|(?<=shp[acpst]{2}_)|(?<=(?<![A-Za-z0-9])gsk_)|(?<=(?<![A-Za-z0-9])r8_)|(?<=lsv2_)"
    r"|(?<=dckr_pat_)|(?<=glsa_)|(?<=rubygems_)|(?<=figd_))([A-Za-z0-9_]{12,})"
)
_LETTERED = re.compile(
    r"A(?<![A-Za-z0-9]A)(Iza(?=[A-Za-z0-9_-]{30})|[KSB]IA(?=[A-Z0-9]{16}(?![A-Za-z0-9]))"
    r"|TATT(?=[A-Za-z0-9_=-]{20})|GE-SECRET-KEY-)[A-Za-z0-9_=-]+"
)
_AWS_SECRET = re.compile(r"(?<![A-Za-z0-9/+=_.-])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=_.-])")
_JWT = re.compile(r"eyJ(?<![A-Za-z0-9_-]eyJ)[A-Za-z0-9_-]{8,}+\.[A-Za-z0-9_-]{8,}+(?:\.[A-Za-z0-9_-]*+){0,3}")
_SENDGRID = re.compile(r"SG\.(?<![A-Za-z0-9]SG\.)[A-Za-z0-9_-]{16,}+\.[A-Za-z0-9_-]{16,}+")
_TELEGRAM = re.compile(r":(?<=[0-9]{8}:)[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])")
_WEBHOOK = re.compile(
    r"/(?:(?<=hooks\.slack\.com/)(?:services|workflows|triggers)/|(?<=/api/webhooks/)[0-9]{1,30}/)[\w/-]{8,}"
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN ([A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?)-----(?!\*\*\*)"
    r"(?s:.*?)(?:-----END [A-Z0-9 ]{0,60}-----|\Z)"
)
_SCHEME = re.compile(
    r"[Bb](?<![A-Za-z0-9][Bb])((?:[Ee][Aa][Rr][Ee][Rr]|[Aa][Ss][Ii][Cc])\s{1,8})([A-Za-z0-9._~+/=-]{8,})"
)
# A port is not a password. A password ends at the last @ before a space or another URL.
_URL_LOGIN = re.compile(
    r"""://([^\s:/@"<>]{0,256}):(?![0-9]{1,5}(?![^/?#\s,;"')\]>.]))((?:(?!://)[^\s"<>`]){1,4096})@"""
)
_URL_TOKEN = re.compile(r"://(?=[A-Za-z0-9_-]{0,256}[0-9])[A-Za-z0-9_-]{20,256}@")
_PARAMETER = re.compile(r"""([?&;]\s?)([\w.%\[\]-]{1,64})=([^&;\s"'<>#]{1,2048})""")
_SECRET_PARAMETERS = frozenset({"auth", "pass", "pwd", "sig", "signature"})
_SHORTEST_KEY_PARAMETER = 16
# A placeholder instead of a value: `${REDIS_PASSWORD}`, `$PW`, `{password}`, `password`.
PLACEHOLDER = re.compile(
    r"\$\{[^}]{0,256}\}\S{0,8}|\$[A-Z_][A-Z0-9_]*|\{[\w.]*\}|password|PASSWORD|secret|token|\*\*\*"
)


def mask_secrets(text: str, *, known: bool = True) -> str:
    """The text with masks instead of everything that has the form of a secret, and of known secrets.

    With `known=False` the known secrets of this process are not masked, so that the result depends only on
    the text.
    """
    if known:
        for secret in _known:
            if secret in text:
                text = text.replace(secret, MASK)
    if "-" in text:
        text = _DASHED.sub(_masked_key, text)
        text = _DASHED_OF_PROVIDERS.sub(_masked_token, text)
        if "-----BEGIN" in text:
            text = _PRIVATE_KEY.sub(rf"-----BEGIN \1-----{MASK}", text)
    if "_" in text:
        text = _UNDERSCORED.sub(_masked_token, text)
    if "A" in text:
        before = text
        text = _LETTERED.sub(rf"A\1{MASK}", text)
        if text is not before and text != before:
            text = _AWS_SECRET.sub(_masked_aws_secret, text)
    if "." in text:
        text = _JWT.sub(f"eyJ{MASK}", text)
        text = _SENDGRID.sub(f"SG.{MASK}", text)
    lowered = text.lower()
    if "bearer" in lowered or "basic" in lowered:
        text = _SCHEME.sub(_masked_scheme, text)
    if ":" in text:
        text = _masked_urls(text)
    return _PARAMETER.sub(_masked_parameter, text) if "=" in text else text


@lru_cache(maxsize=8192)  # every event of a run has the same ids and names
def mask_short(text: str) -> str:
    """The same as `mask_secrets`, with a cache for short texts that are repeated."""
    return mask_secrets(text)


def mask_url(url: str) -> str:
    """One URL, or several URLs of sentinels, with masked passwords. It also works for invalid URLs.

    >>> mask_url("rediss://me:pa@ss/w#rd@host:6379/0?password=x")
    'rediss://me:***@host:6379/0?password=***'
    """
    if "://" not in url and "@" in url:  # not a URL, but the part before the host may be a login
        url = f"{MASK}@{url.rpartition('@')[2]}"
    text = _WHOLE_URL_LOGIN.sub(_masked_login, url)
    text = _URL_PARAMETER.sub(_masked_parameter, text)
    return mask_secrets(text)


_WHOLE_URL_LOGIN = re.compile(r"://([^:@]{0,256}):(?![0-9]{1,5}(?![^/?#\s,;]))((?:(?!://).)*)@", re.DOTALL)
_URL_PARAMETER = re.compile(r"([?&;]\s?)([\w.%\[\]-]{1,64})=([^&;]+)")


def _masked_urls(text: str) -> str:
    text = _TELEGRAM.sub(f":{MASK}", text)
    if "://" not in text:
        return text
    text = _URL_LOGIN.sub(_masked_login, text)
    text = _URL_TOKEN.sub(f"://{MASK}@", text)
    return _WEBHOOK.sub(_masked_webhook, text)


def _masked_login(found: re.Match[str]) -> str:
    user, password = found.groups()
    if PLACEHOLDER.fullmatch(password):
        return found[0]
    return f"://{user}:{MASK}@"


def _masked_webhook(found: re.Match[str]) -> str:
    return f"/{MASK}"


def _masked_parameter(found: re.Match[str]) -> str:
    before, name, value = found.groups()
    return f"{before}{name}={MASK}" if _is_secret_parameter(name, value) else found[0]


def _is_secret_parameter(name: str, value: str) -> bool:
    kind = value_kind(name)
    if PLACEHOLDER.fullmatch(value):
        return False
    if kind is ValueKind.SECRET or (kind is ValueKind.SECRET_OR_NUMBER and not value.isdigit()):
        return True
    name = name.lower()
    if name in _SECRET_PARAMETERS or name.endswith("signature"):
        return True
    return name == "key" and len(value) >= _SHORTEST_KEY_PARAMETER and has_digit(value)


def _masked_key(found: re.Match[str]) -> str:
    """Mask a text after `sk-` with a digit or a part of ten or more letters; `sk-learn` is a name."""
    value = found[1]
    is_key = has_digit(value) or any(len(part) >= 10 for part in re.split("[-_]", value))
    return f"-{MASK}" if is_key else found[0]


def _masked_token(found: re.Match[str]) -> str:
    """Mask the token of a provider: it has a long random part, or begins with `live` or `test`."""
    value = found[1]
    parts = re.split("[-_]", value)
    is_long = any(len(part) >= 12 for part in parts) or sum(map(len, parts)) >= 24
    is_token = has_digit(value) and is_long and not _is_snake_case(parts)
    is_token = is_token or value.startswith(("live_", "test_", "live-", "test-"))
    return f"{found[0][0]}{MASK}" if is_token else found[0]


def _is_snake_case(parts: list[str]) -> bool:
    """Whether each part is a word or a number, as in `config_cache_min_10`."""
    return len(parts) > 1 and all(part.isdigit() or part.isalpha() for part in parts)


def _masked_scheme(found: re.Match[str]) -> str:
    value = found[2]
    inner = value[1:]
    is_mixed = inner != inner.lower() and inner != inner.upper()
    is_secret = has_digit(value) or is_mixed or value.endswith("=") or len(value) >= 24
    return f"{found[0][0]}{found[1]}{MASK}" if is_secret else found[0]


def _masked_aws_secret(found: re.Match[str]) -> str:
    value = found[0]
    is_mixed = value != value.lower() and value != value.upper()
    return MASK if is_mixed and has_digit(value) else value


_DIGIT = re.compile("[0-9]")


def has_digit(text: str) -> bool:
    return _DIGIT.search(text) is not None


# --- the secrets of this process -------------------------------------------------------------------------

MAX_KNOWN = 256  # a deployment has a few; the oldest are forgotten
SHORTEST_KNOWN_CHARS = 8  # a shorter value could be a word of any sentence
SURELY_A_SECRET_CHARS = 20  # no word is this long

MAX_RECENT = 64  # each known secret is searched for in every text
_remembered: dict[str, None] = {}  # the oldest first
_recent: dict[str, bool] = {}  # the one that was used last at the end
_known: tuple[str, ...] = ()
_remembering = threading.Lock()
_caches: list[Callable[[], None]] = [mask_short.cache_clear]


def on_secret_remembered(clear: Callable[[], None]) -> None:
    """Call `clear` whenever a secret is remembered, to empty a cache of masked texts."""
    _caches.append(clear)


def remember_secret(value: str | None) -> None:
    """Mask this value from now on in every text of this process that is stored or shown.

    It is called for the keys that the agents file names and for passwords in URLs of the environment. A value
    that could be a word (`password`, `not-needed`) is ignored, because the word would be masked everywhere.
    """
    if not value or not _is_distinctive(value):
        return
    with _remembering:
        before = len(_remembered)
        _remembered.update(dict.fromkeys((value, quote(value, safe=""))))
        if len(_remembered) == before:
            return
        while len(_remembered) > MAX_KNOWN:
            del _remembered[next(iter(_remembered))]
        _know_remembered()


def remember_secret_for_a_while(value: str) -> None:
    """The same for one of many secrets, for example the key of a tenant: only the last ones are masked, so
    that they do not replace the secrets of the deployment."""
    with _remembering:
        is_new = _recent.pop(value, True)
        if is_new and not _is_distinctive(value):
            return
        _recent[value] = False
        if is_new:
            while len(_recent) > MAX_RECENT:
                del _recent[next(iter(_recent))]
            _know_remembered()


def _know_remembered() -> None:
    """Mask the remembered secrets. The longest first: a secret that begins with another one is masked
    completely."""
    global _known
    _known = tuple(sorted({**_remembered, **_recent}, key=len, reverse=True))
    for clear in _caches:
        clear()


def remember_secrets_of_url(url: str) -> None:
    """Remember the passwords in a URL: of its login and of its parameters."""
    for found in _WHOLE_URL_LOGIN.finditer(url):
        remember_secret(found[2])
        remember_secret(unquote(found[2]))
    for found in _URL_PARAMETER.finditer(url):
        if _is_secret_parameter(found[2], found[3]):
            remember_secret(unquote(found[3]))


def _is_distinctive(value: str) -> bool:
    if len(value) < SHORTEST_KNOWN_CHARS or value == MASK:
        return False
    is_mixed = value[1:] != value[1:].lower() and value != value.upper()
    is_number = value.isdigit()
    return (has_digit(value) and not is_number) or is_mixed or len(value) >= SURELY_A_SECRET_CHARS
