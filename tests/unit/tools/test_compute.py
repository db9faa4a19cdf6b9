"""`calc`: exact for integers, rejects everything but arithmetic, and always fast."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from openagents_worker.errors import ToolValidationError
from openagents_worker.tools.builtin import compute
from openagents_worker.tools.builtin.compute import MAX_INTEGER_BITS, evaluate

MOST_BITS = 2 * MAX_INTEGER_BITS  # of a product or power, until it is checked: computed in microseconds


class Largest:
    """Records the size of the largest integer that an operation returned; the cost depends only on it."""

    def __init__(self) -> None:
        self.bits = 0

    def noting(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            value = operation(*args)
            if isinstance(value, int):
                self.bits = max(self.bits, value.bit_length())
            return value

        return noted


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> Largest:
    largest = Largest()
    for operations in (compute._BINARY, compute._UNARY, compute._FUNCTIONS):
        for name, operation in operations.items():  # type: ignore[attr-defined]  # dicts of operations, all of them
            monkeypatch.setitem(operations, name, largest.noting(operation))  # type: ignore[arg-type]
    return largest


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("17*23", 391),
        (" (1 + 5 % 3) ** 2 ", 9),
        ("-7 // 2", -4),
        ("2**-1", 0.5),
        ("2**1000", 2**1000),
        ("round(sqrt(2), 4)", 1.4142),
        ("round(1234, -2)", 1200),
        ("sum([1, 2, 3]) + sum(4, 5)", 15),
        ("max(1, min([5, 3])) + pow(2, 3)", 11),
        ("log(8, 2)", 3.0),
        ("floor(pi) + ceil(e)", 6),
        ("factorial(20)", math.factorial(20)),
        ("1e3", 1000.0),
    ],
)
def test_arithmetic_is_computed(expression: str, value: float) -> None:
    """Integers stay exact."""
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('id')",
        "().__class__",
        "open('/etc/passwd')",
        "[x for x in (1,)]",
        "'a' * 9",
        "True",
        "1j",
        "x",
        "1 if 2 else 3",
        "lambda: 1",
        "max(key=1)",
        "sqrt",
        "[1, 2]",
        "1 < 2",
        "",
        "1 +",
    ],
)
def test_everything_but_arithmetic_is_rejected(expression: str) -> None:
    """An expression can compute only numbers."""
    with pytest.raises(ToolValidationError, match=r"^expression: "):
        evaluate(expression)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("9**9**9", "too large"),
        ("(-2)**99999999", "too large"),
        ("10.0**400", "too large"),
        ("1e999", "too large"),
        ("exp(1e9)", "too large"),
        ("factorial(501)", "factorial takes"),
        ("factorial(10**9)", "factorial takes"),
        ("round(1, -10**9)", "round takes"),
        ("2**2000 * 2**2000 * 2**2000", "too large"),
        ("1/0", "division by zero"),
        ("(-8)**0.5", "not a real number"),
        ("sqrt(-1)", "cannot be computed"),
        ("1" * 501, "longer than"),
    ],
)
def test_what_would_not_end_or_has_no_value_is_refused(
    expression: str, reason: str, largest: Largest
) -> None:
    """Limits are checked before the computation, and the error names the limit."""
    with pytest.raises(ToolValidationError, match=re.escape(reason)):
        evaluate(expression)
    assert largest.bits <= MOST_BITS


NUMBERS = st.one_of(st.integers(-(10**40), 10**40).map(str), st.floats(allow_nan=False).map(str))
EXPRESSIONS = st.recursive(
    NUMBERS | st.sampled_from(["pi", "e", "9**9", "1e308"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**"]), inner).map(
            lambda t: f"({''.join(t)})"
        ),
        st.tuples(st.sampled_from(["sqrt", "exp", "round", "factorial", "abs", "floor", "log"]), inner).map(
            lambda t: f"{t[0]}({t[1]})"
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda numbers: f"sum([{','.join(numbers)}])"),
        st.tuples(inner, inner).map(lambda t: f"round({t[0]}, {t[1]})"),
    ),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])  # it only takes note
@given(EXPRESSIONS | st.text(max_size=60))
@example("pow(9, pow(9, 9))")
@example("(9**9)**(9**3)")
@example("-" * 499 + "1")
@example("(" * 249 + "1" + ")" * 249)
def test_nothing_but_a_number_or_a_coded_error_comes_out_and_soon(largest: Largest, expression: str) -> None:
    """No expression makes an intermediate number that takes long to compute."""
    try:
        value = evaluate(expression)
    except ToolValidationError:
        value = 0
    assert isinstance(value, int | float)
    assert isinstance(value, int) or math.isfinite(value)
    assert largest.bits <= MOST_BITS
