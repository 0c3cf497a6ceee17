"""Optional packages: which are there, and what the others are for."""

from __future__ import annotations

from collections.abc import Sequence

from colossal_mpi.apps.doctor.facts import Facts
from colossal_mpi.apps.doctor.finding import GOOD, Finding

_OPTIONAL = {
    "torch": "torch",
    "cupy": "cuda12 or cuda13",
    "safetensors": "hf",
    "scikit-learn": "digits",
    "tokenizers": "tokens",
    "tensorboardX": "tensorboard",
}
"""The extra of colossal-mpi that brings each."""


def check(facts: Sequence[Facts]) -> Finding:
    """Return the optional packages of rank 0; differences between ranks are the business of `same`."""
    versions = facts[0]["versions"]
    there = [f"{name} {version}" for name, version in versions.items() if name.startswith(tuple(_OPTIONAL))]
    absent = [f"{name} [{extra}]" for name, extra in _OPTIONAL.items() if not any(v.startswith(name) for v in versions)]
    text = ", ".join(there) or "none"
    return Finding("options", GOOD, text + (f"; not there (extra): {', '.join(absent)}" if absent else ""))
