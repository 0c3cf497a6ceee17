"""Kernel providers: their registry, and the choice of one for each grid.

The trainer chooses with `use`. Layers and optimizers ask `of` for the kernels of the grid that their arrays lie on.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from weakref import WeakKeyDictionary

from colossal_mpi import comm
from colossal_mpi.errors import OptionError
from colossal_mpi.grid import Grid
from colossal_mpi.layers.kernels import reference

AUTO = "auto"
"""The name that chooses PyTorch's kernels where every rank can import them, and the reference elsewhere."""


class Kernels:
    """The local maths of the layers as one provider computes it: the provider's own functions, else the reference's.

    Parameters
    ----------
    name : str
        Name of the provider.
    module : module
        Module with the provider's functions. It need not have all of them.

    Attributes
    ----------
    name : str
        Name of the provider.

    Examples
    --------
    >>> kernels.of(x.grid).gelu(x.local)
    """

    def __init__(self, name: str, module: ModuleType) -> None:
        self.name = name
        for kernel in kernel_names():
            if hasattr(module, kernel):
                setattr(self, kernel, getattr(module, kernel))

    gelu = staticmethod(reference.gelu)
    gelu_backward = staticmethod(reference.gelu_backward)
    gelu_erf = staticmethod(reference.gelu_erf)
    gelu_erf_backward = staticmethod(reference.gelu_erf_backward)
    silu = staticmethod(reference.silu)
    silu_backward = staticmethod(reference.silu_backward)
    relu = staticmethod(reference.relu)
    relu_backward = staticmethod(reference.relu_backward)
    tanh = staticmethod(reference.tanh)
    tanh_backward = staticmethod(reference.tanh_backward)
    norm = staticmethod(reference.norm)
    norm_backward = staticmethod(reference.norm_backward)
    attention = staticmethod(reference.attention)
    attention_backward = staticmethod(reference.attention_backward)
    attention_merge = staticmethod(reference.attention_merge)
    rotate = staticmethod(reference.rotate)
    lookup = staticmethod(reference.lookup)
    lookup_backward = staticmethod(reference.lookup_backward)
    unfold = staticmethod(reference.unfold)
    fold = staticmethod(reference.fold)
    max_pool = staticmethod(reference.max_pool)
    max_pool_backward = staticmethod(reference.max_pool_backward)
    mean_pool = staticmethod(reference.mean_pool)
    mean_pool_backward = staticmethod(reference.mean_pool_backward)
    peak = staticmethod(reference.peak)
    cross_entropy_sums = staticmethod(reference.cross_entropy_sums)
    cross_entropy_losses = staticmethod(reference.cross_entropy_losses)
    cross_entropy_backward = staticmethod(reference.cross_entropy_backward)
    route = staticmethod(reference.route)
    route_backward = staticmethod(reference.route_backward)
    routing_sums = staticmethod(reference.routing_sums)
    sort_by_expert = staticmethod(reference.sort_by_expert)
    match_slots = staticmethod(reference.match_slots)
    fill_slots = staticmethod(reference.fill_slots)
    take_slots = staticmethod(reference.take_slots)
    adam = staticmethod(reference.adam)
    adamw = staticmethod(reference.adamw)


def kernel_names() -> list[str]:
    """Return the names of all kernels: a provider's module may define a function of each name."""
    return [name for name, value in vars(Kernels).items() if isinstance(value, staticmethod)]


@dataclass(frozen=True)
class Provider:
    """An entry of the registry of kernel providers.

    Parameters
    ----------
    module : str
        Import path of the module with the kernels. It is imported when the provider is first chosen.
    description : str
        One sentence for the help of the command line and the documentation.
    requires : str, optional
        Package that the module imports and that may be absent.
    """

    module: str
    description: str
    requires: str | None = None


PROVIDERS: dict[str, Provider] = {}
"""The kernel providers by name."""


def register_provider(name: str, module: str, description: str, requires: str | None = None) -> None:
    """Register a kernel provider, so that `use` and the configuration's ``parallel.kernels`` know it by name.

    Parameters
    ----------
    name : str
        Name of the provider in configurations and on the command line.
    module : str
        Import path of a module whose functions have the names, parameters and results of the kernels (`kernel_names`).
        The reference computes what the module lacks.
    description : str
        One sentence for the help of the command line and the documentation.
    requires : str, optional
        Package that the module imports and that may be absent.

    Raises
    ------
    OptionError
        If the name is taken.

    Examples
    --------
    >>> register_provider("jax", "my_package.jax_kernels", "JAX's compiled kernels.", requires="jax")
    """
    if name == AUTO or name in PROVIDERS:
        raise OptionError(f"kernels={name!r}: there is already a choice of this name")
    PROVIDERS[name] = Provider(module, description, requires)


def choices() -> dict[str, str]:
    """Return the names that `use` takes, each with one sentence that describes it.

    Returns
    -------
    dict of str to str
        ``"auto"`` first, then the registered providers.
    """
    automatic = "PyTorch's kernels where every rank can import them, else the reference."
    return {AUTO: automatic} | {name: entry.description for name, entry in PROVIDERS.items()}


_package = __name__.rpartition(".")[0]
register_provider("reference", f"{_package}.reference", "Formulas in the array API, for NumPy and CuPy.")
register_provider("torch", f"{_package}.torch", "PyTorch's kernels on the same memory.", requires="torch")
_reference = Kernels("reference", reference)
_chosen: WeakKeyDictionary[Grid, Kernels] = WeakKeyDictionary()


@cache
def load(provider: str) -> Kernels:
    """Return the kernels of a provider.

    Parameters
    ----------
    provider : str
        Name of a registered provider.

    Returns
    -------
    Kernels
        The same object on every call.

    Raises
    ------
    OptionError
        If the provider is not registered or what it requires cannot be imported.
    """
    _require_known(provider, PROVIDERS)
    if (reason := _obstacle(provider)) is not None:
        raise OptionError(_unavailable(provider, reason))
    return Kernels(provider, importlib.import_module(PROVIDERS[provider].module))


def use(provider: str, grid: Grid) -> str:
    """Choose the kernels for all layers and optimizers on a grid and on its sub-grids.

    Parameters
    ----------
    provider : str
        ``"auto"`` or the name of a registered provider.
    grid : Grid
        Grid whose ranks choose together: replicas stay equal to the bit only if all ranks compute them with the same
        kernels. Models of different providers need different grids, which may have the same ranks. Meta grids keep
        their own kernels, whatever is chosen.

    Returns
    -------
    str
        Name of the chosen provider; on a meta grid `provider` itself.

    Raises
    ------
    OptionError
        If the provider is not registered, or it is named and some rank cannot import its module.

    Notes
    -----
    **Communication:** one allgather of a flag over the whole grid.

    Examples
    --------
    >>> grid = Grid(data=4)
    >>> kernels.use("auto", grid)
    'torch'
    """
    _require_known(provider, choices())
    if grid.is_meta:
        return provider
    wanted = "torch" if provider == AUTO else provider
    # the obstacle of each rank -> the obstacles of all ranks: allgather
    obstacle = next((reason for reason in comm.collect(_obstacle(wanted), grid) if reason is not None), None)
    if obstacle is not None and provider != AUTO:
        raise OptionError(_unavailable(provider, obstacle))
    _chosen[grid] = load("reference" if obstacle is not None else wanted)
    return _chosen[grid].name


def of(grid: Grid) -> Kernels:
    """Return the kernels that were chosen for a grid or for the grid that it is a part of.

    Parameters
    ----------
    grid : Grid
        Grid that the arrays of a layer lie on.

    Returns
    -------
    Kernels
        The reference where nothing was chosen, and kernels without arithmetic on a meta grid.
    """
    if grid.is_meta:
        return _meta()
    chosen = _chosen.get(grid)
    if chosen is not None:
        return chosen
    return _reference if grid.parent is None else of(grid.parent)


@cache
def _meta() -> Kernels:
    return Kernels("meta", importlib.import_module(f"{_package}.meta"))


def _require_known(provider: str, known: Iterable[str]) -> None:
    if provider not in known:
        raise OptionError(f"kernels={provider!r}: use one of {', '.join(map(repr, known))}")


def _unavailable(provider: str, reason: str) -> str:
    entry = PROVIDERS[provider]
    return (
        f"kernels={provider!r}: {entry.requires or entry.module} cannot be imported ({reason}): install it, "
        f"or use {AUTO!r}"
    )


@cache
def _obstacle(provider: str) -> str | None:
    """Return why a provider's kernels cannot be imported, None if they can."""
    entry = PROVIDERS[provider]
    try:
        if entry.requires is not None and importlib.util.find_spec(entry.requires) is None:
            return "it is not installed"
        importlib.import_module(entry.module)
    except Exception as problem:  # any: a rank that left here would leave the others waiting in `use`
        return next(iter(str(problem).splitlines()), type(problem).__name__)
    return None
