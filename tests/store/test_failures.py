"""What an error means for its command: whether it may be repeated, and whether its outcome is known."""

from __future__ import annotations

import asyncio

import pytest
from redis import exceptions
from redis._parsers.base import BaseParser

from openagents_worker.errors import RedisRefused, RedisUnreachable
from openagents_worker.store.redis_errors import (
    AnswerLost,
    Failure,
    NotSent,
    failure_of,
    translate_connect_errors,
    translate_errors,
)

URL = "redis://:hush@redis.test:6379/0"

ANSWERS = {
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.": Failure.LATER,
    "LOADING Redis is loading the dataset in memory": Failure.LATER,
    "READONLY You can't write against a read only replica.": Failure.LATER,
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist": Failure.LATER,
    "OOM command not allowed when used memory > 'maxmemory'.": Failure.LATER,
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.": Failure.LATER,
    "CLUSTERDOWN The cluster is down": Failure.LATER,
    "TRYAGAIN Multiple keys request during rehashing of slot": Failure.LATER,
    "NOREPLICAS Not enough good replicas to write.": Failure.LATER,
    "EXECABORT Transaction discarded because of previous errors.": Failure.LATER,
    "UNBLOCKED force unblock from blocking operation, instance state changed": Failure.LATER,
    "ERR Error running script (call to f_1): @user_script:5: -OOM command not allowed": Failure.LATER,
    "ERR Error running script (call to f_1): @user_script:5: -MISCONF Redis is configured": Failure.LATER,
    "NOAUTH Authentication required.": Failure.LOGIN,
    "WRONGPASS invalid username-password pair or user is disabled.": Failure.LOGIN,
    "ERR max number of clients reached": Failure.LOST,  # unless it is the answer while connecting
    "NOPERM this user has no permissions to run the 'evalsha' command": Failure.FINAL,
    "WRONGTYPE Operation against a key holding the wrong kind of value": Failure.FINAL,
    "MOVED 3999 127.0.0.1:6381": Failure.FINAL,
    "CROSSSLOT Keys in request don't hash to the same slot": Failure.FINAL,
    "ERR unknown command 'NOPE', with args beginning with: ": Failure.FINAL,
    "ERR user_script:7: Script attempted to access nonexistent global variable 'BUSY'": Failure.FINAL,
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_every_answer_of_redis_has_one_failure_kind(answer: str) -> None:
    """By its error code, wherever Redis or redis-py puts it in the text."""
    error = BaseParser.parse_error(answer)
    assert failure_of(error) is ANSWERS[answer]
    if type(error) is exceptions.ResponseError:
        annotated = exceptions.ResponseError(f"Command # 2 (EVALSHA 1) of pipeline caused error: {error}")
        assert failure_of(annotated) is ANSWERS[answer]


@pytest.mark.parametrize(
    "error",
    [
        exceptions.ConnectionError("Connection closed by server."),
        exceptions.TimeoutError("Timeout reading from socket"),
        exceptions.InvalidResponse("Protocol error"),
        ConnectionResetError(),
        TimeoutError(),
        asyncio.IncompleteReadError(b"", 1),
    ],
    ids=repr,
)
def test_the_outcome_is_unknown_if_the_connection_breaks_after_sending(error: Exception) -> None:
    """If it breaks before, the outcome is known."""
    assert failure_of(error) is Failure.LOST
    with pytest.raises(AnswerLost), translate_errors(URL):
        raise error
    with pytest.raises(NotSent), translate_connect_errors():
        raise error
    with pytest.raises(RedisUnreachable) as caught, translate_errors(URL), translate_connect_errors():
        raise error
    assert not isinstance(caught.value, AnswerLost)


@pytest.mark.parametrize("answer", ANSWERS)
def test_every_error_names_the_redis_and_the_reason_without_the_password(answer: str) -> None:
    """It is an error class of the library, and its cause is kept."""
    error = BaseParser.parse_error(answer)
    with pytest.raises(RedisUnreachable) as caught, translate_errors(URL):
        raise error
    assert caught.value.__cause__ is error
    assert "redis.test" in str(caught.value)
    assert "hush" not in str(caught.value)
    assert isinstance(caught.value, RedisRefused) is (ANSWERS[answer] is Failure.FINAL)


@pytest.mark.parametrize(
    ("says", "hint"),
    [
        ("OOM", "raise maxmemory, or delete sessions"),
        ("MISCONF", "look at its log"),
        ("READONLY", "put the address of its master"),
        ("CLUSTERDOWN", "use a Redis without cluster mode"),
        ("MOVED", "use a Redis without cluster mode"),
        ("CROSSSLOT", "use a Redis without cluster mode"),
        ("LOADING", None),
        ("MASTERDOWN", None),
    ],
)
def test_a_refusal_says_what_an_operator_can_do(says: str, hint: str | None) -> None:
    """Also if Redis 6 wraps the error of a script. One that is over soon needs nobody."""
    for answer in (each for each in ANSWERS if says in each):
        with pytest.raises(RedisUnreachable) as caught, translate_errors(URL):
            raise BaseParser.parse_error(answer)
        assert hint is None or hint in str(caught.value.hint)
        assert (caught.value.hint is None) is (hint is None)


def test_other_exceptions_are_not_translated() -> None:
    """An argument that is not valid text is an error of the caller."""
    with pytest.raises(UnicodeEncodeError), translate_errors(URL):
        "\ud800".encode()
