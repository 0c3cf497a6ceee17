"""Limits of the sizes of a model, which are checked before anything of a configuration from a file is built.

`registry.construct` checks the configurations of checkpoints and Hugging Face directories with them, and the sections
of ``apps.config`` those of runs. The limits are far above every model that has been trained; what lies beyond is
a damaged file or a slip.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

LIMITS = {
    "vocabulary": (1, 1 << 28),
    "layers": (0, 10_000),
    "hidden": (1, 1 << 20),
    "heads": (1, 1 << 14),
    "groups": (1, 1 << 14),
    "inner": (1, 1 << 22),
    "positions": (1, 1 << 28),
    "context": (1, 1 << 28),
    "experts": (0, 1 << 14),
    "experts_per_token": (0, 1 << 14),
    "classes": (1, 1 << 28),
}
"""The least and the greatest value of each size of a model, by its name in configurations."""


def beyond_limits(values: Mapping[str, object]) -> str | None:
    """Return what is wrong with the sizes and numbers of a model.

    Parameters
    ----------
    values : mapping of str to object
        The fields of its configuration by name.

    Returns
    -------
    str or None
        The first field whose value is of another type or beyond its limit, with what it must be; None if all are sane.

    Examples
    --------
    >>> beyond_limits({"layers": 10**9})
    'layers=1000000000 must be an integer from 0 to 10,000'
    """
    for name, value in values.items():
        least, most = LIMITS.get(name, (-(1 << 62), 1 << 62))
        if isinstance(value, float) and not isfinite(value):
            return f"{name}={value} must be finite"
        if value is None or (name not in LIMITS and not isinstance(value, int)):
            continue
        if not isinstance(value, int) or not least <= value <= most:
            return f"{name}={value!r} must be an integer from {least:,} to {most:,}"
    return None
