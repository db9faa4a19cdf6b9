"""Secrets, harmless texts and control sequences, and plugins that leak them in every possible way.

Each secret has a needle: the part that no output may contain. The secrets are not real. They are assembled at
run time, so that secret scanners do not report this file.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from openagents_worker import tool
from openagents_worker.errors import ConfigError, OpenAgentsError, PermanentToolError, ToolError
from openagents_worker.memory.base import MemoryContext, MemoryPlugin
from openagents_worker.patterns.base import PatternPlugin
from openagents_worker.tools.base import ToolContext

__all__ = ["CONTROL", "FILE_KEY", "HARMLESS", "KEYS", "NEEDLES", "SECRETS", "WAYS", "Secret"]

OWN_KEY = "plainly-named-9d1f77c0aa"
"""The value of the environment variable that `api_key_env` names: it has the form of no provider's key."""
FILE_KEY = "plainly-named-44c0b1f6e2"
TENANT_KEY = "plainly-named-b2e87a50d3"
"""Keys in a file and from a registered function; they have the form of no provider's key either."""


@dataclass(frozen=True)
class Secret:
    """A text that contains a secret, and the part that no output may contain."""

    name: str
    text: str
    needle: str


def _secrets() -> Iterator[Secret]:
    def one(name: str, before: str, needle: str, after: str = "") -> Secret:
        return Secret(name, f"{before}{needle}{after}", needle)

    yield one("OpenAI", "sk-", "T3BlbkFJq8Zt4mXw2Lr9Vb6N")
    yield one("OpenAI project", "sk-proj-", "aB3dE5fG7hJ9kL1mN3pQ5rS7")
    yield one("Anthropic", "sk-ant-api03-", "Zx9Cv8Bn7Mq6We5Rt4Yu3Io2")
    yield one("Google", "AIza", "SyD4x8Kq1Wz7Vn3Bm6Lp0Rt5Yh2Jc9Gf1")
    yield one("AWS access key", "AKIA", "Q3EXZ7MVP2LKW4NT")
    yield one("AWS secret", "aws_secret_access_key = ", "wJq8rXUtnFEMI/K7MDENG/bPxRfiCYzEXAM3LEK7")
    yield one("AWS pair", "AKIA" + "Q3EXZ7MVP2LKW4NS ", "uJq8rXUtnFEMI/K7MDENG/bPxRfiCYzEXAM3LEK8")
    yield one("GitHub", "ghp_", "16C7e42F292c6912E7710c838347Ae178B4a")
    yield one("GitHub fine-grained", "github_pat_", "11ABCDEFG0aBcDeFgHiJkL_zYxWvUtSrQpOnMlKjIh")
    yield one("GitLab", "glpat-", "x7Kq9mZt3Lr5Vb8Nc1Wd")
    yield one("Slack bot", "xoxb-", "2381917342-4819371092-Kj7Hg5Fd3Sa1Qw9Er")
    yield one("Slack webhook", "https://hooks.slack.com/services/", "T0A1B2C3D/B4E5F6G7H/Zk8xQ2mW9pL4")
    yield one("Stripe", "sk_live_", "51H8xYzKq3Wm7Rn2Tv9Bc4")
    yield one("Hugging Face", "hf_", "QwErTyUiOpAsDfGh7kLz3xCvBn5m")
    yield one("npm", "npm_", "aB1cD2eF3gH4iJ5kL6mN7oP8qR9sT0uV1wX2")
    yield one("PyPI", "pypi-", "AgEIcHlwaS5vcmcCJDU0Mzc4ZmE1LTk3")
    yield one("SendGrid", "SG.", "ngeVfQFYQlKU0ufo8x5d1A.TwL2iGABf9DHoTf09kqeF8tAmbihYzr")
    yield one("JWT", "eyJ", "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmN")
    yield one("Bearer", "Authorization: Bearer ", "mF_9.B5f-4.1JqM7xT2")
    yield one("Basic", "authorization: basic ", base64.b64encode(b"ann:Swordfish7").decode())
    key = "MIIEpAIBAAKCAQEA7bq1Xz9Ck4mRt6Yw\nVn3Bm6Lp0Rt5Yh2Jc9Gf1D4x8Kq1Wz7"
    yield Secret(
        "private key",
        f"-----BEGIN RSA PRIVATE KEY-----\n{key}\n-----END RSA PRIVATE KEY-----",
        "Vn3Bm6Lp0Rt5Yh2Jc9Gf1D4x8Kq1Wz7",
    )
    yield one("Redis URL", "redis://:", "h0rse-battery-1", "@cache:6379/0")
    yield one("rediss URL with a slash", "rediss://app:", "pa/ss/w0rd-2", "@cache:6380/1")
    yield one("Postgres URL", "postgres://app:", "gr8Secret-3", "@db:5432/app")
    yield one("AMQP URL", "amqp://guest:", "r4bbit-4", "@mq:5672//")
    yield one("HTTPS URL", "https://ann:", "w3b-5word", "@example.org/path")
    yield one("query api_key", "GET https://api.example.org/v1?api_key=", "q1w2e3r4t5-6", "&page=2")
    yield one("query token", "https://example.org/cb?state=9&token=", "t0k3n-7-value")
    yield one("query signature", "https://bucket.example.org/x?X-Amz-Signature=", "fe5f80f77d5fa3beca038a24")
    yield one("assignment", "login failed for ann: password=", "hunter2-8", ", try again")
    yield one("JSON", '{"user": "ann", "password": "', "corr3ct h0rse 9", '"}')
    yield one("JSON in JSON", '{"body": "{\\"password\\": \\"', "corr3ct h0rse 10", '\\"}"}')
    yield one("Python repr", "{'client_secret': '", "s3cr3t-10-repr", "', 'n': 1}")
    yield one("XML", "<login><password>", "xml-15 s3cret", "</password></login>")
    yield one("argument", "mysqldump --user ann --password ", "4rgument-16", " shop")
    yield one("list of arguments", "['mysql', '--password', '", "argument-list", "', 'shop']")
    yield one("URL with a dollar", "https://ann:", "$ecret-17", "@example.org")
    yield one("Authorization without digits", "Authorization: Token ", "abcdefghijklmnop")
    yield one("YAML", "database:\n  password: ", "y4ml-11-value", "\n  host: db")
    yield one("header line", "X-Api-Key: ", "h34der-12-value")
    yield one("cookie", "Set-Cookie: session=", "c00kie13value", "; Path=/; HttpOnly")
    yield one(
        "connection string",
        "DefaultEndpointsProtocol=https;AccountName=shop;AccountKey=",
        "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1",
        ";EndpointSuffix=core.example.net",
    )
    yield one("ODBC", "Driver={SQL};Server=db;Uid=ann;Pwd=", "0dbc-14-pwd", ";")
    yield one("Telegram bot", "bot 123456789:", "AAF9x8Kq1Wz7Vn3Bm6Lp0Rt5Yh2Jc9Gf1Qe")
    yield one("this process's own key", "the gateway said: ", OWN_KEY)


KEYS = (OWN_KEY, FILE_KEY, TENANT_KEY)


SECRETS = tuple(_secrets())
NEEDLES = {secret.name: secret.needle for secret in SECRETS}

HARMLESS = {
    "git sha": "fixed in 4c08f5296a9b1f0f4a0d1b5a3a7c2e9d8f6b1c0a",
    "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "UUID": "run 3f0c9e2d-8a1b-4c7e-9f10-a2b3c4d5e6f7",
    "image": "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwACh",
    "a form's answer": "password: required; token: missing; api_key: must not be empty",
    "counts": "input_tokens=812 max_tokens: 4096 tokens=7 and token_count=3",
    "a URL with a port": "see http://localhost:8080/a@b and http://[::1]:80/x",
    "a URL's query": "https://example.org/search?q=secret+garden&page=2&tokens=9",
    "an address of git": "git+ssh://git@github.com:org/repo@v1.2.3",
    "Python": "def login(user, password=None, *, token: str = get_token()) -> str:",
    "Python's environment": "Client(api_key=os.environ['OPENAI_API_KEY'], password=settings.password)",
    "a comparison": 'if password == "" or token is None: raise ValueError',
    "a shell's variable": "redis://:${REDIS_PASSWORD}@redis:6379/0 and --password=$PW",
    "a form of a URL": "unix://[user:password@]/path/of/the/socket?db=0",
    "names of packages": "pip install sk-learn-contrib; npm_config_cache_min_10; task-force-of-nine",
    "a constraint": 'duplicate key value violates unique constraint "pk_orders_2024"',
    "schemes": "Basic authentication is required; the bearer of news; Bearer authorization missing",
    "prose": "The secret of the author's keys is patience: practise, and sign in at 10:30.",
    "JSON": '{"key": "value", "author": "ann", "monkey": 7, "api_key_env": "OPENAI_API_KEY"}',
    "a call id": "call_9Xz8Kq1Wz7Vn3Bm6Lp0Rt5Yh chatcmpl-9Xz8Kq1Wz7Vn3Bm6Lp0R msg_01XFDUDYJgAACzvnptvVoYEL",
    "a file": "/usr/local/lib/python3.11/site-packages/Authlib/Oauth2/rfc6749/client.py:142",
    "a time": "token expires: 2026-11-26T20:23:11Z",
    "advice": "use --password to log in, or --token with a token; <token>missing</token>",
    "a template": "postgres://ann:{password}@db/shop?password={password} and <password></password>",
    "CSS": "a { color: #ff00aa; key: value }",
    "an IPv6": "key 2001:db8::1 at eth0",
    "public key": "-----BEGIN PUBLIC KEY----- MIIB -----END PUBLIC KEY-----",
}

CONTROL = {
    "clipboard (OSC 52)": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "title (OSC 0)": "\x1b]0;root\x07",
    "hyperlink (OSC 8)": "\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "clear screen": "\x1b[2J\x1b[H",
    "colour": "\x1b[31mred",
    "hidden text": "\x1b[8mhidden\x1b[0m",
    "device attributes": "\x1b[c",
    "sixel (DCS)": "\x1bPq#0;2;0;0;0\x1b\\",
    "program command (APC)": "\x1b_Gf=24;AAAA\x1b\\",
    "C1 CSI": "\x9b31m",
    "C1 OSC": "\x9d52;c;eA==\x9c",
    "C1 DCS": "\x90q\x9c",
    "bell and backspace": "\x07pay 100\x08\x08\x08 1",
    "carriage return": "all good\rERASED",
    "delete": "a\x7fb",
    "shift out": "\x0eabc\x0f",
    "bidi override": "user \u202egpj.exe",
    "bidi isolate": "\u2067abc\u2069",
    "bidi marks": "a\u200eb\u200fc",
    "zero width": "pay\u200bpal",
    "line separator": "one\u2028two",
    "tags": "hi\U000e0049\U000e0067",
}


# --- plugins ---------------------------------------------------------------------------------------------


class OddError(OpenAgentsError):
    """A custom error class that does not call the constructor of its base class."""

    code = "shop.odd"
    extra_fields = ("detail", "response")

    def __init__(self, text: str) -> None:
        Exception.__init__(self, text)
        self.hint = f"try {text}"
        self.detail = text
        self.response = {"body": [text], "password": text}


def _message(text: str) -> Exception:
    return RuntimeError(f"it failed: {text}")


def _coded(text: str) -> Exception:
    return PermanentToolError(f"it failed: {text}", hint=f"give {text}")


def _odd(text: str) -> Exception:
    return OddError(text)


def _noted(text: str) -> Exception:
    error = ValueError("see the note")
    error.add_note(text)
    return error


def _caused(text: str) -> Exception:
    error = ConfigError("cannot connect")
    error.__cause__ = OSError(text)
    error.__cause__.__cause__ = KeyError(text)
    return error


def _grouped(text: str) -> Exception:
    return ExceptionGroup(text, [ValueError(text), ExceptionGroup("inner", [ToolError(text)])])


def _long(text: str) -> Exception:
    return RuntimeError("x" * 1_980 + " " + text + " " + "y" * 9_000)  # around where messages are cut


WAYS = {
    "message": _message,
    "coded": _coded,
    "odd": _odd,
    "noted": _noted,
    "caused": _caused,
    "grouped": _grouped,
    "long": _long,
}
"""Ways in which an exception carries a text."""


def _raised(number: int, way: str) -> Exception:
    return WAYS[way](SECRETS[number].text)


@tool
async def leak(number: int, way: str, context: ToolContext) -> None:
    """Raises an exception whose text contains a secret."""
    await context.emit(f"shop.{SECRETS[number].text}")
    await context.emit("shop.looked", note=SECRETS[number].text, api_key=SECRETS[number].needle)
    raise _raised(number, way)


class LeakyPattern(PatternPlugin):
    """Raises an exception that its input selects: the number of a secret and a way to leak it."""

    async def execute(self) -> Any:
        number, way = self.context.input_text.split()
        raise _raised(int(number), way)


class LeakyMemory(MemoryPlugin):
    """Raises an exception before the pattern starts."""

    async def inject(self, context: MemoryContext) -> None:
        number, way = context.input_text.split()
        raise _raised(int(number), way)


@tool
async def control(number: int, context: ToolContext) -> str:
    """Returns, emits and stores a control sequence."""
    text = list(CONTROL.values())[number]
    await context.emit("shop.said", text=text)
    context.add_artifact(f"artifact {text}", kind="text", payload=text)
    return text


@tool
async def own_key(context: ToolContext) -> None:
    """Raises an exception with the value of the variable that holds the model's key."""
    raise RuntimeError(f"refused with {os.environ['PLANTED_KEY']}")
