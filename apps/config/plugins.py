"""Plugins: a user's Python files that register tensor modes, optimizers, schedules, kernel providers or models.

The key ``run.plugins`` names them. `validate` loads them before it checks a configuration, so that what they register
is a valid choice; ``apps.training`` loads a checkpoint's plugins before it makes the checkpoint's model.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from colossal_mpi.errors import ConfigError

_loaded: dict[str, ModuleType] = {}  # by the real path of the file, or by the import path


def load_plugins(plugins: Iterable[str]) -> None:
    """Execute each plugin once in this process; the second time nothing happens.

    Parameters
    ----------
    plugins : iterable of str
        Python files, whose names end in ``.py``, or modules by their import path.

    Raises
    ------
    ConfigError
        If a file cannot be read or its code fails. The message names the plugin.
    """
    for plugin in absolute(list(plugins)):
        is_file = plugin.endswith(".py")
        one = os.path.realpath(plugin) if is_file else plugin  # a file that is given by two paths is loaded once
        if one in _loaded:
            continue
        if is_file:
            _check_readable(plugin)
        try:
            _loaded[one] = _executed(plugin) if is_file else importlib.import_module(plugin)
        except (Exception, SystemExit) as problem:  # whatever the user's code raises
            raise ConfigError(f"run.plugins: {plugin} failed with {type(problem).__name__}: {problem}") from problem


def absolute(plugins: Sequence[str]) -> list[str]:
    """Return plugins with absolute paths of their files, so that a resumed run finds them from any directory."""
    return [os.path.abspath(plugin) if plugin.endswith(".py") else plugin for plugin in plugins]


def _check_readable(path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as problem:
        raise ConfigError(f"run.plugins: cannot read {path}: {problem.strerror or problem}") from None


def _executed(path: str) -> ModuleType:
    name = f"colossal_mpi_plugin_{len(_loaded)}_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pydantic look a class's module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
