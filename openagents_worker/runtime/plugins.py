"""Plugins: the only place that imports custom modules and creates tools, patterns and memories."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from importlib.metadata import entry_points
from typing import Any

from pydantic import JsonValue, ValidationError

from openagents_worker.agents import PatternRef, PluginRef, RuntimeOptions, ToolRef
from openagents_worker.agents.code import is_pattern_function
from openagents_worker.agents.code_path import code_of
from openagents_worker.agents.problems import problems_of
from openagents_worker.errors import (
    ConfigValidationError,
    OpenAgentsError,
    PluginConfigError,
    PluginError,
    PluginLoadError,
    text_of,
)
from openagents_worker.patterns.function import FunctionPattern
from openagents_worker.runtime.original.errors import translated
from openagents_worker.runtime.original.functions import ParamsTool, is_decorated_tool, registered
from openagents_worker.suggest import did_you_mean
from openagents_worker.tools.function import DecoratedFunction, tool
from openagents_worker.tools.jobs import has_jobs
from openagents_worker.tools.toolset import is_toolset

__all__ = ["GROUP", "import_plugins", "load_plugins", "make_plugin", "may_have_jobs", "with_limits"]

GROUP = "openagents_worker.plugins"
"""The entry-point group in which installed packages list modules for every worker to import."""


def load_plugins(modules: Iterable[str]) -> None:
    """Import the modules in `OPENAGENTS_IMPORTS`, then those of the entry points.

    Raises `PluginLoadError` that names every module that cannot be imported, with its error, or the
    `ConfigValidationError` of a module whose agents are not valid.
    """
    errors = import_plugins(modules)
    if len(errors) > 1:
        message = "; ".join(error.message for error in errors)
        raise PluginLoadError(message, hint=errors[0].hint) from errors[0].__cause__
    for error in errors:
        raise error


def import_plugins(modules: Iterable[str]) -> list[OpenAgentsError]:
    """Import the same modules. Returns an error for each that failed; its cause is the original exception."""
    errors: list[OpenAgentsError] = []
    named = [(name, "OPENAGENTS_IMPORTS") for name in modules]
    found = [(point.value, f"the entry point {point.name!r}") for point in entry_points(group=GROUP)]
    for name, source in (*named, *found):
        try:
            importlib.import_module(name.partition(":")[0])
        except ConfigValidationError as error:  # of an agent in Python: it says what is wrong, and where
            errors.append(error)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a module may raise anything
            failed = PluginLoadError(
                f"cannot import {name!r}, named by {source}: {type(error).__name__}: {text_of(error)}",
                hint="the module must be importable where the worker starts (installed, or on PYTHONPATH)",
            )
            failed.__cause__ = error
            errors.append(failed)
    return errors


# --- creating plugins ---------------------------------------------------------------------------------------

_REQUIRED = {
    "pattern": ("execute",),
    "tool": ("invoke",),
    "memory": ("inject", "writeback"),
    "context_assembler": ("assemble",),
    "diagnostics": ("export",),
    "tool_executor": ("execute",),
}


def with_limits(ref: PatternRef, runtime: RuntimeOptions) -> PatternRef:
    """The reference with the limits of the agent as defaults for its config. Unset limits are left out."""
    limits: dict[str, JsonValue] = {"max_steps": runtime.max_steps}
    if runtime.step_timeout_ms is not None:
        limits["step_timeout_ms"] = runtime.step_timeout_ms
    return ref.model_copy(update={"config": {**limits, **ref.config}})


def make_plugin(kind: str, ref: PluginRef, known: Mapping[str, Callable[..., Any]]) -> Any:
    """Create the plugin that a reference names. Raises `PluginLoadError` or `PluginConfigError`."""
    code = _class_of(kind, ref, known)
    name = ref.impl or ref.type or ""
    make = _wrapper(kind, ref, code)
    if make is None:
        _check_before_calling(kind, name, code)
        make = code
    try:
        plugin = make(config=dict(ref.config))
    except PluginError:
        raise
    except ValidationError as error:  # a custom class that validates its config with pydantic
        raise PluginConfigError(f"{name} rejects its config", problems=problems_of(error)) from error
    except (Exception, SystemExit) as error:
        if isinstance(problem := translated(error), PluginError):
            raise problem from error
        raise PluginLoadError(
            f"{name} cannot be created: {type(error).__name__}: {text_of(error)}",
            hint="it is called with config={…} from the agents file",
        ) from error
    if type(plugin) is not make:  # else its class was checked
        _check_methods(kind, name, plugin)
    return plugin


def _wrapper(kind: str, ref: PluginRef, code: Any) -> Callable[..., Any] | None:
    """What creates the plugin from a function that is itself a pattern or a tool; None for other code.

    Such a function is also one with the `@tool` of the original SDK's package.

    Python code gives functions to its agents on purpose. A path in the agents file can be a mistake: there, a
    pattern is a function whose parameter is named `context`, and a plain function is not a tool.
    """
    if not inspect.isfunction(code) and not isinstance(code, partial):
        return None
    if kind == "tool" and is_decorated_tool(code):
        return partial(ParamsTool, code) if ParamsTool.takes(code) else _tool_of(code)
    try:
        takes_config = "config" in inspect.signature(code).parameters
    except ValueError:  # a partial of a function of C
        return None
    if takes_config:
        return None
    is_given = code_of(ref.impl) is not None
    if kind == "pattern" and is_pattern_function(code) and (is_given or _takes_context(code)):
        return partial(FunctionPattern, code)
    if kind == "tool" and inspect.isfunction(code) and is_given:
        return _tool_of(code)
    return None


def _takes_context(function: Any) -> bool:
    first = next(iter(inspect.signature(function).parameters.values()))
    return first.name == "context" and not _is_in_standard_library(function)


@lru_cache(maxsize=4_096)  # a tool is created for each attempt, and reading a signature takes 1 ms
def _tool_of(function: Callable[..., Any]) -> DecoratedFunction[..., Any]:
    return tool(function)


def _check_before_calling(kind: str, name: str, make: Any) -> None:
    """Raises `PluginLoadError` for an object that does not create plugins, before it is called.

    A plugin is created by a class with the methods of its kind, by a function with `@tool`, or by a function
    that takes `config`.
    """
    if isinstance(make, DecoratedFunction):
        if kind != "tool":
            raise PluginLoadError(f"{name} is not a {kind}: it is a tool", hint=_needs(kind))
    elif isinstance(make, type):
        _check_methods(kind, name, make)
    elif not inspect.isfunction(make):
        raise PluginLoadError(
            f"{name} is not a class or a function: it is a {type(make).__name__}", hint=_needs(kind)
        )
    elif "config" not in inspect.signature(make).parameters or _is_in_standard_library(make):
        raise PluginLoadError(
            f"{name} does not create a {kind}: it is a function without the parameter config",
            hint="decorate a function that is a tool itself with @tool" if kind == "tool" else _needs(kind),
        )


def _is_in_standard_library(function: Any) -> bool:
    return str(function.__module__).partition(".")[0] in sys.stdlib_module_names


def _check_methods(kind: str, name: str, plugin: Any) -> None:
    if kind == "tool" and is_toolset(plugin):
        return
    if kind == "diagnostics" and callable(getattr(plugin, "on_run_complete", None)):
        return  # written for the original SDK
    missing = [method for method in _REQUIRED[kind] if not callable(getattr(plugin, method, None))]
    if missing:
        raise PluginLoadError(
            f"{name} is not a {kind}: it has no {' and no '.join(missing)}", hint=_needs(kind)
        )


def _needs(kind: str) -> str:
    return f"a {kind} has {' and '.join(_REQUIRED[kind])}{_OTHER_FORMS.get(kind, '')}"


_OTHER_FORMS = {
    "tool": "; a toolset has open, list, call and close",
    "diagnostics": "; one of the original SDK has on_run_complete",
    "pattern": ", or is an async function: async def name(context)",
}


_REFUSED = {
    ("memory", "mem0"): (
        "the memory mem0 is not supported: no version of mem0ai, 0.0 to 2.2, has the function that the "
        "original SDK calls, Memory.add(memories=…), and its default store is on the disk of one worker",
        "write a memory of your own around its client, with a store that all workers share",
    )
}
"""Types of the original SDK that cannot work here: why, and what to do."""


def may_have_jobs(ref: ToolRef) -> bool:
    """Whether the calls of a tool may start jobs. Its class is imported, but not created."""
    if ref.background is not None or ref.impl is None:
        return bool(ref.background)
    try:
        return has_jobs(_class_of("tool", ref, {}))
    except PluginError:  # the agent cannot be served
        return False


def _class_of(kind: str, ref: PluginRef, known: Mapping[str, Callable[..., Any]]) -> Any:
    if ref.type:
        if ref.type not in known:
            if (code := registered(kind, ref.type)) is not None:
                return code
            if (refused := _REFUSED.get((kind, ref.type))) is not None:
                raise PluginLoadError(refused[0], hint=refused[1])
            hint = did_you_mean(ref.type, sorted(known))
            raise PluginLoadError(f"no {kind} is named {ref.type!r}", hint=hint)
        try:
            return known[ref.type]
        except ImportError as error:
            raise PluginLoadError(
                f"{kind} {ref.type!r} needs the package {error.name}, which is not installed",
                hint=f"pip install 'openagents-worker[{ref.type}]'",
            ) from error
    if (code := code_of(ref.impl)) is not None:
        return code
    module_name, _, name = (ref.impl or "").rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise PluginLoadError(
            f"cannot load {kind} {ref.impl!r}: {error}",
            hint="name it as package.module.Class; the worker must be able to import it",
        ) from error
    except (Exception, SystemExit) as error:
        raise PluginLoadError(
            f"cannot load {kind} {ref.impl!r}: its module raised {type(error).__name__}: {text_of(error)}",
            hint="the module must be importable where the worker starts; if it uses Django, "
            "set DJANGO_SETTINGS_MODULE, or name the project's Celery app with -A",
        ) from error
