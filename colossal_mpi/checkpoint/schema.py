"""The schema of a manifest, with the types and ranges of all that a checkpoint says of itself.

`colossal_mpi.checkpoint.manifest` loads this module when it reads the first manifest, because pydantic takes a while.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

_Count = Annotated[int, Field(ge=0, lt=1 << 63)]
_PartSchema: TypeAlias = tuple[
    _Count, _Count, Annotated[str, Field(pattern=r"^(crc32:[0-9a-f]{8}|sha256:[0-9a-f]{64})$")], str
]
_DTYPE = r"^(bfloat16|bool|u?int(8|16|32|64)|float(16|32|64)|longdouble|float(96|128)|complex(64|128|192|256))$"


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True)


class _File(_Schema):
    bytes: _Count
    parts: list[_PartSchema]


class _Array(_Schema):
    shape: Annotated[list[_Count], Field(max_length=32)]
    dtype: Annotated[str, Field(pattern=_DTYPE)]
    layout: str
    grid: str | None = None


class _Value(_Schema):
    value: Any
    units: str


class Table(_Schema):
    """A manifest of the newest format must hold these keys; a reader of later versions may find more."""

    format_version: Literal[2]
    metadata: dict[str, Any]
    values: dict[str, _Value]
    arrays: dict[str, _Array]
    files: dict[str, _File]
