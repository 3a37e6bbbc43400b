"""The native part is optional: it is built if it can be, and both the build and ``torchwq.native`` tell the truth.

The room is two files and the extension, and knows nothing of the rest, so a copy of it shows what it says in other
circumstances. setup.py runs as pip runs it, but writes into the test's folder.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from sysconfig import get_platform
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import torchwq
from torchwq import _native
from torchwq._native import sources

ROOM = Path(_native.__file__).parent
ROOT = Path(__file__).parents[2]
OFF = "TORCHWQ_NATIVE=0 is set; unset it to have the native part"
_numbers = itertools.count()


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes | None], ModuleType]:
    """Loads a copy of the room, with this as its extension module; None is no file."""

    def load_copy(extension: bytes | None) -> ModuleType:
        name = f"room{next(_numbers)}"
        (tmp_path / name).mkdir()
        for file in ("__init__.py", "sources.py"):
            shutil.copy(ROOM / file, tmp_path / name)
        if extension is not None:
            (tmp_path / name / "_core.abi3.so").write_bytes(extension)
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module(name)

    monkeypatch.delenv(_native.VARIABLE, raising=False)
    return load_copy


def test_the_status_is_that_of_what_runs() -> None:
    assert torchwq.native is _native.status
    assert torchwq.native.active == bool(torchwq.native) == (_native.core is not None)
    assert torchwq.native.active == (not torchwq.native.reason)
    if not torchwq.native:
        assert torchwq.native.reason in repr(torchwq.native)


def test_a_variable_turns_it_off(load: Callable[[bytes | None], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHWQ_NATIVE", "0")
    room = load(b"not looked at")
    assert room.core is None
    assert room.status.reason == OFF


def test_a_python_without_a_gil_has_none(
    load: Callable[[bytes | None], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    room = load(b"not looked at")
    assert room.core is None
    assert "without a GIL" in room.status.reason


def test_if_it_was_not_built_the_reason_says_what_to_install(load: Callable[[bytes | None], ModuleType]) -> None:
    room = load(None)
    assert room.core is None
    assert "was not built" in room.status.reason
    assert "install a C compiler" in room.status.reason


def test_one_that_cannot_be_loaded_is_a_reason_and_no_error(load: Callable[[bytes | None], ModuleType]) -> None:
    room = load(b"this is no shared library")
    assert room.core is None
    assert "cannot be loaded; install torchwq again" in room.status.reason
    assert "_core.abi3.so" in room.status.reason


def test_one_from_other_sources_is_not_used(
    load: Callable[[bytes | None], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    room = load(None)
    assert room.digest() == ""  # as in a wheel
    built = SimpleNamespace(sources="01234567")
    monkeypatch.setattr(importlib, "import_module", lambda name: built)
    assert room._load() == (built, "")
    (Path(room.__file__).parent / "a.c").touch()
    core, reason = room._load()
    assert core is None
    assert "built from other sources" in reason
    built.sources = room.digest()
    assert room._load() == (built, "")
    built.sources = ""  # by hand
    assert room._load() == (built, "")


def test_the_one_that_runs_is_from_the_sources_that_are_here() -> None:
    if not torchwq.native or not _native.core.sources or not sources.digest():
        pytest.skip("there is none, or no sources, or it was built by hand")
    assert _native.core.sources == sources.digest()


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import torchwq
print(torchwq.marshal(torch.ones(4)).read().tolist())
print(torchwq.native)
"""


def test_a_program_works_if_it_is_off(run_script: Callable[..., Any]) -> None:
    done = run_script(SCRIPT, str(ROOT), env={"TORCHWQ_NATIVE": "0"})
    assert done.stdout.splitlines() == ["[1.0, 1.0, 1.0, 1.0]", f"NativeStatus(active=False, reason={OFF!r})"]
    assert done.stderr == ""


def test_a_program_works_if_it_cannot_be_loaded(run_script: Callable[..., Any], tmp_path: Path) -> None:
    package = tmp_path / "site" / "torchwq"
    shutil.copytree(ROOM.parent, package, ignore=shutil.ignore_patterns("*.so", "*.c", "__pycache__"))
    (package / "_native" / "_core.abi3.so").write_bytes(b"this is no shared library")
    done = run_script(SCRIPT, str(package.parent), env={"TORCHWQ_NATIVE": ""})
    tensor, status = done.stdout.splitlines()
    assert tensor == "[1.0, 1.0, 1.0, 1.0]"
    assert status.startswith("NativeStatus(active=False, reason=")
    assert str(package) in status
    assert done.stderr == ""


def test_the_stub_has_what_the_extension_has() -> None:
    if _native.core is None:
        pytest.skip(_native.status.reason)
    stub: dict[str, set[str] | None] = {}
    for node in ast.parse((ROOM / "_core.pyi").read_bytes()).body:
        if isinstance(node, ast.FunctionDef):
            stub[node.name] = None
        elif isinstance(node, ast.ClassDef):
            functions = {each.name for each in node.body if isinstance(each, ast.FunctionDef)} - {"__new__"}
            fields = {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}  # type: ignore[union-attr]
            stub[node.name] = functions | fields
        elif isinstance(node, ast.AnnAssign) and not node.target.id.startswith("_"):  # type: ignore[union-attr]
            stub[node.target.id] = None  # type: ignore[union-attr]
    there: dict[str, set[str] | None] = {}
    for name, value in vars(_native.core).items():
        if isinstance(value, type):
            there[name] = {each for each in vars(value) if not each.startswith("__")} | (
                {"__enter__", "__exit__"} & vars(value).keys()
            )
        elif not name.startswith("__"):
            there[name] = None
    assert stub == there


# --- setup.py ---


@pytest.fixture
def setup(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs setup.py: arguments, and variables of its environment."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("this is no checkout")
    pytest.importorskip("setuptools", minversion="77.0.3")
    kept = {name: value for name, value in os.environ.items() if name not in ("TORCHWQ_NATIVE", "CC", "CFLAGS")}

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "setup.py", "--quiet", *arguments]
        return subprocess.run(command, cwd=ROOT, env=kept | env, capture_output=True, text=True, timeout=50)

    return run


def _into(folder: Path) -> list[str]:
    return ["build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]


def test_without_a_compiler_one_line_says_so(setup: Callable[..., Any], tmp_path: Path) -> None:
    done = setup(*_into(tmp_path), CC="no-such-compiler")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == (
        "torchwq: the native part is not built: there is no C compiler (looked for: no-such-compiler). "
        "torchwq works without it, more slowly.\n"
    )
    assert not list(tmp_path.rglob("*.so"))


def test_one_that_is_not_wanted_is_not_built(setup: Callable[..., Any], tmp_path: Path) -> None:
    done = setup(*_into(tmp_path), TORCHWQ_NATIVE="0")
    assert done.returncode == 0
    assert "TORCHWQ_NATIVE=0 is set" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(("name", "value"), [("byteorder", "big"), ("maxsize", 2**31 - 1)])
def test_it_is_not_built_for_other_machines(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / "setup.py").exists():
        pytest.skip("this is no checkout")
    pytest.importorskip("setuptools", minversion="77.0.3")
    monkeypatch.delenv("TORCHWQ_NATIVE", raising=False)
    excluded = runpy.run_path(str(ROOT / "setup.py"))["excluded"]
    monkeypatch.setattr(sys, name, value)
    assert excluded()


def test_one_that_is_required_fails(setup: Callable[..., Any], tmp_path: Path) -> None:
    done = setup(*_into(tmp_path), CC="no-such-compiler", TORCHWQ_NATIVE="1")
    assert done.returncode != 0
    assert "no-such-compiler" in done.stderr


def test_what_does_not_compile_is_not_built(setup: Callable[..., Any], tmp_path: Path) -> None:
    functions = runpy.run_path(str(ROOT / "setup.py"))
    if reason := functions["excluded"]() or functions["missing"]():
        pytest.skip(reason)
    done = setup(*_into(tmp_path), CFLAGS="-include no-such-header.h")
    assert done.returncode == 0
    assert "no-such-header.h" in done.stderr
    assert "torchwq: the native part is not built:" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob("*.so"))


def test_without_the_extension_the_wheel_is_pure(setup: Callable[..., Any], tmp_path: Path) -> None:
    for kind in ("", f".{get_platform()}-{sys.implementation.cache_tag}"):
        stale = tmp_path / "build" / f"lib{kind}" / "torchwq" / "of_an_earlier_build.py"
        stale.parent.mkdir(parents=True)
        stale.touch()
    config = tmp_path / "config"
    config.write_text(f"[build]\nbuild_base={tmp_path}/build\n[egg_info]\negg_base={tmp_path}\n")
    arguments = ["bdist_wheel", "--bdist-dir", f"{tmp_path}/bdist", "--dist-dir", str(tmp_path)]
    done = setup(*arguments, CC="no-such-compiler", DIST_EXTRA_CONFIG=str(config))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"torchwq/__init__.py", "torchwq/py.typed", "torchwq/_native/_core.pyi"} <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".c", ".h", ".so", "of_an_earlier_build.py"))]
    assert {name.split("/")[0] for name in names} == {"torchwq", f"torchwq-{torchwq.__version__}.dist-info"}


@pytest.mark.parametrize("choice", ["", "0"])
def test_the_source_distribution_has_the_sources(choice: str, setup: Callable[..., Any], tmp_path: Path) -> None:
    done = setup("egg_info", "--egg-base", str(tmp_path), TORCHWQ_NATIVE=choice)
    assert done.returncode == 0, done.stderr
    files = {os.path.normpath(each) for each in (tmp_path / "torchwq.egg-info/SOURCES.txt").read_text().splitlines()}
    in_c = {f"torchwq/_native/{path.name}" for path in (ROOT / "torchwq/_native").glob("*.[ch]")}
    assert len(in_c) > 5
    wanted = {"setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md", "torchwq/py.typed", "tests/conftest.py"}
    assert not (in_c | wanted) - files
    assert not [each for each in files if each.endswith((".so", ".pyc"))]
