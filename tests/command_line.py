"""Run ``colossal-mpi`` in the process of the test, which starts no interpreter and imports nothing again."""

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

from colossal_mpi.apps.cli import main

RUN = """
[run]
directory = "run"
peak_flops = 1e9
forecast = false
report = false
"""
"""The end of a configuration: a run that neither measures nor draws, which takes longer than a few small steps."""


@dataclass(frozen=True)
class Called:
    """What a command returned and printed, under the names of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


def call(*words):
    """Run a command line on one rank."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["colossal-mpi", *map(str, words)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
    return Called(code, out.getvalue(), err.getvalue())
