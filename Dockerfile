FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# A worker warns as root: a tool that runs as root could write anywhere in the container.
RUN useradd --create-home --uid 10001 agents
WORKDIR /app

COPY pyproject.toml README.md LICENSE ./
COPY openagents_worker openagents_worker
RUN pip install '.[worker,flower]'

COPY tasks tasks
COPY config config
# Where the shipped agent's file tools work.
RUN install -d -o agents assistant_files

USER agents
# A worker that gets SIGTERM hands its runs over; give it OPENAGENTS_DRAIN_TIMEOUT_S to do so.
STOPSIGNAL SIGTERM
CMD ["celery", "-A", "tasks", "worker", "--loglevel=INFO"]
