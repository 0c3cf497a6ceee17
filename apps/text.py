"""Numbers for the eye: thousands separated, three digits where more mean nothing, with their units."""

from __future__ import annotations

import math
from typing import Any

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def si(value: float, unit: str) -> str:
    """Return a number with three digits, a prefix and a unit: ``12.3 Gflop/s``."""
    power = min(max(int(math.log10(abs(value)) // 3), 0), len(_PREFIXES) - 1) if value else 0
    return f"{significant(value / 1000**power)} {_PREFIXES[power]}{unit}"


def significant(value: float) -> str:
    """Return three digits of a number, without an exponent where it is near 1, and thousands separated."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.2e}" if digits > 6 else f"{value:,.{max(digits, 0)}f}"


def binary(size: float) -> str:
    """Return a number of bytes: ``1.50 GiB``."""
    scale, unit = bytes_unit(size)
    if scale == 1:
        return f"{size:.0f} B"
    return f"{significant(size / scale)} {unit}"


def bytes_unit(size: float) -> tuple[int, str]:
    """Return the unit of a number of bytes, as a number of bytes and by name."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = min(int(math.log2(max(size, 1)) // 10), len(units) - 1)
    return 1024**power, units[power]


def duration(seconds: float) -> str:
    """Return a time: ``0.53 ms``, ``12.1 s``, ``2:03:14 h``."""
    if seconds >= 100:
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
    return f"{significant(seconds)} s" if seconds >= 1 else f"{significant(1e3 * seconds)} ms"


def percent(share: float) -> str:
    """Return a share: ``12.3 %``."""
    return f"{significant(100 * share)} %"


def plain(value: Any) -> str:
    """Return a value of a configuration as it is written there, a grid as ``row=2, col=2``."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={plain(one)}" for key, one in value.items()) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return "[" + ", ".join(map(plain, value)) + "]"
    return str(value)
