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
