"""Workers start clean: they do not import ``__main__``, and get the owner's *present* environment."""

from __future__ import annotations

import os
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest

import torchwq
from tests.mapping import jobs_environment as jobs
from tests.mapping.programs import Program

#: A script as people write them: no guard, functions and classes that use each other, an error of its own.
UNGUARDED = """
    import enum
    import math
    from dataclasses import dataclass, field

    import torch
    import torchwq

    print("main runs", __name__, flush=True)
    torchwq.warm_up()

    class Trouble(Exception):
        pass

    class Kind(enum.Enum):
        SMALL = 1
        LARGE = 2

    @dataclass
    class Point:
        x: int
        y: int = 2
        kinds: list = field(default_factory=list)

        def length(self):
            return math.hypot(self.x, self.y)

    class Named(Point):
        def length(self):
            return super().length() + 1

    def helper(n):
        return 1 if n == 0 else n * helper(n - 1)

    def work(point, mapid):
        assert isinstance(point, Point)
        return Named(mapid, kinds=[Kind.LARGE]), point.length(), helper(mapid + 3), torch.ones(2) * mapid

    def fail(mapid):
        raise Trouble("caught by its own class", mapid)

    def main_module():
        import sys
        return sorted(name for name in vars(sys.modules["__main__"]) if not name.startswith("__"))

    (first, *rest), second = torchwq.map(2, work, Point(3, 4)).join()
    assert type(first) is Named and first.kinds[0] is Kind.LARGE and first.y == 2, first
    assert rest[:2] == [5.0, 6] and second[2] == 24 and second[3].tolist() == [1, 1], (rest, second)
    try:
        torchwq.map(2, fail).join()
    except Trouble as error:
        assert error.args == ("caught by its own class", 0)
        print("caught")
    print(torchwq.map(1, main_module).join())

    weights = torch.ones(1000)
    def uses_weights():
        return weights.sum().item()
    def uses_it_indirectly():
        return uses_weights()
    for function in (uses_weights, uses_it_indirectly):
        try:
            torchwq.map(1, function)
        except torchwq.ClosureError as error:
            assert "weights" in str(error) and "4.0 KB" in str(error), error
            print("refused")
    print(torchwq.map(1, uses_it_indirectly, upvalues=True).join())
"""
PRINTED = ["main runs __main__", "caught", "[[]]", "refused", "refused", "[1000.0]"]


@pytest.mark.parametrize("how", ["script", "-c", "-"])
def test_a_script_needs_no_guard(how: str) -> None:
    with Program(UNGUARDED, how=how) as program:
        status, out, err = program.end()
    assert (status, err) == (0, "")
    assert out.splitlines() == PRINTED


def test_what_the_owner_is_now_comes_along(run_script: Any, tmp_path: Path) -> None:
    """All of it changed after the fork server was started."""
    (tmp_path / "late").mkdir()
    run_script(
        """
        import os, sys, warnings
        import torch, torchwq

        os.environ["BEFORE"] = "was there"
        torchwq.warm_up()

        os.environ["AFTER"] = "came later"
        del os.environ["BEFORE"]
        os.chdir("late")
        with open("made_later.py", "w") as module:
            module.write("answer = 42")
        sys.path.append(os.getcwd())
        sys.argv[:] = ["a name", "--an-option"]
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.float64)
        torch.multiprocessing.set_sharing_strategy("file_system")
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "no matter")

        def look(mapid):
            import os, sys, warnings, torch
            import made_later
            assert torch.zeros(1).dtype is torch.float64
            assert torch.multiprocessing.get_sharing_strategy() == "file_system"
            warnings.warn("no matter")
            try:
                warnings.warn("it matters")
                raised = False
            except UserWarning:
                raised = True
            return (
                os.environ.get("BEFORE"), os.environ.get("AFTER"), os.getcwd(), sys.path, sys.argv,
                made_later.answer, raised, torch.get_num_threads(),
            )

        expected = (None, "came later", os.getcwd(), sys.path, sys.argv, 42, True, 1)
        seen = torchwq.map(2, look).join()
        assert seen == [expected] * 2, (seen, expected)
        assert torch.get_num_threads() == 3
        """
    )


def test_a_module_beside_the_script_is_found(run_script: Any, tmp_path: Path) -> None:
    """The script's folder is on its workers' path, and they print to its present stdout."""
    (tmp_path / "beside.py").write_text(
        textwrap.dedent(
            """
            import sys

            def work(mapid):
                print(f"worker {mapid} says so")
                print(f"worker {mapid} complains", file=sys.stderr)
                return __name__, mapid
            """
        )
    )
    done = run_script(
        """
        import os
        import torchwq, beside
        assert torchwq.map(2, beside.work).join() == [("beside", 0), ("beside", 1)]
        os.dup2(2, 1)  # stdout goes elsewhere now
        torchwq.map(1, beside.work).join()
        """
    )
    assert sorted(done.stdout.splitlines()) == ["worker 0 says so", "worker 1 says so"]
    expected = ["worker 0 complains"] * 2 + ["worker 0 says so", "worker 1 complains"]
    assert sorted(done.stderr.splitlines()) == expected


def test_sys_path_of_this_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "written_by_a_test.py").write_text("def work():\n    return __file__\n")
    monkeypatch.syspath_prepend(tmp_path)
    import written_by_a_test  # type: ignore[import-not-found]

    try:
        assert torchwq.map(1, written_by_a_test.work).join() == [str(tmp_path / "written_by_a_test.py")]
    finally:
        del sys.modules["written_by_a_test"]


def test_working_directory_of_this_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert torchwq.map(1, os.getcwd).join() == [str(tmp_path)]


def test_a_removed_working_directory_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert torchwq.map(1, abs, -1).join() == [1]


def test_environment_of_this_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET_JUST_NOW", "x" * 100_000)  # more than one message holds, perhaps
    assert torchwq.map(1, os.getenv, "SET_JUST_NOW", None).join() == ["x" * 100_000]
    monkeypatch.delenv("SET_JUST_NOW")
    assert torchwq.map(1, os.getenv, "SET_JUST_NOW", None).join() == [None]


def test_warning_filters_of_this_moment() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DeprecationWarning, match="from the worker"):
            torchwq.map(1, jobs.warn, "from the worker").join()
        warnings.filterwarnings("ignore", "FROM the", DeprecationWarning, jobs.__name__)
        assert torchwq.map(1, jobs.warn, "from the worker").join() == ["warned"]


def test_one_worker_does_not_see_what_another_did() -> None:
    assert torchwq.map(3, jobs.change_everything).join() == ["clean"] * 3
    assert torchwq.map(3, jobs.change_everything).join() == ["clean"] * 3


def test_no_program_is_at_the_workers_standard_input() -> None:
    assert torchwq.map(1, jobs.read_stdin).join() == [""]
