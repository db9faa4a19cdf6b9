"""The shop: its orders, what it has paid back, and the tools with which the agent sees and changes both.

The database stands for a payment service: it keeps the idempotency key of each refund, so it can say whether
an interrupted call has paid.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openagents_worker import PermanentToolError, Reconciled, ToolContext, tool

LIMIT_CENTS = 2_000
"""A refund of more needs an approval."""
ORDERS = (("A17", "ada", "lamp", 4_500), ("B02", "ada", "book", 1_200), ("C11", "bob", "chair", 9_900))
TABLES = """
CREATE TABLE IF NOT EXISTS orders (number TEXT PRIMARY KEY, customer TEXT, item TEXT, cents INTEGER);
CREATE TABLE IF NOT EXISTS refunds (number TEXT PRIMARY KEY, cents INTEGER, reason TEXT, key TEXT UNIQUE);
"""


@tool
def find_order(number: str, context: ToolContext) -> dict[str, Any]:
    """Shows an order of the customer: what was bought, its price, and what was paid back.

    Args:
        number: The number of the order, for example A17.
    """
    with _database() as shop:
        return _order_of_customer(shop, number, context)


def needs_approval(params: Mapping[str, Any], context: ToolContext) -> bool:
    """Whether a person decides about a refund. An order is refunded once, so nobody can split a large one."""
    return bool(params["cents"] > LIMIT_CENTS)


async def find_refund(
    params: Mapping[str, Any], idempotency_key: str, context: ToolContext | None
) -> Reconciled:
    """Asks the shop whether the interrupted call with this key has paid."""
    return await asyncio.to_thread(_refund_with, idempotency_key)


@tool(durable_idempotent=False, approval=needs_approval, reconcile=find_refund)
def refund(number: str, cents: int, reason: str, context: ToolContext) -> dict[str, Any]:
    """Pays money back to the customer.

    Args:
        number: The number of the order.
        cents: How much, at most the price of the order.
        reason: Why, in the words of the customer.
    """
    with _database() as shop:
        order = _order_of_customer(shop, number, context)
        if order["refunded_cents"]:
            raise PermanentToolError(f"{number} was refunded before", "refund")
        if not 0 < cents <= order["cents"]:
            raise PermanentToolError(f"a refund for {number} is 1 to {order['cents']} cents", "refund")
        row = (number, cents, reason, context.idempotency_key)
        shop.execute("INSERT INTO refunds VALUES (?, ?, ?, ?)", row)
        return {"number": number, "refunded_cents": cents}


def _order_of_customer(shop: sqlite3.Connection, number: str, context: ToolContext) -> dict[str, Any]:
    """The order, if it belongs to the customer of the session: the model cannot choose another one."""
    customer = context.session_id.removeprefix("customer-")
    row = shop.execute(
        "SELECT item, orders.cents, coalesce(refunds.cents, 0) FROM orders LEFT JOIN refunds USING (number)"
        " WHERE number = ? AND customer = ?",
        (number, customer),
    ).fetchone()
    if row is None:
        raise PermanentToolError(f"{customer} has no order {number}", "find_order")
    return {"number": number, "item": row[0], "cents": row[1], "refunded_cents": row[2]}


def _refund_with(key: str) -> Reconciled:
    with _database() as shop:
        row = shop.execute("SELECT number, cents FROM refunds WHERE key = ?", (key,)).fetchone()
    if row is None:
        return Reconciled.not_done()
    return Reconciled.done({"number": row[0], "refunded_cents": row[1]})


@contextmanager
def _database() -> Iterator[sqlite3.Connection]:
    """One transaction. The file SUPPORT_DATABASE is created with the first one."""
    path = Path(os.environ.get("SUPPORT_DATABASE", "var/support.sqlite3"))
    path.parent.mkdir(parents=True, exist_ok=True)
    shop = sqlite3.connect(path)
    try:
        with shop:
            shop.executescript(TABLES)
            shop.executemany("INSERT OR IGNORE INTO orders VALUES (?, ?, ?, ?)", ORDERS)
            yield shop
    finally:
        shop.close()
