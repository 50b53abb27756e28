"""Draws the figures as SVG: a panel for each scenario, a bar for each contestant."""

from __future__ import annotations

import html
import statistics
from collections.abc import Iterator
from typing import Any

WIDTH, LABEL, VALUE, BAR, GAP, HEAD = 720, 130, 120, 16, 5, 34
COLOURS = {"library": "#0b6e4f", "process": "#2a9d74", "floor": "#9a9a9a", "inflate": "#9a9a9a"}
PEER = "#4a6fa5"


def draw(report: dict[str, Any]) -> str:
    """Draw the report of ``python -m benchmarks --json``: medians with least and most."""
    parts: list[str] = []
    top = 8
    for scenario, facts in report["scenarios"].items():
        walls: dict[str, list[float]] = {}
        for run in report["runs"]:
            if run["scenario"] == scenario:
                walls.setdefault(run["contestant"], []).append(run["wall"])
        parts += _panel(top, facts["title"], walls)
        top += HEAD + len(walls) * (BAR + GAP) + 14
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" '
            f'viewBox="0 0 {WIDTH} {top}" font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{top}" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _panel(top: int, title: str, walls: dict[str, list[float]]) -> Iterator[str]:
    yield f'<text x="8" y="{top + 18}" font-weight="bold">{html.escape(title)}</text>'
    longest = max((max(times) for times in walls.values()), default=1.0)
    scale = (WIDTH - LABEL - VALUE) / longest
    medians = {name: statistics.median(times) for name, times in walls.items()}
    for index, (name, median) in enumerate(sorted(medians.items(), key=lambda item: item[1])):
        y = top + HEAD + index * (BAR + GAP)
        middle, text = y + BAR / 2, y + BAR - 4
        least, most = (LABEL + scale * bound(walls[name]) for bound in (min, max))
        colour = COLOURS.get(name, PEER)
        yield f'<text x="{LABEL - 8}" y="{text}" text-anchor="end">{html.escape(name)}</text>'
        yield (
            f'<rect x="{LABEL}" y="{y}" width="{scale * median:.1f}" height="{BAR}" '
            f'fill="{colour}"/>'
        )
        yield (
            f'<path d="M{least:.1f} {middle}H{most:.1f}M{least:.1f} {middle - 4}v8'
            f'M{most:.1f} {middle - 4}v8" stroke="#222222" fill="none"/>'
        )
        yield f'<text x="{most + 8:.1f}" y="{text}">{_seconds(median)}</text>'


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 0.1 else f"{seconds:.2f} s"
