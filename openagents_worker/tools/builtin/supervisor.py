"""The process that supervises a command, so that no process of it survives the call.

`python supervisor.py` reads one line of JSON from stdin, executes the command in it, and prints the outcome
as JSON. It kills every process that the command has started when the command has ended, at the timeout, and
when nobody waits for the outcome any more: the worker closes stdin to cancel the call, and the system closes
it, or sends SIGTERM on Linux, if the worker dies.

`python supervisor.py serve WORKER_PID PROGRAM ARGUMENT…` executes a program that serves the worker over its
stdin and stdout, with the environment of this process, until the program ends or SIGTERM comes.

A command can start a process with a group and a session of its own, whose parent has ended. Such a process
gets the supervisor as its parent (on Linux: PR_SET_CHILD_SUBREAPER), so it is found like the others. On other
systems only the process group of the command is killed.

It imports only the standard library, and is started in isolated mode with an empty environment.
"""

from __future__ import annotations

import codecs
import ctypes
import json
import os
import selectors
import signal
import sys
import time
from contextlib import suppress
from subprocess import DEVNULL, PIPE, Popen

TYPE_CHECKING = False  # importing `typing` and `pathlib` would take as long as the rest of this process
if TYPE_CHECKING:
    from typing import IO, Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
KILL_PATIENCE_S = 5.0  # a killed process is gone in milliseconds, unless the system itself holds it
PIECE_BYTES = 65_536
_IS_LINUX = sys.platform == "linux"


class Captured:
    """The beginning of an output stream. The rest is read and dropped, so that the command is not blocked."""

    def __init__(self, stream: IO[bytes], max_bytes: int) -> None:
        self.stream = stream
        self.bytes = 0
        self._max_bytes = max_bytes
        self._kept = bytearray()
        os.set_blocking(stream.fileno(), False)

    def read(self) -> bool:
        """Read what is there. Returns False at the end of the stream."""
        try:
            piece = os.read(self.stream.fileno(), PIECE_BYTES)
        except BlockingIOError:
            return True
        self.bytes += len(piece)
        self._kept += piece[: self._max_bytes - len(self._kept)]
        return bool(piece)

    @property
    def text(self) -> str:
        """What was kept. A character that was cut is left out."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return decoder.decode(bytes(self._kept), final=self.bytes == len(self._kept))


def main() -> None:
    """Execute the command of the request. Print its process id first, and at the end how it has ended."""
    request = json.loads(sys.stdin.buffer.readline())
    wakeup = _woken_by_signals(request["worker_pid"])
    if wakeup is None:
        return
    try:
        command = _start(request)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        _print({"error": reason, "is_missing": isinstance(error, FileNotFoundError)})
        return
    try:
        outcome = _supervise(command, request, wakeup)
    finally:
        kill_all(command)
    if outcome is not None:
        _print(outcome)


def serve(worker_pid: int, argv: list[str]) -> int:
    """Execute a program with the standard streams of this process. Returns its exit code.

    When it has ended, and if the worker ends this process or dies, all that it has started is killed.
    """
    wakeup = _woken_by_signals(worker_pid)
    if wakeup is None:
        return 0

    def prepare() -> None:
        if _IS_LINUX:
            _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    try:
        program = Popen(argv, start_new_session=True, preexec_fn=prepare)  # noqa: S603 - see above
    except OSError as error:
        print(f"{argv[0]} cannot be started: {error.strerror}", file=sys.stderr)
        return 127
    os.close(0)  # so that the worker and the program see the end of each other
    os.close(1)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(wakeup, selectors.EVENT_READ)
            while program.poll() is None:
                selector.select()
                if signal.SIGTERM in _received(wakeup):
                    break
                _reap_others(program.pid)
    finally:
        kill_all(program)
    return program.returncode or 0


def _reap_others(pid: int) -> None:
    """Reap the ended processes that were adopted, but not the program itself: `Popen` waits for it."""
    if not _IS_LINUX:  # there, none is adopted
        return
    with suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid == pid:
                return
            os.waitpid(ended.si_pid, os.WNOHANG)


def _woken_by_signals(worker_pid: int) -> int | None:
    """A pipe with a byte for each SIGCHLD and SIGTERM; None if the worker has already died."""
    if _IS_LINUX:
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
    wakeup, wakeup_end = os.pipe()
    for end in (wakeup, wakeup_end):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wakeup_end, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # only for its byte in the pipe
    if _IS_LINUX:
        # A process that the worker has forked since then may keep stdin open after the worker's death.
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != worker_pid:
            return None
    return wakeup


def _start(request: dict[str, Any]) -> Popen[bytes]:
    """Start the command. It reports its process id itself, before it can kill this process."""
    stdout = os.dup(1)  # closed in the command when the program starts

    def prepare() -> None:
        os.write(stdout, json.dumps({"pid": os.getpid()}).encode() + b"\n")
        if _IS_LINUX:
            _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # if this process is killed

    return Popen(  # noqa: S603 - executing it is the purpose of the tools
        request["argv"], executable=request["executable"], cwd=request["cwd"], env=request["env"],
        stdin=DEVNULL, stdout=PIPE, stderr=PIPE, start_new_session=True,
        preexec_fn=prepare,  # this process has one thread
    )  # fmt: skip


def _supervise(command: Popen[bytes], request: dict[str, Any], wakeup: int) -> dict[str, Any] | None:
    """The outcome of the command; None if nobody waits for it."""
    assert command.stdout is not None
    assert command.stderr is not None
    ends_at = time.monotonic() + request["timeout_s"]
    out, err = (Captured(each, request["max_bytes"]) for each in (command.stdout, command.stderr))
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ, "stdin")
        selector.register(wakeup, selectors.EVENT_READ, "child")
        for each in (out, err):
            selector.register(each.stream, selectors.EVENT_READ, each)
        while command.poll() is None:
            if (left_s := ends_at - time.monotonic()) <= 0:
                return _outcome(command, out, err, timed_out=True)
            for key, _ in selector.select(left_s):
                if isinstance(key.data, Captured):
                    if not key.data.read():
                        selector.unregister(key.fileobj)
                elif key.data == "stdin" or signal.SIGTERM in _received(wakeup):
                    return None
    return _outcome(command, out, err, timed_out=False)


def _received(wakeup: int) -> bytes:
    """The numbers of the signals that have come."""
    try:
        return os.read(wakeup, PIECE_BYTES)
    except BlockingIOError:
        return b""


def _outcome(command: Popen[bytes], out: Captured, err: Captured, *, timed_out: bool) -> dict[str, Any]:
    """The outcome, after all processes of the command were killed and its output was read to the end."""
    kill_all(command)
    for each in (out, err):
        ends_at = time.monotonic() + KILL_PATIENCE_S
        os.set_blocking(each.stream.fileno(), False)
        while time.monotonic() < ends_at and _has_more(each):
            pass
    return {
        "exit_code": command.returncode,
        "stdout": out.text,
        "stderr": err.text,
        "stdout_bytes": out.bytes,
        "stderr_bytes": err.bytes,
        "timed_out": timed_out,
    }


def _has_more(captured: Captured) -> bool:
    before = captured.bytes
    return captured.read() and captured.bytes > before


def kill_all(command: Popen[bytes]) -> None:
    """Kill the process group of the command and all descendants of this process, until none is left.

    More than one round is needed: a process may fork while the others are killed.
    """
    ends_at = time.monotonic() + KILL_PATIENCE_S
    while True:
        with suppress(ProcessLookupError, PermissionError):
            if command.returncode is None or not _IS_LINUX:
                os.killpg(command.pid, signal.SIGKILL)
        left = descendants(os.getpid()) if _IS_LINUX else set()
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        command.poll()
        left -= _reaped(command)
        if (not left and command.returncode is not None) or time.monotonic() > ends_at:
            return
        time.sleep(0.001)


def _reaped(command: Popen[bytes]) -> set[int]:
    """The ended processes that were adopted. `Popen` waits for the command itself."""
    reaped: set[int] = set()
    if command.returncode is None:
        return reaped
    with suppress(ChildProcessError):
        while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
            reaped.add(pid)
    return reaped


def descendants(pid: int) -> set[int]:
    """All processes below a process, from /proc."""
    children: dict[int, list[int]] = {}
    with os.scandir("/proc") as entries:
        processes = [entry.name for entry in entries if entry.name.isdigit()]
    for process in processes:
        with suppress(OSError, ValueError, IndexError):  # it has just ended
            with open(f"/proc/{process}/stat", "rb") as file:  # noqa: PTH123 - see above
                fields = file.read().rpartition(b")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(process))
    found: set[int] = set()
    above = [pid]
    while above:
        below = set(children.get(above.pop(), ())) - found
        found |= below
        above += below
    return found


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _print(outcome: dict[str, Any]) -> None:
    print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        sys.exit(serve(int(sys.argv[2]), sys.argv[3:]))
    main()
