"""What all optimizers share: groups of parameters, the norm and clipping of the gradients, the state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray, squares
from colossal_mpi.errors import OptionError
from colossal_mpi.grid import Grid
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layers.precision import MASTER, LossScale
from colossal_mpi.offload import to_device, to_host, write_back
from colossal_mpi.platform import backend


def gradient_norm(gradients: Sequence[DistArray], grid: Grid | None = None) -> float:
    """Return the norm of reduced gradients together, each global element counted once, in float64.

    Parameters
    ----------
    gradients : sequence of DistArray
        On this rank's stage, where the model is cut into stages.
    grid : Grid, optional
        All ranks of the model; by default those of the gradients.

    **Communication:** one allreduce of a single word over the whole grid.
    """
    grid = gradients[0].grid if grid is None else grid
    owned = [g for g in gradients if g.layout.owner(g.grid.axes, g.grid.coords)]
    local = sum((squares(g) for g in owned), start=grid.xp.zeros((), dtype=grid.xp.float64))
    return math.sqrt(float(backend.to_host(comm.allreduce(grid.xp.asarray(local), grid, tuple(grid.axes)))))


class Group:
    """Parameters with options of their own.

    Parameters
    ----------
    parameters : iterable of Parameter
    rate : float
        Times the learning rate of the step.
    **options
        In place of the optimizer's: ``weight_decay``, ``betas`` and whatever else it has.
    """

    def __init__(self, parameters: Iterable[Parameter], rate: float = 1.0, **options: Any) -> None:
        self.parameters, self.rate, self.options = list(parameters), rate, options


def is_weight(parameter: Parameter) -> bool:
    """Say whether a parameter is a weight or a table, no vector and no bias of heads, ``[3, a, d]``."""
    return parameter.value.ndim > 1 and not parameter.name.endswith("bias")


class Optimizer:
    """Base of all optimizers: each rank updates the blocks that it stores.

    A subclass names its `slots` and implements `update`; its options are keyword arguments of the base.

    Parameters
    ----------
    parameters : iterable of Parameter or of Group
    lr : float
        Used when `step` is given none.
    clip : float, optional
        Greatest norm of the gradient; a longer one is scaled to it.
    weight_decay : float
        Of the parameters that decay.
    decays : callable
        Says which do; by default weights and tables, not biases and gains.
    scaling : LossScale, optional
        Of the losses whose gradients come; by default what the weights' dtypes need.
    offload : bool
        Keep the state, masters included, in host memory, and bring it to the device for each parameter's step: the
        same bits for less memory. Without a device it changes nothing.
    **options
        Of the subclass.

    Raises
    ------
    OptionError
        If a group has an option that the optimizer has not, or a parameter comes twice.
    """

    slots: tuple[str, ...] = ()
    """Arrays of the state for each parameter."""

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
        self.parameters = [parameter for group in self.groups for parameter in group.parameters]
        self.lr, self.clip, self.decays, self.steps = lr, clip, decays, 0
        self.options = {"weight_decay": weight_decay, **options}
        self._check()
        self.scaling = scaling or LossScale.of({p.dtype for p in self.parameters})
        self.offload = offload
        self.moments = {p.name: self._begin(p) for p in self.parameters}
        """The state of each parameter by slots: those of `begin`, and the master of a 16-bit weight."""

    @property
    def loss_scale(self) -> float:
        """What the loss of the next step is to be multiplied by before its backward pass (`Context.scale`)."""
        return 1.0 if self.scaling is None else self.scaling.value

    def _check(self) -> None:
        names = [parameter.name for parameter in self.parameters]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise OptionError(f"{type(self).__name__}: {', '.join(twice)} given twice: a parameter is of one group")
        for group in self.groups:
            if alien := sorted(set(group.options) - set(self.options)):
                raise OptionError(f"{type(self).__name__}: no option {', '.join(alien)}; use {', '.join(self.options)}")

    def _begin(self, parameter: Parameter) -> dict[str, DistArray]:
        slots = self.begin(parameter) | ({MASTER: parameter.master()} if parameter.half else {})
        return {slot: to_host(array) for slot, array in slots.items()} if self.offload else slots

    @contextmanager
    def _slots(self, parameter: Parameter) -> Iterator[dict[str, DistArray]]:
        """Give the state of a parameter where its weight is, and take it back as it then is."""
        kept = self.moments[parameter.name]
        if not self.offload:
            yield kept
            return
        here = {slot: to_device(array, parameter.value.local) for slot, array in kept.items()}
        yield here
        for slot, array in here.items():
            write_back(array, kept[slot])

    def begin(self, parameter: Parameter) -> dict[str, DistArray]:
        """Return a parameter's slots before the first step."""
        return {slot: parameter.zeros() for slot in self.slots}

    def step(self, lr: float | None = None) -> float:
        """Update all weights, forget the gradients, and return the norm that they had.

        Where weights are of 16 bits and the norm is not finite, on all ranks alike, nothing but the loss scale changes.

        **Communication:** the deferred reductions of the gradients and one allreduce of a single word; what `update`
        needs besides.
        """
        reduced = [parameter.reduce() for parameter in self.parameters]
        counted = [g for g, parameter in zip(reduced, self.parameters, strict=True) if parameter.counted]
        norm = gradient_norm(counted, self.parameters[0].world) / (given := self.loss_scale)
        if self.scaling is not None and not self.scaling.follow(norm):
            for parameter in self.parameters:
                parameter.grad = None
            return norm
        scale = (1.0 if self.clip is None or norm <= self.clip else self.clip / norm) / given
        self.steps += 1
        for group in self.groups:
            rate, options = group.rate * (self.lr if lr is None else lr), self.options | group.options
            for parameter in group.parameters:
                self._apply(parameter, rate, scale, options)
        return norm

    def _apply(self, parameter: Parameter, lr: float, scale: float, options: dict[str, Any]) -> None:
        assert parameter.grad is not None
        own = options if self.decays(parameter) else options | {"weight_decay": 0.0}
        gradient = parameter.grad if scale == 1.0 else parameter.grad * scale
        with self._slots(parameter) as slots:
            w = slots[MASTER] if parameter.half else parameter.share()
            self.update(parameter, w, gradient, slots, lr, **own)
            parameter.refresh(w)
        parameter.grad = None

    def update(
        self, parameter: Parameter, w: DistArray, g: DistArray, slots: dict[str, DistArray], lr: float, **options: Any
    ) -> None:
        """Step this rank's part of a weight in place.

        Parameters
        ----------
        parameter : Parameter
        w, g : DistArray
            The part of its value and its reduced and clipped gradient, in one layout.
        slots : dict of DistArray
            This parameter's; updated in place.
        lr : float
        **options
            Of the parameter's group.
        """
        raise NotImplementedError

    def weights(self, parameters: Iterable[Parameter] | None = None) -> Mapping[str, DistArray]:
        """Return the weights of some parameters or all by name, those of 16 bits as their masters.

        What is read into masters counts after `refresh`.
        """
        chosen = self.parameters if parameters is None else parameters
        return {p.name: self.moments[p.name][MASTER] if p.half else p.value for p in chosen}

    def refresh(self) -> None:
        """Let 16-bit weights be their masters, rounded. **Communication:** that of `Parameter.refresh`."""
        for parameter in self.parameters:
            if parameter.half:
                with self._slots(parameter) as slots:
                    parameter.refresh(slots[MASTER])

    def state(self, parameters: Iterable[Parameter] | None = None) -> Mapping[str, DistArray]:
        """Return the slots but masters, of some parameters or all, by ``<slot>/<parameter>``.

        `weights`, `steps` and `scaling` are the rest of the state.
        """
        names = [p.name for p in (self.parameters if parameters is None else parameters)]
        slots = ((slot, name, array) for name in names for slot, array in self.moments[name].items())
        return {f"{slot}/{name}": array for slot, name, array in slots if slot != MASTER}
