"""Charts as SVG inside a page of HTML: lines over epochs, and bars made of parts.

They are text, small, and the same bytes for the same numbers. Colours are classes, which the page
gives one meaning in light and another in dark; lines differ in their dashes too, for readers who
see no colours and for printers that have none. Every chart has a title and a description that
screen readers read, and every point and part says its number under the pointer.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

LINE_STYLES = 6  # classes line0, line1, ... that the page defines; further lines start over
WIDTH = 400  # of a chart, in its own units; on the page it is as wide as there is room
LINE_HEIGHT = 220  # of a chart of lines
MOST_MARKERS = 40  # points of a line; with more, markers would hide it
TICKS = 5  # steps of an axis, about
CHARACTER = 8.0  # width of a digit or letter at the size of the charts' text, nearly always less
LONGEST_NAME = 20  # characters of the name of a bar
ROW, BAR = 28, 20  # height of a bar with and without the gap


class Line(NamedTuple):
    """Values over the epochs.

    Attributes:
        name: for the legend.
        points: epoch and value.
    """

    name: str
    points: Sequence[tuple[int, float]]


class Part(NamedTuple):
    """A part of a bar.

    Attributes:
        style: a class, which decides about the colour.
        value: its length.
        meaning: what it is, in words, with its number.
        text: written into it, where it fits.
    """

    style: str
    value: float
    meaning: str
    text: str = ""


class Bar(NamedTuple):
    """A horizontal bar.

    Attributes:
        name: written before it.
        parts: one after the other.
        text: written behind it.
    """

    name: str
    parts: Sequence[Part]
    text: str


def escaped(text: object) -> str:
    """Text for HTML, also within attributes; characters that HTML does not have are replaced."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]", "\ufffd", str(text)))


def line_chart(title: str, y_label: str, lines: Sequence[Line]) -> str:
    """Lines over epochs. At least one of them has a point.

    Args:
        title: what the chart shows.
        y_label: of the axis, with the unit.
        lines: their style follows from their place.
    """
    every = [point for line in lines for point in line.points]
    epochs = [epoch for epoch, _ in every]
    first, last = min(epochs), max(epochs)
    y_ticks, y_texts = _ticks(min(value for _, value in every), max(value for _, value in every))
    left = 12 + CHARACTER * max(map(len, y_texts))
    right, top, bottom = WIDTH - 14, 30, LINE_HEIGHT - 40

    def x_of(epoch: float) -> float:
        return left + (right - left) * ((epoch - first) / (last - first) if last > first else 0.5)

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    parts = [f'<text x="2" y="14" class="label">{escaped(y_label)}</text>']
    for value, text in zip(y_ticks, y_texts, strict=True):
        y = y_of(value)
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right}" />')
        parts.append(f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" class="end">{text}</text>')
    parts += [
        f'<text x="{x_of(epoch):.1f}" y="{bottom + 18}" class="middle">{epoch}</text>'
        for epoch in _whole_ticks(first, last)
    ]
    middle = (left + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{LINE_HEIGHT - 6}" class="middle label">epoch</text>')
    for number, line in enumerate(lines):
        places = [(x_of(epoch), y_of(value)) for epoch, value in line.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<g class="line{number % LINE_STYLES}">')
        if len(places) > 1:
            parts.append(f'<path class="line" d="M{path}" />')
        if len(places) <= MOST_MARKERS:
            for (epoch, value), (x, y) in zip(line.points, places, strict=True):
                parts.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3">'
                    f"<title>{escaped(line.name)}, epoch {epoch}: {value:.5g}</title></circle>"
                )
        parts.append("</g>")
    ends = "; ".join(
        f"{line.name}: {line.points[0][1]:.4g} in epoch {line.points[0][0]}, "
        f"{line.points[-1][1]:.4g} in epoch {line.points[-1][0]}"
        for line in lines
        if line.points
    )
    return _svg(title, ends, LINE_HEIGHT, parts)


def legend(lines: Sequence[Line]) -> str:
    """Which line of `line_chart` is which."""
    entries = (
        f'<li class="line{number % LINE_STYLES}"><svg viewBox="0 0 30 10" aria-hidden="true">'
        f'<path class="line" d="M0 5H30" /></svg> {escaped(line.name)}</li>'
        for number, line in enumerate(lines)
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def bar_chart(title: str, x_label: str, bars: Sequence[Bar]) -> str:
    """Horizontal bars that begin at 0, one below the other. There is at least one.

    Args:
        title: what the chart shows.
        x_label: of the axis, with the unit.
        bars: none of their values is negative.
    """
    names = [_shortened(bar.name) for bar in bars]
    left = 14 + CHARACTER * max(map(len, names))
    longest = max(sum(part.value for part in bar.parts) for bar in bars)
    ticks, texts = _ticks(0, longest)
    right = WIDTH - max(
        12 + CHARACTER * max(len(bar.text) for bar in bars), CHARACTER * len(texts[-1]) / 2
    )
    scale = (right - left) / max(longest, ticks[1] / 2)
    bottom = 4 + ROW * len(bars)
    parts = []
    for value, text in zip(ticks, texts, strict=True):
        x = left + value * scale
        if x <= right + 0.1:
            parts.append(f'<path class="grid" d="M{x:.1f} 2V{bottom}" />')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" class="middle">{text}</text>')
    for number, (bar, name) in enumerate(zip(bars, names, strict=True)):
        y = 4 + ROW * number + (ROW - BAR) / 2
        text_y = y + BAR / 2 + 4
        parts.append(f'<text x="{left - 8:.1f}" y="{text_y:g}" class="end">{escaped(name)}</text>')
        x = left
        for part in bar.parts:
            width = part.value * scale
            if part.value > 0:
                parts.append(
                    f'<rect x="{x:.1f}" y="{y:g}" width="{width:.1f}" height="{BAR}" '
                    f'class="{part.style}"><title>{escaped(bar.name)}, {escaped(part.meaning)}'
                    "</title></rect>"
                )
            if part.text and width > 0.8 * CHARACTER * len(part.text) + 4:  # it is written smaller
                parts.append(
                    f'<text x="{x + width / 2:.1f}" y="{text_y:g}" class="middle on {part.style}">'
                    f"{escaped(part.text)}</text>"
                )
            x += width
        parts.append(f'<text x="{x + 6:.1f}" y="{text_y:g}">{escaped(bar.text)}</text>')
    parts.append(
        f'<text x="{(left + right) / 2:.1f}" y="{bottom + 36}" class="middle label">'
        f"{escaped(x_label)}</text>"
    )
    told = "; ".join(f"{bar.name}: {', '.join(part.meaning for part in bar.parts)}" for bar in bars)
    return _svg(title, told, bottom + 42, parts)


def _svg(title: str, description: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img">'
        f"<title>{escaped(title)}</title><desc>{escaped(description)}</desc>"
        f"{''.join(parts)}</svg>"
    )


def _ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Round numbers from `low` or below to `high` or above, at least two, and their texts."""
    least = 1e-3 * max(abs(low), abs(high)) or 1.0  # a line that hardly moves is no mountain range
    if high - low < least:
        low, high = (low, low + least) if low == 0 else (low - least / 2, high + least / 2)
    step = _round_step((high - low) / TICKS)
    numbers = range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    ticks = [number * step for number in numbers]
    if max(map(abs, ticks)) >= 1e6 or step < 1e-4:  # short, and enough for steps of this size
        return ticks, [f"{tick:.5g}" for tick in ticks]
    decimals = max(0, -math.floor(math.log10(step)))
    return ticks, [f"{tick:,.{decimals}f}" for tick in ticks]


def _whole_ticks(first: int, last: int) -> list[int]:
    """Some of the epochs."""
    step = max(1, round(_round_step((last - first) / TICKS))) if last > first else 1
    return [first, *range((first // step + 1) * step, last + 1, step)]


def _round_step(step: float) -> float:
    """1, 2 or 5 times a power of ten, at least as large."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
