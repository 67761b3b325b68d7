"""All single edits of a module, from its syntax tree: what the model ranks and the tests decide.

Invariants:
1. The enumeration is a function of the source text alone: it knows no bug, and its order (that of the tree) says nothing.
2. An edit replaces text on one line, compiles, and differs from the source and from every other edit.
3. The rest of the text stands as it was: nothing is printed anew from the tree.

Edits: another operator of the same family (binary, compare, boolean, augmented), a dropped ``not`` or minus, whole
numbers one up or down, another local name, two arguments or operands swapped, True/False, min/max, any/all, and one
more or less in a ``range`` or an index.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

COMPARE = ("<", "<=", ">", ">=", "==", "!=")
BINARY = ("+", "-", "*", "//", "%")
AUGMENTED = tuple(f"{op}=" for op in BINARY)
FAMILIES = (COMPARE, BINARY, AUGMENTED, ("and", "or"), ("in", "not in"), ("is", "is not"), ("/", "*", "//"))
TWINS = {"min": "max", "max": "min", "any": "all", "all": "any"}
SWAPPED = (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
OPERATOR = re.compile(r"\bnot\s+in\b|\bis\s+not\b|\bin\b|\bis\b|\band\b|\bor\b|//=|[-+*%/]=|//|[<>=!]=|[-+*/%<>]")


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit: the whole new text, and what was replaced by what on which line (from 1)."""

    text: str
    line: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"line {self.line}: `{self.old}` -> `{self.new}`"


@dataclass(frozen=True, slots=True)
class _Splice:
    """Characters ``start`` to ``end`` of the source give way to ``new``."""

    start: int
    end: int
    new: str


def enumerate_edits(source: str) -> list[Edit]:
    """Every single edit of ``source`` (ASCII Python). Raises ``SyntaxError`` for what is not Python."""
    tree = ast.parse(source)
    places = _Places(source)
    edits: dict[str, Edit] = {}
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        names = _local_names(function)
        for node in _in_order(function):
            for splice in _splices(node, places, names):
                text = source[: splice.start] + splice.new + source[splice.end :]
                if text != source and text not in edits and _compiles(text):
                    edits[text] = _edit(source, text, splice)
    return list(edits.values())


class _Places:
    """From the tree's (line, column) to positions in the text."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None  # ast.parse fills both ends
        assert node.end_col_offset is not None
        return self._starts[node.lineno - 1] + node.col_offset, self._starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.expr) -> str:
        start, end = self.span(node)
        return self.source[start:end]

    def operator(self, left: ast.expr, right: ast.expr) -> tuple[int, int]:
        """The span of the operator that stands between two operands."""
        begin, end = self.span(left)[1], self.span(right)[0]
        found = OPERATOR.search(self.source, begin, end)
        assert found is not None  # two operands always have one between them
        return found.start(), found.end()


def _in_order(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function's body in the order of the text, without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    stack: list[ast.AST] = list(reversed(body))
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(list(ast.iter_child_nodes(node))))


def _local_names(function: ast.FunctionDef) -> list[str]:
    """Parameters and assigned names, in the order of the text."""
    names = dict.fromkeys(argument.arg for argument in function.args.args)
    for node in _in_order(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = None
    return list(names)


def _splices(node: ast.AST, places: _Places, names: list[str]) -> Iterator[_Splice]:
    """What may change at one node."""
    match node:
        case ast.Compare(left=left, comparators=comparators):
            for first, second in itertools.pairwise([left, *comparators]):
                yield from _other_operators(places, first, second)
        case ast.BoolOp(values=values):
            for first, second in itertools.pairwise(values):
                yield from _other_operators(places, first, second)
        case ast.BinOp(left=left, op=op, right=right):
            yield from _other_operators(places, left, right)
            if isinstance(op, SWAPPED):
                yield from _swap(places, left, right)
        case ast.AugAssign(target=target, value=value):
            yield from _other_operators(places, target, value)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield _Splice(places.span(node)[0], places.span(operand)[0], "")
        case ast.Constant(value=bool() as value):
            yield _Splice(*places.span(node), str(not value))
        case ast.Constant(value=int() as value):
            yield _Splice(*places.span(node), str(value + 1))
            yield _Splice(*places.span(node), str(value - 1))
        case ast.Name(id=name, ctx=ast.Load()) if name in names:
            for other in names:
                yield _Splice(*places.span(node), other)
        case ast.Call():
            yield from _of_call(node, places)
        case ast.Subscript(slice=index) if not isinstance(index, ast.Slice | ast.Constant | ast.Tuple):
            yield from _one_off(places, index)


def _of_call(node: ast.Call, places: _Places) -> Iterator[_Splice]:
    if isinstance(node.func, ast.Name) and node.func.id in TWINS:
        yield _Splice(*places.span(node.func), TWINS[node.func.id])
    for first, second in itertools.pairwise(node.args):
        yield from _swap(places, first, second)
    if isinstance(node.func, ast.Name) and node.func.id == "range":
        for argument in node.args:
            yield from _one_off(places, argument)


def _other_operators(places: _Places, left: ast.expr, right: ast.expr) -> Iterator[_Splice]:
    start, end = places.operator(left, right)
    present = " ".join(places.source[start:end].split())
    family = next((family for family in FAMILIES if present in family), ())
    for other in family:
        if other != present:
            yield _Splice(start, end, other)


def _swap(places: _Places, left: ast.expr, right: ast.expr) -> Iterator[_Splice]:
    start, end = places.span(left)[0], places.span(right)[1]
    between = places.source[places.span(left)[1] : places.span(right)[0]]
    if "(" not in between and ")" not in between:  # an operand in brackets: its span is inside them
        yield _Splice(start, end, places.text(right) + between + places.text(left))


def _one_off(places: _Places, node: ast.expr) -> Iterator[_Splice]:
    if isinstance(node, ast.Constant):
        return  # a number is moved by the rule for numbers
    for suffix in (" + 1", " - 1"):
        yield _Splice(*places.span(node), places.text(node) + suffix)


def _compiles(text: str) -> bool:
    try:
        compile(text, "candidate", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def _edit(source: str, text: str, splice: _Splice) -> Edit:
    return Edit(text, source.count("\n", 0, splice.start) + 1, source[splice.start : splice.end], splice.new)
