"""The programs in the README and in the documentation run as they stand, and print what they say they print."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/index.md", "docs/howto.md")


def _programs() -> list[Any]:
    found = []
    for page in PAGES:
        blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
        complete = [block for block in blocks if len(block.splitlines()) > 2]
        found += [pytest.param(block, id=f"{Path(page).stem}-{number}") for number, block in enumerate(complete)]
    return found


@pytest.mark.parametrize("program", _programs())
def test_a_program_of_the_documentation_runs(program: str, run_script: Any) -> None:
    done = run_script(program, timeout=100)
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
