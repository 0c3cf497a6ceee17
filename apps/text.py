"""Numbers and values as text for people: thousands separated, three significant digits, with units.

The commands, the reports and the plans print with these functions.
"""

from __future__ import annotations

import math

_SI_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def si(value: float, unit: str) -> str:
    """Return a number with three digits, an SI prefix and a unit: ``12.3 Gflop/s``."""
    power = min(max(int(math.log10(abs(value)) // 3), 0), len(_SI_PREFIXES) - 1) if value else 0
    return f"{significant(value / 1000**power)} {_SI_PREFIXES[power]}{unit}"


def significant(value: float) -> str:
    """Return a number with three significant digits: ``0.0123``, ``12.3``, ``12,345``; an exponent if it is tiny."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.2e}" if digits > 6 else f"{value:,.{max(digits, 0)}f}"


def binary(size: float) -> str:
    """Return a number of bytes with a binary unit: ``1.50 GiB``, ``8 B``."""
    scale, unit = bytes_unit(size)
    if scale == 1:
        return f"{size:,.0f} B"
    return f"{significant(size / scale)} {unit}"


def bytes_unit(size: float) -> tuple[int, str]:
    """Return the binary unit that suits a number of bytes: its bytes and its name."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = min(int(math.log2(max(size, 1)) // 10), len(units) - 1)
    return 1024**power, units[power]


def duration(seconds: float) -> str:
    """Return a number of seconds with a unit: ``0.53 ms``, ``12.1 s``, ``2:03:14 h``."""
    if seconds >= 100:
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
    return f"{significant(seconds)} s" if seconds >= 1 else f"{significant(1e3 * seconds)} ms"


def percent(share: float) -> str:
    """Return a share in percent: ``12.3 %``."""
    return f"{significant(100 * share)} %"


def plain(value: object) -> str:
    """Return a value of a configuration as a user writes it, and a grid as ``row=2, col=2``."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={plain(one)}" for key, one in value.items()) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return "[" + ", ".join(map(plain, value)) + "]"
    return str(value)
