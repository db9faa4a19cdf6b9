"""The base class of plugins: the only place that checks the `config` of a plugin in the agents file."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from openagents_worker.agents.problems import checked_config

__all__ = ["Plugin"]


class Plugin:
    """A tool, pattern, memory or context assembler that is configured in the agents file.

    `Config` is a pydantic model that checks the `config` object of the agents file; the checked values are in
    `self.cfg`, and `self.config` has them as they stand in the file.
    """

    class Config(BaseModel):
        model_config = ConfigDict(extra="forbid")

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = dict(config or {})
        self.cfg: Any = checked_config(self.Config, self.config, type(self).__name__)

    def __copy__(self) -> Self:
        """As `copy.copy` makes it, in a tenth of the time: one is made for every attempt."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other
