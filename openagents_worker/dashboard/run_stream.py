"""Live events of a run. The only place that sends them to a browser."""

from __future__ import annotations

from contextlib import aclosing

from tornado.iostream import StreamClosedError

from openagents_worker.dashboard.page import PageHandler
from openagents_worker.producer.sse import sse

__all__ = ["RunStream"]


class RunStream(PageHandler):
    """Server-Sent Events of a run: those after `Last-Event-ID`, or after the parameter `after`."""

    async def get(self, run_id: str) -> None:
        handle = self.client.handle(run_id)
        await handle.record()
        after = self.request.headers.get("Last-Event-ID") or self.query("after")
        frames = sse(handle, after)
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("X-Accel-Buffering", "no")
        async with aclosing(frames):
            try:
                await self.flush()
                async for frame in frames:
                    self.write(frame)
                    await self.flush()
            except StreamClosedError:
                return  # the browser has left the page
