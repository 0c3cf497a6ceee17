"""The training loop: start or resume a run, and do its steps, validations and checkpoints.

The command ``train`` calls `start` and `resume`. They construct a `Trainer`, a `Meter` and, on rank 0, a `Report`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mpi4py import MPI

from colossal_mpi import checkpoint, comm
from colossal_mpi.apps.config import Config, load
from colossal_mpi.apps.run_directory import RunDirectory
from colossal_mpi.apps.training import tasks
from colossal_mpi.apps.training.meter import Meter
from colossal_mpi.apps.training.progress import Report, check
from colossal_mpi.apps.training.recovery import Recovery
from colossal_mpi.apps.training.stopping import CODE, Stop
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.errors import CheckpointError, ConfigError, NonFiniteError
from colossal_mpi.grid import Grid, world_size
from colossal_mpi.runtime import require_equal, signals, watchdog

Forecaster = Callable[[Trainer, float], Mapping[str, Any] | None]
"""Called on all ranks with a trainer and the flop/s of all ranks together; returns, on rank 0, the forecast of a step:
``words``, ``memory`` in bytes, ``seconds``. The command that trains passes a function of ``apps.planning``."""


def make_grid(config: Config, **options: object) -> Grid:
    """Return the grid of a run, after the ranks have agreed on its configuration.

    Parameters
    ----------
    config : Config
        The configuration. Without axes in it, all ranks are on axis ``data``.
    **options
        What else must be the same on all ranks, such as the options of the command line.

    Returns
    -------
    Grid
        All ranks of the job, on the device that the configuration names.

    Raises
    ------
    GridError
        If the sizes of the axes do not multiply to the number of ranks.
    ConfigError
        If the ranks have different configurations or options: it names the key and two ranks.

    Notes
    -----
    **Communication:** 16 bytes of each rank are compared, and one grid is made, on all ranks.
    """
    keys = {f"{section}.{key}": value for section, table in config.model_dump().items() for key, value in table.items()}
    options["check"] = comm.check.checking()
    require_equal(MPI.COMM_WORLD, keys | options, ConfigError, "the configuration of the run")
    parallel = config.parallel
    axes = parallel.grid or {"data": world_size()}
    return Grid(None, parallel.device, **axes)


def start(config: Config, overwrite: bool = False, trace: int = 0, forecast: Forecaster | None = None) -> int:
    """Train from the beginning, into a new run directory.

    Parameters
    ----------
    config : Config
        The configuration of the run.
    overwrite : bool
        Whether to replace a run that the directory holds.
    trace : int
        Number of steps to trace, from the second on, besides those of ``run.trace_steps``.
    forecast : callable, optional
        Function that predicts a step; the run's last line compares the prediction with the measurement.

    Returns
    -------
    int
        The exit code: 0, or `CODE` if a signal stopped the run.

    Raises
    ------
    ConfigError
        If the data or the run directory cannot be used.
    ColossalError
        If a number is not finite, and ``training.nonfinite`` does not let the run go on.
    """
    config = _without_consent(tasks.complete(config))
    grid = make_grid(config, overwrite=overwrite, trace=trace)
    trainer, directory = Trainer(config, grid), RunDirectory(config.run.directory)
    if config.adapter.base:
        trainer.load_base(Path(config.adapter.base))
    with comm.agreed(grid):
        if grid.rank == 0:
            check(config)
            directory.create(config, overwrite, trainer.task.tokenizer)
    return _released(directory, _train(trainer, directory, 0, trace, forecast))


def resume(path: str, settings: list[str], trace: int = 0, forecast: Forecaster | None = None) -> int:
    """Continue a run from its latest checkpoint. On the same grid it ends bitwise like a run without a stop.

    Parameters
    ----------
    path : str
        The run directory, or one of its checkpoints: the run then goes on from there, and later ones are removed.
    settings : list of str
        Settings ``section.key=value`` over the configuration of the run.
    trace : int
        Number of steps to trace, from the second on, besides those of ``run.trace_steps``.
    forecast : callable, optional
        Function that predicts a step; the run's last line compares the prediction with the measurement.

    Returns
    -------
    int
        The exit code: 0, or `CODE` if a signal stopped the run.

    Raises
    ------
    CheckpointError
        If there is no run or no checkpoint, or it is damaged; the message names the newest that is whole.
    ConfigError
        If the run has done more steps already, another job writes it, or the data are not those of the checkpoint and
        the settings do not allow that.
    """
    directory, chosen = RunDirectory.of(path)
    directory.latest()
    config = load(str(directory.config), settings)
    allowed, config = config.data.changed, _without_consent(config)
    grid = make_grid(config, resume=path, trace=trace)
    with comm.agreed(grid):
        if grid.rank == 0:
            directory.hold()
    latest = chosen or directory.latest()  # the job that had the lock may have removed the earlier one
    trainer = Trainer(config, grid)
    done = _restore(trainer, directory, latest)
    if done > config.training.steps:
        raise ConfigError(f"{latest} has done {done} steps, and training.steps={config.training.steps}: give more")
    change = trainer.data_change()
    if change and not allowed:
        raise ConfigError(
            f"the data are not those of {latest}: {change}; give the same data.files and data.validation, or go on "
            "with these, other samples and other held-out ones, with --set data.changed=true"
        )
    with comm.agreed(grid):
        if grid.rank == 0:
            check(config)
            directory.rewind(done)
            directory.write_config(config)
    return _released(directory, _train(trainer, directory, done, trace, forecast))


def _restore(trainer: Trainer, directory: RunDirectory, source: Path) -> int:
    """Restore a trainer from a checkpoint; if it is damaged, say from which one the run can go on."""
    try:
        return trainer.restore(source)
    except CheckpointError as problem:
        if checkpoint.is_whole(source, trainer.grid):
            raise
        others = comm.share(directory.others(source), trainer.grid)
        whole = next((one for one in others if checkpoint.is_whole(one, trainer.grid)), None)
        advice = "no other checkpoint of the run is whole: start it anew with --overwrite"
        if whole is not None:
            advice = f"the newest that is whole is {whole.name}: go on from it with --resume {whole}"
        raise CheckpointError(f"{problem}; {advice}") from None


def _without_consent(config: Config) -> Config:
    """Return the configuration without ``data.changed``, which is true of one resume and not of the next."""
    return config.model_copy(update={"data": config.data.model_copy(update={"changed": False})})


def _released(directory: RunDirectory, code: int) -> int:
    """Release the lock of a run that has ended well; after an error, the end of the process releases it."""
    directory.release()
    return code


def _train(trainer: Trainer, directory: RunDirectory, done: int, trace: int, forecast: Forecaster | None) -> int:
    training, first = trainer.config.training, trainer.grid.rank == 0
    meter = Meter(trainer, directory, {*trainer.config.run.trace_steps, *range(done + 2, done + 2 + trace)})
    report = Report(trainer, directory, done) if first else None
    watchdog.write_reports_to(directory.path)
    if trainer.config.run.timeout is not None:
        watchdog.set_timeout(trainer.config.run.timeout)
    signals.listen(interrupt=False)  # the guards of a job listen to the interrupt already
    with Stop(trainer.grid) as stop:
        try:
            stopped = _steps(trainer, directory, done, report, meter, stop)
            if stopped:
                if report:
                    report.stop(stopped)
                return CODE
            with trainer.averaged():
                text = trainer.task.sample(training.sample) if training.sample else b""
            expected = _forecast(forecast, trainer, meter.peak) if forecast and trainer.config.run.forecast else None
            if report:
                report.finish(text, expected)
            return 0
        finally:
            if report:
                report.close()


def _forecast(forecast: Forecaster, trainer: Trainer, peak: float) -> Mapping[str, Any] | None:
    """Return the forecast of a step; if its dry run fails, warn: a run that is done must not end in an error."""
    try:
        return forecast(trainer, peak)
    except Exception as problem:  # a plugin's layer or optimizer may use what meta arrays lack
        sys.stderr.write(f"colossal_mpi: warning: no forecast of a step: {type(problem).__name__}: {problem}\n")
        return None


def _steps(
    trainer: Trainer, directory: RunDirectory, done: int, report: Report | None, meter: Meter, stop: Stop
) -> int:
    """Do the steps; return the signal that stopped the run before the last step, 0 if none did."""
    training, recovery = trainer.config.training, Recovery(trainer, directory, report)
    if trainer.saves_meanwhile(done):
        trainer.reserve()
    step = done
    while step < training.steps:
        last = step + 1 == training.steps
        try:
            row, signal = _timed_step(trainer, step, meter, stop)
            if training.check_replicas and (step + 1) % training.check_replicas == 0:
                trainer.compare_replicas(step + 1)
            # A run that is being stopped has no time for a validation.
            if last or ((step + 1) % training.evaluate_every == 0 and not signal):
                row |= _validated(trainer, step) | meter.ranks()
            if report:
                report.step(row)
            if last or signal or (step + 1) % training.checkpoint_every == 0:
                _checkpoint(trainer, directory, step + 1, training.background_checkpoints and not (last or signal))
            else:
                trainer.saving.poll()
        except NonFiniteError as problem:
            step = recovery.after(problem, step, last)
            continue
        if signal and not last:
            return signal
        step += 1
    return 0


def _validated(trainer: Trainer, step: int) -> dict[str, float]:
    """Return the measures of a validation, and raise an error on all ranks if its loss is not finite."""
    measures = trainer.validate()
    if not math.isfinite(measures["val_loss"]):
        raise NonFiniteError(f"after step {step + 1}: validation loss {measures['val_loss']}", repeats=True)
    return measures


def _checkpoint(trainer: Trainer, directory: RunDirectory, step: int, background: bool) -> None:
    training = trainer.config.training
    after = partial(directory.keep, step, training.keep_last, training.keep_every)
    trainer.save(directory.checkpoint(step), step, after, background)


def _timed_step(trainer: Trainer, step: int, meter: Meter, stop: Stop) -> tuple[dict[str, Any], int]:
    """Do a step; return its row of the metrics, and the signal that stops the run after it, 0 if none does."""
    watchdog.begin_step(step + 1)
    with meter.measure(step + 1) as measured:
        row: dict[str, Any] = {"step": step + 1, "samples": trainer.samples(step + 1)}
        try:
            row |= trainer.step(step, stop.vote)
        finally:
            signal = stop.decided()
    return row | measured, signal
