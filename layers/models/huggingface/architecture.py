"""The mapping of a model onto Hugging Face directories, as data: keys of ``config.json`` and names of tensors.

The file of each model fills in one `Architecture`, and `from_pretrained` and `save_pretrained` read it in the two
directions. "Ours" is a field or a weight of a model of this package, "theirs" its counterpart in transformers.

``WeightMap("qkv.weight", "htad", ("q.weight", "k.weight", "v.weight"), "(ad)h")`` says that our weight
``qkv[h, t, a, d]`` is stored as three tensors ``[a d, h]``, one for each t. Letters in brackets are merged into one
dim, ``1`` is a dim of size 1, and the letter that the dims of theirs lack counts their tensors. A letter whose size the
architecture does not know stands in the names: ``WeightMap("down.weight", "efh", ("experts.{e}.w2.weight",), "hf")``
says that each expert e has a tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import numpy as np

from colossal_mpi.errors import ConfigError
from colossal_mpi.layers.activation import GATED
from colossal_mpi.layers.models.limits import beyond_limits
from colossal_mpi.layout import Box, box_shape

Table = dict[str, Any]
"""The contents of a ``config.json``."""

ACTIVATIONS = {
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu_fast": "gelu-tanh",
    "gelu_accurate": "gelu-tanh",
    "gelu_python_tanh": "gelu-tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "quick_gelu": "gelu-sigmoid",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""Our name for each activation of transformers that we implement; of several names the first is written."""

GATED_ACTIVATIONS = {
    theirs: gated for theirs, ours in ACTIVATIONS.items() for gated, gate in GATED.items() if gate == ours
}
"""Our name for the gated form of each activation of transformers."""


@dataclass(frozen=True)
class ConfigKey:
    """One key of ``config.json`` that changes what the model computes.

    Parameters
    ----------
    theirs : str
        The key.
    ours : str, optional
        The field of our configuration. A key without a field must have one of the `values`.
    default : optional
        The value that transformers assumes where the file lacks the key.
    values : mapping, optional
        Our value for each of their values that we can run. Without it every value of one of `kinds` is taken as it is.
    kinds : tuple of type
        The types that a value may have.
    missing : callable, optional
        A function of our configuration that returns their value where ours is None.
    """

    theirs: str
    ours: str | None = None
    default: object = None
    values: Mapping[Any, Any] | None = None
    kinds: tuple[type, ...] = (int,)
    missing: Callable[[Any], object] | None = None

    def read(self, table: Table) -> object:
        """Return our value for the value in a ``config.json``; raise ConfigError if we cannot run it."""
        value = table.get(self.theirs, self.default)
        if self.values is None:
            if type(value) not in self.kinds:
                kinds = " or ".join("null" if kind is type(None) else kind.__name__ for kind in self.kinds)
                raise ConfigError(f"{self.theirs}={value!r} cannot be run: it must be {kinds}")
            problem = beyond_limits({self.ours or self.theirs: value})
            if problem is not None:
                raise ConfigError(f"{self.theirs}={value!r} cannot be run: {problem}")
            return value
        if not isinstance(value, str | int | float | None) or value not in self.values:
            known = " or ".join(map(repr, self.values))
            raise ConfigError(f"{self.theirs}={value!r} cannot be run: it must be {known}")
        return self.values[value]

    def write(self, config: object) -> object:
        """Return their value for a configuration of ours; raise ConfigError if they have no such value."""
        ours = getattr(config, self.ours) if self.ours else None
        if self.values is None:
            return self.missing(config) if ours is None and self.missing else ours
        theirs = [value for value, mapped in self.values.items() if self.ours is None or mapped == ours]
        if not theirs:
            raise ConfigError(f"{self.ours}={ours!r} has no name in Hugging Face's {self.theirs}")
        return theirs[0]


def integer(theirs: str, ours: str, default: int, missing: Callable[[Any], object] | None = None) -> ConfigKey:
    """Return the key of an integer.

    Parameters
    ----------
    theirs : str
        The key of ``config.json``.
    ours : str
        The field of our configuration.
    default : int
        The value that transformers assumes where the file lacks the key.
    missing : callable, optional
        A function of our configuration that returns their value where ours is None.

    Returns
    -------
    ConfigKey
        The key.
    """
    return ConfigKey(theirs, ours, default, missing=missing)


def optional_integer(
    theirs: str, ours: str, default: int | None, missing: Callable[[Any], object] | None = None
) -> ConfigKey:
    """Return the key of an integer that may be null.

    Parameters
    ----------
    theirs : str
        The key of ``config.json``.
    ours : str
        The field of our configuration.
    default : int or None
        The value that transformers assumes where the file lacks the key.
    missing : callable, optional
        A function of our configuration that returns their value where ours is None.

    Returns
    -------
    ConfigKey
        The key.
    """
    return ConfigKey(theirs, ours, default, kinds=(int, type(None)), missing=missing)


def real(theirs: str, ours: str, default: float) -> ConfigKey:
    """Return the key of a real number."""
    return ConfigKey(theirs, ours, default, kinds=(float, int))


def boolean(theirs: str, ours: str, default: bool) -> ConfigKey:
    """Return the key of a boolean."""
    return ConfigKey(theirs, ours, default, kinds=(bool,))


def fixed(theirs: str, default: object, *values: object) -> ConfigKey:
    """Return a key that must have one of `values`, all of which mean the same; the first is written."""
    return ConfigKey(theirs, None, default, dict.fromkeys(values))


Range = tuple[int, int]


@dataclass(frozen=True)
class BoxPair:
    """A box of our weight and the box of the tensor of theirs that stores the same elements.

    Parameters
    ----------
    name : str
        The name of their tensor.
    ours, theirs : Box
        The two boxes.
    lengths : tuple of int
        The lengths of the letters of their box, merged dims taken apart.
    order : tuple of int
        For each letter of ours that they have, its index among `lengths`.
    """

    name: str
    ours: Box
    theirs: Box
    lengths: tuple[int, ...]
    order: tuple[int, ...]

    def from_theirs(self, values: np.ndarray) -> np.ndarray:
        """Return the elements of their box in the shape of ours."""
        return values.reshape(self.lengths).transpose(self.order).reshape(box_shape(self.ours))

    def to_theirs(self, values: np.ndarray) -> np.ndarray:
        """Return the elements of our box in the shape of theirs: the inverse of `from_theirs`."""
        apart = values.reshape([self.lengths[place] for place in self.order])
        return apart.transpose(np.argsort(self.order)).reshape(box_shape(self.theirs))


@dataclass(frozen=True)
class WeightMap:
    """One weight of ours and the tensors of theirs that store it.

    Parameters
    ----------
    ours : str
        Name of our parameter; ``{i}`` stands for the number of a block.
    letters : str
        A letter for each dim of our parameter.
    theirs : tuple of str
        Names of their tensors: one for each index of the letter that `dims` lacks, or a single one. Another letter that
        `dims` lacks stands in all names in braces, in place of its index.
    dims : str
        The dims of each of their tensors.
    """

    ours: str
    letters: str
    theirs: tuple[str, ...]
    dims: str

    @property
    def groups(self) -> list[str]:
        """The letters that are merged into each dim of theirs."""
        return [dim.strip("()1") for dim in re.findall(r"\([a-z]+\)|[a-z1]", self.dims)]

    def of_block(self, i: int) -> WeightMap:
        """Return the map of the same weight in block `i`."""
        ours, *theirs = (name.replace("{i}", str(i)) for name in (self.ours, *self.theirs))
        return WeightMap(ours, self.letters, tuple(theirs), self.dims)

    def names(self, ours: Sequence[int]) -> list[str]:
        """Return the names of all of their tensors, given the shape of our weight."""
        whole = [(0, size) for size in ours]
        return [name for name, _ in self._stacked(dict(zip(self.letters, whole, strict=True)))]

    def _stacked(self, ranges: Mapping[str, Range]) -> Iterator[tuple[str, dict[str, Range]]]:
        """Yield the name of each tensor that given ranges of our letters meet, with the indices that it stands for."""
        stack = [x for x in self.letters if x not in "".join(self.groups)]
        for indices in product(*(range(*ranges[x]) for x in stack)):
            number = dict(zip(stack, indices, strict=True))
            counted = [x for x in stack if f"{{{x}}}" not in self.theirs[0]]
            name = self.theirs[number[counted[0]] if counted else 0]
            for x in stack:
                name = name.replace(f"{{{x}}}", str(number[x]))
            yield name, {x: (i, i + 1) for x, i in number.items()}

    def shape(self, ours: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of each of their tensors, given the shape of our weight."""
        sizes = dict(zip(self.letters, ours, strict=True))
        return tuple(math.prod(sizes[x] for x in group) for group in self.groups)

    def box_pairs(self, shape: Sequence[int], box: Box) -> Iterator[BoxPair]:
        """Yield the pairs of boxes that make up a box of our weight of this global shape.

        The pairs are as few as possible, and each box of theirs is contiguous along each dim.
        """
        if 0 in box_shape(box):
            return
        sizes, groups = dict(zip(self.letters, shape, strict=True)), self.groups
        ranges = dict(zip(self.letters, box, strict=True))
        flat = "".join(groups)
        order = tuple(flat.index(x) for x in self.letters if x in flat)
        intervals = [list(_intervals(group, sizes, ranges)) for group in groups]
        for name, number in self._stacked(ranges):
            for chosen in product(*intervals):
                covered = dict(number)
                for _, letters in chosen:
                    covered |= letters
                lengths = tuple(covered[x][1] - covered[x][0] for x in flat)
                ours, theirs = tuple(covered[x] for x in self.letters), tuple(interval for interval, _ in chosen)
                yield BoxPair(name, ours, theirs, lengths, order)


def _intervals(
    group: str, sizes: Mapping[str, int], ranges: Mapping[str, Range]
) -> Iterator[tuple[Range, dict[str, Range]]]:
    """Yield the intervals of a merged dim that given ranges of its letters cover, each with its ranges of letters."""
    inner = math.prod(sizes[x] for x in group[1:])
    if not group:
        yield (0, 1), {}
    elif all(ranges[x] == (0, sizes[x]) for x in group[1:]):
        start, stop = ranges[group[0]]
        yield (start * inner, stop * inner), {x: ranges[x] for x in group}
    else:
        for i in range(*ranges[group[0]]):
            for (start, stop), rest in _intervals(group[1:], sizes, ranges):
                yield (i * inner + start, i * inner + stop), {group[0]: (i, i + 1), **rest}


def tensor(ours: str, letters: str, theirs: str, dims: str | None = None) -> WeightMap:
    """Return the map of a weight that is stored as one tensor.

    Parameters
    ----------
    ours : str
        Name of our parameter.
    letters : str
        A letter for each of its dims.
    theirs : str
        Name of the tensor.
    dims : str, optional
        The letters of the tensor's dims; by default the same.

    Returns
    -------
    WeightMap
        The map.
    """
    return WeightMap(ours, letters, (theirs,), dims or letters)


def norm(ours: str, theirs: str) -> tuple[WeightMap, WeightMap]:
    """Return the maps of the gain and the bias of a norm."""
    return tensor(f"{ours}.gain", "h", f"{theirs}.weight"), tensor(f"{ours}.bias", "h", f"{theirs}.bias")


def linear(ours: str, letters: str, theirs: Sequence[str], dims: str, summed: str = "h") -> tuple[WeightMap, WeightMap]:
    """Return the maps of the weight and the bias of a linear layer.

    Parameters
    ----------
    ours : str
        Prefix of the names of our parameters.
    letters : str
        A letter for each dim of our weight.
    theirs : sequence of str
        Prefixes of the names of the tensors that together are our weight.
    dims : str
        The letters of a tensor's dims.
    summed : str
        The letters over which the product sums; the bias lacks them.

    Returns
    -------
    weight, bias : WeightMap
        The maps.
    """
    weights, biases = (tuple(f"{name}.{kind}" for name in theirs) for kind in ("weight", "bias"))
    kept, left = ("".join(x for x in text if x not in summed).replace("()", "") for text in (letters, dims))
    return WeightMap(f"{ours}.weight", letters, weights, dims), WeightMap(f"{ours}.bias", kept, biases, left)


def count_labels(table: Table) -> int:
    """Return the number of labels of a classifier, of which transformers assumes two if none are named."""
    return len(table.get("id2label") or range(2))


def label_names(count: int, extra: Table) -> Table:
    """Return the keys that name this number of labels: as `extra` has them, or numbered."""
    if len(extra.get("id2label") or {}) == count:
        return {}
    names = {str(i): f"LABEL_{i}" for i in range(count)}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


def _unchanged(table: Table, other: object = None) -> Table:
    return table


_TRAINING_ONLY = (
    *("seed", "dtype", "std", "dropout", "drop_path"),
    *("expert_balance", "expert_balance_over", "expert_z_loss"),
)
"""Fields of our configurations that do not change what a trained model computes."""


@dataclass(frozen=True)
class Architecture:
    """The mapping between a model of ours and the directories of one ``model_type``, in both directions.

    Parameters
    ----------
    model_type : str
        The value of this key in ``config.json``.
    classes : tuple of str
        Classes of transformers with exactly these weights; the first is written.
    base : str
        Prefix of the names of the body's tensors. Directories that store the body alone leave it out.
    keys : tuple of ConfigKey
        Every key that changes what is computed; other keys are ignored.
    weights : tuple of WeightMap
        Every weight that a model may have.
    ignored : tuple of str
        Patterns of the names of tensors that do not enter the result.
    tied : mapping of str to str
        From the name of a tensor to the name of its copy, which a directory with tied weights may store, too.
    doubled : mapping of str to str
        From the name of a tensor to the name under which it is stored a second time, or instead.
    implied : mapping
        Fields of our configuration that are the same in every directory, with their values.
    normalize : callable
        A function from a table as it is in the file to one with the `keys`.
    choose : callable
        A function from such a table and the names of the tensors, as `unwrapped` returns them, to a table with the keys
        of the head. Models with a single head need none.
    denormalize : callable
        A function from a table with the `keys` and the table that the directory had before to the one to write.
    """

    model_type: str
    classes: tuple[str, ...]
    base: str
    keys: tuple[ConfigKey, ...]
    weights: tuple[WeightMap, ...]
    ignored: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    doubled: Mapping[str, str] = field(default_factory=dict)
    implied: Table = field(default_factory=dict)
    normalize: Callable[[Table], Table] = _unchanged
    choose: Callable[[Table, Container[str]], Table] = _unchanged
    denormalize: Callable[[Table, Table], Table] = _unchanged

    def read_config(self, table: Table, names: Container[str]) -> Table:
        """Return the fields of our configuration that a ``config.json`` and the names of the tensors determine.

        Raises
        ------
        ConfigError
            If it asks for something that we cannot run; the message names key and value.
        """
        table = self.choose(self.normalize(dict(table)), names)
        values = [(key.ours, key.read(table)) for key in self.keys]
        return {ours: value for ours, value in values if ours is not None} | self.implied

    def write_config(self, config: Any, extra: Mapping[str, Any] | None = None) -> Table:
        """Return the ``config.json`` of a configuration of ours, the inverse of `read_config`, and the `extra` keys.

        Raises
        ------
        ConfigError
            If transformers cannot run what the configuration asks for.
        """
        known, extra = {key.ours for key in self.keys}, dict(extra or {})
        for ours in fields(config):
            value = getattr(config, ours.name)
            if ours.name in _TRAINING_ONLY:
                continue
            if value != self.implied.get(ours.name, value):
                need = self.implied[ours.name]
                raise ConfigError(f"{ours.name}={value!r} has no place in a {self.model_type}: it must be {need!r}")
            if ours.name in self.implied:
                continue
            if ours.name not in known and value != ours.default:
                raise ConfigError(f"{ours.name}={value!r} has no place in a {self.model_type} of Hugging Face")
        table = {"architectures": [self.classes[0]], "model_type": self.model_type}
        return extra | self.denormalize(table | {key.theirs: key.write(config) for key in self.keys}, extra)

    def weights_of(self, layers: int) -> Iterator[WeightMap]:
        """Yield the maps of all weights of a model with this number of blocks."""
        for weight in self.weights:
            if "{i}" in weight.ours:
                yield from map(weight.of_block, range(layers))
            else:
                yield weight

    def is_ignored(self, name: str) -> bool:
        """Return whether a tensor need not have a counterpart in the model; the body's prefix may be left out."""
        names = (name, f"{self.base}.{name}")
        return name in self.tied.values() or any(fnmatchcase(n, pattern) for n in names for pattern in self.ignored)

    def spellings(self, name: str) -> list[str]:
        """Return the names that a tensor may have: its own, the one without the body's prefix, and older ones."""
        names = [name, name.removeprefix(f"{self.base}.")]
        old = [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")]
        return names + [n.replace(new, was) for n in names for new, was in old if new in n]


_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\."
)
"""What torch.compile, DataParallel, FSDP, recomputation and peft put into the names of the modules that they wrap."""


def unwrapped(name: str) -> str:
    """Return the name of a tensor without what wrappers of its modules have put into it.

    Examples
    --------
    >>> unwrapped("module._orig_mod.transformer.wte.weight")
    'transformer.wte.weight'
    """
    return _WRAPPERS.sub("", name.removeprefix("base_model.model."))
