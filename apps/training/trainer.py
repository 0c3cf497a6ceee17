"""The trainer: a task, its pipeline and its optimizer, which it steps, validates, saves and restores.

The training loop, the planner's trials, the demo and the benchmark of optimizers construct it. It builds the task from
a configuration, runs steps through ``layers.pipeline`` and writes checkpoints with ``checkpoint``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from colossal_mpi import checkpoint, comm, ledger
from colossal_mpi.apps.config import Config
from colossal_mpi.apps.environment import peak_memory
from colossal_mpi.apps.training import tasks
from colossal_mpi.apps.training.metadata import SavedOptimizer, SavedSteps
from colossal_mpi.apps.training.replicas import require_equal_replicas
from colossal_mpi.apps.training.saved import checkpoint_of, metadata_of, saved_names
from colossal_mpi.apps.training.tasks import StepFeed
from colossal_mpi.errors import CheckpointError, NonFiniteError
from colossal_mpi.grid import Grid
from colossal_mpi.layers import Context, Parallelism, add_adapters, kernels, models, precision, recompute
from colossal_mpi.layers.finite import Place, scan, watch
from colossal_mpi.layers.optim import OPTIMIZERS, LearningRateSchedule, MovingAverage
from colossal_mpi.layers.optim.base import NotFinite
from colossal_mpi.layers.pipeline import PIPE, SCHEDULES, Pipeline, parameter_names, partition, stage_grid
from colossal_mpi.platform import backend

OWN_LOSSES = ("balance", "z_loss")
"""The losses that mixtures of experts add, by the last part of the name under which a layer reports them."""


class Trainer:
    """A task and its optimizer on a grid. Everything random is a function of the seed.

    Parameters
    ----------
    config : Config
        The configuration of the run.
    grid : Grid
        All ranks of the run, on a device or a meta grid.

    Attributes
    ----------
    kernels : str
        Name of the provider of the kernels.
    before : int
        Greatest memory of the process in bytes before there was a model, with the library of its kernels loaded.
    task : Task
        The model, its data and its loss.
    model : Sequential
        The whole model, of which a stage of a pipeline stores a part.
    pipeline : Pipeline
        The stages of the model; one stage where the grid has no axis ``pipe``.
    optimizer : Optimizer
        The optimizer of the stored weights.
    average : MovingAverage or None
        The moving averages of the weights, if the run keeps them.
    own : dict of str to float
        Losses that experts have added in the last step.
    learning_rate : LearningRateSchedule
        The learning rate as a function of the step.
    saving : AsyncCheckpointer
        The writer of background checkpoints.
    restored : mapping of str to object
        The metadata of the checkpoint that the trainer was restored from; empty for a new run.

    Raises
    ------
    ConfigError
        If the data cannot be read or do not fit the model, on all ranks.
    GridError
        If the grid does not fit the tensor mode or the model.
    """

    def __init__(self, config: Config, grid: Grid) -> None:
        parallel, training = config.parallel, config.training
        self.config, self.grid = config, grid
        self.kernels = kernels.use(parallel.kernels, grid)
        self.before = peak_memory()
        parallelism = Parallelism(
            stage_grid(grid), parallel.tensor, parallel.keep_gathered, parallel.zero, sequence=parallel.sequence
        )
        self.task = tasks.make(config, parallelism)
        self.model, self.task.run = self.task.model, self.run
        if (adapter := config.adapter).rank:
            add_adapters(self.model, adapter.rank, adapter.alpha, adapter.targets, training.seed)
        whole = recompute(self.model, parallel.recompute, SCHEDULES[parallel.schedule].defers_weights)
        chunks = partition(whole, grid, parallel.virtual_stages)
        names = parameter_names(whole, grid, parallel.virtual_stages)
        self.pipeline = self.task.pipeline = Pipeline(chunks, grid, parallel.schedule, parallel.bucket, names)
        self.optimizer = OPTIMIZERS[training.optimizer](
            self.pipeline.parameters(),
            weight_decay=training.weight_decay,
            clip=training.clip,
            offload=parallel.offload,
            **training.optimizer_arguments(),
        )
        self.average = MovingAverage(self.optimizer.parameters, training.average) if training.average else None
        self.own: dict[str, float] = {}
        self.learning_rate = LearningRateSchedule(
            training.rate, training.lr, training.steps, training.warmup, **training.rate_arguments()
        )
        self.saving = checkpoint.AsyncCheckpointer(grid)
        self.restored: Mapping[str, Any] = {}
        self._begun_at = (0, 0)  # the steps done and the samples taken before this process began

    @property
    def parameters(self) -> int:
        """Number of weights of the whole model."""
        return sum(math.prod(parameter.shape) for parameter in self.model.parameters())

    def samples(self, step: int) -> int:
        """Return the number of training samples that the run takes in its first steps.

        Parameters
        ----------
        step : int
            Number of steps, none of them before the checkpoint that the trainer was restored from.

        Returns
        -------
        int
            The samples of the steps before the checkpoint, whatever batches they had, and of those after it.
        """
        steps, samples = self._begun_at
        return samples + (step - steps) * self.config.training.batch

    def gradients(self, step: int) -> float:
        """Compute the gradients of a step and leave them in the parameters.

        Parameters
        ----------
        step : int
            Number of the step, from 0.

        Returns
        -------
        float
            The loss of the step in nats, with the losses that experts add; the same on all ranks.

        Notes
        -----
        **Communication:** the messages of the pipeline's stages and of the layers.
        """
        feed = StepFeed(self.task, step, self.optimizer.loss_scale, self.samples(step))
        with precision.overflowing() if self.optimizer.scaling else nullcontext():
            loss = self.pipeline.step(feed)
        self.own = self._of_experts(feed.own)
        return loss + sum(self.own.values())

    def _of_experts(self, reported: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return the losses that the experts of all stages add."""
        if not getattr(self.config.model, "experts", 0):
            return {}
        losses = [(name.rpartition(".")[2], value) for one in reported for name, value in one.items()]
        sums = [sum(x for found, x in losses if found == kind) for kind in OWN_LOSSES]
        stages = (PIPE,) if PIPE in self.grid.axes else ()
        # own[2] {U_pipe} -> totals[2]: allreduce over pipe
        own = self.grid.to_block(np.array(sums, np.float64))  # without experts on a stage the sums are integers
        totals = backend.to_host(comm.allreduce(own, self.grid, stages))
        return {f"expert_{kind}": float(total) for kind, total in zip(OWN_LOSSES, totals, strict=True)}

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the weights have the values of their moving averages, if the run keeps them.

        Returns
        -------
        context manager
            Its end restores the weights.
        """
        return nullcontext() if self.average is None else self.average.applied()

    def run(self, x: Any, ctx: Context) -> Any:
        """Return the outputs of the model, on all stages.

        Parameters
        ----------
        x : DistArray
            Inputs of the model.
        ctx : Context
            Context of the layers.

        Returns
        -------
        DistArray or tuple of DistArray
            The outputs.

        Notes
        -----
        **Communication:** the messages of the pipeline's stages and of the layers.
        """
        length = x.shape[1] if x.ndim == 2 else None
        return self.pipeline.outputs(x, ctx, self.task.activation_spec(x.shape[0], length))

    def step(self, step: int, meanwhile: Callable[[], None] | None = None) -> dict[str, float | None]:
        """Do a training step.

        Parameters
        ----------
        step : int
            Number of the step, from 0.
        meanwhile : callable, optional
            Function that is called between gradients and update. The reductions of the update hide a message that it
            begins.

        Returns
        -------
        dict of str to float
            ``loss``, the losses of experts, ``gradient_norm``, ``learning_rate``, and with 16-bit floats
            ``loss_scale``. The norm is None where scaled gradients were too large and the update was left out.

        Raises
        ------
        NonFiniteError
            On all ranks, if the loss, a gradient, a weight or the optimizer's state is not finite on one. No weight has
            changed. An overflow of scaled gradients is no such error.

        Notes
        -----
        **Communication:** the messages of the pipeline, and the reductions of gradients and of their norm. To locate
        what is not finite, the passes of the step are done again.
        """
        loss, lr, scale = self.gradients(step), self.learning_rate(step), self.optimizer.loss_scale
        if meanwhile:
            meanwhile()
        self.saving.settle()
        with ledger.span("update"):
            sound = math.isfinite(loss) or self.grid.is_meta
            norm = self.optimizer.step(lr, leave_out=not sound)
            left_out = not (self.grid.is_meta or math.isfinite(norm))
            if not sound or left_out:
                self._require_overflow(step, loss, norm, scale)
            if self.average is not None and not left_out:
                self.average.update()
        row = {"loss": loss, **self.own, "gradient_norm": None if left_out else norm, "learning_rate": lr}
        return row if self.optimizer.scaling is None else row | {"loss_scale": scale}

    def _require_overflow(self, step: int, loss: float, norm: float, scale: float) -> None:
        """Raise an error that locates what is not finite in a step, unless scaled gradients alone have overflowed."""
        # what each rank has found, its state first -> the same list on all ranks: allgather
        found = comm.collect(self.optimizer.found, self.grid)
        damaged = [one if one is not None and one.state else None for one in found]
        if not any(damaged) and math.isfinite(loss) and scale > 1:
            return
        said = f"step {step + 1}: loss {loss}, gradient norm {norm}"
        if any(damaged):
            name, where = self._first(damaged)
            raise NonFiniteError(f"{said}: {name} is not finite before the step, first {where}", state=True)
        if (first := self._repeated(step, scale)) is not None:
            raise NonFiniteError(f"{said}: {first}", repeats=True)
        text = "the step done again is finite, so that memory or hardware is at fault"
        if any(found):
            name, where = self._first(found)
            text = f"{name} was not finite after the backward pass, first {where}; {text}"
        raise NonFiniteError(f"{said}: {text}")

    def _first(self, found: Sequence[NotFinite | None]) -> tuple[str, str]:
        """Return the name of what the first rank found, and the place with all ranks that found the same."""
        first = next(one for one in found if one is not None)
        ranks = [rank for rank, one in enumerate(found) if one == first]
        return first.name, _at(first.place, ranks, self.grid)

    def _repeated(self, step: int, scale: float) -> str | None:
        """Do the passes of a step again and return where they are first not finite, the same text on all ranks."""
        stages, stage = self.pipeline.stages, self.pipeline.stage
        chunks = {c * stages + stage: chunk for c, chunk in enumerate(self.pipeline.chunks)}
        feed = StepFeed(self.task, step, scale, self.samples(step))
        plain = feed.loss
        with watch(chunks) as seen, np.errstate(all="ignore"):

            def loss(y: Any, microbatch: int) -> tuple[float, Any]:
                share, cache = plain(y, microbatch)
                seen.see_loss(share, microbatch)
                return share, cache

            feed.loss = loss  # type: ignore[method-assign]
            self.pipeline.step(feed)
            for parameter in self.optimizer.parameters:
                parameter.reduce()
                parameter.grad = None
        sightings = [(one.key, rank, one) for rank, one in enumerate(comm.collect(seen.first, self.grid)) if one]
        if not sightings:
            return None
        key, _, one = min(sightings, key=lambda entry: entry[:2])
        ranks = [rank for other, rank, _ in sightings if other == key]
        return f"first in the {one.what}, {_at(one.place, ranks, self.grid)}"

    def require_finite(self, step: int) -> None:
        """Require that weights, averages and the optimizer's state are finite on all ranks, before a checkpoint.

        Parameters
        ----------
        step : int
            Number of steps that are done.

        Raises
        ------
        NonFiniteError
            On all ranks, if an array is not finite on one: it says which, and where.

        Notes
        -----
        **Communication:** an allgather of small objects.
        """
        seen = scan(self._state())
        found = comm.collect(seen and NotFinite(True, *seen), self.grid)
        if any(found):
            name, where = self._first(found)
            raise NonFiniteError(f"after step {step}: {name} is not finite, first {where}", state=True)

    def move_on(self, step: int, samples: int) -> None:
        """Give the steps from now on other samples, after the trainer was restored from a checkpoint.

        Parameters
        ----------
        step : int
            Number of steps that are done.
        samples : int
            Number of samples that count as taken, so that the next step takes those that follow them.
        """
        self._begun_at = step, samples

    def validate(self) -> dict[str, float]:
        """Return loss and measures over the held-out samples, with averaged weights if the run keeps averages.

        Returns
        -------
        dict of str to float
            ``val_loss`` in nats, and ``val_<measure>`` for each measure of the task, a share from 0 to 1.
        """
        loss, shares, held, weight = 0.0, Counter[str](), self.task.held, self.task.held_weight()
        with self.averaged():
            for batch in self.task.held_out():
                outputs = self.run(batch.inputs, Context(train=False, **batch.context))
                loss += self.task.loss(outputs, batch.labels, weight)[0]
                shares.update(self.task.measures(outputs, batch.labels, held))
        return {"val_loss": loss, **{f"val_{name.replace(' ', '_')}": share for name, share in shares.items()}}

    def save(
        self, directory: Path, step: int, after: Callable[[], None] | None = None, background: bool = False
    ) -> None:
        """Write a checkpoint of the state after some steps.

        Parameters
        ----------
        directory : Path
            The checkpoint to write.
        step : int
            Number of steps that are done.
        after : callable, optional
            Function that rank 0 calls when the checkpoint is whole; by default it points ``latest`` to the checkpoint.
        background : bool
            Whether to return at once and write during the next steps. The caller calls ``saving.poll()`` after each
            step and ``saving.finish()`` after the last.

        Raises
        ------
        NonFiniteError
            On all ranks, if an array is not finite on one; nothing is written then.
        """
        self.require_finite(step)
        metadata, after = self._metadata(step), after or partial(checkpoint.point_latest, directory)
        state, values = self._state(counted=True), self._values(step)
        if background:
            self.saving.begin(directory, state, metadata, values=values, after=after)
            return
        self.saving.finish()
        checkpoint.save(directory, state, metadata, self.grid, values=values)
        with comm.agreed(self.grid):
            if self.grid.rank == 0:
                after()

    @property
    def copies(self) -> int:
        """Bytes of host memory that the copies of background checkpoints take on this rank, 0 if there are none."""
        return checkpoint.owned_bytes(self._state(counted=True)) if self.saves_meanwhile() else 0

    def saves_meanwhile(self, done: int = 0) -> bool:
        """Say whether a run writes some checkpoint in the background; it never writes the last one so.

        Parameters
        ----------
        done : int
            Number of steps that are done.

        Returns
        -------
        bool
            The same on all ranks.
        """
        training = self.config.training
        return training.background_checkpoints and done + training.checkpoint_every < training.steps

    def compare_replicas(self, step: int) -> None:
        """Check that replicas of weights and optimizer states are equal, bit for bit.

        Parameters
        ----------
        step : int
            Number of steps that are done.

        Raises
        ------
        MismatchError
            If some differ, on all ranks.

        Notes
        -----
        **Communication:** a checksum of each array is collected from all ranks.
        """
        require_equal_replicas(self._state(), self.grid, f"after step {step}")

    def reserve(self) -> None:
        """Allocate the memory for copies of background checkpoints, so that the first is as quick as the others."""
        self.saving.reserve(self._state(counted=True))

    def _metadata(self, step: int) -> dict[str, Any]:
        model = models.describe(self.model)
        if self.optimizer.scaling is not None:
            model["dtype"] = "float32"  # the checkpoint holds the master weights
        return {
            "step": step,
            "config": self.config.model_dump(),
            "data": {"digest": self.task.digest, "about": self.task.about},
            "model": model,
            "adapter": self._adapter(),
            "optimizer": {
                "steps": self.optimizer.steps,
                "loss_scale": self.optimizer.scaling and self.optimizer.scaling.state(),
            },
        }

    def _values(self, step: int) -> dict[str, tuple[Any, str]]:
        """Return the numbers besides the arrays that the next steps depend on, with their units."""
        training = self.config.training
        scaling = self.optimizer.scaling
        scale = {} if scaling is None else {"training/loss_scale": (self.optimizer.loss_scale, "1")}
        return scale | {
            "training/step": (step, "steps"),
            "training/samples": (self.samples(step), "samples"),
            "training/seed": (training.seed, "1"),
            "training/finite": (True, "whether every weight, average and array of the optimizer is finite"),
            "training/rate": (training.rate, "name of the schedule of the learning rate"),
            "training/learning_rate": (self.learning_rate(step), "of the next step"),
        }

    def restore(self, directory: Path) -> int:
        """Load the state of a checkpoint that was saved on any grid and in any mode.

        Parameters
        ----------
        directory : Path
            The checkpoint.

        Returns
        -------
        int
            Number of steps that are done in the checkpoint.

        Raises
        ------
        CheckpointError
            If the checkpoint lacks an array or is damaged, has other adapters than the configuration, or its metadata
            are not those of a run, on all ranks.
        """
        self._require_adapter(directory)
        state = self._state()
        metadata = checkpoint.load(directory, state, self.grid)
        self._fill_frozen(state)
        saved = SavedSteps.of(directory, metadata)
        self.restored, step = metadata, saved.step
        self._begun_at = step, self._samples_of(directory, step)
        optimizer = saved.optimizer or SavedOptimizer(steps=step)
        self.optimizer.steps = optimizer.steps
        if self.optimizer.scaling is not None and optimizer.loss_scale:
            self.optimizer.scaling.restore(optimizer.loss_scale.model_dump())
        self.optimizer.refresh()
        if self.average is not None:
            self.average.updates = step
        return step

    def load_base(self, source: Path) -> None:
        """Fill the frozen weights from a checkpoint or a run without adapters.

        Parameters
        ----------
        source : Path
            A checkpoint, or a run, of which the latest one is taken.

        Raises
        ------
        CheckpointError
            If it holds another model or is damaged, on all ranks.

        Notes
        -----
        **Communication:** messages of a few bytes; each rank reads its own blocks. With ZeRO, 16-bit weights are
        gathered (`Parameter.refresh`).
        """
        with comm.agreed(self.grid, CheckpointError):
            latest = checkpoint_of(source)
            saved, own = metadata_of(latest), models.describe(self.model)
            if saved.get("adapter"):
                raise CheckpointError(f"adapter.base={str(source)!r} has adapters: give the base that these have")
            free = ("seed", "dtype", "std", "positions", "dropout")
            held = saved["model"]
            other = [key for key in own if key not in free and held.get(key, own[key]) != _plain(own[key])]
            if other:
                key = other[0]
                raise CheckpointError(
                    f"adapter.base={str(source)!r} holds a model with {key}={held[key]!r}, and the configuration "
                    f"makes {key}={own[key]!r}: give the sizes of the base"
                )
        state = self._frozen_weights(False)
        names = saved_names(latest, [name.removeprefix("weights/") for name in state])
        found = {names[name.removeprefix("weights/")]: array for name, array in state.items()}
        checkpoint.load(latest, found, self.grid, besides=True)
        self._fill_frozen(state)

    def _require_adapter(self, directory: Path) -> None:
        """Require that a checkpoint has the adapters of the configuration. **Communication:** a small message."""
        with comm.agreed(self.grid, CheckpointError):
            saved, own = checkpoint.read_manifest(directory)["metadata"].get("adapter"), self._adapter()
            if saved != own:
                texts = ["no adapters" if one is None else f"adapters {one}" for one in (saved, own)]
                raise CheckpointError(
                    f"{directory} has {texts[0]}, and the configuration asks for {texts[1]}: give adapter.rank, "
                    "adapter.alpha and adapter.targets of the checkpoint"
                )

    def _adapter(self) -> dict[str, Any] | None:
        """Return the adapters as JSON has them."""
        adapter = self.config.adapter
        return adapter.model_dump(exclude={"base"}) if adapter.rank else None

    def _frozen_weights(self, counted: bool) -> dict[str, Any]:
        """Return the frozen weights of this stage, 16-bit ones as copies in float32."""
        frozen = [p for p in self.pipeline.parameters() if p.frozen and (p.counted or not counted)]
        return {f"weights/{p.name}": p.share().astype("float32") if p.half else p.value for p in frozen}

    def _fill_frozen(self, state: Mapping[str, Any]) -> None:
        """Write the copies of frozen 16-bit weights, which a checkpoint has filled, into the weights."""
        for p in self.pipeline.parameters():
            if p.frozen and p.half:
                p.refresh(state[f"weights/{p.name}"])

    def data_change(self) -> str:
        """Return how the data differ from those of the checkpoint that the trainer was restored from.

        Returns
        -------
        str
            Both, for a reader; ``""`` if they are the same, or if one of the digests is not known.
        """
        saved, now = self.restored.get("data", {}), self.task
        if not saved.get("digest") or not now.digest or saved["digest"] == now.digest:
            return ""
        same = saved["about"] == now.about
        return f"as many, of other content ({now.about})" if same else f"then ({saved['about']}), now ({now.about})"

    def _samples_of(self, directory: Path, step: int) -> int:
        """Return the number of samples that the steps of a checkpoint took. **Communication:** a small message."""
        taken = None
        with comm.agreed(self.grid):
            if self.grid.rank == 0:
                taken = checkpoint.read_manifest(directory)["values"].get("training/samples")
        taken = comm.share(taken, self.grid)
        if taken is None:
            return step * self.config.training.batch
        if type(taken["value"]) is not int or not 0 <= taken["value"] < 1 << 62:
            raise CheckpointError(f"{directory} is damaged: training/samples={taken['value']!r} must be a count")
        return int(taken["value"])

    def _state(self, counted: bool = False) -> dict[str, Any]:
        """Return this stage's arrays by name. If `counted`, weights that another stage stores, too, are left out."""
        parameters = [p for p in self.optimizer.parameters if p.counted or not counted]
        weights = {f"weights/{name}": array for name, array in self.optimizer.weights(parameters).items()}
        if self.average is not None:
            weights |= {f"average/{p.name}": self.average.averages[p.name] for p in parameters}
        weights |= self._frozen_weights(counted)
        return weights | {f"optimizer/{name}": array for name, array in self.optimizer.state(parameters).items()}


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _at(place: Place, ranks: Sequence[int], grid: Grid) -> str:
    """Return where an element is: its global index, and the ranks that hold it, the first with its coordinates."""
    coords = ", ".join(f"{axis}={i}" for axis, i in grid.coords_of(ranks[0]).items())
    index = f"at {place} " if place else ""
    others = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
    return f"{index}on rank {ranks[0]} ({coords}){others}"
