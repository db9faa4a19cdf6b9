"""Templates. The only place that adds our templates to those of Flower, and our tab to its navigation."""

from __future__ import annotations

from pathlib import Path

from tornado.template import Loader, Template

from openagents_worker.telemetry.logs import get_logger

__all__ = ["ANCHORS", "OURS", "PageTemplates", "patched"]

log = get_logger(__name__)

OURS = "openagents/"
"""Names of our templates begin with this. Every other name is a template of Flower."""
_FOLDER = Path(__file__).parent / "templates"

_TABS = """<li class="nav-item">
          <a class="nav-link{% if active_tab == 'runs' %} active{% end %}"
            href="{{ reverse_url('openagents-runs') }}"
            {% if active_tab == 'runs' %}aria-current="page"{% end %}>Runs</a>
        </li>
        """
_LINK_TO_RUN = """{% if task.name in ('tasks.run_agent', 'tasks.resume_run') %}
      <a class="btn btn-primary" href="{{ reverse_url('openagents-runs') }}?id={{ url_escape(task.uuid) }}">Open the run</a>
      {% end %}
      """  # noqa: E501
_LINKS_TO_RUNS = """<script defer src="{{ reverse_url('openagents-static', 'tasks.js') }}"
      data-runs="{{ reverse_url('openagents-runs') }}"></script>
    """

ANCHORS = {
    "navbar.html": ('<li class="nav-item">', _TABS),
    "task.html": ("{% if not read_only %}", _LINK_TO_RUN),
    "tasks.html": ('<table id="tasks-table"', _LINKS_TO_RUNS),
}
"""Per template of Flower: our text, and the text before which it is inserted. The first place counts."""


def patched(name: str, text: str) -> str:
    """The template of Flower with our part. Without the anchor it is unchanged, with a warning in the log."""
    if name not in ANCHORS:
        return text
    anchor, ours = ANCHORS[name]
    if anchor not in text:
        log.warning("flower.not_patched", template=name, hint="this version of Flower is not supported")
        return text
    return text.replace(anchor, ours + anchor, 1)


class PageTemplates(Loader):
    """Loads templates of Flower and ours by their full names. Every `{{ }}` is escaped."""

    def resolve_path(self, name: str, parent_path: str | None = None) -> str:
        """Names are never relative to the including template."""
        return name

    def _create_template(self, name: str) -> Template:
        ours = name.startswith(OURS)
        path = _FOLDER / name.removeprefix(OURS) if ours else Path(self.root) / name
        text = path.read_text(encoding="utf-8")
        return Template(text if ours else patched(name, text), name=name, loader=self)
