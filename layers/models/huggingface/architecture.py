"""What an architecture of Hugging Face is in our terms, as data: keys of its configuration and names of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

from colossal_mpi.errors import ConfigError
from colossal_mpi.layers.models.huggingface.axes import Entry

Table = dict[str, Any]

ACTIVATIONS = {
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Our name of each of their activations that there is."""


@dataclass(frozen=True)
class Key:
    """One key of ``config.json`` that says what is computed.

    Parameters
    ----------
    theirs : str
    ours : str, optional
        The field of our configuration. Without one, the key must have one of the `values`.
    default : optional
        What transformers takes where the file has no such key.
    values : mapping, optional
        Our value for each of theirs that can be run; without it, any value of one of `kinds` is taken as it is.
    kinds : tuple of type
    missing : callable, optional
        Of our configuration: their value where ours is None.
    """

    theirs: str
    ours: str | None = None
    default: Any = None
    values: Mapping[Any, Any] | None = None
    kinds: tuple[type, ...] = (int,)
    missing: Callable[[Any], Any] | None = None

    def read(self, table: Table) -> Any:
        """Return our value.

        Raises
        ------
        ConfigError
            If theirs cannot be run.
        """
        value = table.get(self.theirs, self.default)
        if self.values is None:
            if type(value) not in self.kinds:
                kinds = " or ".join("null" if kind is type(None) else kind.__name__ for kind in self.kinds)
                raise ConfigError(f"{self.theirs}={value!r} cannot be run: it must be {kinds}")
            return value
        if not isinstance(value, str | int | float | None) or value not in self.values:
            known = " or ".join(map(repr, self.values))
            raise ConfigError(f"{self.theirs}={value!r} cannot be run: it must be {known}")
        return self.values[value]

    def write(self, config: Any) -> Any:
        """Return their value for a configuration of ours, or the one that is meant where there is no field.

        Raises
        ------
        ConfigError
            If they have no such value.
        """
        ours = getattr(config, self.ours) if self.ours else None
        if self.values is None:
            return self.missing(config) if ours is None and self.missing else ours
        theirs = [value for value, mine in self.values.items() if self.ours is None or mine == ours]
        if not theirs:
            raise ConfigError(f"{self.ours}={ours!r} has no name in Hugging Face's {self.theirs}")
        return theirs[0]


def whole(theirs: str, ours: str, default: int | None, missing: Callable[[Any], Any] | None = None) -> Key:
    """Return the key of an integer."""
    return Key(theirs, ours, default, missing=missing)


def optional(theirs: str, ours: str, default: int | None) -> Key:
    """Return the key of an integer that may be null."""
    return Key(theirs, ours, default, kinds=(int, type(None)))


def real(theirs: str, ours: str, default: float) -> Key:
    """Return the key of a real number."""
    return Key(theirs, ours, default, kinds=(float, int))


def flag(theirs: str, ours: str, default: bool) -> Key:
    """Return the key of something that is or is not there."""
    return Key(theirs, ours, default, kinds=(bool,))


def fixed(theirs: str, default: Any, *values: Any) -> Key:
    """Return a key that must have the first of `values`, or another that means the same."""
    return Key(theirs, None, default, dict.fromkeys(values))


def _as_it_is(table: Table, extra: Table | None = None) -> Table:
    return table


_OF_TRAINING = ("seed", "dtype", "std", "dropout", "drop_path")
"""Fields that change nothing of what a trained model computes."""


@dataclass(frozen=True)
class Architecture:
    """Both directions between a model of ours and the directories of one ``model_type``.

    Parameters
    ----------
    name : str
        The ``model_type`` that is written.
    classes : tuple of str
        Classes of transformers with exactly these weights; the first is written.
    base : str
        Prefix of the body's tensors, which directories of the body alone leave out.
    keys : tuple of Key
        Every key that changes what is computed; others are passed over.
    entries : tuple of Entry
        Every weight that a model may have.
    passed : tuple of str
        Patterns of tensors that have no part in the result.
    twins : mapping of str to str
        By the name of a tensor, that of the one that is the same where weights are tied, and which may stand there too.
    normal, spelled : callable
        From the spellings of a table that are read to the one that `keys` know, and from that, and the table that a
        directory had before, to what is written.
    """

    name: str
    classes: tuple[str, ...]
    base: str
    keys: tuple[Key, ...]
    entries: tuple[Entry, ...]
    passed: tuple[str, ...] = ()
    twins: Mapping[str, str] = field(default_factory=dict)
    normal: Callable[[Table], Table] = _as_it_is
    spelled: Callable[[Table, Table], Table] = _as_it_is

    def fields(self, table: Table) -> Table:
        """Return the fields of our configuration that a ``config.json`` gives.

        Raises
        ------
        ConfigError
            If it asks for what cannot be run, by key and value.
        """
        table = self.normal(dict(table))
        read = [(key.ours, key.read(table)) for key in self.keys]
        return {ours: value for ours, value in read if ours is not None}

    def table(self, config: Any, extra: Mapping[str, Any] | None = None) -> Table:
        """Return the ``config.json`` of a configuration of ours, the inverse of `fields`, over further keys.

        Raises
        ------
        ConfigError
            If it says what transformers cannot run.
        """
        known, extra = {key.ours for key in self.keys}, dict(extra or {})
        for ours in fields(config):
            value = getattr(config, ours.name)
            if ours.name not in (*known, *_OF_TRAINING) and value != ours.default:
                raise ConfigError(f"{ours.name}={value!r} has no place in a {self.name} of Hugging Face")
        table = {"architectures": [self.classes[0]], "model_type": self.name}
        return extra | self.spelled(table | {key.theirs: key.write(config) for key in self.keys}, extra)

    def named(self, layers: int) -> Iterator[Entry]:
        """Yield the entries of a model of so many blocks."""
        for entry in self.entries:
            if "{i}" in entry.ours:
                yield from map(entry.of_block, range(layers))
            else:
                yield entry

    def is_passed(self, name: str) -> bool:
        """Say whether a tensor need have no place in the model."""
        return name in self.twins.values() or any(fnmatchcase(name, pattern) for pattern in self.passed)

    def spellings(self, name: str) -> list[str]:
        """Return the names under which a tensor may stand: its own, and those of directories of the body alone."""
        names = [name, name.removeprefix(f"{self.base}.")]
        old = [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")]
        return names + [n.replace(new, was) for n in names for new, was in old if new in n]
