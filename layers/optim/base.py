"""The base of all optimizers: groups of parameters, the norm and the clipping of gradients, and the state.

The trainer calls `Optimizer.step` after the backward passes and stores `Optimizer.state` in checkpoints. A step reduces
the gradients with `Parameter.reduce` and calls the subclass's `update` for each parameter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray, root_of_squares, squares
from colossal_mpi.errors import OptionError
from colossal_mpi.grid import Grid
from colossal_mpi.layers.finite import Place, nan_if_not_finite, scan
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layers.precision import MASTER, LossScale
from colossal_mpi.offload import to_device, to_host, write_back
from colossal_mpi.platform import backend


def gradient_norm(gradients: Sequence[DistArray], grid: Grid | None = None, more: Any = 0.0) -> float:
    """Return the Euclidean norm of all gradients together, with each global element counted once.

    Parameters
    ----------
    gradients : sequence of DistArray
        Reduced gradients of this rank's stage.
    grid : Grid, optional
        Grid of the whole model, if it is cut into stages. By default it is the grid of the gradients.
    more : number
        Added to this rank's sum of squares: a NaN tells all ranks that one has found something wrong.

    Returns
    -------
    float
        Norm, summed in float64, the same on all ranks.

    Notes
    -----
    **Communication:** one allreduce of a single word over the whole grid; a second one if the sum of squares is 0,
    infinite or near the ends of float64's range (`root_of_squares`).
    """
    world = gradients[0].grid if grid is None else grid
    owned = [g for g in gradients if g.layout.owner(g.grid.axes, g.grid.coords)]

    def total(factor: float) -> float:
        local = sum((squares(g, factor) for g in owned), start=world.xp.zeros((), dtype=world.xp.float64))
        local = local if isinstance(more, float) and more == 0 else local + more
        # sum of dW[...]^2 of this rank's elements {U_all} -> sum on all ranks: allreduce of a word over the whole grid
        return float(backend.to_host(comm.allreduce(world.xp.asarray(local), world, tuple(world.axes))))

    return root_of_squares(total, scaled=not world.is_meta)


def require_clip(name: str, clip: float | None) -> None:
    """Require that the greatest norm of a gradient, of this name in errors, is None or above 0."""
    # 0 would erase every gradient, a negative number would turn it around, and no norm is above NaN
    if clip is not None and not clip > 0:
        raise OptionError(
            f"{name}={clip!r}: the greatest norm must be above 0; without clipping it is None or infinite"
        )


@dataclass(frozen=True)
class NotFinite:
    """A NaN or an infinity that one rank has found.

    Parameters
    ----------
    state : bool
        True if it is in a weight or in the state of the optimizer, False if in a gradient.
    name : str
        The array.
    place : tuple of int
        Global index of the first such element.
    """

    state: bool
    name: str
    place: Place


class Group:
    """Parameters with options of their own.

    Parameters
    ----------
    parameters : iterable of Parameter
        Parameters of the group.
    rate : float
        Factor of the step's learning rate.
    **options : dict
        Options that replace the optimizer's, such as ``weight_decay`` or ``betas``.

    Examples
    --------
    >>> AdamW([*body, Group(head, rate=0.1, weight_decay=0.0)])
    """

    def __init__(self, parameters: Iterable[Parameter], rate: float = 1.0, **options: Any) -> None:
        self.parameters, self.rate, self.options = list(parameters), rate, options


def is_weight(parameter: Parameter) -> bool:
    """Say whether a parameter is a weight or a table, neither a vector nor a bias of heads ``[3, a, d]``."""
    return parameter.value.ndim > 1 and not parameter.name.endswith("bias")


class Optimizer:
    """Base of all optimizers, in which each rank updates the blocks that it stores.

    A subclass names its `slots`, or implements `begin`, and implements `update`. It gives its own options to the
    constructor of the base as keyword arguments, which a `Group` may replace.

    Parameters
    ----------
    parameters : iterable of Parameter or Group
        Parameters to update. A `Group` gives its parameters options of their own. Frozen ones are left out.
    lr : float
        Learning rate of a step for which `step` is given none.
    clip : float, optional
        Greatest norm of the gradient. A longer gradient is scaled to this norm.
    weight_decay : float
        Decay of the parameters that decay.
    decays : callable
        ``decays(parameter)`` says whether a parameter decays. By default weights and tables do, biases and gains do
        not.
    scaling : LossScale, optional
        Scale of the losses that the gradients come from. By default it is the scale that the weights' dtypes need.
    offload : bool
        Keep the state, master weights included, in host memory, and copy it to the device for each parameter's update.
        The bits are the same. Without a device it changes nothing.
    **options : dict
        Options of the subclass.

    Raises
    ------
    OptionError
        If a group has an option that the optimizer does not have, a parameter comes twice, or `clip` is not above 0.

    References
    ----------
    Rajbhandari et al.: ZeRO: memory optimizations toward training trillion parameter models, 2020 (each rank's share of
    the state). Ren et al.: ZeRO-Offload, 2021.
    """

    slots: tuple[str, ...] = ()
    """Names of the arrays of a parameter's state, which start as zeros."""

    def __init__(
        self,
        parameters: Iterable[Parameter | Group],
        lr: float,
        clip: float | None,
        weight_decay: float,
        decays: Callable[[Parameter], bool] = is_weight,
        scaling: LossScale | None = None,
        offload: bool = False,
        **options: Any,
    ) -> None:
        given = list(parameters)
        plain = [item for item in given if isinstance(item, Parameter)]
        self.groups = [Group(plain), *[item for item in given if isinstance(item, Group)]]
        everything = [parameter for group in self.groups for parameter in group.parameters]
        self.parameters = [parameter for parameter in everything if not parameter.frozen]
        self._world = everything[0].world or everything[0].parallelism.grid if everything else None
        require_clip(f"{type(self).__name__}: clip", clip)
        self.lr, self.clip, self.decays, self.steps = lr, clip, decays, 0
        self.options = {"weight_decay": weight_decay, **options}
        self._require_options()
        self.scaling = scaling or LossScale.of({p.dtype for p in everything})
        self.offload = offload
        self.moments = {p.name: self._begin(p) for p in self.parameters}
        """The state of each parameter: the arrays of `begin`, and the master weight of a 16-bit weight, by slot."""
        self.found: NotFinite | None = None
        """What this rank found in a step that was left out since its norm was not finite; None after other steps."""

    @property
    def loss_scale(self) -> float:
        """The factor of the next step's loss before its backward pass (`Context.scale`)."""
        return 1.0 if self.scaling is None else self.scaling.value

    def _require_options(self) -> None:
        """Require that no parameter comes twice and that groups have the optimizer's options alone."""
        names = [parameter.name for parameter in self.parameters]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise OptionError(
                f"{type(self).__name__}: {', '.join(twice)} given twice: a parameter belongs to one group"
            )
        for group in self.groups:
            if alien := sorted(set(group.options) - set(self.options)):
                raise OptionError(f"{type(self).__name__}: no option {', '.join(alien)}; use {', '.join(self.options)}")

    def _begin(self, parameter: Parameter) -> dict[str, DistArray]:
        """Return the state of a parameter before the first step, where it is kept."""
        slots = self.begin(parameter) | ({MASTER: parameter.master()} if parameter.half else {})
        return {slot: to_host(array) for slot, array in slots.items()} if self.offload else slots

    @contextmanager
    def _slots(self, parameter: Parameter) -> Iterator[dict[str, DistArray]]:
        """Give the state of a parameter on the device of its weight, and write its new values back."""
        kept = self.moments[parameter.name]
        if not self.offload:
            yield kept
            return
        here = {slot: to_device(array, parameter.value.local) for slot, array in kept.items()}
        yield here
        for slot, array in here.items():
            write_back(array, kept[slot])

    def begin(self, parameter: Parameter) -> dict[str, DistArray]:
        """Return the state of a parameter before the first step.

        Parameters
        ----------
        parameter : Parameter
            A parameter of this optimizer.

        Returns
        -------
        dict of str to DistArray
            Arrays by slot, in any layout. By default zeros for each of `slots`, in the layout of the reduced gradient.
        """
        return {slot: parameter.zeros() for slot in self.slots}

    def step(self, lr: float | None = None, leave_out: bool = False) -> float:
        """Update all weights and clear the gradients.

        If a gradient, a weight or an array of the state is not finite on some rank, no weight changes: the norm is then
        not finite on all ranks, and `found` says what this rank has seen. With a loss scale, the scale changes.

        Parameters
        ----------
        lr : float, optional
            Learning rate of this step. By default it is the optimizer's.
        leave_out : bool
            Whether to leave the update out in any case; the same on all ranks.

        Returns
        -------
        float
            Norm of the gradient before it was clipped.

        Notes
        -----
        **Communication:** the deferred reductions of the gradients (`Parameter.reduce`), the allreduce of a single word
        in `gradient_norm`, what `update` needs, and with ZeRO an allgather of the weights over the axes that cut the
        state (`Parameter.refresh`).
        """
        # dW {U_data} -> dW in the layout of the state: allreduce, with ZeRO reduce_scatter, over the deferred axes
        reduced = [parameter.reduce() for parameter in self.parameters]
        counted = [g for g, parameter in zip(reduced, self.parameters, strict=True) if parameter.counted]
        given, is_meta = self.loss_scale, self._world is not None and self._world.is_meta
        norm = gradient_norm(counted, self._world, 0.0 if is_meta else self._nan_if_damaged(reduced)) / given
        self.found = None
        sound = math.isfinite(norm) or is_meta
        if self.scaling is not None:
            self.scaling.follow(norm)
        if leave_out or not sound:
            self.found = self._not_finite(reduced)
            for parameter in self.parameters:
                parameter.grad = None
            return norm
        scale = (1.0 if self.clip is None or norm <= self.clip else self.clip / norm) / given
        self.steps += 1
        for group in self.groups:
            rate, options = group.rate * (self.lr if lr is None else lr), self.options | group.options
            for parameter in (one for one in group.parameters if not one.frozen):
                self._apply(parameter, rate, scale, options)
        return norm

    def _nan_if_damaged(self, gradients: Sequence[DistArray]) -> Any:
        """Return 0, or NaN if a weight, the state or a gradient beside the norm is not finite on this rank.

        Each is read once. The norm counts a gradient on one of the ranks that hold it; the others look at their copies.
        """
        pairs = zip(self.parameters, gradients, strict=True)
        copies = (g.local for p, g in pairs if not (p.counted and g.layout.owner(g.grid.axes, g.grid.coords)))
        weights = (p.value.local for p in self.parameters if not p.half)
        state = (array.local for slots in self.moments.values() for array in slots.values())
        return nan_if_not_finite(itertools.chain(weights, state, copies))

    def _not_finite(self, gradients: Sequence[DistArray]) -> NotFinite | None:
        """Return what is not finite on this rank, the state before the gradients."""
        state = {f"weight {p.name}": p.value for p in self.parameters}
        for name, slots in self.moments.items():
            state |= {f"{slot} of {name}": array for slot, array in slots.items()}
        if (seen := scan(state)) is not None:
            return NotFinite(True, *seen)
        named = zip(self.parameters, gradients, strict=True)
        seen = scan({f"gradient of {p.name}": g for p, g in named})
        return None if seen is None else NotFinite(False, *seen)

    def _apply(self, parameter: Parameter, lr: float, scale: float, options: dict[str, Any]) -> None:
        """Update one parameter by its reduced gradient, times the scale."""
        assert parameter.grad is not None
        own = options if self.decays(parameter) else options | {"weight_decay": 0.0}
        gradient = parameter.grad if scale == 1.0 else parameter.grad * scale
        with self._slots(parameter) as slots:
            w = slots[MASTER] if parameter.half else parameter.share()
            self.update(parameter, w, gradient, slots, lr, **own)
            # W in the layout of the state -> W as it is stored: with ZeRO an allgather over data
            parameter.refresh(w)
        parameter.grad = None

    def update(
        self, parameter: Parameter, w: DistArray, g: DistArray, slots: dict[str, DistArray], lr: float, **options: Any
    ) -> None:
        """Update this rank's blocks of a weight in place.

        Parameters
        ----------
        parameter : Parameter
            The parameter.
        w : DistArray
            Its weight, or the master weight, in the layout of the state. It is updated in place.
        g : DistArray
            Its reduced and clipped gradient, in the same layout. It stays as it is.
        slots : dict of str to DistArray
            Its state, updated in place.
        lr : float
            Learning rate.
        **options : dict
            Options of the parameter's group. ``weight_decay`` is 0 if the parameter does not decay.
        """
        raise NotImplementedError

    def weights(self, parameters: Iterable[Parameter] | None = None) -> Mapping[str, DistArray]:
        """Return the weights for a checkpoint, 16-bit weights as their master weights.

        Values that are read into master weights take effect after `refresh`.

        Parameters
        ----------
        parameters : iterable of Parameter, optional
            Some of the parameters. By default all.

        Returns
        -------
        mapping of str to DistArray
            Weights by the names of the parameters.
        """
        chosen = self.parameters if parameters is None else parameters
        return {p.name: self.moments[p.name][MASTER] if p.half else p.value for p in chosen}

    def refresh(self) -> None:
        """Set 16-bit weights to their master weights, rounded, after a checkpoint was read.

        Notes
        -----
        **Communication:** with ZeRO an allgather over the axes that cut the state (`Parameter.refresh`).
        """
        for parameter in self.parameters:
            if parameter.half:
                with self._slots(parameter) as slots:
                    parameter.refresh(slots[MASTER])

    def state(self, parameters: Iterable[Parameter] | None = None) -> Mapping[str, DistArray]:
        """Return the state for a checkpoint, without master weights.

        `weights`, `steps` and `scaling` are the rest of the state.

        Parameters
        ----------
        parameters : iterable of Parameter, optional
            Some of the parameters. By default all.

        Returns
        -------
        mapping of str to DistArray
            Arrays by ``<slot>/<name of the parameter>``.
        """
        names = [p.name for p in (self.parameters if parameters is None else parameters)]
        slots = ((slot, name, array) for name in names for slot, array in self.moments[name].items())
        return {f"{slot}/{name}": array for slot, name, array in slots if slot != MASTER}
