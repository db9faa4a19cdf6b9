"""Settings: the value of each variable, and errors that name wrong variables."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from openagents_worker.errors import ConfigValidationError
from openagents_worker.settings import Settings, env_example, load_settings, unknown_variables

CONFIG = Path(__file__).parents[2] / "config"


def test_an_empty_environment_gives_a_working_development_setup() -> None:
    """Without a single variable everything is on the Redis of this machine."""
    settings = load_settings({})
    assert settings.redis_url == settings.broker_url == "redis://127.0.0.1:6379/0"
    assert settings.result_backend is None
    assert (settings.lease_ms, settings.heartbeat_ms) == (10_000, 2_500)
    assert settings.durable_default
    assert (settings.key_prefix, settings.queue, settings.config) == ("oa", "agents", "config/agents.json")
    assert (settings.run_ttl_s, settings.session_ttl_s) == (604_800, 2_592_000)


def test_an_empty_variable_counts_as_unset() -> None:
    """Compose files and CI pass on empty variables."""
    assert load_settings({"OPENAGENTS_LEASE_MS": "", "OPENAGENTS_REDIS_URL": ""}) == load_settings({})


def test_this_processs_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_settings()` and `Settings()` read the same variables."""
    monkeypatch.setenv("OPENAGENTS_QUEUE", "other")
    assert load_settings().queue == Settings().queue == "other"
    assert load_settings({}).queue == "agents", "a given environment is the only one that counts"


def test_lists_and_levels_are_written_with_commas() -> None:
    """`a,b` is two modules; `logger=LEVEL` pairs are levels."""
    settings = load_settings(
        {"OPENAGENTS_IMPORTS": "my.tools, my.patterns,", "OPENAGENTS_LOG_LEVELS": "a.b=debug"}
    )
    assert settings.imports == ("my.tools", "my.patterns")
    assert settings.log_levels == {"a.b": "DEBUG"}


def test_the_broker_is_the_same_redis_unless_it_is_named() -> None:
    """One variable is enough."""
    url = "unix:///run/r.sock?db=2"
    assert load_settings({"OPENAGENTS_REDIS_URL": url}).broker_url == url
    assert load_settings({"OPENAGENTS_BROKER_URL": "amqp://rabbit//"}).broker_url == "amqp://rabbit//"


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("LEASE_MS", "ten", "should be a valid integer"),
        ("LEASE_MS", "5", "greater than or equal to 500"),
        ("LOOP_DEAD_S", "0.5", "greater than or equal to 1"),
        ("CONCURRENCY", "0", "greater than or equal to 1"),
        ("DURABLE_DEFAULT", "perhaps", "should be a valid boolean"),
        ("LOG_FORMAT", "xml", "should be 'text' or 'json'"),
        ("LOG_LEVEL", "loud", "should be 'DEBUG'"),
        ("LOG_LEVELS", "a", "logger=LEVEL"),
        ("QUEUE", "a b", "not a valid name"),
        ("KEY_PREFIX", "oa*", "not a valid name"),
        ("REDIS_URL", "http://host", "must begin with redis://"),
        ("BROKER_URL", "host:6379", "write a scheme first"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(variable: str, value: str, says: str) -> None:
    """The error names the variable."""
    with pytest.raises(ConfigValidationError, match=f"OPENAGENTS_{variable}: .*{says}"):
        load_settings({f"OPENAGENTS_{variable}": value})


def test_all_wrong_variables_are_named_at_once() -> None:
    """One start of the worker is enough to see them."""
    with pytest.raises(ConfigValidationError) as caught:
        load_settings({"OPENAGENTS_LEASE_MS": "x", "OPENAGENTS_QUEUE": " "})
    assert "OPENAGENTS_LEASE_MS" in str(caught.value)
    assert "OPENAGENTS_QUEUE" in str(caught.value)


def test_a_heartbeat_that_one_lost_beat_would_make_deadly_is_refused() -> None:
    """The error has the limit: two heartbeats and the margin fit into a lease."""
    with pytest.raises(ConfigValidationError, match="OPENAGENTS_HEARTBEAT_MS: must be at most 4000 with"):
        load_settings({"OPENAGENTS_LEASE_MS": "10000", "OPENAGENTS_HEARTBEAT_MS": "4001"})

    fits = load_settings({"OPENAGENTS_LEASE_MS": "10000", "OPENAGENTS_HEARTBEAT_MS": "4000"})
    assert fits.time_limits.beat_s == 4.0


def test_passwords_are_in_no_text_and_no_error() -> None:
    """Settings are logged at start, and errors end up in tickets."""
    url = "redis://me:hunter2@host:6379/0"
    settings = load_settings({"OPENAGENTS_REDIS_URL": url, "OPENAGENTS_RESULT_BACKEND": url})
    assert settings.redis_url == url
    assert "hunter2" not in f"{settings!r} {settings} {settings.redis_url_safe}"
    assert "redis://me:***@host:6379/0" in repr(settings)
    with pytest.raises(ConfigValidationError) as caught:
        load_settings({"OPENAGENTS_REDIS_URL": "http://me:hunter2@host"})
    assert "hunter2" not in str(caught.value)


def test_the_key_for_definitions_is_never_shown() -> None:
    """Neither in the representation of the settings, nor in the error about one that is too short."""
    key = "0123456789abcdef" * 2
    settings = load_settings({"OPENAGENTS_DEFINITIONS_KEY": key})
    with pytest.raises(ConfigValidationError) as short:
        load_settings({"OPENAGENTS_DEFINITIONS_KEY": "hunter2-of-mine"})

    assert settings.definitions_key == key
    assert key not in f"{settings!r} {settings}"
    assert "32 or more characters" in short.value.message
    assert "hunter2" not in f"{short.value.message} {short.value!r}"


def test_settings_cannot_be_changed() -> None:
    """Two parts of a process can never see different settings."""
    with pytest.raises(ValueError, match="frozen"):
        load_settings({}).queue = "other"  # type: ignore[misc]


def test_there_are_no_other_settings() -> None:
    """A misspelled name would leave the default in place."""
    with pytest.raises(ValidationError, match="key_prefx"):
        Settings(key_prefx="shop:")  # type: ignore[call-arg]


def test_a_misspelt_variable_is_found_and_its_name_suggested() -> None:
    """A variable that is not read would silently have no effect."""
    env = {"OPENAGENTS_LEASE": "1", "OPENAGENTS_ZZZ": "1", "OPENAGENTS_QUEUE": "q", "PATH": "/bin"}
    assert unknown_variables(env) == [("OPENAGENTS_LEASE", "OPENAGENTS_LEASE_MS"), ("OPENAGENTS_ZZZ", None)]


def test_what_kubernetes_and_the_original_set_is_known() -> None:
    """Service addresses from Kubernetes are ignored; the logging variables of the original SDK are read."""
    env = {"OPENAGENTS_SERVICE_HOST": "", "OPENAGENTS_REDIS_PORT_6379_TCP": "", "OPENAGENTS_WORKER_PORT": ""}
    env |= {
        f"OPENAGENTS_LOG_{n}": ""
        for n in ("LEVEL", "LEVELS", "PRETTY", "STREAM", "INCLUDE", "EXCLUDE", "REDACT")
    }
    assert unknown_variables(env) == []


def test_the_example_file_is_what_the_class_says() -> None:
    """`config/.env.example` is written by `env_example()`; a new field must be in it."""
    assert (CONFIG / ".env.example").read_text() == env_example()
    for name, field in Settings.model_fields.items():
        assert f"OPENAGENTS_{name.upper()}=" in env_example()
        assert field.description, name


NUMBERS = [name for name, field in Settings.model_fields.items() if field.annotation in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value",
    [
        "9" * 5_000,
        "9" * 30,
        "-" + "9" * 30,
        "1e999",
        "1e308",
        "nan",
        "-inf",
        "\udcff",
        str(2**63),
        "[" * 2_000,
    ],
    ids=lambda value: value[:6].encode("ascii", "replace").decode(),
)
def test_a_number_that_nothing_could_count_is_refused(name: str, value: str) -> None:
    """With the variable's name: an integer of 5,000 digits, a time of more than ten years, infinity."""
    with pytest.raises(ConfigValidationError) as refused:
        load_settings({f"OPENAGENTS_{name.upper()}": value})

    assert f"OPENAGENTS_{name.upper()}: " in str(refused.value)
    assert len(str(refused.value)) < 500
    str(refused.value).encode()


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_a_variable_that_is_not_utf8_is_refused(name: str) -> None:
    """Python represents its bytes as halves of surrogate pairs, which cannot be stored or sent."""
    with pytest.raises(ConfigValidationError, match=f"OPENAGENTS_{name.upper()}"):
        load_settings({f"OPENAGENTS_{name.upper()}": "a\udcff"})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["1" + "0" * 18, "9" * 300, "1e300"])
def test_a_size_and_a_time_have_an_end(name: str, value: str) -> None:
    """A value that must be a mistake is rejected, and the error has the largest allowed value."""
    with pytest.raises(ConfigValidationError) as refused:
        load_settings({f"OPENAGENTS_{name.upper()}": value})

    assert f"OPENAGENTS_{name.upper()}" in str(refused.value)


@pytest.mark.parametrize("name", NUMBERS)
def test_the_largest_value_is_named_and_taken(name: str) -> None:
    """`lease_ms` and the values computed from it are checked together."""
    largest = next(each.le for each in Settings.model_fields[name].metadata if hasattr(each, "le"))
    others = {"OPENAGENTS_LEASE_MS": str(60 * 60 * 1000)} if name == "heartbeat_ms" else {}
    value = largest // 4 if name == "heartbeat_ms" else largest

    assert getattr(load_settings({f"OPENAGENTS_{name.upper()}": str(value), **others}), name) == value


def test_a_port_that_kubernetes_injects_counts_as_unset() -> None:
    """A service named openagents-metrics sets OPENAGENTS_METRICS_PORT in every container of its namespace."""
    injected = {"OPENAGENTS_METRICS_PORT": "tcp://10.0.0.11:9808", "OPENAGENTS_HEALTH_PORT": "9809"}
    settings = load_settings(injected)
    assert (settings.metrics_port, settings.health_port) == (None, 9809)
    assert settings.monitoring_address == "127.0.0.1"
