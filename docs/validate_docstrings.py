"""Check the docstrings of all public names with numpydoc's own validation: ``python docs/validate_docstrings.py``.

A name is public if the ``__all__`` of a package has it; the public methods and properties of a public class are public,
too. A method without a docstring has the docstring of the base class. ``--list`` prints the public names.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from types import ModuleType

from numpydoc.validate import validate

import colossal_mpi

NOT_ASKED = {"EX01", "SA01", "ES01", "GL01", "GL02", "GL03", "SS06"}
"""The checks of examples, See Also, the extended summary and the summary's place are left to the author or to ruff."""


def packages() -> Iterator[ModuleType]:
    """Yield ``colossal_mpi`` and all packages below it."""
    yield colossal_mpi
    for found in pkgutil.walk_packages(colossal_mpi.__path__, "colossal_mpi."):
        if found.ispkg:
            yield importlib.import_module(found.name)


def public_names() -> dict[str, str]:
    """Return the paths of all public objects that have docstrings, each once, by the name of their definition."""
    names: dict[str, str] = {}
    for package in packages():
        for name in getattr(package, "__all__", ()):
            item = getattr(package, name)
            if inspect.isclass(item) or inspect.isroutine(item):
                names.setdefault(f"{item.__module__}.{item.__qualname__}", f"{package.__name__}.{name}")
    return names


def paths() -> Iterator[str]:
    """Yield the import paths of public functions, classes and their public members."""
    for path in public_names().values():
        yield path
        module, name = path.rsplit(".", 1)
        item = getattr(importlib.import_module(module), name)
        if inspect.isclass(item):
            for member, value in vars(item).items():
                if not member.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)):
                    inherits = value.__doc__ is None and inspect.getdoc(getattr(item, member)) is not None
                    if not inherits:
                        yield f"{path}.{member}"


def _is_protocol(path: str) -> bool:
    """Say whether a path names a protocol, whose constructor takes nothing, whatever its signature says."""
    module, name = path.rsplit(".", 1)
    return bool(vars(getattr(sys.modules.get(module), name, object)).get("_is_protocol", False))


def main() -> int:
    """Print a line for each fault; return 1 if there is any."""
    if "--list" in sys.argv:
        print(*paths(), sep="\n")
        return 0
    only = tuple(argument for argument in sys.argv[1:] if not argument.startswith("-"))
    faults = 0
    for path in paths():
        if only and not path.startswith(only):
            continue
        found = validate(path)
        for code, message in found["errors"]:
            if code not in NOT_ASKED and not (code == "PR01" and _is_protocol(path)):
                faults += 1
                print(f"{found['file']}:{found['file_line']}: {path}: {code} {message}")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
