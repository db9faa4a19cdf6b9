"""Who may see and do what: the host, the origin, the password, and the switch `read_only`."""

from __future__ import annotations

import base64
import re
from types import SimpleNamespace
from typing import Any

import pytest

from openagents_worker.dashboard.access import AllowedHosts, check_listening, is_from_own_page
from openagents_worker.dashboard.run_actions import ACTIONS
from tests.dashboard.server import Server, serving
from tests.dashboard.world import HOSTILE
from tests.support.runner import agent, calls, process, scripted

OUR_PAGES = ("/overview", "/runs", "/approvals", "/sessions", "/fleet", "/run/r1", "/session/s1")
FLOWERS_PAGES = ("/", "/workers", "/tasks", "/metrics", "/healthcheck", "/api/workers", "/static/favicon.ico")
PASSWORD = {"Authorization": f"Basic {base64.b64encode(b'ann:secret').decode()}"}


@pytest.mark.parametrize("path", [*OUR_PAGES, *FLOWERS_PAGES, "/openagents-static/pages.js"])
async def test_no_page_answers_to_another_host(server: Server, path: str) -> None:
    """A web page can make its own name resolve to this machine (DNS rebinding)."""
    answer = await server.get(path, Host="evil.example")

    assert answer.status_code == 403
    assert "FLOWER_HOSTS" in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "https://evil.example", "Sec-Fetch-Site": "same-origin"},
        {},
    ],
)
@pytest.mark.parametrize("password", [None, "ann:secret"])
async def test_no_other_site_acts(redis_url: str, headers: dict[str, str], password: str | None) -> None:
    """With and without a password: a browser sends the password with requests of other sites, too."""
    own = PASSWORD if password else {}
    options = {"basic_auth": [password]} if password else {}
    async with serving(redis_url, **options) as server, process(redis_url) as worker:
        await worker.submit()

        answer = await server.post("/run/r1/cancel", headers={**headers, **own})

        assert answer.status_code == 403
        assert (await worker.record()).state == "queued"


@pytest.mark.parametrize("action", ACTIONS)
async def test_a_read_only_flower_refuses_every_action(redis_url: str, action: str) -> None:
    async with serving(redis_url, read_only=True) as server, process(redis_url) as worker:
        await worker.submit()

        answer = await server.post(f"/run/r1/{action}")
        page = await server.text("/run/r1")

        assert answer.status_code == 403
        assert "FLOWER_READ_ONLY" in answer.text
        assert 'method="post"' not in page


async def test_every_page_asks_for_the_password(redis_url: str) -> None:
    """The metrics, too. Only the check of the process's health does not: it says nothing."""
    async with serving(redis_url, basic_auth=["ann:secret"]) as server, process(redis_url) as worker:
        await worker.run()

        for path in (*OUR_PAGES, "/run/r1/events", "/metrics", "/workers", "/tasks"):
            assert (await server.get(path)).status_code == 401, path
            if not path.endswith("events"):
                assert (await server.get(path, **PASSWORD)).status_code == 200, path
        own = {"Origin": server.url}
        assert (await server.post("/run/r1/resume", headers=own)).status_code == 401


async def test_a_password_that_is_not_ascii_is_a_wrong_password(redis_url: str) -> None:
    """Flower would answer with a traceback and its versions, to somebody who has not logged in."""
    async with serving(redis_url, basic_auth=["ann:secret"]) as server:
        header = base64.b64encode("ann:gehéim".encode()).decode()
        for path in ("/runs", "/workers", "/metrics"):
            answer = await server.get(path, Authorization=f"Basic {header}")
            assert (answer.status_code, answer.text) == (401, "Access denied"), path


async def test_no_page_may_be_read_or_framed_by_another_site(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower allows every origin if its API is open."""
    monkeypatch.setenv("FLOWER_UNAUTHENTICATED_API", "true")

    headers = (await server.get("/runs")).headers

    assert "Access-Control-Allow-Origin" not in headers
    assert headers["X-Frame-Options"] == "DENY"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy


async def test_html_of_a_run_is_text(server: Server, redis_url: str) -> None:
    """In the question, the arguments and results of tools, the answer, ids, and the transcript."""
    tools = [{"id": "look", "impl": "tests.runtime.plugins.Look"}]
    hostile = agent(llm=scripted(calls(("look", {"who": HOSTILE})), {"text": HOSTILE}), tools=tools)
    ids = {"run_id": "<b>run", "session_id": "<b>session", "labels": {"<b>": "<i>"}, "tenant": "<b>t"}
    async with process(redis_url, hostile) as worker:
        await worker.submit(input_text=HOSTILE, **ids)
        await worker.execute("<b>run")

        for path in ("/runs", "/run/%3Cb%3Erun", "/session/%3Cb%3Esession", "/sessions", "/overview"):
            page = await server.text(path)
            assert not re.search(r"<(script>|img src=x|b>|i>)", page), path
        assert "&lt;script&gt;" in await server.text("/run/%3Cb%3Erun")
    echoed = await server.text("/runs?agent=%22%3E%3Cscript%3Ealert(1)%3C/script%3E")
    assert "<script>" not in echoed


async def test_hidden_characters_are_shown(server: Server, redis_url: str) -> None:
    """A text that reads otherwise than it is must not be approved by mistake."""
    async with process(redis_url) as worker:
        await worker.run(input_text="pay \u202e021 cents")

        assert "\u202e" not in await server.text("/run/r1")


async def test_pages_load_nothing_from_elsewhere(server: Server, redis_url: str) -> None:
    async with process(redis_url) as worker:
        await worker.run()
    for path in OUR_PAGES:
        page = await server.text(path)
        loaded = re.findall(r'<(?:script|link|img|iframe|form)[^>]*?(?:src|href|action)="([^"]+)"', page)
        assert loaded
        assert [url for url in loaded if not url.startswith("/") or url.startswith("//")] == []
        assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|javascript:", page), path


@pytest.mark.parametrize(
    ("options", "listens"),
    [
        ({}, "127.0.0.1"),
        ({"address": "::1"}, "::1"),
        ({"basic_auth": ["a:b"]}, "127.0.0.1"),
        ({"basic_auth": ["a:b"], "address": "0.0.0.0"}, "0.0.0.0"),  # noqa: S104
        ({"unix_socket": "/run/flower.sock"}, ""),
    ],
)
def test_flower_listens_on_this_machine_unless_it_has_a_password(options: Any, listens: str) -> None:
    values = SimpleNamespace(**{"address": "", "unix_socket": "", "basic_auth": [], "auth": "", **options})

    check_listening(values)

    assert values.address == listens


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1", "flower.example"])  # noqa: S104
def test_flower_does_not_start_open_to_others(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = SimpleNamespace(address=address, unix_socket="", basic_auth=[], auth="")

    with pytest.raises(SystemExit) as exited:
        check_listening(values)

    assert exited.value.code == 2
    assert "set FLOWER_BASIC_AUTH=user:password" in capsys.readouterr().err


def test_an_empty_password_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    """`FLOWER_BASIC_AUTH=` of an unset variable must not open the pages to others."""
    for basic_auth in ([""], ["ann:"]):
        values = SimpleNamespace(address="0.0.0.0", unix_socket="", basic_auth=basic_auth, auth="")  # noqa: S104
        with pytest.raises(SystemExit):
            check_listening(values)
    assert "FLOWER_BASIC_AUTH must have the form user:password" in capsys.readouterr().err


def test_flower_does_not_start_with_a_password_that_nobody_can_give(
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = SimpleNamespace(address="", unix_socket="", basic_auth=["ann:gehéim"], auth="")
    with pytest.raises(SystemExit) as exited:
        check_listening(values)
    assert exited.value.code == 2
    assert "a character that is not ASCII" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "options", "names", "allowed"),
    [
        *((host, {}, "", True) for host in ("127.0.0.1:5555", "localhost", "[::1]:5555", "LOCALHOST.")),
        *(
            (host, {}, "", False)
            for host in ("evil.example", "192.0.2.1", "", "a b", "[::1", "127.0.0.1.evil")
        ),
        ("flower.example", {}, "flower.example", True),
        ("evil.example", {}, "flower.example", False),
        ("flower.example", {"basic_auth": ["a:b"]}, "", True),
        ("evil.example", {"basic_auth": ["a:b"]}, "flower.example,other", False),
        ("10.0.0.5:5555", {"basic_auth": ["a:b"]}, "flower.example", True),
        ("flower.example", {"unix_socket": "x"}, "", True),
    ],
)
def test_which_hosts_are_answered(host: str, options: Any, names: str, allowed: bool) -> None:
    values = SimpleNamespace(
        **{"address": "127.0.0.1", "unix_socket": "", "basic_auth": [], "auth": "", **options}
    )

    assert AllowedHosts.of(values, {"FLOWER_HOSTS": names}).allow(host) is allowed


def test_a_browser_proves_that_a_request_comes_from_an_own_page() -> None:
    assert is_from_own_page({"Origin": "http://127.0.0.1:5555"}, "127.0.0.1:5555")
    assert is_from_own_page({"Sec-Fetch-Site": "same-origin"}, "127.0.0.1:5555")
    assert not is_from_own_page({"Origin": "http://127.0.0.1:6666"}, "127.0.0.1:5555")
