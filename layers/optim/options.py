"""The options of a registered optimizer or learning-rate schedule, read from its signature and its docstring.

The registries of this package call `options_of`. The configuration makes keys of the options, so that an option is
declared once, where it is used.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Option:
    """One option of a registered class or function, whose values a configuration file can hold.

    Parameters
    ----------
    name : str
        Name of the keyword argument.
    annotation : object
        Type of its values: bool, int, float, str, a literal, or a tuple or union of these.
    default : object
        Value of an option that is not given.
    description : str
        Its meaning, in the words of the docstring. Empty if the docstring has none.
    """

    name: str
    annotation: object
    default: object
    description: str


def options_of(item: Callable[..., object], without: frozenset[str] = frozenset()) -> dict[str, Option]:
    """Return the options of a class or a function by name.

    Parameters
    ----------
    item : callable
        A function, or a class, whose constructor is read, and its base classes' as long as ``**options`` are passed on.
    without : frozenset of str
        Names to leave out.

    Returns
    -------
    dict of str to Option
        Keyword arguments with a default, whose type a configuration file can hold.
    """
    found: dict[str, Option] = {}
    meanings: dict[str, str] = {}
    functions = list(_constructors(item)) if isinstance(item, type) else [item]
    for owner in item.__mro__ if isinstance(item, type) else [item]:
        meanings = descriptions(owner.__doc__ or "") | meanings
    for function in functions:
        hints = get_type_hints(function)
        for name, parameter in inspect.signature(function).parameters.items():
            plain = parameter.default is not parameter.empty and is_plain(hints.get(name))
            if plain and name not in found and name not in without:
                found[name] = Option(name, hints[name], parameter.default, meanings.get(name, ""))
    return found


def _constructors(item: type) -> Iterator[Callable[..., object]]:
    """Yield the constructors that a class calls, its own first, while they take any keyword arguments."""
    for owner in item.__mro__:
        if "__init__" not in vars(owner) or owner is object:
            continue
        constructor: Callable[..., object] = vars(owner)["__init__"]
        yield constructor
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(constructor).parameters.values()):
            return


def is_plain(annotation: object) -> bool:
    """Say whether a configuration file can hold the values of a type."""
    if annotation in (bool, int, float, str, NoneType) or annotation is Ellipsis:
        return True
    if get_origin(annotation) is Literal:
        return True
    return get_origin(annotation) in (tuple, list, Union, UnionType) and all(map(is_plain, get_args(annotation)))


def summary(item: Callable[..., object]) -> str:
    """Return the first line of the docstring of a class or a function."""
    return (inspect.getdoc(item) or "").partition("\n")[0]


def descriptions(docstring: str) -> dict[str, str]:
    """Return what a numpydoc docstring says of each parameter, by name, on one line."""
    section = re.search(r"^Parameters\n-+\n(.*?)(?:\n\n\S+[^\n]*\n-+\n|\Z)", inspect.cleandoc(docstring), re.S | re.M)
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", section[1] if section else ""):
        names, _, text = entry.partition("\n")
        found |= dict.fromkeys(names.partition(" : ")[0].split(", "), " ".join(text.split()))
    return found
