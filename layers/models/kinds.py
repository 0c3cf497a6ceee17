"""Models by name: a model as a few values that JSON holds, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from colossal_mpi.errors import OptionError
from colossal_mpi.layers.layer import Layer
from colossal_mpi.layers.models.bert import Bert, BertConfig
from colossal_mpi.layers.models.gpt import GPT, GPTConfig
from colossal_mpi.layers.models.llama import Llama, LlamaConfig
from colossal_mpi.layers.models.vit import ViT, ViTConfig
from colossal_mpi.layers.parallelism import Parallelism

KINDS: dict[str, tuple[type, type]] = {
    "gpt": (GPT, GPTConfig),
    "llama": (Llama, LlamaConfig),
    "bert": (Bert, BertConfig),
    "vit": (ViT, ViTConfig),
}
"""Every model and its configuration by the name that configurations and checkpoints give it."""


def describe(model: Layer) -> dict[str, Any]:
    """Return kind and configuration of a model.

    Raises
    ------
    OptionError
        If it is none of `KINDS`.
    """
    for kind, (cls, _) in KINDS.items():
        if type(model) is cls:
            return {"kind": kind, **asdict(model.config)}  # type: ignore[attr-defined]
    raise OptionError(f"a {type(model).__name__} has no kind: it must be one of {', '.join(KINDS)}")


def make(description: Mapping[str, Any], parallelism: Parallelism) -> Any:
    """Return the model of a description, its random weights zero, to be loaded.

    Raises
    ------
    OptionError
        If there is no such kind, or its configuration has no such fields.
    """
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in description.items()}
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise OptionError(f"there is no model of kind={kind!r}: it must be one of {', '.join(KINDS)}")
    cls, config = KINDS[kind]
    try:
        values = config(**{**fields, "seed": None})
    except TypeError as problem:
        raise OptionError(f"this is no configuration of a {kind}: {problem}") from None
    return cls(values, parallelism)
