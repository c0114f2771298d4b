"""docs/environment.md names every environment variable that the sources read, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("vlmo_kernels", "python", "csrc", "tests", "benchmarks")
HERE = Path(__file__)


def files(*endings: str) -> list[Path]:
    found = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in endings]
    return sorted(p for p in (*found, ROOT / "setup.py", ROOT / "Makefile") if p.suffix in endings and p != HERE)


def text_of(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def named_in_python(source: str) -> tuple[set[str], list[int]]:
    """Variables read (or set) by name, and the lines that use the environment in a way unknown here."""
    names: set[str] = set()
    unknown: list[int] = []
    tree = ast.parse(source)
    parent = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "getenv":
            names.add(text_of(parent[node].args[0]) or f"line {node.lineno}")
        if not (isinstance(node, ast.Attribute) and node.attr == "environ" and ast.unparse(node.value) == "os"):
            continue
        user = parent[node]
        if isinstance(user, ast.Subscript) and text_of(user.slice):
            names.add(text_of(user.slice))
        elif isinstance(user, ast.Attribute) and user.attr == "get" and text_of(parent[user].args[0]):
            names.add(text_of(parent[user].args[0]))
        # A child process gets all of it, with changes: nothing is read.
        elif not isinstance(user, ast.BinOp | ast.Dict) and getattr(user, "attr", None) != "items":
            unknown.append(node.lineno)
    return names, unknown


def read_by_the_sources() -> dict[str, set[str]]:
    """Variable to the files that read it."""
    found: dict[str, set[str]] = {}
    for path in files(".py", ".h", ".cpp", ".cu", ".sh", ""):
        source = path.read_text() if path.is_file() else ""
        unknown: list[int] = []
        if path.suffix == ".py":
            names, unknown = named_in_python(source)
        elif path.suffix == ".sh":
            names = set(re.findall(r"\$\{([A-Z][A-Z_]*):-", source))
        elif path.name == "Makefile":
            names = set(re.findall(r"^(\w+)\s*\?=", source, re.M))
        else:
            names = set(re.findall(r'getenv\("(\w+)"\)', source))
        assert not unknown, f"{path.relative_to(ROOT)}, lines {unknown}: which variable is it?"
        for name in names:
            found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return found


def rows_of_the_page() -> list[list[str]]:
    lines = (ROOT / "docs" / "environment.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    assert rows
    return rows


def test_the_page_names_every_variable_and_no_other() -> None:
    assert {row[0].strip("`") for row in rows_of_the_page()} == set(read_by_the_sources())


def test_the_page_names_who_reads_it() -> None:
    """Every file that reads a variable stands in one of its rows; make's variables have no such column."""
    readers: dict[str, set[str]] = {}
    for row in rows_of_the_page():
        named = set(re.findall(r"`([\w/]+\.(?:py|h|sh))`", row[-1])) if len(row) == 4 else {"Makefile"}
        readers.setdefault(row[0].strip("`"), set()).update(named)
    assert readers == read_by_the_sources()


def test_the_reader_of_sources_finds_what_is_there() -> None:
    source = 'import os\na = os.environ.get("A", "1")\nb = os.environ["B"]\nc = os.getenv("C")\n'
    source += 'd = os.environ | {"D": "1"}\ne = "E" in os.environ\n'
    assert named_in_python(source) == ({"A", "B", "C"}, [6])
