"""The configuration of a run: the schema of its TOML file, its plugins, its loader, and keys that exclude each other.

Every command that runs a model loads a configuration here, and the tasks of ``apps.training`` register the sections of
their models. The package uses pydantic for the schema and takes the choices of a key from the registries of ``layers``.
"""

from colossal_mpi.apps.config.combinations import problems
from colossal_mpi.apps.config.plugins import load_plugins
from colossal_mpi.apps.config.sections import (
    Config,
    ModelSection,
    TextSection,
    TransformerSection,
    model_sections,
)
from colossal_mpi.apps.config.toml import (
    choices,
    commented,
    dump,
    grid_setting,
    load,
    parse_grid,
    setting,
    shipped,
    validate,
)

__all__ = [
    "Config",
    "ModelSection",
    "TextSection",
    "TransformerSection",
    "choices",
    "commented",
    "dump",
    "grid_setting",
    "load",
    "load_plugins",
    "model_sections",
    "parse_grid",
    "problems",
    "setting",
    "shipped",
    "validate",
]
