"""Numbers: `calc`, `percentage`, `min_max`. All computations are limited, so they run on the event loop."""

from __future__ import annotations

import ast
import math
import operator
import statistics
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from openagents_worker.errors import ToolValidationError
from openagents_worker.tools.base import ToolContext
from openagents_worker.tools.typed import READS_ONLY, TypedTool

__all__ = ["Calc", "MinMax", "Percentage", "evaluate"]

MAX_EXPRESSION_CHARS = 500
MAX_INTEGER_BITS = 4096  # about 1,200 digits, which are still multiplied in microseconds
MAX_FACTORIAL = 500
MAX_ROUND_DIGITS = 300  # round(1, -10**9) would compute 10**10**9


class Calc(TypedTool):
    name = "calc"
    description = (
        "Computes an arithmetic expression, for example `17*23`, `(1+5%3)**2` or `round(sqrt(2), 4)`. "
        "Operators + - * / // % **, constants pi and e, functions abs, round, min, max, sum, sqrt, exp, log, "
        "log2, log10, sin, cos, tan, asin, acos, atan, floor, ceil, factorial, pow."
    )
    spec = READS_ONLY

    class Params(TypedTool.Params):
        expression: str = Field(
            min_length=1, max_length=MAX_EXPRESSION_CHARS, description="The expression, without variables."
        )

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        return {"result": evaluate(args.expression)}


class Percentage(TypedTool):
    name = "percentage"
    description = "Computes a percentage of a value, or the value increased or decreased by a percentage."
    spec = READS_ONLY

    class Params(TypedTool.Params):
        value: float = Field(description="The value the percentage refers to.")
        percent: float = Field(description="The percentage; 15 means 15 %.")
        operation: Literal["of", "increase", "decrease"] = Field(
            "of",
            description="`of`: that share of the value; `increase`, `decrease`: the value changed by it.",
        )

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        share = args.value * args.percent / 100
        results = {"of": share, "increase": args.value + share, "decrease": args.value - share}
        result = results[args.operation]
        if not math.isfinite(result):
            raise ToolValidationError("value: the result is too large for a number", self.name)
        return {"result": result}


Number = int | float


class MinMax(TypedTool):
    name = "min_max"
    description = "Finds the smallest and largest of a list of numbers, or its sum, average or median."
    spec = READS_ONLY

    class Params(TypedTool.Params):
        numbers: list[int | float] | str = Field(
            min_length=1, description="The numbers; also as a text with commas: `1, 2.5`."
        )
        action: Literal["min", "max", "sum", "avg", "median", "both"] = Field(
            "both", description="What to find; `both`: the smallest and the largest."
        )

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        numbers = self._numbers(args.numbers) if isinstance(args.numbers, str) else args.numbers
        if args.action == "both":
            return {"min": min(numbers), "max": max(numbers)}
        try:
            result = _within_limits(_OF_MANY[args.action](numbers))
        except OverflowError:
            raise ToolValidationError("numbers: the result is too large for a number", self.name) from None
        return {args.action: result, "result": result}

    def _numbers(self, text: str) -> list[Number]:
        try:
            return [_within_limits(_number_in(number)) for number in text.split(",")]
        except (ValueError, OverflowError):
            raise ToolValidationError(
                f"numbers: {text[:80]!r} is not a list of numbers", self.name, hint="for example 1, 2.5"
            ) from None


def _number_in(text: str) -> Number:
    """A number in a text. An integer stays one: a float of this size may be another number."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def evaluate(expression: str) -> Number:
    """Compute an arithmetic expression. Any expression takes at most a few milliseconds.

    Raises `ToolValidationError` for other syntax, for numbers that are too large, and for a result that is
    not a real number.

    >>> evaluate("17 * 23")
    391
    """
    if len(expression) > MAX_EXPRESSION_CHARS:
        raise _refused(f"the expression is longer than {MAX_EXPRESSION_CHARS} characters")
    try:
        value = _evaluate_node(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        raise _refused("division by zero") from None
    except OverflowError:
        raise _refused("a number is too large") from None
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise _refused(f"cannot be computed: {error}") from None
    if isinstance(value, list):
        raise _refused("the result is a list; use min, max or sum")
    return _within_limits(value)


def _evaluate_node(node: ast.expr) -> Any:
    """The value of a node: a number, or a list of numbers."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _within_limits(value)
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_number(element) for element in elements]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_number(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _within_limits(_BINARY[type(op)](_number(left), _number(right)))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _within_limits(_FUNCTIONS[name](*[_evaluate_node(argument) for argument in arguments]))
    raise _refused(f"`{ast.unparse(node)[:80]}` is not allowed")


def _number(node: ast.expr) -> Number:
    value: Number | list[Number] = _evaluate_node(node)
    if isinstance(value, list):
        raise _refused("a list is allowed only as the argument of min, max or sum")
    return value


def _within_limits(value: Any) -> Number:
    """The value, if it is a real number. Raises OverflowError if it is too large."""
    if isinstance(value, int):
        if value.bit_length() > MAX_INTEGER_BITS:
            raise OverflowError
        return value
    if not isinstance(value, float):
        raise _refused("the result is not a real number")
    if not math.isfinite(value):
        raise OverflowError
    return value


def _power(base: Number, exponent: Number) -> Number:
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and abs(base) > 1 and int(base).bit_length() * exponent > 2 * MAX_INTEGER_BITS:
        raise OverflowError  # before it is computed: 9**9**9 would block the event loop for minutes
    return base**exponent  # complex for (-8)**0.5; _within_limits rejects it


def _factorial(n: Number) -> int:
    if not isinstance(n, int) or not 0 <= n <= MAX_FACTORIAL:
        raise _refused(f"factorial takes whole numbers from 0 to {MAX_FACTORIAL}")
    return math.factorial(n)


def _round_checked(value: Number, digits: Number = 0) -> Number:
    if not isinstance(digits, int) or abs(digits) > MAX_ROUND_DIGITS:
        raise _refused(f"round takes at most {MAX_ROUND_DIGITS} digits, as a whole number")
    return round(value, digits) if digits else round(value)


def _sum(*values: Any) -> Number:
    numbers = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    return sum(_within_limits(number) for number in numbers)


def _refused(reason: str) -> ToolValidationError:
    return ToolValidationError(f"expression: {reason}", Calc.name)


_OF_MANY: dict[str, Callable[[list[Any]], Number]] = {
    "min": min,
    "max": max,
    "sum": sum,
    "avg": statistics.fmean,
    "median": statistics.median,
}
_CONSTANTS = {"pi": math.pi, "e": math.e}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "acos": math.acos,
    "asin": math.asin,
    "atan": math.atan,
    "ceil": math.ceil,
    "cos": math.cos,
    "exp": math.exp,
    "factorial": _factorial,
    "floor": math.floor,
    "log": math.log,
    "log10": math.log10,
    "log2": math.log2,
    "max": max,
    "min": min,
    "pow": _power,
    "round": _round_checked,
    "sin": math.sin,
    "sqrt": math.sqrt,
    "sum": _sum,
    "tan": math.tan,
}
