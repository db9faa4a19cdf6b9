"""Secrets in text: a text with the form of a secret is masked everywhere, other text is not changed."""

from __future__ import annotations

import doctest
import sys
from collections.abc import Callable, Generator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openagents_worker import secret_forms, secret_names, secret_text
from openagents_worker.redaction import redact, safe_message
from openagents_worker.secret_forms import MASK, mask_secrets, mask_url, remember_secret
from openagents_worker.secret_text import mask_prose
from tests.hostile.planted import HARMLESS, OWN_KEY, SECRETS, Secret

AROUND = {
    "alone": "{}",
    "in a sentence": "The server said: {} - and hung up.",
    "quoted": "cannot open '{}'",
    "in a repr": "ConnectionError({!r})",
    "after a line": "first line\n{}\nlast line",
    "in brackets": "failed ({}).",
}


@pytest.fixture(autouse=True)
def known_key(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    monkeypatch.setattr(secret_forms, "_remembered", {})
    monkeypatch.setattr(secret_forms, "_known", ())
    secret_forms.mask_short.cache_clear()
    remember_secret(OWN_KEY)
    yield
    secret_forms.mask_short.cache_clear()
    secret_text.mask_short_prose.cache_clear()


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND.keys())
@pytest.mark.parametrize("secret", SECRETS, ids=[secret.name for secret in SECRETS])
def test_a_secret_is_masked_in_whatever_stands_around_it(secret: Secret, around: str) -> None:
    """The secret part is masked, the rest is kept, and masking twice changes nothing."""
    text = around.format(secret.text)
    shown = mask_prose(text)

    assert secret.needle not in shown
    assert secret.needle[:12] not in shown
    assert MASK in shown
    assert mask_prose(shown) == shown
    assert shown.split(" ")[0] == text.split(" ")[0] or around in (
        "{}",
        "cannot open '{}'",
        "ConnectionError({!r})",
    )


@pytest.mark.parametrize("text", HARMLESS.values(), ids=HARMLESS.keys())
def test_a_harmless_text_stays_as_it_is(text: str) -> None:
    """Hashes, ids, pictures, prose, code: nothing of them is masked, in prose and in data."""
    assert mask_prose(text) == text
    assert redact([text]) == [text]


@pytest.mark.parametrize("secret", SECRETS, ids=[secret.name for secret in SECRETS])
@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_cut_leaves_no_part_of_a_secret(secret: Secret, cut: int) -> None:
    """A secret at the cut of a text is masked before the cut."""
    at = len("x" * 30 + " ") + secret.text.index(secret.needle) + cut
    shown = safe_message("x" * 30 + " " + secret.text, at)

    assert secret.needle[:6] not in shown


@pytest.mark.parametrize(
    "wrong", ["redis://:p@ss w/rd#1@host/0", "':s3cret-x@host:6379'", "amqp://u:s3/c?r@h//"]
)
def test_a_url_that_is_written_wrongly_shows_nothing_of_its_password(wrong: str) -> None:
    shown = mask_url(wrong)

    assert "host" in shown or "@h" in shown
    assert not any(part in shown for part in ("ss w", "rd#", "s3"))


def test_a_known_secret_is_masked_whatever_its_form() -> None:
    """Also in percent-encoded text and in data."""
    remember_secret("pl/in wörds 7")

    assert mask_secrets("at pl/in wörds 7, pl%2Fin%20w%C3%B6rds%207.") == f"at {MASK}, {MASK}."
    assert redact({"note": f"it was {OWN_KEY}"}) == {"note": f"it was {MASK}"}
    assert mask_secrets(f"it was {OWN_KEY}", known=False) == f"it was {OWN_KEY}"


@pytest.mark.parametrize("word", ["", "short-1", "password", "openagents", "not-needed", "12345678"])
def test_a_word_is_not_remembered_as_a_secret(word: str) -> None:
    """It would be masked in every sentence that has it."""
    remember_secret(word)

    assert mask_secrets(f"say {word} again") == f"say {word} again"


def test_the_oldest_known_secret_is_forgotten_first() -> None:
    for number in range(secret_forms.MAX_KNOWN):
        remember_secret(f"number-{number}-secret")

    assert mask_secrets("number-255-secret") == MASK
    assert mask_secrets(OWN_KEY) == OWN_KEY


def test_the_examples_are_true() -> None:
    assert doctest.testmod(secret_text).failed == doctest.testmod(secret_forms).failed == 0
    assert doctest.testmod(secret_names).failed == 0


@given(
    st.lists(
        st.one_of(
            st.sampled_from(["Bearer", "BASIC", "bEaReR", "bearers", " ", "\u2003", "\t", "aB3+/=.~_-x9"]),
            st.text(max_size=3),
        )
    ).map("".join)
)
def test_a_scheme_is_found_in_any_case_and_among_any_characters(text: str) -> None:
    """Texts without the word of a scheme are not searched for one. None with a scheme is left out."""
    by_scheme = secret_forms._SCHEME.sub(secret_forms._masked_scheme, text)
    if by_scheme != text:
        assert MASK in mask_secrets(text)


ADVERSARIAL = (
    "-", "_", ":", "=", "?", "&", "sk-", "ghp_", "AKIA", "AIza", "eyJ", "eyJaaaaaaaaa.",
    "SG.aaaaaaaaaaaaaaaaaaaa.", "12345678:", "-----BEGIN ", "-----BEGIN PRIVATE KEY-----", "Bearer ", "://",
    "://a:", "://a:b ", "://a1", "?token=a1&", "password=", "password:", "password='", 'password="x',
    "token:", "token='", "token=1,", "cookie:", "cookie: a", "cookie: =", "password=a(", "password :    ",
    "password=[", '\\"password\\":',
)  # fmt: skip


@pytest.mark.share(of=4)
@pytest.mark.parametrize("piece", ADVERSARIAL)
def test_the_work_grows_with_the_length_of_the_text(piece: str) -> None:
    """Twice as many beginnings of a pattern cost twice as many calls; see also `bench masking`."""
    once, twice = (_calls_of(mask_prose, (piece * size)[:size]) for size in (20_000, 40_000))

    assert twice <= 2.1 * once + 100


def _calls_of(function: Callable[[str], str], text: str) -> int:
    """How many functions, Python's own included, are called while the text is masked."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function(text)
    finally:
        sys.setprofile(None)
    return calls
