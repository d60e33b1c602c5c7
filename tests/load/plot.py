"""SVG written by hand: panels of a run, one below the other over the same seconds; bars of a benchmark. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH, PANEL, GAP, LEFT, RIGHT, TOP, BOTTOM = 960, 170, 54, 78, 24, 86, 46
INK, PALE, MARK = "#222", "#ddd", "#c0392b"


@dataclass(frozen=True)
class Line:
    """`points`: (second, value). `filled`: down to the axis."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    filled: bool = False


@dataclass(frozen=True)
class Panel:
    """`unit` is part of the axis' label. `log`: a logarithmic axis, from 1 on."""

    title: str
    unit: str
    lines: Sequence[Line]
    log: bool = False


def draw(title: str, subtitle: str, panels: Sequence[Panel], marks: Sequence[tuple[float, str]]) -> str:
    """`marks`: (second, what happened), a dashed line through all panels."""
    seconds = max([1.0, *(x for panel in panels for line in panel.lines for x, _ in line.points)])
    height = TOP + len(panels) * (PANEL + GAP) - GAP + BOTTOM
    across = (WIDTH - LEFT - RIGHT) / seconds
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="{LEFT}" y="26" font-size="17" font-weight="bold">{escape(title)}</text>',
        f'<text x="{LEFT}" y="46" fill="#555">{escape(subtitle)}</text>',
    ]
    for number, panel in enumerate(panels):
        out += _panel(panel, TOP + number * (PANEL + GAP), across, seconds)
    bottom = TOP + len(panels) * (PANEL + GAP) - GAP
    for number, (second, what) in enumerate(marks):
        x = LEFT + second * across
        beside, anchor = (x + 3, "start") if second < 0.8 * seconds else (x - 3, "end")
        out.append(
            f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="{MARK}" stroke-width="1" stroke-dasharray="4 3"/>'
        )
        out.append(
            f'<text x="{beside:.1f}" y="{TOP + 11 + 13 * (number % 4)}" text-anchor="{anchor}" fill="{MARK}" font-size="11" '
            'stroke="#fff" stroke-width="3" paint-order="stroke">'
            f"{escape(what)}</text>"
        )
    out.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{height - 10}" text-anchor="middle">seconds since the first mail</text>'
    )
    return "\n".join([*out, "</svg>", ""])


@dataclass(frozen=True)
class Bar:
    """`reached`: of what was wanted; 1 is all of it. `text` stands behind the bar."""

    name: str
    reached: float
    text: str


def bars(title: str, subtitle: str, shown: Sequence[Bar]) -> str:
    """A line for each, with a mark at 1; on a logarithmic axis from a tenth to ten."""
    left, row, top = 400, 24, 70
    height, across = top + row * len(shown) + 40, (WIDTH - left - 190) / 2
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="24" y="26" font-size="17" font-weight="bold">{escape(title)}</text>',
        f'<text x="24" y="46" fill="#555">{escape(subtitle)}</text>',
    ]
    for number, bar in enumerate(shown):
        y, length = top + number * row, across * (1 + log10(min(10.0, max(0.1, bar.reached))))
        colour = "#1e8449" if bar.reached >= 1 else MARK
        out.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(bar.name)}</text>')
        out.append(f'<rect x="{left}" y="{y + 2}" width="{length:.1f}" height="{row - 8}" fill="{colour}" fill-opacity="0.6"/>')
        out.append(f'<text x="{left + length + 6:.1f}" y="{y + 13}" fill="#555">{escape(bar.text)}</text>')
    bottom = top + row * len(shown)
    for value, name in ((0.1, "0.1 ×"), (1.0, "wanted"), (10.0, "10 ×")):
        x = left + across * (1 + log10(value))
        dashed = f'stroke="{INK}"' if value == 1 else f'stroke="{PALE}"'
        out.append(f'<line x1="{x:.1f}" y1="{top - 4}" x2="{x:.1f}" y2="{bottom}" {dashed}/>')
        out.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{name}</text>')
    return "\n".join([*out, "</svg>", ""])


def _panel(panel: Panel, top: float, across: float, seconds: float) -> list[str]:
    highest = max([1.0, *(y for line in panel.lines for _, y in line.points)])
    ticks = _decades(highest) if panel.log else _round(highest)
    base = top + PANEL
    form = ",.0f" if ticks[1] >= 1 else "g"

    def at(value: float) -> float:
        share = log10(max(1.0, value)) / log10(ticks[-1]) if panel.log else value / ticks[-1]
        return base - share * PANEL

    out = [f'<text x="{LEFT}" y="{top - 8}" font-weight="bold">{escape(panel.title)}</text>']
    for tick in ticks:
        out.append(f'<line x1="{LEFT}" y1="{at(tick):.1f}" x2="{WIDTH - RIGHT}" y2="{at(tick):.1f}" stroke="{PALE}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{at(tick) + 4:.1f}" text-anchor="end">{tick:{form}}</text>')
    for second in _round(seconds):
        if second <= seconds:
            x = LEFT + second * across
            out.append(f'<line x1="{x:.1f}" y1="{base}" x2="{x:.1f}" y2="{base + 4}" stroke="{INK}"/>')
            out.append(f'<text x="{x:.1f}" y="{base + 17}" text-anchor="middle">{second:,.0f}</text>')
    out.append(f'<text transform="translate(16 {top + PANEL / 2}) rotate(-90)" text-anchor="middle">{escape(panel.unit)}</text>')
    right = float(WIDTH - RIGHT)
    for line in reversed(panel.lines):
        out.append(f'<rect x="{right - 12:.0f}" y="{top - 17}" width="12" height="9" fill="{line.colour}"/>')
        out.append(f'<text x="{right - 17:.0f}" y="{top - 8}" text-anchor="end">{escape(line.name)}</text>')
        right -= 40 + 6.4 * len(line.name)
    for line in panel.lines:
        path = " ".join(f"{LEFT + x * across:.1f},{at(y):.1f}" for x, y in line.points)
        if line.filled and line.points:
            first, last = LEFT + line.points[0][0] * across, LEFT + line.points[-1][0] * across
            out.append(
                f'<polygon points="{first:.1f},{base} {path} {last:.1f},{base}" fill="{line.colour}" fill-opacity="0.35"/>'
            )
        out.append(f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="1.6"/>')
    return [*out, f'<line x1="{LEFT}" y1="{base}" x2="{WIDTH - RIGHT}" y2="{base}" stroke="{INK}"/>']


def _round(highest: float) -> list[float]:
    """Four to eight round numbers from 0 to at least `highest`."""
    step = 10.0 ** floor(log10(highest))
    for part in (0.2, 0.5, 1.0, 2.0):
        if highest / (step * part) <= 7:
            step *= part
            break
    return [number * step for number in range(ceil(highest / step) + 1)]


def _decades(highest: float) -> list[float]:
    return [10.0**power for power in range(max(1, ceil(log10(highest))) + 1)]
