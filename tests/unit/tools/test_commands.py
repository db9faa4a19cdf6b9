"""`shell_exec` and `execute_command` with real processes: none survives its call, or sees a secret."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.errors import OpenAgentsError, PermanentToolError, ToolError, ToolValidationError
from openagents_worker.tools.builtin.commands import ExecuteCommand, ShellExec
from openagents_worker.tools.builtin.environment import SetEnv
from openagents_worker.tools.builtin.supervisor import descendants
from tests.support.waiting import wait_for
from tests.unit.run_fakes import FakeRun

PATIENCE_S = 60
# The process itself, one in another session, and one whose parent has ended; each writes its id.
THREE = (
    "echo $$ >> pids; setsid sh -c 'echo $$ >> pids; exec sleep 600' & "
    "(setsid sh -c 'setsid sh -c \"echo \\$\\$ >> pids; exec sleep 600\" &' &) ; "
    "while [ $(wc -l < pids) -lt 3 ]; do sleep 0.01; done; "
)


async def shell(command: str | list[str], config: Mapping[str, Any] | None = None, **more: Any) -> Any:
    return await ShellExec(dict(config or {})).invoke({"command": command, **more}, FakeRun())


async def execute(command: str, config: Mapping[str, Any] | None = None, **more: Any) -> Any:
    return await ExecuteCommand(dict(config or {})).invoke({"command": command, **more}, FakeRun())


def pids(folder: Path) -> list[int]:
    file = folder / "pids"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def alive(processes: list[int]) -> list[int]:
    return [pid for pid in processes if Path(f"/proc/{pid}").exists()]


# --- results ---------------------------------------------------------------------------------------------


async def test_a_program_gives_its_exit_code_and_both_outputs() -> None:
    """Text is split as a shell splits it, but no shell interprets it."""
    command = f"{sys.executable} -c 'import sys; print(sys.argv[1]); sys.exit(\"no\")' '$HOME *'"
    for form in (
        command,
        [sys.executable, "-c", "import sys; print(sys.argv[1]); sys.exit('no')", "$HOME *"],
    ):
        assert await shell(form) == {
            "exit_code": 1,
            "stdout": "$HOME *\n",
            "stderr": "no\n",
            "timed_out": False,
            "truncated": False,
        }


async def test_a_command_line_is_one_of_a_shell() -> None:
    """stdin is empty, so that nothing waits for input."""
    done = await execute("cat; echo a b | wc -w; exit 3")

    assert (done["stdout"].strip(), done["returncode"], done["success"]) == ("2", 3, False)


async def test_output_is_kept_up_to_its_bound() -> None:
    """The rest is dropped. The command is not blocked, and a cut character is left out."""
    done = await execute("printf 'aéé'; head -c 300000 /dev/zero >&2", {"capture_bytes": 4})

    assert (done["stdout"], len(done["stderr"]), done["truncated"], done["success"]) == ("aé", 4, True, True)


@pytest.mark.parametrize(
    "command", ["no-such-program", "./no-such-file", "/", "", "'", ["a\0b"], [""], ["a"] * 1_001]
)
async def test_what_cannot_be_executed_is_a_coded_error(command: str | list[str]) -> None:
    """Nothing was done, and the error says what is wrong."""
    with pytest.raises(ToolError) as caught:
        await shell(command)
    assert caught.value.code in {"tool.permanent", "tool.validation"}


# --- the environment -------------------------------------------------------------------------------------


@pytest.mark.defect("A07")
async def test_a07_a_command_gets_no_variable_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A07: an empty `env_passthrough` is an empty environment. The command's parent has no secrets either."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-0123456789abcdef")

    assert (await shell("env"))["stdout"] == ""
    assert "planted" not in (await execute("env; cat /proc/$PPID/environ; cat /proc/$PPID/cmdline"))["stdout"]


async def test_named_variables_are_passed_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """A glob does not cover secrets. A secret that is named in full is passed."""
    for name in ("APP_MODE", "APP_TOKEN", "OTHER_TOKEN"):
        monkeypatch.setenv(name, "x")

    passed = await shell("env", {"env_passthrough": ["APP_*", "OTHER_TOKEN"]})

    assert sorted(passed["stdout"].split()) == ["APP_MODE=x", "OTHER_TOKEN=x"]


async def test_variables_of_the_session_and_of_the_call_are_set() -> None:
    """Those of the call win."""
    run = FakeRun()
    for name, value in (("A", "1"), ("B", "1")):
        await SetEnv().invoke({"key": name, "value": value}, run)

    done = await ShellExec().invoke({"command": "env", "env": {"B": "2"}}, run)

    assert sorted(done["stdout"].split()) == ["A=1", "B=2"]


async def test_with_an_allowlist_the_model_chooses_the_program_by_name_only(tmp_path: Path) -> None:
    """Neither a path, nor a variable such as PATH or LD_PRELOAD, makes another program of it."""
    (tmp_path / "env").write_text("#!/bin/sh\necho other program\n")
    (tmp_path / "env").chmod(0o755)
    config = {"command_allowlist": ["env", "/bin/ls"], "cwd": str(tmp_path)}
    run = FakeRun()
    await SetEnv().invoke({"key": "PATH", "value": str(tmp_path)}, run)

    done = await ShellExec(config).invoke({"command": "env"}, run)

    assert (done["exit_code"], done["stdout"]) == (0, "")
    for command in ("./env", f"{tmp_path}/env", "ls", "/bin/ls", "sh -c env"):
        with pytest.raises(PermanentToolError, match="not in command_allowlist"):
            await shell(command, config)
    with pytest.raises(PermanentToolError, match="LD_PRELOAD may not be set"):
        await shell("env", config, env={"LD_PRELOAD": "x"})
    assert (await shell("env", {**config, "settable_env": ["A"]}, env={"A": "1"}))["stdout"] == "A=1\n"


# --- the folder ------------------------------------------------------------------------------------------


async def test_a_command_starts_in_the_configured_folder(tmp_path: Path) -> None:
    """A call may choose a folder in it, and none outside of it."""
    (tmp_path / "in").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "link").symlink_to("/")
    config = {"cwd": str(tmp_path)}

    assert (await shell("pwd", config))["stdout"].strip() == str(tmp_path)
    assert (await execute("pwd", config, cwd="in"))["stdout"].strip() == str(tmp_path / "in")
    for outside in ("..", "/", "link", ".git", "no-such-folder", "\0"):
        with pytest.raises(ToolError):
            await shell("pwd", config, cwd=outside)


# --- the end of all processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["exits", "is killed by the timeout", "is killed by the cancellation"])
@pytest.mark.defect("P15")
async def test_p15_no_process_survives_the_call(tmp_path: Path, end: str) -> None:
    """P15: also one that has changed its session, and one whose parent has ended."""
    config = {"cwd": str(tmp_path), "env_passthrough": ["PATH"]}
    if end == "exits":
        assert (await execute(THREE, config))["returncode"] == 0
    elif end == "is killed by the timeout":
        for seconds in (1, 5, 25):  # a busy machine may need longer until all of them run
            (tmp_path / "pids").unlink(missing_ok=True)
            done = await execute(THREE + "echo ready; exec sleep 600", config, timeout=seconds)
            assert (done["returncode"], done["timed_out"], done["success"]) == (-signal.SIGKILL, True, False)
            if done["stdout"] == "ready\n":
                break
    else:
        call = asyncio.create_task(execute(THREE + "exec sleep 600", config), name="call")
        await asyncio.to_thread(wait_for, lambda: len(pids(tmp_path)) == 3, "all processes run", PATIENCE_S)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    assert len(pids(tmp_path)) == 3
    assert alive(pids(tmp_path)) == []


async def test_a_call_may_not_take_longer_than_configured() -> None:
    """A call may ask for more than the default, up to the maximum."""
    done = await shell("sleep 600", {"default_timeout_ms": 1, "max_timeout_ms": 50}, timeout_ms=10**9)
    assert (done["timed_out"], done["exit_code"]) == (True, -signal.SIGKILL)


WORKER = """
import asyncio, os, sys, time
from openagents_worker.tools.builtin.commands import ExecuteCommand

async def main():
    call = asyncio.create_task(ExecuteCommand({"cwd": sys.argv[1]}).invoke({"command": sys.argv[2]}, None))
    while not os.path.exists(sys.argv[1] + "/pids"):
        await asyncio.sleep(0.01)
    if os.fork() == 0:  # it inherits the open pipe to the supervisor
        os.setsid()
        time.sleep(600)
    print("ready", flush=True)
    await call

asyncio.run(main())
"""


async def test_no_process_survives_the_worker(tmp_path: Path) -> None:
    """Also if a process that the worker has forked lives on, and holds the worker's pipes."""
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(tmp_path), THREE + "exec sleep 600"], stdout=subprocess.PIPE
    )
    assert worker.stdout is not None
    try:
        await asyncio.to_thread(wait_for, lambda: len(pids(tmp_path)) == 3, "all processes run", PATIENCE_S)
        assert await asyncio.to_thread(worker.stdout.readline) == b"ready\n"
        children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
        worker.kill()
        await asyncio.to_thread(wait_for, lambda: not alive(pids(tmp_path)), "they are gone", PATIENCE_S)
        for pid in alive([int(pid) for pid in children]):
            os.kill(pid, signal.SIGKILL)
    finally:
        worker.kill()
        await asyncio.to_thread(worker.wait)
        worker.stdout.close()


SEARCH = """
import asyncio, sys
from openagents_worker.tools.builtin.grep import GrepFiles
asyncio.run(GrepFiles({"root": sys.argv[1], "timeout_ms": 10**9}).invoke({"pattern": "(a+)+$"}, None))
"""


async def test_a_search_ends_with_its_worker(tmp_path: Path) -> None:
    """Also one whose pattern would keep it busy for years."""
    (tmp_path / "text").write_text("a" * 60 + "b")
    worker = subprocess.Popen([sys.executable, "-c", SEARCH, str(tmp_path)])
    try:
        children = await asyncio.to_thread(
            wait_for, lambda: descendants(worker.pid), "it searches", PATIENCE_S
        )
    finally:
        worker.kill()
        await asyncio.to_thread(worker.wait)
    await asyncio.to_thread(wait_for, lambda: not alive(list(children)), "the search has ended", PATIENCE_S)


async def test_a_command_that_kills_its_supervisor_is_killed_too(tmp_path: Path) -> None:
    """The call fails with a code, and is not retried: the command may have had an effect."""
    with pytest.raises(ToolError, match="supervised") as caught:
        await execute("echo $$ > pids; kill -9 $PPID; exec sleep 600", {"cwd": str(tmp_path)})

    assert isinstance(caught.value, OpenAgentsError)
    assert not caught.value.retryable
    await asyncio.to_thread(wait_for, lambda: not alive(pids(tmp_path)), "it is gone", PATIENCE_S)


async def test_a_folder_that_does_not_exist_is_made(tmp_path: Path) -> None:
    """As the file tools do with `root`, so that both can share one."""
    done = await shell("pwd", {"root": str(tmp_path / "new")})
    assert done["stdout"].strip() == str(tmp_path / "new")


async def test_text_that_no_program_can_get_is_refused() -> None:
    with pytest.raises(ToolValidationError, match="NUL"):
        await execute("echo \0")
