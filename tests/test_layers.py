"""The house: which room may import which (the table of STYLE, section 1), and how large files and functions may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "ir": ("paretorch.ir",),
    "rewrites": ("paretorch.rewrites", "paretorch.ir"),
    "cost_model": ("paretorch.cost_model", "paretorch.ir"),
    "codegen": ("paretorch.codegen", "paretorch.ir", "paretorch.cost_model.devices"),
    "compiler": ("paretorch",),
}
FILE_LINES, FUNCTION_LINES = 450, 60

FILES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, also inside functions; `from a import b` counts as a.b, for b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)


@every_file
def test_imports(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    wrong = []
    for line, module in imported(ast.parse(path.read_text())):
        bare = module.split(".")[0] in MAY_IMPORT or module.startswith(".")
        ours = module == "paretorch" or module.startswith("paretorch.")
        allowed = any(f"{module}.".startswith(f"{prefix}.") for prefix in MAY_IMPORT[room])
        if bare or (ours and not allowed):
            wrong.append(f"line {line}: {room}/ may not import {module}")
    assert not wrong, "\n".join(wrong)


def test_imports_are_seen() -> None:
    tree = ast.parse("import ir.graph\nfrom paretorch.ir import graph\ndef f():\n    from . import x\n")
    assert list(imported(tree)) == [(1, "ir.graph"), (2, "paretorch.ir.graph"), (4, "..x")]


@every_file
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= FILE_LINES, f"{path.name} has {text.count(chr(10))} lines"
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1}" for node in functions if (node.end_lineno or 0) - node.lineno >= FUNCTION_LINES
    ]
    assert not long, f"functions of {path.name} with more than {FUNCTION_LINES} lines: {', '.join(long)}"
