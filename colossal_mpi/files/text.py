"""JSON and TOML of limited depth."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

import numpy as np

DEPTH = 64
"""Greatest depth of tables and lists in JSON and TOML."""
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


def parse_json(content: bytes) -> Any:
    """Return what JSON holds.

    Parameters
    ----------
    content : bytes
        JSON in UTF-8, with or without a byte order mark.

    Returns
    -------
    object
        Tables, lists, texts and numbers.

    Raises
    ------
    ValueError
        If it is no JSON, or tables and lists are nested deeper than `DEPTH`.
    """
    marks = np.frombuffer(_TEXT.sub(b"", content), np.uint8)
    opened, closed = ((marks == one) | (marks == two) for one, two in (b"[{", b"]}"))
    places = np.flatnonzero(opened | closed)
    if np.cumsum(np.where(opened[places], 1, -1)).max(initial=0) > DEPTH:
        raise ValueError(f"tables and lists are nested deeper than {DEPTH}")
    return json.loads(content.decode("utf-8-sig"))


def parse_toml(text: str) -> dict[str, Any]:
    """Return the table that TOML holds.

    Parameters
    ----------
    text : str
        The TOML.

    Returns
    -------
    dict
        The table.

    Raises
    ------
    ValueError
        If it is no TOML, or tables and lists are nested deeper than `DEPTH`.
    """
    try:
        table = tomllib.loads(text)
    except RecursionError:
        table = None
    level: list[Any] = [table]
    for _ in range(DEPTH):
        tables = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [item for items in tables for item in items]
    if table is None or level:
        raise ValueError(f"tables and lists are nested deeper than {DEPTH}")
    return table
