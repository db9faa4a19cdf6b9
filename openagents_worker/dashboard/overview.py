"""The overview. The only place that computes figures and plots of the newest runs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from openagents_worker.dashboard.page import TONE_OF, PageHandler
from openagents_worker.dashboard.shown_text import (
    ago_text,
    cost_text,
    now_ms,
    time_text,
    took_text,
)
from openagents_worker.models import RunRecord, RunState
from openagents_worker.producer.waiting_reason import why_runs_wait
from openagents_worker.store.approvals import count_asking_runs
from openagents_worker.store.fleet import read_fleet
from openagents_worker.store.row_reads import ReadBy
from openagents_worker.store.run_figures import newest_figures

__all__ = [
    "AgentFigures",
    "Column",
    "OverviewPage",
    "Plot",
    "accepted_plot",
    "ended_plot",
    "figures_of",
    "percentile",
]

SAMPLE = 200  # newest runs
COLUMNS = 24
AGENTS = 12
CODES = 10
QUEUES = 5  # whose problem is shown
TONES = ("good", "bad", "off", "wait", "busy", "idle")
"""The order of the parts of a column, from the bottom."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the plot of runs over time. `parts`: tone, place from the top and height, in percent."""

    label: str
    count: int
    parts: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True, slots=True)
class Plot:
    """Runs over time. `highest` is the largest count of a column, `step_ms` the time that a column covers."""

    columns: tuple[Column, ...]
    highest: int
    step_ms: int


@dataclass(frozen=True, slots=True)
class AgentFigures:
    """What the sampled runs of an agent took. Bars are in percent of the largest agent."""

    agent_id: str
    runs: int
    failed: int
    median: str
    slow: str
    tokens: int
    cost: str
    runs_bar: float
    tokens_bar: float


class OverviewPage(PageHandler):
    """Accepted and ended runs over time, latency, tokens and cost per agent, errors, approvals, workers."""

    tab = "overview"

    async def get(self) -> None:
        store, now = self.client.store, now_ms()
        page = await store.execute(newest_figures(store.keys, SAMPLE))
        records = [run.record for run in page]
        queued = {record.queue for record in records if record.state is RunState.QUEUED}
        fleet = await store.execute(
            read_fleet(
                store.keys,
                self.client.settings.queue,
                scans_queues=False,
                queues=queued,
                read_by=ReadBy.SCRIPT,
            )
        )
        asking = await store.execute(count_asking_runs(store.keys))
        codes = Counter(run.code for run in page if run.code)
        alive = [worker for worker in fleet.workers if worker.is_alive]
        self.show(
            "overview.html",
            sample=len(records),
            problems=page.problems,
            is_sample=page.next_cursor is not None,
            since=ago_text(records[-1].created_ms, now) if records else "",
            states=Counter(record.state for record in records).most_common(),
            accepted=accepted_plot(records, now),
            ended=ended_plot(records, now),
            ends=Counter(record.state for record in records if record.state.is_terminal).most_common(),
            tones=TONES,
            agents=figures_of(records),
            more_agents=max(0, len({record.agent_id for record in records}) - AGENTS),
            codes=[
                (code, count, 100 * count / max(codes.values())) for code, count in codes.most_common(CODES)
            ],
            throughput=_throughput_text(records, now),
            asking=asking,
            unserved=[
                (queue, problem)
                for queue in fleet.queues
                if queue.waiting and (problem := why_runs_wait(fleet.workers, queue.name))
            ][:QUEUES],
            workers=len(alive),
            dead_workers=len(fleet.workers) - len(alive),
            active=sum(worker.runs for worker in alive),
            waiting=sum(queue.waiting for queue in fleet.queues),
            oldest=took_text(
                max((queue.oldest_age_ms for queue in fleet.queues if queue.oldest_age_ms), default=None)
            ),
        )


def accepted_plot(records: Sequence[RunRecord], now: int) -> Plot:
    """When the runs were accepted, by their present state."""
    return _plot([(record.created_ms, record.state) for record in records], _since(records), now)


def ended_plot(records: Sequence[RunRecord], now: int) -> Plot:
    """When the runs ended, and how: the throughput. It has the same times as the plot of accepted runs."""
    ended = [(record.ended_ms, record.state) for record in records if record.state.is_terminal]
    return _plot(ended, _since(records), now)


def _since(records: Iterable[RunRecord]) -> int | None:
    return min((record.created_ms for record in records if record.created_ms is not None), default=None)


def _plot(moments: Iterable[tuple[int | None, RunState]], first: int | None, now: int) -> Plot:
    """Columns from `first` until now: how many runs were there in each, by state."""
    if first is None:
        return Plot((), 0, 0)
    step = max(1, (now - first) / COLUMNS)
    tones: list[Counter[str]] = [Counter() for _ in range(COLUMNS)]
    for at_ms, state in moments:
        if at_ms is not None:
            at = max(0, min(COLUMNS - 1, int((at_ms - first) / step)))
            tones[at][TONE_OF.get(state, "wait")] += 1
    highest = max(map(Counter.total, tones))
    columns = tuple(
        Column(time_text(first + at * step), counted.total(), tuple(_parts(counted, highest)))
        for at, counted in enumerate(tones)
    )
    return Plot(columns, highest, round(step))


def _parts(counted: Counter[str], highest: int) -> Iterable[tuple[str, float, float]]:
    top = 100.0
    for tone in TONES:
        if counted[tone]:
            height = 100 * counted[tone] / highest
            top -= height
            yield tone, round(top, 2), round(height, 2)


def figures_of(records: Sequence[RunRecord]) -> list[AgentFigures]:
    """The figures of each agent, that with the most runs first."""
    by_agent = defaultdict[str, list[RunRecord]](list)
    for record in records:
        by_agent[record.agent_id].append(record)
    rows = sorted(by_agent.items(), key=lambda row: (-len(row[1]), row[0]))[:AGENTS]
    most_runs = max((len(own) for _, own in rows), default=1)
    most_tokens = max((_tokens(own) for _, own in rows), default=0) or 1
    return [_figures(agent_id, own, most_runs, most_tokens) for agent_id, own in rows]


def _figures(agent_id: str, own: Sequence[RunRecord], most_runs: int, most_tokens: int) -> AgentFigures:
    took = sorted(
        record.ended_ms - record.created_ms
        for record in own
        if record.ended_ms is not None and record.created_ms is not None
    )
    costs = [record.usage.cost_usd for record in own if record.usage.cost_usd is not None]
    return AgentFigures(
        agent_id,
        len(own),
        sum(TONE_OF.get(record.state) == "bad" for record in own),
        took_text(percentile(took, 50)),
        took_text(percentile(took, 95)),
        _tokens(own),
        cost_text(sum(costs) if costs else None),
        round(100 * len(own) / most_runs, 1),
        round(100 * _tokens(own) / most_tokens, 1),
    )


def _tokens(records: Iterable[RunRecord]) -> int:
    return sum(record.usage.input_tokens + record.usage.output_tokens for record in records)


def percentile(ordered: Sequence[int], part: int) -> int | None:
    """The value that `part` percent of the ordered values do not exceed; None without values.

    >>> percentile([1, 2, 3, 4], 50), percentile([1, 2, 3, 4], 95), percentile([], 50)
    (2, 4, None)
    """
    return ordered[max(0, -(-len(ordered) * part // 100) - 1)] if ordered else None


def _throughput_text(records: Sequence[RunRecord], now: int) -> str:
    """How many runs have ended per minute, since the first of these runs was accepted."""
    times = [record.created_ms for record in records if record.created_ms is not None]
    ended = sum(record.state.is_terminal for record in records)
    if not times or not ended:
        return "0"
    per_minute = ended / max((now - min(times)) / 60_000, 1 / 60)
    return f"{per_minute:,.0f} / min" if per_minute >= 10 else f"{per_minute:.2g} / min"
