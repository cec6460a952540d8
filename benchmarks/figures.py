"""Numbers as people read them."""

from __future__ import annotations


def format_value(value: float) -> str:
    """Three significant digits, thousands separated: ``101,000``, ``1.25``, ``0.0132``."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        digits = len(str(int(abs(value)))) - 3
        return f"{round(value, -digits):,.0f}"
    return f"{value:.3g}"


def format_ratio(ratio: float) -> str:
    """Three digits, so that what is just below 1 does not look like it: ``0.997``, ``2.00``."""
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:#.3g}"
