"""A command of ``colossal-mpi`` is one dataclass: its fields are the options, their types and help, and it runs itself.

The commands in ``apps.cli`` and the benchmarks in ``apps.bench`` are such classes. typer makes the parser and the help
from them; `Command.arguments` turns an instance back into words for the ranks that a command starts.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import ArgumentInfo, OptionInfo

GridAxes = Annotated[str | None, typer.Option(help="Axes of the grid, outermost first: data=2,row=2,col=2.")]
"""The option ``--grid``."""
Settings = Annotated[list[str], typer.Option("--set", help="section.key=value; may be repeated.", show_default=False)]
"""The option ``--set``, which changes keys of a configuration."""
Plugins = Annotated[
    list[str],
    typer.Option("--plugin", help="Load this file, in place of run.plugins; may be repeated.", show_default=False),
]
"""The option ``--plugin``: Python files that register modes, optimizers, schedules or models."""
JsonFile = Annotated[Path | None, typer.Option(help="Write the rows to this file.")]
"""The option ``--json``."""


class Command(ABC):
    """A command with its options.

    A subclass is a frozen dataclass with keyword-only fields. Each field is an ``Annotated`` type with one
    ``typer.Option`` or ``typer.Argument``; the default of the field is the default of the option. The docstring of the
    subclass is the help. ``__post_init__`` raises `ConfigError` for invalid values.

    Examples
    --------
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Greet(Command):
    ...     '''Print a greeting.'''
    ...
    ...     example = "colossal-mpi greet --times 2 Ada"
    ...     name: Annotated[str, typer.Argument(help="Whom to greet.")]
    ...     times: Annotated[int, typer.Option(help="How often.")] = 1
    ...
    ...     def run(self) -> int:
    ...         print(f"Hello, {self.name}! " * self.times)
    ...         return 0
    >>> Greet(name="Ada", times=2).arguments()
    ['--times', '2', 'Ada']
    """

    example: ClassVar[str]
    """A line for a shell, shown below the help."""
    context_settings: ClassVar[dict[str, object]] = {}
    """Settings of click for this command."""

    @abstractmethod
    def run(self) -> int:
        """Do what the options say, and return the exit code."""

    @classmethod
    def parser(cls, name: str) -> TyperCommand:
        """Return the parser that makes an instance from words and runs it."""

        def call(**values: Any) -> None:
            raise typer.Exit(cls(**values).run())

        parameters = [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=hint)
            for field, hint, _ in _fields(cls)
        ]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
        settings = dict(cls.context_settings)
        help_text = inspect.cleandoc(cls.__doc__ or "")
        app.command(name, help=help_text, epilog=f"Example: {cls.example}", context_settings=settings)(call)
        return typer.main.get_command(app)  # type: ignore[return-value]  # one command: no group is made

    def arguments(self) -> list[str]:
        """Return the words that make an equal instance; options that have their defaults are left out."""
        options, positional = list[str](), list[str]()
        for field, _, info in _fields(type(self)):
            value = getattr(self, field.name)
            if isinstance(info, ArgumentInfo):
                positional += [] if value is None else _words(value)
            elif value != _default(field):
                options += _option(field.name, info, value)
        interspersed = type(self).context_settings.get("allow_interspersed_args", True)
        after = positional if interspersed else positional[:1]  # the words that a parser would take for options
        return options + (["--"] if any(word.startswith("-") for word in after) else []) + positional


def _fields(command: type[Command]) -> Iterator[tuple[dataclasses.Field[Any], Any, ArgumentInfo | OptionInfo]]:
    """Yield the fields, their annotated types and what typer has to know about them."""
    hints = get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):  # type: ignore[arg-type]  # every subclass is a dataclass
        info = next(one for one in get_args(hints[field.name]) if isinstance(one, ArgumentInfo | OptionInfo))
        yield field, hints[field.name], info


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field; `inspect.Parameter.empty` if its option is required."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def _option(name: str, info: OptionInfo, value: Any) -> list[str]:
    """Return the words that give an option a value."""
    # From Option("--json"), typer takes the first name as the default until it sees the default of the field.
    declared = [word for word in (info.default, *(info.param_decls or ())) if isinstance(word, str)]
    flag = declared[0] if declared else f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [word for one in _words(value) for word in (flag, one)]


def _words(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]


class LazyCommand(TyperCommand):
    """A command whose module is imported when it is called. A list of commands needs only its name and its summary.

    Parameters
    ----------
    name : str
        The word that calls it.
    where : str
        ``module:Class`` of a `Command`.
    summary : str
        The first sentence of its help.
    """

    def __init__(self, name: str, where: str, summary: str) -> None:
        super().__init__(name, help=summary)
        self.where = where

    def load(self) -> TyperCommand:
        """Import the command and return its parser."""
        module, _, attribute = self.where.partition(":")
        found: type[Command] = getattr(importlib.import_module(module), attribute)
        return found.parser(str(self.name))

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse the words of a call with the parser of the command."""
        return self.load().make_context(info_name, args, parent, **extra)
