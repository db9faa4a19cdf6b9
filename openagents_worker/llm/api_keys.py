"""API keys of models: the only place that reads them, from the environment, a file, or a registered function.

A key is asked for before each model call. It is never part of a message, an event, a record or a log line.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import stat
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

from openagents_worker.errors import LLMAuthError, LLMConnectionError, OpenAgentsError, text_of
from openagents_worker.secret_forms import remember_secret, remember_secret_for_a_while
from openagents_worker.telemetry.logs import get_logger

__all__ = [
    "ApiKeys",
    "EnvironmentKey",
    "KeyFile",
    "KeyResolver",
    "NoKey",
    "is_header_value",
    "is_readable_by_all",
    "key_resolver",
    "register_api_keys",
]

log = get_logger(__name__)

KeyResolver = Callable[[str, str | None], str | Awaitable[str]]
"""(provider, tenant) -> key. The tenant is None for a run without one."""

RESOLVER_TIMEOUT_S = 10.0  # a secret store answers in milliseconds; a call must not wait for a dead one
MAX_THREADS = 16  # a resolver that is not async, and hangs, takes at most so many threads
MAX_KEY_BYTES = 16 * 1024  # a signed token of a cloud may have several thousand
FILE_CHECK_S = 1.0  # a rotated key is used after this time, or at once if the provider refuses the old one

_HEADER_VALUE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")


class ApiKeys(Protocol):
    """Where the key of a model comes from."""

    @property
    def origin(self) -> str:
        """The source in words, for hints: "the environment variable OPENAI_API_KEY"."""

    @property
    def value(self) -> str | None:
        """The key that is known without asking; None without one."""

    async def key(self, provider: str, tenant: str | None, *, fresh: bool = False) -> str | None:
        """The key for a call; None if the server needs none. `fresh`: the provider has refused the last one.

        Raises `LLMAuthError` if there is no valid key, and `LLMConnectionError`, which is retried, if the
        source does not answer.
        """


def is_header_value(text: str) -> bool:
    """Whether a text may be the value of an HTTP header."""
    return _HEADER_VALUE.fullmatch(text) is not None


# --- the environment, and a registered function ----------------------------------------------------------

_resolver: KeyResolver | None = None


def register_api_keys(resolver: KeyResolver) -> None:
    """Register the function that returns the API key of a model: `(provider, tenant) -> key`.

    It is asked for each model call of an agent that has neither `api_key_env` nor `api_key_file`, and its
    answer is used for that call only. `provider` is the one of the agents file, `tenant` that of the request
    of the run. The function may be async; another one is called in a thread. It has ten seconds. "" means
    that the server needs no key. An exception, or no answer in time, is retried like a lost connection; None
    is the error `llm.auth`. If the provider refuses the key, the function is asked once more.

    Call it in a module that `OPENAGENTS_IMPORTS` names. A second function replaces the first.

    >>> register_api_keys(lambda provider, tenant: f"key of {tenant or 'everybody'} for {provider}")
    """
    global _resolver
    if not callable(resolver):
        raise TypeError(f"register_api_keys takes a function, not {type(resolver).__name__}")
    _resolver = resolver


def key_resolver() -> KeyResolver | None:
    """The registered function; None without one."""
    return _resolver


@dataclass(frozen=True, slots=True)
class EnvironmentKey:
    """The key of an environment variable, read at start. A registered function takes precedence, unless the
    agent names the variable."""

    variable: str
    value: str | None = field(repr=False)
    is_named: bool = False

    @property
    def origin(self) -> str:
        if self._resolver is not None:
            return "the function that register_api_keys registered"
        return f"the environment variable {self.variable}"

    @property
    def _resolver(self) -> KeyResolver | None:
        return None if self.is_named else _resolver

    async def key(self, provider: str, tenant: str | None, *, fresh: bool = False) -> str | None:
        resolver = self._resolver
        return self.value if resolver is None else await _resolved(resolver, provider, tenant)


async def _resolved(resolver: KeyResolver, provider: str, tenant: str | None) -> str | None:
    """The answer of the function, checked. Its exceptions become errors of this library."""
    whose = f"the provider {provider!r} and " + ("no tenant" if tenant is None else f"the tenant {tenant!r}")
    try:
        async with asyncio.timeout(RESOLVER_TIMEOUT_S) as limit:
            key = await _ask_resolver(resolver, provider, tenant)
    except TimeoutError as error:
        if not limit.expired():
            raise _failed(whose, error) from error
        text = f"the function of register_api_keys gave no key for {whose} within {RESOLVER_TIMEOUT_S:.0f} s"
        raise LLMConnectionError(text) from error
    except OpenAgentsError:
        raise
    except Exception as error:
        raise _failed(whose, error) from error
    if key == "":
        return None
    if not isinstance(key, str):
        text = f"the function of register_api_keys returned no text for {whose}, but {type(key).__name__}"
        raise LLMAuthError(text, hint='return the key, or "" for a server without keys')
    remember_secret_for_a_while(key)
    if not is_header_value(key) or len(key) > MAX_KEY_BYTES:
        text = f"the key that the function of register_api_keys returned for {whose} is not a valid header"
        raise LLMAuthError(text, hint="the usual reason is a newline at its end")
    return key


def _failed(whose: str, error: Exception) -> LLMConnectionError:
    text = f"the function of register_api_keys failed for {whose}: {type(error).__name__}: {text_of(error)}"
    return LLMConnectionError(text)


async def _ask_resolver(resolver: KeyResolver, provider: str, tenant: str | None) -> Any:
    """What the function returns. A function that is not async is called in a thread."""
    call = getattr(resolver, "__call__", None)  # noqa: B004 - an object whose method is async
    if inspect.iscoroutinefunction(resolver) or inspect.iscoroutinefunction(call):
        return await cast("Awaitable[str]", resolver(provider, tenant))
    answer = await _in_thread(resolver, provider, tenant)
    return await answer if inspect.isawaitable(answer) else answer


_slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


async def _in_thread(resolver: KeyResolver, provider: str, tenant: str | None) -> Any:
    """The answer of a function that may block. Its thread is a daemon: one that hangs ends with the process.

    A thread keeps its slot until it ends, also after the call has been given up.
    """
    loop = asyncio.get_running_loop()
    slots = _slots.setdefault(loop, asyncio.Semaphore(MAX_THREADS))
    await slots.acquire()
    answered: asyncio.Future[Any] = loop.create_future()
    context = copy_context()

    def end(answer: Any, error: Exception | None) -> None:
        slots.release()
        if answered.done():
            return
        if error is None:
            answered.set_result(answer)
        else:
            answered.set_exception(error)

    def work() -> None:
        answer: Any = None
        error: Exception | None = None
        try:
            answer = context.run(resolver, provider, tenant)
        except StopIteration as stopped:  # a future cannot hold it
            error = RuntimeError(f"StopIteration: {stopped}")
        except Exception as raised:  # noqa: BLE001 - it is raised where the key is awaited
            error = raised
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(end, answer, error)

    threading.Thread(target=work, name="openagents-api-keys", daemon=True).start()
    return await answered


class NoKey:
    """No key, whatever the environment has: that of a fallback with `share_key: false`."""

    @property
    def origin(self) -> str:
        return "nowhere: share_key is false, so none is sent"

    @property
    def value(self) -> str | None:
        return None

    async def key(self, provider: str, tenant: str | None, *, fresh: bool = False) -> str | None:
        return None


# --- a file ----------------------------------------------------------------------------------------------


def is_readable_by_all(path: str) -> bool:
    """Whether every user of this machine may read a file; False if there is none."""
    try:
        return bool(Path(path).stat().st_mode & stat.S_IROTH)
    except (OSError, ValueError):
        return False


class KeyFile:
    """The key in a file. It is read again when the file was replaced, as a rotated secret is.

    If the file cannot be read then, the last key stays in use and a line in the log says so.
    """

    def __init__(self, path: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises `ValueError` that says what is wrong with the file. Relative paths: the current folder."""
        self.path = Path(path)
        self._clock = clock
        self._stamp: tuple[int, ...] = self._stamp_now()
        self._value = self._read()
        self._checked_at = clock()

    @property
    def origin(self) -> str:
        return f"the file {self.path}"

    @property
    def value(self) -> str:
        """The key that was read last."""
        return self._value

    async def key(self, provider: str, tenant: str | None, *, fresh: bool = False) -> str | None:
        now = self._clock()
        if fresh or now - self._checked_at >= FILE_CHECK_S:
            self._checked_at = now
            await self._read_if_replaced()
        return self._value

    async def _read_if_replaced(self) -> None:
        try:
            stamp = await asyncio.to_thread(self._stamp_now)
            if stamp != self._stamp:
                self._value, self._stamp = await asyncio.to_thread(self._read), stamp
                log.info("llm.key_read_again", path=str(self.path))
        except ValueError as error:
            log.warning("llm.key_file_unreadable", path=str(self.path), error=str(error))

    def _stamp_now(self) -> tuple[int, ...]:
        """Changes when the file is written or replaced. Raises `ValueError` if there is none."""
        try:
            found = self.path.stat()
        except OSError as error:
            raise ValueError(self._unreadable(error)) from error
        return found.st_mtime_ns, found.st_ino, found.st_size

    def _read(self) -> str:
        """The key, without white space around it. Raises `ValueError`."""
        try:
            if not self.path.is_file():
                raise ValueError(f"{self.path} is not a file")
            with self.path.open("rb") as file:
                data = file.read(MAX_KEY_BYTES + 1)
        except OSError as error:
            raise ValueError(self._unreadable(error)) from error
        if len(data) > MAX_KEY_BYTES:
            raise ValueError(
                f"{self.path} has more than {MAX_KEY_BYTES:,} bytes; it should hold only the key"
            )
        key = data.decode("utf-8", "replace").strip()
        if not key:
            raise ValueError(f"{self.path} is empty")
        remember_secret(key)
        if not is_header_value(key):
            raise ValueError(
                f"the content of {self.path} is not allowed in an HTTP header; it should hold only the key"
            )
        return key

    def _unreadable(self, error: OSError) -> str:
        return f"{self.path} cannot be read: {os.strerror(error.errno) if error.errno else error}"
