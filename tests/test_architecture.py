"""What the sources look like: imports point one way, modules are small, public code and locks are explained.

Reads the package that is installed (or the tree) as text; nothing of it is imported.
"""

import ast
import graphlib
import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ORDER = (
    # Ground floor first. A module may import what stands before it, and from its own package.
    "errors",
    "units",
    "openfiles",
    "blocks",
    "ids",
    "calling",
    "events",
    "guard",
    "identity",
    "deliveries",
    "hooks",
    "policies",
    "mounts",
    "cgroups",
    "gauges",
    "turns",
    "heap",
    "peaks",
    "monitor",
    "telling",
    "reports",
    "transfers",
    "prefetching",
    "sources",
    "archives",
    "fetch",
    "disk",
    "memory",
    "above",
    "flights",
    "freshness",
    "workers",
    "ranks",
    "trips",
    "fetching",
    "history",
    "loading",
    "lifecycle",
    "machinery",
    "watching",
    "census",
    "explaining",
    "lookup",
    "orders",
    "closing",
    "cache",
)
MAY_IMPORT = {"sinks": {"errors", "units", "events", "hooks"}}
"""Packages beside the order, with all that they may import."""

MAX_LINES = 320
LOCKS = {"Lock", "RLock", "Condition"}

_SPEC = importlib.util.find_spec("modelcache")
assert _SPEC is not None, "modelcache is neither installed nor on the path"
assert _SPEC.submodule_search_locations
PACKAGE = Path(next(iter(_SPEC.submodule_search_locations)))
PATHS = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """Return the dotted name within the package: ``disk.tier``, ``disk`` for its ``__init__``, ``""`` for the root."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path.read_text() for path in PATHS}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}

each_module = pytest.mark.parametrize("name", SOURCES, ids=lambda name: name or "__init__")


def floor_of(name: str) -> str:
    """Return what the module is called in ORDER: its first part."""
    return name.partition(".")[0]


def imports_of(name: str) -> set[str]:
    """Return the modules of the package that this one imports, wherever in it, for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import in line {node.lineno}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner.removeprefix("modelcache.") in SOURCES else str(node.module))
    ours = {module for module in found if floor_of(module) == "modelcache"}
    return {module.removeprefix("modelcache").lstrip(".") for module in ours}


@each_module
def test_imports_point_down(name: str) -> None:
    """A module imports only from earlier floors, or from its own package."""
    if not name:
        return
    floor = floor_of(name)
    if floor in MAY_IMPORT:
        allowed = MAY_IMPORT[floor]
    else:
        assert floor in ORDER, f"{floor!r} is not in ORDER: add it at the lowest place where its imports allow it"
        allowed = set(ORDER[: ORDER.index(floor)])
    for module in imports_of(name):
        assert module, f"{name} imports modelcache itself: import the module that defines the name"
        assert floor_of(module) in allowed | {floor}, f"{name} may not import {module}: allowed are {sorted(allowed)}"


def test_order_is_kept_up() -> None:
    """The order lists what is there, nothing that has gone."""
    assert {*ORDER, *MAY_IMPORT} <= {floor_of(name) for name in SOURCES}


def test_readme_lists_the_modules() -> None:
    """The README's table has all there is, and imports point down it."""
    table = (Path(__file__).parents[1] / "README.md").read_text().partition("| module | ")[2].partition("\n\n")[0]
    rows = [re.findall(r"`(\w+)/?`", line.split("|")[1]) for line in table.splitlines()[2:]]
    at = {module: number for number, row in enumerate(rows) for module in row}
    assert set(at) == {floor_of(name) for name in SOURCES if name}
    for name in filter(None, SOURCES):
        for module in imports_of(name):
            assert at[floor_of(module)] >= at[floor_of(name)], f"{module} stands above {name}, which imports it"


def test_no_circle() -> None:
    """No chain of imports leads back to where it started, late imports included."""
    try:
        graphlib.TopologicalSorter({name: imports_of(name) - {name} for name in SOURCES}).prepare()
    except graphlib.CycleError as error:
        pytest.fail("circle: " + " -> ".join(name or "modelcache" for name in error.args[1]))


@each_module
def test_small(name: str) -> None:
    """A module fits in one reading."""
    lines = len(SOURCES[name].splitlines())
    assert lines <= MAX_LINES, (
        f"{name or '__init__'} has {lines} lines, at most {MAX_LINES}: split it by what it decides"
    )


def is_exempt(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Tell whether a decorator says that the words stand elsewhere."""
    words = {ast.unparse(decorator).rpartition(".")[2] for decorator in function.decorator_list}
    return bool(words & {"override", "overload", "setter", "deleter"})


def undocumented(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    """Yield the public classes, functions and methods without a docstring."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from undocumented([*node.body, *node.orelse], prefix)
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        where = f"{prefix}.{node.name}"
        if not ast.get_docstring(node) and (isinstance(node, ast.ClassDef) or not is_exempt(node)):
            yield f"{where} (line {node.lineno})"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, where)


@each_module
def test_documented(name: str) -> None:
    """Every module, public class, public function and public method has a docstring."""
    assert ast.get_docstring(TREES[name]), f"{name or '__init__'} does not say what it covers"
    assert not list(undocumented(TREES[name].body, name))


def locks_of(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements that make a lock: by a call, or by handing the class to a factory."""
    for statement in ast.walk(tree):
        if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.Expr | ast.Return):
            continue
        for node in ast.walk(statement):
            made = [node.func] if isinstance(node, ast.Call) else []
            made += [node.value] if isinstance(node, ast.keyword) else []
            if any(ast.unparse(what).removeprefix("threading.") in LOCKS for what in made):
                yield statement
                break


def words_beside(name: str, statement: ast.stmt) -> str:
    """Return the lines of the statement and the comment directly above it."""
    lines = SOURCES[name].splitlines()
    above = reversed(lines[: statement.lineno - 1])
    comment = list(itertools.takewhile(lambda line: line.lstrip().startswith("#"), above))
    return "\n".join([*comment, *lines[statement.lineno - 1 : statement.end_lineno]])


@each_module
def test_locks_say_what_they_guard(name: str) -> None:
    """Every lock is made beside a comment that says what it guards."""
    silent = [node.lineno for node in locks_of(TREES[name]) if "guards" not in words_beside(name, node).lower()]
    assert not silent, f"{name}: no comment with 'guards' on or directly above the locks made in lines {silent}"
