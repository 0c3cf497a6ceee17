"""The metadata of a run's checkpoint that its next steps depend on, checked by a schema before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from colossal_mpi.errors import CheckpointError


class SavedScale(BaseModel):
    """The loss scale of a run in 16 bits."""

    model_config = ConfigDict(strict=True)

    value: float = Field(gt=0, allow_inf_nan=False, description="the scale")
    good: int = Field(ge=0, description="steps since it was last changed")


class SavedOptimizer(BaseModel):
    """The numbers of an optimizer besides its arrays."""

    model_config = ConfigDict(strict=True)

    steps: int = Field(ge=0, lt=1 << 53, description="updates that are done")
    loss_scale: SavedScale | None = Field(None, description="the loss scale, if there is one")


class SavedData(BaseModel):
    """The data that a run had."""

    model_config = ConfigDict(strict=True)

    digest: str = Field("", description="digest of the data")
    about: str = Field("", description="the data for a reader")


class SavedSteps(BaseModel):
    """The steps that a checkpoint has done."""

    model_config = ConfigDict(strict=True)

    step: int = Field(ge=0, lt=1 << 53, description="steps that are done")
    optimizer: SavedOptimizer | None = Field(None, description="numbers of the optimizer")
    data: SavedData = Field(SavedData(), description="the data")

    @classmethod
    def of(cls, directory: Path, metadata: Mapping[str, Any]) -> SavedSteps:
        """Return the checked metadata of a checkpoint.

        Parameters
        ----------
        directory : Path
            The checkpoint, for the message.
        metadata : mapping
            Its metadata.

        Returns
        -------
        SavedSteps
            The steps.

        Raises
        ------
        CheckpointError
            If a number is missing, of another type or beyond its range.
        """
        try:
            return cls.model_validate(metadata)
        except ValidationError as problem:
            first = problem.errors()[0]
            key = ".".join(map(str, first["loc"]))
            reason = f"{first['msg'][0].lower()}{first['msg'][1:]}"
            raise CheckpointError(
                f"{directory} cannot be resumed: its metadata have {key}={first['input']!r}: {reason}"
            ) from None
