"""Charts as inline SVG, coloured by the page's style sheet, readable without it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

from clipes.config import CONFIDENCE_THRESHOLD
from clipes.report.measure import CurvePoint
from clipes.run.curve import TrainingPoint

_WIDTH, _HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 22, 52
# Cuts written beside the curve, if apart.
_TITLED = (CONFIDENCE_THRESHOLD, 0.999, 0.99, 0.9999, 0.0)
_APART = 40


def confidence_histogram(bars: Sequence[tuple[float, float, float]]) -> str:
    """Draw which share of the pixels has which confidence.

    Args:
        bars: (from, to, share) in [0, 1], equally wide in the drawing.
    """
    top = _round_up(max(share for _, _, share in bars))
    wide = (_WIDTH - _LEFT - _RIGHT) / len(bars)
    drawn = [_y_axis(0, top, "share of all pixels, %")]
    for index, (low, high, share) in enumerate(bars):
        left, height = _LEFT + index * wide, (_HEIGHT - _TOP - _BOTTOM) * share / top
        y = _HEIGHT - _BOTTOM - height
        kind = "sure" if low >= CONFIDENCE_THRESHOLD else "unsure"
        words = f"confidence {low:g} to {high:g}: {100 * share:.2f} % of the pixels"
        drawn.append(
            f'<rect class="{kind}" x="{left + 2:.1f}" y="{y:.1f}" width="{wide - 4:.1f}"'
            f' height="{height:.1f}" rx="2"><title>{words}</title></rect>'
            f'<text class="small" text-anchor="middle" x="{left + wide / 2:.1f}"'
            f' y="{y - 5:.1f}">{_short(100 * share)}</text>'
            f'<text class="small" text-anchor="end" transform="translate({left + 6:.1f}'
            f' {_HEIGHT - _BOTTOM + 12}) rotate(-38)">{f"{low:g}".lstrip("0") or "0"}</text>'
        )
    drawn.append(
        _label(f"confidence, from (stretched towards 1; orange: below {CONFIDENCE_THRESHOLD:g})")
    )
    return _svg("Histogram of confidence", drawn)


def coverage_curve(points: Sequence[CurvePoint]) -> str:
    """Draw accuracy and mIoU of the pixels kept at each confidence, against their share.

    Args:
        points: By rising confidence, at least one.
    """
    left_end = math.floor(10 * min(point.coverage for point in points)) / 10
    left_end = min(left_end, 0.9)
    values = [value for point in points for value in (point.accuracy, point.miou)]
    low = math.floor(20 * min(values) - 0.2) / 20
    low, high = max(0.0, low), 1.0

    def place(coverage: float, value: float) -> tuple[float, float]:
        # From everything on the left to the surest pixels on the right.
        x = _LEFT + (1 - coverage) / (1 - left_end) * (_WIDTH - _LEFT - _RIGHT)
        return x, _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    drawn = [_y_axis(low, high, "of the pixels kept, %")]
    steps = 5 if 1 - left_end <= 0.5 else 10
    for percent in range(round(100 * left_end), 101, steps):
        x, _ = place(percent / 100, low)
        drawn.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
            f'<text text-anchor="middle" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}">{percent}</text>'
        )
    for kind, name in (("accuracy", "pixel accuracy"), ("miou", "mIoU")):
        spots = [(place(point.coverage, getattr(point, kind)), point) for point in points]
        drawn += _line(kind, name, spots)
    lower = {point.cut: place(point.coverage, min(point.accuracy, point.miou)) for point in points}
    drawn += _cuts(lower)
    drawn.append(_label("coverage: share of the pixels kept, %"))
    return _svg("Accuracy of the pixels kept, by confidence", drawn)


def training_curve(points: Sequence[TrainingPoint], kind: str) -> str:
    """Draw how one number of a training changed from update to update.

    Args:
        points: In order, two at least.
        kind: ``loss`` or ``miou``.
    """
    values = [getattr(point, kind) for point in points]
    high = 1.08 * max(*values, 1e-3)
    last = points[-1].iteration
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    spots = [
        (_LEFT + point.iteration / last * wide, _HEIGHT - _BOTTOM - value / high * tall)
        for point, value in zip(points, values, strict=True)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    percent = kind == "miou"
    name = "mIoU with the labels that are learnt, %" if percent else "loss"
    drawn = [_y_axis(0, high, name, 100 if percent else 1)]
    step = _nice(last)
    for iteration in range(0, last + 1, max(1, round(step))):
        x = _LEFT + iteration / last * wide
        y = _HEIGHT - _BOTTOM + 18
        drawn.append(f'<text text-anchor="middle" x="{x:.1f}" y="{y}">{iteration}</text>')
    drawn.append(f'<polyline class="{"miou" if percent else "accuracy"}" points="{path}"/>')
    for (x, y), point, value in zip(spots, points, values, strict=True):
        shown = f"{100 * value:.1f} %" if percent else f"{value:.4g}"
        drawn.append(
            f'<circle class="{"miou" if percent else "accuracy"}" cx="{x:.1f}" cy="{y:.1f}" r="2">'
            f"<title>update {point.iteration}: {shown}</title></circle>"
        )
    drawn.append(_label("updates"))
    return _svg(f"Training: {name}", drawn)


def _line(
    kind: str, name: str, spots: Sequence[tuple[tuple[float, float], CurvePoint]]
) -> Iterator[str]:
    """Draw one curve, with what each of its points is as a title."""
    path = " ".join(f"{x:.1f},{y:.1f}" for (x, y), _ in spots)
    yield f'<polyline class="{kind}" points="{path}"/>'
    for (x, y), point in spots:
        words = (
            f"confidence of at least {point.cut:g}: {100 * point.coverage:.1f} % of the pixels,"
            f" {name} {100 * getattr(point, kind):.2f} %"
        )
        yield (
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
            f"<title>{words}</title></circle>"
        )


def _cuts(lower: Mapping[float, tuple[float, float]]) -> Iterator[str]:
    """Write some cuts below the curves, where they do not touch."""
    titled: list[float] = []
    for cut in _TITLED:
        if cut in lower and all(abs(lower[cut][0] - x) > _APART for x in titled):
            x, y = lower[cut]
            titled.append(x)
            yield (
                f'<text class="small" text-anchor="start" x="{x + 4:.1f}" y="{y + 16:.1f}">'
                f"≥ {cut:g}</text>"
            )


def _nice(span: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that fits 7 times at most."""
    power = 10.0 ** math.floor(math.log10(span / 7))
    return next(s * power for s in (1, 2, 5, 10) if span / (s * power) <= 7 + 1e-9)


def _y_axis(low: float, high: float, name: str, unit: float = 100) -> str:
    step = _nice(high - low)
    drawn = []
    for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        y = _HEIGHT - _BOTTOM - (index * step - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        drawn.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text text-anchor="end" x="{_LEFT - 8}" y="{y + 4:.1f}">{unit * index * step:.6g}'
            "</text>"
        )
    drawn.append(f'<text x="0" y="12">{escape(name)}</text>')
    return "".join(drawn)


def _label(name: str) -> str:
    return (
        f'<text text-anchor="middle" x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 6}">'
        f"{escape(name)}</text>"
    )


def _svg(name: str, drawn: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(name)}">'
        f"{''.join(drawn)}</svg>\n"
    )


def _short(percent: float) -> str:
    return f"{percent:.0f}" if percent >= 9.95 else f"{percent:.1f}" if percent else "0"


def _round_up(share: float) -> float:
    """Return a share a little above another, so that the longest bar has room for its number."""
    return min(1.0, math.ceil(share * 1.08 * 20) / 20) or 1.0
