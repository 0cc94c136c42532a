"""Modules import downward only: each package stands on a layer, and sees only layers below its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import shoal

SOURCE = Path(shoal.__file__).parent
LAYERS = (
    ("errors", "events", "ops", "units", "run", "strict_toml", "_version"),
    ("wire",),
    ("strategy", "cluster", "data", "job"),
    ("plan", "servers"),
    ("engine",),
    ("launch", "dashboard"),
    ("training",),
    ("cli",),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
GROUND = LAYERS[0]
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def name_of(path: Path) -> tuple[str, ...]:
    """`shoal/wire/stitched.py` -> ("wire", "stitched"); a package's `__init__` has the package's name."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full module name) of every import anywhere in the file: in functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module, names, level):
                assert level == 0, f"{path.name}:{node.lineno}: relative imports hide where they point"
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in names)


def exists(*parts: str) -> bool:
    return SOURCE.joinpath(*parts).with_suffix(".py").is_file() or SOURCE.joinpath(*parts).is_dir()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: ".".join(name_of(path)))
def test_a_module_imports_downward_only(path: Path) -> None:
    own = name_of(path)[0]
    for line, name in imports_of(path):
        package, _, rest = name.partition(".")
        if package != "shoal":
            continue
        target = rest.partition(".")[0]
        where = f"{path.relative_to(SOURCE)}:{line} imports {name}"
        assert exists(target), f"{where}: a public name; inside the package, import from the module that defines it"
        allowed = target == own or LAYER[target] < LAYER[own] or (own in GROUND and target in GROUND)
        assert allowed, f"{where}: layer {LAYER[target]} is not below layer {LAYER[own]}"


def test_every_module_stands_on_a_layer() -> None:
    assert {name_of(path)[0] for path in MODULES} == LAYER.keys()


@pytest.mark.parametrize("name", GROUND)
def test_the_ground_needs_neither_torch_nor_sockets(name: str) -> None:
    roots = {module.partition(".")[0] for _, module in imports_of(SOURCE / f"{name}.py")}
    assert not roots & {"torch", "socket"}


def graph() -> dict[str, set[str]]:
    """Module -> the package's own modules that it imports when it is imported itself."""
    edges: dict[str, set[str]] = {}
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = set()
        for node in tree.body:  # the top level only: what a function imports later cannot make a cycle
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shoal"):
                parts = (node.module or "").split(".")[1:]
                for alias in node.names:
                    found.add(".".join([*parts, alias.name] if exists(*parts, alias.name) else parts))
        edges[".".join(name_of(path))] = found
    return edges


def test_no_module_imports_itself_by_way_of_others() -> None:
    edges = graph()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"an import cycle: {' -> '.join([*path, name])}"
        if name not in done:
            for target in sorted(edges.get(name, set()) - {name}):
                visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())
