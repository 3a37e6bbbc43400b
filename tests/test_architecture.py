"""What holds of all of torchwq's source.

No module imports itself by way of others, not even inside of a function or for its types alone. The layers, which
import-linter checks, keep the rooms apart; this holds inside of each room, and among public modules. A module that
imports from a package imports what it finds there: a submodule, or else the package.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import torchwq


def imports(root: Path) -> dict[str, set[str]]:
    """What each module of the package in the folder ``root`` imports of the package, wherever in its source."""
    files = {_name(root, path): path for path in root.rglob("*.py")}
    return {name: _imported(ast.parse(path.read_bytes()), name, path, files) - {name} for name, path in files.items()}


def _name(root: Path, path: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(source: ast.Module, name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found.update(each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source_name = ".".join([*above, *([node.module] if node.module else [])])
            for each in node.names:
                member = f"{source_name}.{each.name}"
                found.add(member if member in modules else source_name)
    return found & set(modules)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, with the first one again at its end; none if there is none."""
    done: set[str] = set()
    way: list[str] = []

    def look_from(module: str) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        way.append(module)
        for each in sorted(graph[module]):
            if found := look_from(each):
                return found
        done.add(way.pop())
        return []

    for module in sorted(graph):
        if found := look_from(module):
            return found
    return []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = imports(Path(torchwq.__file__).parent)
    assert len(graph) > 100
    found = circle(graph)
    assert not found, "a circle of imports: " + " -> ".join(found)


def test_objects_end_by_a_finalizer_that_knows_nothing_of_them() -> None:
    root = Path(torchwq.__file__).parent
    found = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in sorted(root.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_bytes()))
        if "__del__" in (getattr(node, "name", ""), getattr(node, "id", ""), getattr(node, "attr", ""))
    ]
    assert [each.split(":")[0] for each in found] == ["loading/iterator.py"], f"__del__ in {found}"


def test_a_circle_is_found_wherever_its_imports_are(tmp_path: Path) -> None:
    for path, source in {
        "house/__init__.py": "from .upper.floor import live",
        "house/lower.py": "",
        "house/upper/__init__.py": "",
        "house/upper/floor.py": "from . import stairs\nfrom ..lower import ground",
        "house/upper/stairs.py": "def climb():\n    from .roof import look",
        "house/upper/roof.py": "import typing\nif typing.TYPE_CHECKING:\n    import house.upper.floor",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_text(source)
    upper = "house.upper."
    assert circle(imports(tmp_path / "house")) == [upper + each for each in ("floor", "stairs", "roof", "floor")]
    (tmp_path / "house/upper/roof.py").write_text("from ..lower import ground")
    assert circle(imports(tmp_path / "house")) == []
    (tmp_path / "house/lower.py").write_text("from . import live")
    assert circle(imports(tmp_path / "house")) == ["house", "house.upper.floor", "house.lower", "house"]


def test_the_page_on_the_house_has_every_module_and_no_other() -> None:
    package = Path(torchwq.__file__).parent
    page = (package.parent / "docs" / "internals" / "house.md").read_text()
    table = page.split("### What is in them")[1].split("\n## ")[0]
    room, told = "", set()
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and "`" in cells[1]:
            room = cells[0].strip("`") or room
            told |= {f"{room}/{name.strip(' `')}" for name in cells[1].split(",")}
    files = [*package.glob("*/*.py"), *package.glob("_native/*.c")]
    there = {f"{path.parent.name}/{path.stem}" for path in files if path.stem != "__init__"}
    assert told == there


def test_what_the_page_on_the_house_names_is_there() -> None:
    """``room/module.name``, and ``Class.method``. A class has the methods of its bases, or of their twins."""
    package = Path(torchwq.__file__).parent
    page = (package.parent / "docs" / "internals" / "house.md").read_text()
    members: dict[str, set[str]] = {}
    bases: list[tuple[str, str]] = []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ClassDef):
                methods = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
                members.setdefault(node.name, set()).update(methods | _attributes(node))
                bases += [(node.name, each.id) for each in node.bases if isinstance(each, ast.Name)]
    for name, base in bases:
        members[name] |= members.get(base, set()) | members.get(f"Python{base}", set())
    missing = []
    for module, name in re.findall(r"`((?!tests/)[a-z_]+/[a-z_]+)\.([A-Za-z_]+)[`.(]", page):
        if not re.search(rf"^(class |def |)_?{name}\b", (package / f"{module}.py").read_text(), re.MULTILINE):
            missing.append(f"{module}.{name}")
    for cls, name in re.findall(r"[`./]([A-Z][A-Za-z]+)\.(\w+)`", page):
        if name not in members.get(cls, set()):
            missing.append(f"{cls}.{name}")
    assert missing == []


def _attributes(node: ast.ClassDef) -> set[str]:
    """What its methods assign to ``self``."""
    return {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == "self"
    }
