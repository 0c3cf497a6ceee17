"""The ways in which a product can be done, for tests: small ones take them all only if they are made to."""

from colossal_mpi.platform import shared_memory
from colossal_mpi.redistribution import execute

EXECUTIONS = ["whole", "read", "message", "k-read", "k-message", "m-read", "m-message", "n-read", "n-message"]
"""Operands laid side by side; pieces read from neighbours; pieces by message; the last two in panels of a letter."""


def execute_as(name, grid, monkeypatch, panel=3):
    """Make products of any size be done in a way; return the arguments for `contract`."""
    letter, _, way = name.rpartition("-")
    if way != "whole":
        monkeypatch.setattr(execute, "READ_FROM", 0)
        monkeypatch.setattr(shared_memory, "LEAST", 0)
        monkeypatch.setattr(grid, "shares", grid.shares and way == "read")
    return {"stream": letter, "panel": panel} if letter else {}
