"""Settings of Sphinx; ``make docs`` builds the pages of this folder and takes warnings as errors."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "colossal_mpi"
author = "the colossal_mpi authors"
release = version = installed("colossal-mpi")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "_pictures"]
default_role = "py:obj"
suppress_warnings = ["ref.python"]  # the type "dtype" of a parameter is no reference to an attribute of that name
highlight_language = "python"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_mock_imports = ["cupy", "torch"]
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_ivar = True
napoleon_preprocess_types = False

html_theme = "furo"
html_title = "colossal_mpi"

_LISTS = {"Parameters", "Returns", "Raises", "Attributes"}


def _notes(app, what, name, obj, options, lines):
    """Put paragraphs that follow a list of parameters, results or errors without a heading under Notes."""
    section = None
    for i, line in enumerate(list(lines)):
        heading = i + 1 < len(lines) and set(lines[i + 1]) == {"-"}
        if heading:
            section = line
        elif section in _LISTS and line and not line.startswith(" ") and not lines[i - 1]:
            lines[i] = f"\n\x00{line}"
            section = None
    lines[:] = [part for line in lines for part in line.replace("\n\x00", "Notes\x00-----\x00\x00").split("\x00")]


_attributes = {}


def _keep(app, what, name, obj, options, lines):
    """Keep the lines of an attribute, because napoleon takes the text before a colon for its type."""
    if what in ("attribute", "property"):
        _attributes[name] = list(lines)


def _restore(app, what, name, obj, options, lines):
    if name in _attributes:
        lines[:] = _attributes[name]


def setup(app):
    """Draw the pictures, add the tables of registries, and connect the hooks before and after napoleon's."""
    from pictures import draw_all
    from registries import Registry

    draw_all(HERE / "_pictures")
    app.add_directive("registry", Registry)
    for hook, priority in ((_notes, 1), (_keep, 2), (_restore, 900)):
        app.connect("autodoc-process-docstring", hook, priority=priority)
