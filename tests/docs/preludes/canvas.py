"""An app in eager mode: `delay` executes a run in this process, and what is linked to it. Redis is real."""

import os
import uuid

from celery import Celery, chain, chord, group

from openagents_worker import RunHandle, RunRequest, register

url = os.environ["OPENAGENTS_REDIS_URL"]
app = Celery("shop", broker=url, backend=url, set_as_current=True)
app.conf.update(task_always_eager=True, task_store_eager_result=True, result_expires=60)
run_agent = register(app)
called: list[str] = []


@app.task
def publish(outcome):
    called.append(f"publish {outcome['stop_reason']}")
    return RunHandle(outcome["run_id"]).result["final_output"]


@app.task
def compare(outcomes):
    called.append(f"compare {len(outcomes)}")


@app.task
def store(outcome):
    called.append(f"store {outcome['stop_reason']}")


@app.task
def alarm(*arguments):
    called.append("alarm")


def request():
    return RunRequest(agent_id="assistant", session_id=f"s-{uuid.uuid4().hex}", input_text="What is 17*23?")


a, b = request(), request()
request = request()


def check():
    assert called == ["publish completed", "compare 2", "store completed"], called
