"""Line charts as inline SVG: a report page then needs no plotting library, no script and no server."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 40
COLORS = ("var(--series-1)", "var(--series-2)", "var(--series-3)", "var(--series-4)", "var(--series-5)")


@dataclass(frozen=True)
class Series:
    """One line. ``xs`` and ``ys`` have the same length; points that are not finite are left out."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    dashed: bool = False
    color: int = 0
    """Index into `COLORS`: lines that belong together may share one."""

    @property
    def stroke(self) -> str:
        return COLORS[self.color % len(COLORS)]

    def points(self) -> list[tuple[float, float]]:
        if len(self.xs) != len(self.ys):
            raise ValueError(f"series {self.label!r} has {len(self.xs)} x values and {len(self.ys)} y values")
        return [(x, y) for x, y in zip(self.xs, self.ys, strict=True) if math.isfinite(x) and math.isfinite(y)]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high], about ``count`` of them."""
    if not (math.isfinite(low) and math.isfinite(high)) or high < low:
        raise ValueError(f"an axis from {low} to {high} has no ticks")
    if high == low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def format_tick(value: float) -> str:
    """A short label: 12k, 0.05, 3."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}"


def line_chart(title: str, x_label: str, y_label: str, series: Sequence[Series], y_low: float | None = None) -> str:
    """One chart as an ``<svg>`` element; the y axis goes down to ``y_low`` if the data do not.

    Raises:
        ValueError: If no series has a finite point.
    """
    points = {one.label: one.points() for one in series}
    everything = [point for line in points.values() for point in line]
    if not everything:
        raise ValueError(f"chart {title!r} has nothing to draw: no finite point in {list(points)}")
    x_ticks = nice_ticks(min(x for x, _ in everything), max(x for x, _ in everything), 6)
    y_values = [y for _, y in everything] + ([] if y_low is None else [y_low])
    y_ticks = nice_ticks(min(y_values), max(y_values))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title, quote=True)}">',
        f'<text class="chart-title" x="{LEFT}" y="16">{html.escape(title)}</text>',
    ]
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{format_tick(tick)}</text>')
    for tick in x_ticks:
        x, y = place(tick, y_ticks[0])
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y + 15:.1f}" text-anchor="middle">{format_tick(tick)}</text>')
    parts.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{html.escape(x_label)}</text>'
    )
    middle = (HEIGHT + TOP - BOTTOM) / 2
    parts.append(
        f'<text class="tick" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
        f"{html.escape(y_label)}</text>"
    )
    for one in series:
        dash = ' stroke-dasharray="5 4"' if one.dashed else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points[one.label]))
        parts.append(f'<polyline class="line" style="stroke:{one.stroke}"{dash} points="{path}"/>')
    parts.append("</svg>")
    return "".join(parts) + _legend(series)


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    items = [
        f'<span><i style="border-top:3px {"dashed" if one.dashed else "solid"} {one.stroke}"></i>'
        f"{html.escape(one.label)}</span>"
        for one in series
    ]
    return '<div class="legend">' + "".join(items) + "</div>"
