"""The ways in which `contract` can execute a product; tests force each of them on small matrices."""

from colossal_mpi.platform import shared_memory
from colossal_mpi.redistribution import execute

EXECUTIONS = ["whole", "read", "message", "k-read", "k-message", "m-read", "m-message", "n-read", "n-message"]
"""The ways: whole operands, tiles read from shared memory, tiles by message, and the last two in panels of a letter."""


def execute_as(name, grid, monkeypatch, panel=3):
    """Force products of any size to be executed in one way; return the arguments for `contract`."""
    letter, _, way = name.rpartition("-")
    if way != "whole":
        monkeypatch.setattr(execute, "READ_FROM", 0)
        monkeypatch.setattr(shared_memory, "LEAST", 0)
        monkeypatch.setattr(grid, "shares", grid.shares and way == "read")
    return {"stream": letter, "panel": panel} if letter else {}
