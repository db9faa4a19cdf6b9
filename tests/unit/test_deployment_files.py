"""What an operator edits: compose file, Procfile, Redis and Flower settings, Makefile. Each is tried out."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import honcho.environ
import jsonschema
import pytest
import redis

from openagents_worker.local.redis_server import find_server
from openagents_worker.settings import Settings, load_settings, unknown_variables
from tests.deployment.compose import SERVICES, Missing, environment_of, filled_in, load
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]
SHOW_FLOWER_OPTIONS = """
import json, sys
from flower.command import apply_env_options, apply_options, options
apply_env_options()
apply_options("flower", ["--conf=config/flowerconfig.py", *sys.argv[1:]])
print(json.dumps({name: getattr(options, name) for name in ("address", "basic_auth", "read_only")}))
"""
SHOW_FLOWER_COLUMNS = """
from flower.command import apply_env_options, apply_options, options
from flower.views.tasks import visible_task_columns
apply_options("flower", ["--conf=config/flowerconfig.py"])
print(*(name for name, _ in visible_task_columns(options.tasks_columns)), options.format_task.__name__)
"""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return load()


def flower(*arguments: str, show: str = SHOW_FLOWER_OPTIONS, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", show, *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]} | env,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_compose_file_is_one_by_the_compose_specification(compose: dict[str, Any]) -> None:
    """Checked against the specification's own schema."""
    schema = json.loads((ROOT / "tests" / "data" / "compose-spec.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(compose)


def test_every_service_waits_for_a_healthy_redis_and_says_how_it_is(compose: dict[str, Any]) -> None:
    """`docker compose up` on a new machine works at the first try."""
    for name in ("worker", "flower", "producer"):
        assert compose["services"][name]["depends_on"]["redis"] == {"condition": "service_healthy"}
    for name in ("redis", "worker", "flower"):
        assert compose["services"][name]["healthcheck"]["test"]


def test_only_flower_is_published_and_only_on_this_machine(compose: dict[str, Any]) -> None:
    """Nobody outside of the project's network reaches Redis."""
    published = {
        name: service["ports"] for name, service in compose["services"].items() if "ports" in service
    }
    assert published == {"flower": ["127.0.0.1:5555:5555"]}


def test_redis_keeps_its_data_in_a_volume(compose: dict[str, Any]) -> None:
    """`docker compose down` and `up` again lose no run."""
    assert "redis-data:/data" in compose["services"]["redis"]["volumes"]
    assert "redis-data" in compose["volumes"]


def test_a_stopped_worker_has_time_to_hand_its_runs_over(compose: dict[str, Any]) -> None:
    """Docker kills after 10 s by default, which is before our own drain ends."""
    grace_s = int(compose["services"]["worker"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > load_settings({}).drain_timeout_s


def test_what_compose_mounts_and_the_dockerfile_copies_exists(compose: dict[str, Any]) -> None:
    """A path that is misspelt would be an empty folder in the container."""
    mounts = [
        v for service in compose["services"].values() for v in service.get("volumes", ()) if v[0] == "."
    ]
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for path in [*(mount.split(":")[0] for mount in mounts), *" ".join(copied).split()]:
        assert (ROOT / path).exists(), path


DOTENV = {"REDIS_PASSWORD": "secret-1", "FLOWER_BASIC_AUTH": "me:secret-2", "OPENAI_API_KEY": "secret-3"}
WITH_OUR_CODE = ("worker", "flower", "producer")


def test_the_variables_of_the_compose_file_are_ours() -> None:
    """A misspelt variable would silently do nothing."""
    for service in SERVICES:
        env = environment_of(service, DOTENV)
        assert unknown_variables(dict.fromkeys(SERVICES[service]["environment"], "")) == []
        load_settings(env)


def test_the_worker_gets_every_setting_of_the_env_file() -> None:
    """What stands in `.env` counts; where nothing stands there, our own defaults do."""
    ours = {f"OPENAGENTS_{name.upper()}" for name in Settings.model_fields}
    dotenv = {**DOTENV, **{name: f"value of {name}" for name in ours}}

    worker = environment_of("worker", dotenv)

    assert {name: worker[name] for name in ours} == {name: dotenv[name] for name in ours}
    assert {name for name in environment_of("worker", DOTENV) if name in ours} == {
        "OPENAGENTS_REDIS_URL",
        "OPENAGENTS_HEALTH_PORT",  # which the health check of the service asks
        "OPENAGENTS_MONITORING_ADDRESS",
    }


def test_redis_is_found_with_its_password_unless_another_is_named() -> None:
    """By whoever runs our code."""
    for service in WITH_OUR_CODE:
        assert environment_of(service, DOTENV)["OPENAGENTS_REDIS_URL"] == "redis://:secret-1@redis:6379/0"
        other = {**DOTENV, "OPENAGENTS_REDIS_URL": "rediss://elsewhere/0"}
        assert environment_of(service, other)["OPENAGENTS_REDIS_URL"] == "rediss://elsewhere/0"


def test_a_secret_is_known_to_whom_it_concerns() -> None:
    """The model's key to the worker, Flower's password to Flower, that of Redis to all; no service reads all
    of `.env`."""
    known = {
        name: {key for key, value in DOTENV.items() if value in str(environment_of(name, DOTENV))}
        for name in SERVICES
    }

    assert known == {
        "redis": {"REDIS_PASSWORD"},
        "worker": {"REDIS_PASSWORD", "OPENAI_API_KEY"},
        "flower": {"REDIS_PASSWORD", "FLOWER_BASIC_AUTH"},
        "producer": {"REDIS_PASSWORD"},
    }
    assert not any("env_file" in service for service in SERVICES.values())


def test_compose_refuses_to_start_without_the_passwords() -> None:
    """And says where to set them."""
    for service, name in (("redis", "REDIS_PASSWORD"), ("flower", "FLOWER_BASIC_AUTH")):
        with pytest.raises(Missing, match=rf"required variable {name} .*: set {name}.* in \.env"):
            environment_of(service, {other: value for other, value in DOTENV.items() if other != name})


def test_every_service_has_limits_and_a_log_that_ends(compose: dict[str, Any]) -> None:
    """A disk that is full of logs, or a machine without memory, stops everything else on it."""
    for name, service in compose["services"].items():
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}, name
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}, name
        assert service["init"] is True, name


def test_redis_has_room_to_rewrite_its_file(compose: dict[str, Any]) -> None:
    """Rewriting may take as much memory again as the data."""
    limit = compose["services"]["redis"]["deploy"]["resources"]["limits"]["memory"]
    arguments = compose["services"]["redis"]["command"]
    maxmemory = filled_in(arguments[arguments.index("--maxmemory") + 1], {})
    assert (limit, maxmemory) == ("2g", "1gb")


def test_the_procfile_starts_worker_and_flower() -> None:
    """`honcho start` runs both on this machine."""
    processes = honcho.environ.parse_procfile((ROOT / "Procfile").read_text()).processes
    commands = {name: shlex.split(command) for name, command in processes.items()}
    assert commands["worker"][:4] == ["celery", "-A", "tasks", "worker"]
    assert commands["flower"] == ["celery", "-A", "tasks", "flower", "--conf=config/flowerconfig.py"]


def test_redis_starts_with_our_config_and_is_durable(tmp_path: Path) -> None:
    """A real server reads `config/redis.conf`: on disk every second, nothing evicted, this machine only."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(find_server()),
        str(ROOT / "config" / "redis.conf"),
        "--port",
        str(port),
        "--dir",
        str(tmp_path),
    ]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL) as server,
        redis.Redis(port=port, decode_responses=True) as client,
    ):
        try:
            wait_for(lambda: answers(client), "the server answers")
            config = client.config_get()
        finally:
            server.terminate()
    assert (config["appendonly"], config["appendfsync"]) == ("yes", "everysec")
    assert config["maxmemory-policy"] == "noeviction"
    assert config["bind"].split()[0] == "127.0.0.1"
    assert config["save"] == "3600 1"


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


@pytest.mark.long
def test_flower_listens_on_this_machine_and_only_shows() -> None:
    """Flower's own defaults are every interface, no password and all buttons."""
    assert json.loads(flower().stdout) == {"address": "127.0.0.1", "basic_auth": [], "read_only": True}


def test_flower_refuses_to_be_open_to_others_without_a_password() -> None:
    """It says which variable to set."""
    for refused in (flower("--address=0.0.0.0"), flower(FLOWER_ADDRESS="192.0.2.1"), flower("--address=::")):
        assert refused.returncode == 2
        assert "set FLOWER_BASIC_AUTH=user:password" in refused.stderr


@pytest.mark.long
def test_flower_may_be_open_to_others_with_a_password() -> None:
    """As in the compose file."""
    opened = flower("--address=0.0.0.0", FLOWER_BASIC_AUTH="me:pw,you:pw", FLOWER_READ_ONLY="0")
    assert json.loads(opened.stdout) == {
        "address": "0.0.0.0",  # noqa: S104 - nothing listens here, only options are read
        "basic_auth": ["me:pw", "you:pw"],
        "read_only": False,
    }


@pytest.mark.long
def test_flowers_buttons_are_there_where_they_work() -> None:
    """Without a password only on this machine's loopback; a socket's reader is not known."""
    local = flower(FLOWER_READ_ONLY="0")
    behind_a_socket = flower("--unix_socket=flower.sock", FLOWER_READ_ONLY="0")
    said_to_be_open = flower(
        "--unix_socket=flower.sock", FLOWER_READ_ONLY="0", FLOWER_UNAUTHENTICATED_API="1"
    )

    assert json.loads(local.stdout)["read_only"] is False, local.stderr
    assert json.loads(behind_a_socket.stdout)["read_only"] is True
    assert json.loads(said_to_be_open.stdout)["read_only"] is False


def test_flower_is_read_only_unless_the_variable_says_no() -> None:
    """`y` and `t` are a yes for Flower, and a misspelled word must not open anything."""
    shown = flower(FLOWER_READ_ONLY="y")

    assert json.loads(shown.stdout)["read_only"] is True, shown.stderr


def test_flower_starts_with_an_empty_variable_and_names_a_wrong_value() -> None:
    """A line of `.env.example` without its `#`. Where Flower would listen is checked after the variables."""
    command = "from celery.__main__ import main; main()"
    arguments = ("-A", "tasks", "flower", "--conf=config/flowerconfig.py", "--address=0.0.0.0")

    empty = flower(*arguments, show=command, FLOWER_READ_ONLY="", FLOWER_PORT="")
    wrong = flower(*arguments, show=command, FLOWER_READ_ONLY="ture")

    assert empty.returncode == wrong.returncode == 2
    assert empty.stderr.startswith("Flower would listen on 0.0.0.0 without a password."), empty.stderr
    assert "has a value that Flower cannot read: invalid truth value 'ture'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_flowers_rows_show_agent_session_run_and_reason() -> None:
    """Every column is one that Flower knows, or it would leave it out without a word."""
    shown = flower(show=SHOW_FLOWER_COLUMNS).stdout.split()

    assert shown == [
        *("args", "state", "exception", "uuid", "received", "runtime", "worker", "name", "format_task"),
    ]


@pytest.mark.long
def test_an_empty_or_half_password_is_none() -> None:
    """`FLOWER_BASIC_AUTH=` from an unset variable must not open the door."""
    assert flower("--address=0.0.0.0", FLOWER_BASIC_AUTH="").returncode == 2
    assert "form user:password" in flower(FLOWER_BASIC_AUTH="me:").stderr


def test_make_names_a_python_that_is_too_old_or_missing(tmp_path: Path) -> None:
    """The first thing a newcomer types answers with what to install."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    old = tmp_path / "python2"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2"\nexit 1\n')
    old.chmod(0o755)
    for python, says in ((str(old), "Python 3.9.2 is too old"), ("no-python", "no-python is missing")):
        run = subprocess.run(
            ["make", "test", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, timeout=30
        )
        assert run.returncode != 0
        assert says in run.stdout


def test_make_names_a_browser_that_is_missing(tmp_path: Path) -> None:
    """Instead of skipping every test of a page."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").mkdir()
    for name in ("pyproject.toml", ".venv/.installed"):
        (tmp_path / name).touch()
    for name in ("make", "sh"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))

    run = subprocess.run(
        ["make", "test-ui"],
        cwd=tmp_path,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert run.returncode != 0
    assert "apt install chromium chromium-driver" in run.stdout


def test_make_lists_its_targets() -> None:
    """`make` alone explains itself."""
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=30).stdout
    for target in (
        "demo",
        "lint",
        "test",
        "test-long",
        "test-extras",
        "test-ui",
        "check",
        "dev",
        "bench",
        "clean",
    ):
        assert f"make {target} " in listed


def ci(
    folder: Path, *, fails: str = "", browser: bool = True, apt_get: str = "", **env: str
) -> tuple[int, list[str], str]:
    """Run CI's script with a `make` that only notes its target, and may fail at it, and a browser or none.

    `apt_get`: the script in place of this program; without it there is none. Returns its exit code, the
    targets in their order, and its output.
    """
    programs = folder / "bin"
    programs.mkdir(parents=True)
    if apt_get:
        (programs / "apt-get").write_text(f"#!{shutil.which('bash')}\n{apt_get}\n")
        (programs / "apt-get").chmod(0o755)
    for name in ("bash", "dirname", "timeout", "sleep", "cp"):
        (programs / name).symlink_to(str(shutil.which(name)))
    make = f'#!{shutil.which("bash")}\necho "$1" >> {folder}/made\n[ "$1" != "{fails}" ]\n'
    for name, text in {"make": make, **(BROWSER if browser else {})}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / ".ci" / "run")],
        env={"PATH": str(programs), **env},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stderr == ""
    return done.returncode, (folder / "made").read_text().split(), done.stdout


BROWSER = {"chromium": "", "chromedriver": ""}
WITHOUT_A_BROWSER = ["lint", "test", "test-long", "test-extras"]


def test_make_lint_makes_every_check_without_tests() -> None:
    """Format, lint, import contracts and types. `make check` makes them before the tests."""
    commands = ["ruff format --check .", "ruff check .", "lint-imports", "mypy"]

    for target in ("lint", "check"):
        said = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=30)
        made = [line for line in said.stdout.splitlines() if line.startswith(".venv/bin/")]
        places = [made.index(f".venv/bin/{command}") for command in commands]
        assert places == sorted(places)
        assert any("pytest" in line for line in made) == (target == "check")


def test_ci_runs_all_tests_and_prints_their_times(tmp_path: Path) -> None:
    """What CI runs is what anybody can run."""
    code, made, said = ci(tmp_path)

    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert (code, made) == (0, [*WITHOUT_A_BROWSER, "test-ui"])
    for target in made:
        assert re.search(rf"^make {target}: passed, \d+ s$", said, re.MULTILINE)


@pytest.mark.parametrize("fails", [*WITHOUT_A_BROWSER, "test-ui"])
def test_ci_fails_with_any_of_them_and_runs_the_others(fails: str, tmp_path: Path) -> None:
    """One failure does not hide another."""
    code, made, said = ci(tmp_path, fails=fails)

    assert (code, made) == (1, [*WITHOUT_A_BROWSER, "test-ui"])
    assert re.search(rf"^make {fails}: FAILED, \d+ s$", said, re.MULTILINE)
    assert said.count("passed") == 4


def test_ci_says_that_there_is_no_browser(tmp_path: Path) -> None:
    """And which packages it needs; whoever must have those tests says so, and it fails."""
    code, made, said = ci(tmp_path / "lenient", browser=False)
    strict, _, _ = ci(tmp_path / "strict", browser=False, CI_REQUIRE_UI="1")

    assert (code, made) == (0, WITHOUT_A_BROWSER)
    assert "make test-ui: NOT RUN, no chromium here (Debian: apt install chromium chromium-driver)\n" in said
    assert strict == 1


def test_ci_installs_a_browser(tmp_path: Path) -> None:
    """Debian's, without asking; then it tests the pages."""
    apt_get = f"""echo "$*" >> {tmp_path}/asked
        for name in chromium chromedriver; do cp -L {shutil.which("true")} {tmp_path}/ci/bin/$name; done"""
    code, made, said = ci(tmp_path / "ci", browser=False, apt_get=apt_get, CI_REQUIRE_UI="1")

    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["update -q", "install -q -y --no-install-recommends chromium chromium-driver"]
    assert (code, made) == (0, [*WITHOUT_A_BROWSER, "test-ui"])
    assert "NOT RUN" not in said


@pytest.mark.parametrize(
    ("apt_get", "reason"),
    [
        (
            "echo Reading; echo 'E: are you root?' >&2; exit 100",
            "chromium could not be installed: E: are you root?",
        ),
        ("sleep 60", "chromium could not be installed within 0.1 s"),
    ],
    ids=["fails", "takes too long"],
)
def test_ci_goes_on_without_a_browser(tmp_path: Path, apt_get: str, reason: str) -> None:
    """With the reason in the last lines."""
    code, made, said = ci(tmp_path / "ci", browser=False, apt_get=apt_get, CI_INSTALL_S="0.1")

    assert (code, made) == (0, WITHOUT_A_BROWSER)
    assert f"make test-ui: NOT RUN, {reason}\n" in said
