"""A run stops, leaves a step out or goes back to a checkpoint after a step that was not finite.

The training loop makes a `Recovery` and calls `Recovery.after` with the error that the trainer raised on all ranks
before it updated a weight. ``training.nonfinite`` chooses.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from colossal_mpi import comm
from colossal_mpi.apps.run_directory import RunDirectory
from colossal_mpi.apps.training.progress import Report
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.checkpoint import read_manifest
from colossal_mpi.errors import CheckpointError, NonFiniteError

MOST_IN_A_ROW, MOST_FROM_ONE = 10, 3
"""Steps that are left out one after the other, and returns to one checkpoint, before a run stops: it has diverged."""


class Recovery:
    """The answer to steps that are not finite.

    Parameters
    ----------
    trainer : Trainer
        The trainer of the run.
    directory : RunDirectory
        The run directory.
    report : Report or None
        The output of rank 0; None on the other ranks.
    """

    def __init__(self, trainer: Trainer, directory: RunDirectory, report: Report | None) -> None:
        self.trainer, self.directory, self.report = trainer, directory, report
        self._left_out: list[int] = []
        self._returns = Counter[int]()

    def after(self, problem: NonFiniteError, step: int, last: bool) -> int:
        """Do what the configuration says, and return the step to go on with.

        Parameters
        ----------
        problem : NonFiniteError
            What was found, the same on all ranks.
        step : int
            Number of the step, from 0.
        last : bool
            Whether it is the last step of the run.

        Returns
        -------
        int
            Number of the next step, from 0.

        Raises
        ------
        NonFiniteError
            On all ranks, if the run is to stop, or if neither leaving out a step nor going back can help. It says how
            to go on.

        Notes
        -----
        **Communication:** the checkpoint that is under way is finished; a small message; and the reading of a
        checkpoint.
        """
        self.trainer.saving.finish()
        chosen, saved = self.trainer.config.training.nonfinite, self._saved()
        if chosen == "rollback":
            return self._roll_back(problem, step, saved)
        if chosen == "stop":
            raise self._stopped(problem, step, saved)
        return self._leave_out(problem, step, last, saved)

    def _saved(self) -> list[int]:
        """Return the steps of the checkpoints that do not say that they are not finite, on all ranks."""
        found: list[int] = []
        with comm.agreed(self.trainer.grid):
            if self.trainer.grid.rank == 0:
                found = [step for step in self.directory.saved() if _is_finite(self.directory.checkpoint(step))]
        steps: list[int] = comm.share(found, self.trainer.grid)
        return steps

    def _leave_out(self, problem: NonFiniteError, step: int, last: bool, saved: list[int]) -> int:
        if problem.state:
            raise self._stopped(problem, step, saved, "leaving out a step does not mend it; ")
        in_a_row = [s for s in self._left_out if s > step - MOST_IN_A_ROW]
        if len(in_a_row) + 1 >= MOST_IN_A_ROW:
            raise self._stopped(problem, step, saved, f"{MOST_IN_A_ROW} steps in a row were left out; ")
        self._left_out.append(step)
        if self.report:
            self.report.recovered(f"{problem}; the step is left out", step + 1)
        training = self.trainer.config.training
        if last or (step + 1) % training.checkpoint_every == 0:
            self._save(step + 1)
        return step + 1

    def _save(self, step: int) -> None:
        """Write the checkpoint that is due after a step that was left out."""
        training = self.trainer.config.training

        def after() -> None:
            self.directory.keep(step, training.keep_last, training.keep_every)

        self.trainer.save(self.directory.checkpoint(step), step, after)

    def _roll_back(self, problem: NonFiniteError, step: int, saved: list[int]) -> int:
        trainer, wanted = self.trainer, step - self.trainer.config.training.rollback_steps
        # the samples of the step that failed are passed over, whatever step takes them
        samples = trainer.samples(step + 1)
        candidates = [s for s in saved if s <= wanted and self._returns[s] < MOST_FROM_ONE]
        if not candidates:
            tried = f", beyond the {MOST_FROM_ONE} returns to one" if any(s <= wanted for s in saved) else ""
            raise self._stopped(problem, step, saved, f"no checkpoint after step {max(wanted, 0)} or before{tried}; ")
        back = self._restored(candidates)
        self._returns[back] += 1
        trainer.move_on(back, samples)
        with comm.agreed(trainer.grid):
            if trainer.grid.rank == 0:
                self.directory.rewind(back)
        if self.report:
            text = f"the run goes back to the checkpoint after step {back} and on with the samples from {samples:,} on"
            self.report.recovered(f"{problem}; {text}", back)
        return back

    def _restored(self, candidates: list[int]) -> int:
        """Restore the newest checkpoint that is whole and finite, and return the number of its steps."""
        for back in reversed(candidates):
            try:
                self.trainer.restore(self.directory.checkpoint(back))
                self.trainer.require_finite(back)
            except (CheckpointError, NonFiniteError):  # on all ranks
                if back == candidates[0]:
                    raise
            else:
                return back
        raise AssertionError("there is a candidate")

    def _stopped(self, problem: NonFiniteError, step: int, saved: list[int], why: str = "") -> NonFiniteError:
        text = f"{problem}; {why}{self._remedy(problem, step, saved)}"
        return NonFiniteError(text, problem.state, problem.repeats)

    def _remedy(self, problem: NonFiniteError, step: int, saved: list[int]) -> str:
        """Return how a run can go on that has stopped before the update of a step."""
        resume = f"--resume {self.directory.path}"
        lower = f"--set training.lr={self.trainer.config.training.lr / 10:.3g}"
        if not saved:
            return f"there is no checkpoint yet: start it anew with a lower rate: --overwrite {lower}"
        if not problem.state and not problem.repeats:
            return f"go on from the checkpoint after step {saved[-1]}: {resume}"
        if problem.repeats and saved[-1] >= step:
            older = [s for s in saved if s < step]
            if not older:
                return (
                    f"the only checkpoint, after step {saved[-1]}, ends in the same: go on without this step: {resume} "
                    f"--set training.nonfinite=skip, or start it anew with a lower rate: --overwrite {lower}"
                )
            return (
                f"the newest checkpoint ends in the same: go on from the one after step {older[-1]} with other samples "
                f"and a lower rate: {resume} --set training.nonfinite=rollback --set training.rollback_steps="
                f"{step - older[-1]} {lower}"
            )
        return f"go on from the checkpoint after step {saved[-1]} with a lower rate: {resume} {lower}"


def _is_finite(directory: Path) -> bool:
    """Say whether a checkpoint can be read and does not state that it is not finite; older ones state nothing."""
    try:
        finite = read_manifest(directory)["values"].get("training/finite")
    except CheckpointError:
        return False
    return finite is None or bool(finite["value"])
