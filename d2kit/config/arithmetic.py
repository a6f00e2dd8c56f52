"""Arithmetic over numbers, as configs write it behind ``!!python/object/apply:eval``.

The text is parsed, never executed: each node of the syntax tree that is on the list below is
computed here, every other one is refused.
"""

import ast
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["ArithmeticRefused", "evaluate"]

MAX_TEXT = 4096  # characters
MAX_DEPTH = 60  # of brackets and of nodes
MAX_STEPS = 6_000  # nodes computed; 20 ms
MAX_ITEMS = 10_000  # elements of all lists made on the way, written out
MAX_MAGNITUDE = 2**63

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "round": round,
    "min": min,
    "max": max,
    "len": len,
    "abs": abs,
    "sum": sum,
    "list": list,
    "tuple": tuple,
    "sorted": sorted,
    "range": range,
}


_OF_NUMBERS = ("sum", "min", "max", "sorted")
"""Functions that take numbers, or one list of numbers."""


class ArithmeticRefused(ValueError):
    """The text is more than arithmetic over numbers, or too much of it."""


def evaluate(text: str) -> object:
    """Return the value of an expression of numbers.

    Args:
        text: numbers, lists, tuples, ``+ - * / // % **``, comprehensions over ``range`` and lists
            (with comparisons as conditions), and the functions ``int``, ``float``, ``round``,
            ``min``, ``max``, ``len``, ``abs``, ``sum``, ``list``, ``tuple``, ``sorted``, ``range``.

    Returns:
        A number, or a list or tuple of such, nested.

    Raises:
        ArithmeticRefused: for anything else, with the reason.
    """
    if len(text) > MAX_TEXT:
        raise ArithmeticRefused(f"the expression has {len(text)} characters, {MAX_TEXT} are enough")
    if not text.isascii():
        raise ArithmeticRefused("a letter that no number or operator has")
    _check_brackets(text)
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ArithmeticRefused(f"no expression of Python: {error}") from error
    computation = _Computation()
    try:
        value = computation.value(tree.body, {}, 0)
    except (ArithmeticError, TypeError, ValueError) as error:
        if isinstance(error, ArithmeticRefused):
            raise
        raise ArithmeticRefused(f"it cannot be computed: {error}") from error
    return list(value) if isinstance(value, range) else value


def _check_brackets(text: str) -> None:
    """Refuse deep nesting, and the signs that make it, before the parser recurses over it."""
    depth = signs = 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        signs = signs + 1 if letter in "-+~ " else 0
        if depth > MAX_DEPTH or signs > MAX_TEXT // 8:
            raise ArithmeticRefused(f"brackets or signs are nested more than {MAX_DEPTH} deep")


class _Computation:
    """One evaluation with its budget of steps and elements."""

    def __init__(self) -> None:
        self.steps = 0
        self.items = 0

    def value(self, node: ast.expr, names: dict[str, Any], depth: int) -> Any:
        """Return the value of a node; `names` are the loop variables around it."""
        self.steps += 1
        if self.steps > MAX_STEPS or depth > MAX_DEPTH:
            what = f"{MAX_STEPS} steps" if depth <= MAX_DEPTH else f"{MAX_DEPTH} levels"
            raise ArithmeticRefused(f"it takes more than {what}")
        handler = _HANDLERS.get(type(node))
        if handler is None:
            raise ArithmeticRefused(
                f"'{_shown(node)}' ({type(node).__name__}) is not arithmetic over numbers"
            )
        made = self._checked(handler(self, node, names, depth + 1))
        if isinstance(made, list | tuple) and not isinstance(node, ast.Name):
            self._count(made)
        return made

    def _count(self, made: list[Any] | tuple[Any, ...]) -> None:
        """Charge a list as it would be written out: one inside it may stand there many times."""
        waiting = [made]
        while waiting:
            part = waiting.pop()
            self._grow(len(part))
            waiting += [inner for inner in part if isinstance(inner, list | tuple)]

    def _checked(self, value: object) -> object:
        if isinstance(value, bool | list | tuple | range):
            return value
        if isinstance(value, int) and abs(value) > MAX_MAGNITUDE:
            raise ArithmeticRefused("a number beyond 2**63")
        if isinstance(value, float) and not math.isfinite(value):
            raise ArithmeticRefused("a number that is not finite")
        if not isinstance(value, int | float):
            raise ArithmeticRefused(f"a {type(value).__name__}; only numbers are computed with")
        return value

    def _grow(self, count: int) -> None:
        self.items += count
        if self.items > MAX_ITEMS:
            raise ArithmeticRefused(f"lists of more than {MAX_ITEMS} elements in all")

    def constant(self, node: ast.Constant, *_: object) -> object:
        """A number; strings, complex numbers and the like are not."""
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            raise ArithmeticRefused(f"{_shown(node)} is not a number")
        return node.value

    def name(self, node: ast.Name, names: dict[str, Any], depth: int) -> object:
        """A loop variable."""
        if node.id not in names:
            raise ArithmeticRefused(f"the name '{node.id}' is unknown here")
        return names[node.id]

    def sequence(self, node: ast.List | ast.Tuple, names: dict[str, Any], depth: int) -> object:
        """A list or a tuple."""
        kind = list if isinstance(node, ast.List) else tuple
        return kind(self.value(part, names, depth) for part in node.elts)

    def binary(self, node: ast.BinOp, names: dict[str, Any], depth: int) -> object:
        """Two values and an operator; the size of the result is bounded before it is made."""
        operation = _BINARY.get(type(node.op))
        if operation is None:
            raise ArithmeticRefused(
                f"the operator in '{_shown(node)}' is not among + - * / // % **"
            )
        left = self.value(node.left, names, depth)
        right = self.value(node.right, names, depth)
        sizes = [len(x) for x in (left, right) if isinstance(x, list | tuple)]
        if isinstance(node.op, ast.Mult) and sizes:
            times = right if isinstance(left, list | tuple) else left
            if isinstance(times, int) and sizes[0] * times > MAX_ITEMS:
                raise ArithmeticRefused(f"a list of more than {MAX_ITEMS} elements")
        elif isinstance(node.op, ast.Pow):
            _check_power(left, right)
        return operation(left, right)

    def unary(self, node: ast.UnaryOp, names: dict[str, Any], depth: int) -> object:
        """A sign."""
        operation = _UNARY.get(type(node.op))
        if operation is None:
            raise ArithmeticRefused(f"the operator in '{_shown(node)}' is no sign")
        return operation(self.value(node.operand, names, depth))

    def call(self, node: ast.Call, names: dict[str, Any], depth: int) -> object:
        """One of the known functions, by its name, with plain arguments."""
        if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS:
            raise ArithmeticRefused(
                f"a call of '{_shown(node.func)}'; the functions are {', '.join(_FUNCTIONS)}"
            )
        if node.keywords:
            raise ArithmeticRefused(f"'{_shown(node)}' has named arguments")
        arguments = [self.value(part, names, depth) for part in node.args]
        if node.func.id == "range":
            made = range(*arguments)
            if len(made) > MAX_ITEMS:  # an OverflowError, where it is beyond any list
                raise ArithmeticRefused(f"a range of more than {MAX_ITEMS} elements")
            return made
        self._grow(sum(len(x) for x in arguments if isinstance(x, list | tuple | range)))
        if node.func.id in _OF_NUMBERS and arguments:
            inner = arguments if len(arguments) > 1 else arguments[0]
            if node.func.id == "sum":
                inner = (*arguments[1:], *list(arguments[0]))
            if isinstance(inner, list | tuple) and any(isinstance(x, list | tuple) for x in inner):
                raise ArithmeticRefused(f"{node.func.id}() is for numbers")
        if node.func.id == "round" and len(arguments) > 1 and abs(arguments[1]) > 100:
            raise ArithmeticRefused("round() to more than 100 digits")
        return _FUNCTIONS[node.func.id](*arguments)

    def comprehension(
        self, node: ast.ListComp | ast.GeneratorExp, names: dict[str, Any], depth: int
    ) -> list[Any]:
        """A list made by loops; of a generator, the list of what it yields."""
        return [
            self.value(node.elt, inner, depth)
            for inner in self._loops(node.generators, names, depth)
        ]

    def _loops(
        self, loops: list[ast.comprehension], names: dict[str, Any], depth: int
    ) -> Iterator[dict[str, Any]]:
        """Yield the loop variables of each turn, the last loop the fastest."""
        if not loops:
            yield names
            return
        loop, *inner = loops
        if loop.is_async:
            raise ArithmeticRefused("an asynchronous loop")
        over = self.value(loop.iter, names, depth)
        if not isinstance(over, list | tuple | range):
            raise ArithmeticRefused(f"a loop over '{_shown(loop.iter)}', which is no list")
        for item in over:
            self.steps += 1
            bound = {**names, **_bound(loop.target, item)}
            if all(self.value(test, bound, depth) for test in loop.ifs):
                yield from self._loops(inner, bound, depth)

    def compare(self, node: ast.Compare, names: dict[str, Any], depth: int) -> bool:
        """Comparisons of numbers, for the conditions of a loop."""
        values = [self.value(part, names, depth) for part in (node.left, *node.comparators)]
        if not all(type(op) in _COMPARE for op in node.ops):
            raise ArithmeticRefused(f"the comparison in '{_shown(node)}'")
        if any(isinstance(value, list | tuple | range) for value in values):
            raise ArithmeticRefused(f"'{_shown(node)}' compares lists; only numbers are compared")
        pairs = zip(node.ops, values, values[1:], strict=False)
        return all(_COMPARE[type(op)](a, b) for op, a, b in pairs)


_HANDLERS: dict[type[ast.expr], Callable[..., Any]] = {
    ast.Constant: _Computation.constant,
    ast.Name: _Computation.name,
    ast.List: _Computation.sequence,
    ast.Tuple: _Computation.sequence,
    ast.BinOp: _Computation.binary,
    ast.UnaryOp: _Computation.unary,
    ast.Call: _Computation.call,
    ast.ListComp: _Computation.comprehension,
    ast.GeneratorExp: _Computation.comprehension,
    ast.Compare: _Computation.compare,
}


def _check_power(base: object, exponent: object) -> None:
    """Refuse powers of integers that are too long to be written down; floats overflow early."""
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1:
        bits = abs(exponent) * (abs(base).bit_length() - 1)
        if bits > MAX_MAGNITUDE.bit_length():
            raise ArithmeticRefused("a power beyond 2**63")


def _bound(target: ast.expr, item: object) -> dict[str, Any]:
    """Return the loop variables that `target` names, for one element."""
    if isinstance(target, ast.Name):
        return {target.id: item}
    names = target.elts if isinstance(target, ast.Tuple | ast.List) else []
    if not names or not all(isinstance(name, ast.Name) for name in names):
        raise ArithmeticRefused(f"the loop variable '{_shown(target)}' is no name")
    if not isinstance(item, list | tuple) or len(item) != len(names):
        raise ArithmeticRefused(f"'{_shown(target)}' does not fit {item!r:.40}")
    return {name.id: value for name, value in zip(names, item, strict=True)}  # type: ignore[attr-defined]


def _shown(node: ast.expr) -> str:
    """Return the source of a node, shortened."""
    if isinstance(node, ast.Constant):
        return f"{node.value!r:.40}"
    try:
        return ast.unparse(node)[:40]
    except (RecursionError, ValueError):
        return type(node).__name__
