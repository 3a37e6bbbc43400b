"""The programs in the README and in the documentation run as they stand, and print what they say they print.

A comment before a block, which nobody sees on the page, says what else is to know:

* ``<!-- to run it: ... -->`` has what comes before the block, which is a part of a program;
* ``<!-- raises E -->`` names the error that it is there to show;
* ``<!-- needs a cluster -->``: it is only compiled.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
#: The comment, if there is one, and the block.
BLOCK = re.compile(r"^(?:<!-- ([^<]*?)-->\n\n)?```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _programs() -> list[Any]:
    found = []
    for page in PAGES:
        blocks = BLOCK.findall((ROOT / page).read_text("utf-8"))
        found += [pytest.param(*block, id=f"{Path(page).stem}-{number}") for number, block in enumerate(blocks)]
    return found


@pytest.mark.parametrize(("comment", "program"), _programs())
def test_a_program_of_the_documentation_runs(comment: str, program: str, run_script: Any) -> None:
    if comment.startswith("needs a cluster"):
        compile(program, "the page", "exec")
        return
    if comment.startswith("to run it:"):
        program = comment.removeprefix("to run it:") + program
    done = run_script(program, timeout=100, check=not comment.startswith("raises"))
    if comment.startswith("raises"):
        assert done.returncode == 1
        assert re.search(rf"^[\w.]*{comment.split()[1]}: ", done.stderr, re.MULTILINE)
        return
    assert not done.stderr.replace("INFO:torchwq:", "").startswith("Traceback")
    for expected in re.findall(r"print\(.*\)  # (?!stands for)(.*)$", program, re.MULTILINE):
        assert expected in done.stdout


def test_every_picture_has_a_size() -> None:
    """Without one, a browser lays out a picture in a figure as 0 x 0."""
    for picture in (ROOT / "docs" / "images").glob("*.svg"):
        head = picture.read_text("utf-8").partition(">")[0]
        assert re.search(r'width="\d+" height="\d+"', head), picture.name


def test_every_page_of_the_readme_is_there() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
