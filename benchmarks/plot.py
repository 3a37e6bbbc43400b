"""Draws what the benchmarks have measured: python -m benchmarks.plot FOLDER [TO]

FOLDER has the files that the benchmarks have written with `--json`; `make bench` writes them to build/bench. Each group
of cases becomes one picture, TO/benchmark-NAME-GROUP.svg: how many times as fast torchwq is as each other contender,
the median over the rounds, with the facts of the machine below. Left of the line, the other one is faster.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks._harness import Results

#: Colours that can be told apart by everybody, and on light and dark pages.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999", "#b2a600", "#7a5195")
SUBJECT = "torchwq"


def facts(environment: dict[str, Any]) -> str:
    """What the figures depend on, in a line."""
    system, *_, processor = environment["system"].split()
    versions = f"torch {environment['torch']}, Python {environment['python']}"
    return f"{environment['cpus']} cores, {system} on {processor}, {versions}"


def draw(title: str, results: Results, environment: dict[str, Any], path: Path) -> None:
    """Draw the ratios of one group of cases."""
    import matplotlib.pyplot as plt

    others = [name for name in results.contenders if name != SUBJECT]
    cases = [case for case in results.figures if any(results.ratio(case, SUBJECT, other) for other in others)]
    height = 0.7 + len(cases) * (0.16 * len(others) + 0.25)
    figure, axes = plt.subplots(figsize=(8, height), layout="constrained")
    for place, other in enumerate(others):
        ratios = [results.ratio(case, SUBJECT, other) for case in cases]
        shown = [(row, ratio) for row, ratio in enumerate(ratios) if ratio]
        rows = [row + (place - (len(others) - 1) / 2) * 0.8 / len(others) for row, _ in shown]
        lefts, widths = [1.0] * len(shown), [ratio - 1.0 for _, ratio in shown]
        colour = COLOURS[place % len(COLOURS)]
        axes.barh(rows, widths, height=0.75 / len(others), left=lefts, color=colour, label=f"to {other}")
        for row, (_, ratio) in zip(rows, shown, strict=True):
            text = f" {ratio:.2g} " if ratio < 100 else f" {ratio:.0f} "
            axes.text(ratio, row, text, va="center", ha="left" if ratio >= 1 else "right", fontsize=7, color="#808080")
    axes.set_xscale("log")
    axes.axvline(1.0, color="#808080", linewidth=1)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"times as fast; {facts(environment)}", fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    for text in [axes.title, axes.xaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()]:
        text.set_color("#808080")
    for text in axes.get_legend().get_texts():
        text.set_color("#808080")
    axes.tick_params(colors="#808080")
    # Neither the time nor random names: the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):
        figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)
    _tidy(path)


def _tidy(path: Path) -> None:
    """Leave out what says who has drawn it, and say its size in pixels: points would be 4/3 of them."""
    text = re.sub(r"^.*?(?=<svg )|<metadata>.*?</metadata>\s*", "", path.read_text("utf-8"), flags=re.DOTALL)
    width, height = (round(float(size)) for size in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups())
    text = re.sub(r'(width|height)="[\d.]+pt" ?', "", text, count=2)
    path.write_text(text.replace("<svg ", f'<svg width="{width}" height="{height}" ', 1), "utf-8")


def main(folder: Path, to: Path) -> int:
    matplotlib.use("svg")
    files = sorted(folder.glob("*.json"))
    if not files:
        print(f"there is nothing to draw in {folder}: run a benchmark with --json first")
        return 1
    to.mkdir(parents=True, exist_ok=True)
    for file in files:
        document = json.loads(file.read_text("utf-8"))
        for group, found in document["results"].items():
            results = Results(found["unit"], found["figures"])
            if SUBJECT in results.contenders and len(results.contenders) > 1:
                path = to / f"benchmark-{file.stem}-{group}.svg".replace(" ", "-")
                draw(f"{file.stem}: {group}, {results.unit}", results, document["environment"], path)
                print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else sys.argv[1])))
