"""The example of a support agent, from outside: a customer in one terminal, a colleague in another."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.examples.outcomes import Support, support

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Generator[Support]:
    with support(tmp_path_factory.mktemp("support")) as shop:
        yield shop


def test_a_small_refund_is_paid_at_once(shop: Support) -> None:
    answer = shop.ask("ada", "B02 never came. I want my money back.")

    assert answer == "1200 cents for the book were paid back.\n"
    assert shop.refunds() == {"B02": 1200}


def test_a_large_refund_is_paid_once_a_colleague_approves_it(shop: Support) -> None:
    """In the conversation of the customer: the next question needs no number."""
    answer = shop.ask_and_decide("ada", "A17 came broken. I want my money back.", "approve")

    assert answer == "4500 cents for the lamp were paid back.\n"
    assert shop.refunds()["A17"] == 4500
    assert shop.ask("ada", "What has become of it?") == "Of your lamp, 4500 cents were paid back.\n"


def test_a_refund_that_a_colleague_denies_is_not_paid(shop: Support) -> None:
    """The customer gets the reason."""
    answer = shop.ask_and_decide(
        "bob", "C11 wobbles. I want my money back.", "deny", "--note", "Send a photo"
    )

    assert "Send a photo" in answer
    assert "C11" not in shop.refunds()


def test_an_order_of_another_customer_is_not_found(shop: Support) -> None:
    answer = shop.ask("eve", "A17 never came. I want my money back.")

    assert "eve has no order A17" in answer
