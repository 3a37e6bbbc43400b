"""Builds the native part, the extension module ``torchwq._native._core``. All the rest is in pyproject.toml.

The extension is optional, and the wheel is a pure one without it, which pyproject.toml cannot say. Where it cannot be
built, for want of a compiler for one, torchwq is installed without it, and this file says so in one line. pip shows
that line only with ``-v``; ``torchwq.native`` says later whether the extension is there.

``TORCHWQ_NATIVE`` decides when torchwq is built: "0" builds no extension, and "1" makes it an error if there is none.

The wheel has the extension for the stable ABI of CPython 3.10 and later, so one wheel serves all of them; without an
extension it is a pure wheel. A build begins with an empty folder: setuptools would put modules into a wheel that an
earlier build has left there and that have been removed since.
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

HERE = Path(__file__).parent
FOLDER = Path("torchwq", "_native")
CHOICE = os.environ.get("TORCHWQ_NATIVE", "")
#: The oldest Python whose stable ABI has what the extension uses; core.h says the same.
STABLE_ABI = "cp310"


def excluded() -> str:
    """Why no extension is to be built for this Python; empty if one is."""
    if CHOICE == "0":
        return "TORCHWQ_NATIVE=0 is set"
    if sys.platform != "linux":
        return "it is made for Linux"
    if sys.implementation.name != "cpython":
        return "it is made for CPython"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "it is not made for a Python without a GIL"
    if sys.byteorder != "little" or sys.maxsize < 2**32:
        return "it is made for little-endian machines with 64 bits"
    return ""


def missing() -> str:
    """What is missing to build the extension; empty if nothing is known to be."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(compiler) is None:
        return f"there is no C compiler (looked for: {compiler})"
    folders = [sysconfig.get_path("include"), sysconfig.get_config_var("INCLUDEPY") or ""]
    if not any(Path(folder, "Python.h").is_file() for folder in folders):
        return f"Python's header files are not installed (looked for: {folders[0]}/Python.h)"
    return ""


class BuildNative(build_ext):
    """Builds the extension, or says why not."""

    def build_extension(self, ext: Extension) -> None:
        """Build it. If that fails, the distribution is one without an extension from here on."""
        try:
            if reason := excluded() or missing():
                raise CompileError(reason)
            super().build_extension(ext)
        except (BaseError, CCompilerError) as error:
            if not ext.optional:
                raise
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            self.distribution.ext_modules = None
            what = "torchwq works without it, more slowly"
            print(f"torchwq: the native part is not built: {error}. {what}.", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """Put it beside the sources. One of an earlier build, from other sources, goes in any case."""
        for extension in self.extensions:
            (HERE / self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """Knows what kind of wheel it is only when the extension has been built, or has not."""

    def run(self) -> None:
        """Make the wheel."""
        if not self.distribution.have_run.get("build"):
            shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def main() -> None:
    """What setuptools calls."""
    os.chdir(HERE)  # the paths of sources must be relative
    digest = runpy.run_path(str(FOLDER / "sources.py"))["digest"]
    extension = Extension(
        "torchwq._native._core",
        sources=sorted(map(str, FOLDER.glob("*.c"))),
        depends=[str(FOLDER / "core.h")],
        define_macros=[("SOURCES", f'"{digest()}"')],
        # CFLAGS come before these, so where there are any, none of these may contradict.
        extra_compile_args=["-std=c11", *([] if "CFLAGS" in os.environ else ["-O2", "-g0"])],
        py_limited_api=True,
        optional=CHOICE != "1",
    )
    setup(
        ext_modules=[extension],
        options={} if excluded() else {"bdist_wheel": {"py_limited_api": STABLE_ABI}},
        cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    )


if __name__ == "__main__":
    main()
