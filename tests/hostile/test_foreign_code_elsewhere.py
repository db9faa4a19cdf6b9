"""Names of code at entry points other than the producer's: none is imported, called or read from disk."""

from __future__ import annotations

import json
from typing import Any

from tests.hostile.matrix import CODE
from tests.hostile.table import Attack, Case, cases, hostile
from tests.hostile.world import World

IMPLS = (
    "os.system", "os:system", "subprocess.Popen", "builtins.eval", "tests.access.planted.Boom", "__import__",
    "pickle.loads", "antigravity", "../../etc/passwd", "/etc/passwd", "importlib.import_module", "sys.exit",
    "ctypes.CDLL", "shutil.rmtree", "code.interact", "runpy.run_path", "webbrowser.open", "this",
    "openagents_worker.tools.builtin.calc.Calc", "tests.hostile.exploding",
)  # fmt: skip
OBJECTS: dict[str, Any] = {
    "jsonpickle": {"py/object": "os.system", "py/reduce": [{"py/function": "os.system"}, ["true"]]},
    "kombu's types": {"__type__": "os.system", "__value__": "true"},
    "an exception": {"exc_type": "system", "exc_module": "os", "exc_message": ["true"]},
    "a prototype": {"__proto__": {"x": 1}, "constructor": {"prototype": {"x": 1}}},
    "a class": {"__class__": "os._wrap_close", "__init__": {"__globals__": {}}},
    "a reduce": {"__reduce__": ["os.system", ["true"]]},
    "a template": "{{ ''.__class__.__mro__ }} ${7*7} #{7*7} <%= 7*7 %> {0.__class__}",
    "a format": "{0.__init__.__globals__} %(x)s %n%n%s",
    "YAML": "!!python/object/apply:os.system ['true']",
    "a pickle": "cos\nsystem\n(S'true'\ntR.",
    "a signature": {"task": "os.system", "args": ["true"], "subtask_type": "chord", "options": {}},
    "a reference": {"$ref": "file:///etc/passwd", "$id": "os.system"},
    "a shell": "$(touch /tmp/x); `touch /tmp/x` | sh && :",
    "Lua": "redis.call('FLUSHALL') return 1",
    "a command of Redis": "\r\n*1\r\n$8\r\nFLUSHALL\r\n",
    "HTML": "<script>fetch('/api/worker/shutdown/x')</script>",
    "an implementation": {"impl": "os.system", "type": "os.system", "class": "os.system"},
    "many": [{"impl": name} for name in IMPLS],
    "a date of JSON": {"__type__": "datetime", "__value__": "os.system"},
    "a key": {"os.system": "true", "__builtins__": {}, "eval(1)": 1},
}


def reply(message: Any) -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()


def stream(delta: Any) -> bytes:
    chunk = {"choices": [{"delta": delta, "finish_reason": "stop"}]}
    return f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode()


def calls(name: str, given: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(given if isinstance(given, dict) else {"x": given})}
    return {"content": None, "tool_calls": [{"index": 0, "id": "c", "function": function}]}


def of_a_record(value: Any) -> Any:
    def changed(redis: Any, keys: Any, run_id: str) -> None:
        key = keys("run", run_id)
        request = json.loads(redis.hget(key, "request"))
        redis.hset(key, "request", json.dumps({**request, "metadata": {"x": value}}))

    return changed


def canvas(value: Any) -> Any:
    return lambda redis, keys, run_id: redis.hset(keys("run", run_id), "canvas", json.dumps(value))


CHARSETS = ("hex", "rot13", "base64", "zip", "bz2", "uu", "idna", "punycode", "unicode_escape",
"raw_unicode_escape",
            "undefined", "mbcs", "os", "../os", "encodings.hex_codec", "aliases", "__init__", "quopri",
            "utf-7",
            "tests.hostile.exploding")  # fmt: skip
SCHEMES = ("file:///etc/passwd", "file://localhost/etc/passwd", "data:text/plain,x", "javascript:alert(1)",
"jar:x!/y",
           "gopher://127.0.0.1:6379/_FLUSHALL", "dict://127.0.0.1:6379/FLUSHALL", "ldap://127.0.0.1/x",
           "ftp://127.0.0.1/",
           "sftp://127.0.0.1/", "unix:///run/redis.sock", "redis://127.0.0.1/0", "netdoc:///etc/passwd",
           "php://input",
           "expect://true", "phar://x", "python:os.system", "view-source:http://x", "ws://127.0.0.1/",
           "local_file:///etc/passwd")  # fmt: skip
OPTIONS = (
    "serializer",
    "compression",
    "task",
    "link",
    "link_error",
    "chain",
    "headers",
    "queue",
    "shadow",
    "producer",
)
COMMANDS = (["run"], ["validate"], ["show"], ["watch"], ["cancel"], ["session"])
PAGES = ("/../../etc/passwd", "/static/../../../etc/passwd", "/static/%2e%2e/%2e%2e/etc/passwd",
"/task/{{7*7}}",
         "/task/%7B%7B7*7%7D%7D", "/tasks?sort=__class__", "/tasks?state=__import__('os')", "/task/os.system",
         "/task/<script>alert(1)</script>", "/static/%00", "/static/....//....//etc/passwd", "//etc/passwd",
         "/workers?json=os.system", "/tasks?type=os.system", "/tasks?worker={0.__class__}",
         "/login?next=//evil.example",
         "/api/task/apply/os.system", "/api/worker/shutdown/x", "/api/tasks?taskname=os.system",
         "/static//etc/passwd")  # fmt: skip

ANSWERED = ("200", "302", "400", "401", "403", "404", "405", "500")
"""500: Tornado's own reader of files has no word for a name with a zero in it."""

TABLE = [
    *cases(
        "options",
        {
            f"{option} is {name}": (
                {option: name},
                ("completed", "request.invalid", "config.error"),
            )
            for option, name in zip((*OPTIONS, *OPTIONS), IMPLS, strict=True)
            if option != "queue"  # no worker consumes a queue with that name
        }
        | {
            f"a {name} that is linked": ({"link": [value]}, ("request.invalid", "completed"))
            for name, value in list(OBJECTS.items())[:4]
        },
    ),
    *cases("record", {f"metadata: {n}": (of_a_record(v), "completed") for n,
    v in list(OBJECTS.items())[:12]}),
    *cases(
        "record",
        {f"canvas: {n}": (canvas(v), ("completed", "record.unreadable")) for n,
        v in list(OBJECTS.items())[8:]},
    ),
    *cases("reply", {name: (reply(calls(name, {})), "tool.not_found") for name in IMPLS[::2]}),
    *cases("reply", {n: (reply(calls("x", v)), "tool.not_found") for n, v in list(OBJECTS.items())[::2]}),
    *cases("stream", {name: (stream(calls(name, {})), "tool.not_found") for name in IMPLS[1::2]}),
    *cases("stream", {n: (stream(calls("x", v)), "tool.not_found") for n, v in list(OBJECTS.items())[1::2]}),
    *cases("tool_result", {name: (repr(value), "completed") for name, value in OBJECTS.items()}),
    *cases("event", {name: (repr({"x": value}), "completed") for name, value in OBJECTS.items()}),
    *cases("state", {name: (repr({"x": value}), "completed") for name, value in OBJECTS.items()}),
    *cases("url", {url[:30]: (url, ("tool.validation", "tool.permanent")) for url in SCHEMES}),
    *cases(
        "header",
        {
            f"charset {name}": (
                {"content-type": f"application/json; charset={name}"},
                ("completed", "llm.response"),
            )
            for name in CHARSETS
        },
    ),
    *cases(
        "cli",
        {
            f"{' '.join(command)} {name}": (
                [*command, name, *(["x"] if command == ["run"] else [])],
                ("exit 1", "exit 3", "exit 2 config.load", "exit 2 user.agent_not_found",
                "exit 2 run.not_found",
                 "exit 2 config.error", "exit 2 session.not_found", "exit 3 run.not_found"),
            )
            for command, name in zip(COMMANDS * 4, IMPLS, strict=False)
        },
    ),
    *cases("page", {path: (path, ANSWERED) for path in PAGES}),
]  # fmt: skip


@hostile(CODE, TABLE)
def test_what_names_code_is_only_text(case: Case, attack: Attack, world: World) -> None:
    attack(case)

    assert not [text for text in world.shown if "root:x:0" in text or "<script>alert(1)" in text]
