"""Stand-ins for programs, which tests put on PATH: an srun that calls mpiexec, and a short train command."""

import json
import os
import sys
from pathlib import Path

from colossal_mpi.runtime.launcher import mpiexec_command

SRUN = """#!/bin/sh
# what Slurm does: start the program on every task, in an environment that says so
while [ "${1#-}" != "$1" ]; do echo "option $1" >> called; shift; done
echo "$*" >> called
env | grep -E '^(OMP|SRUN|COLOSSAL|MPIR)_' >> called
[ -n "$FAKE_CODE" ] && exit $FAKE_CODE
[ $# -gt 0 ] || exit 0
exec MPIEXEC -n "${SLURM_NTASKS:-4}" "$@"
"""
SBATCH = """#!/bin/sh
# at once, and with no more of what the script asks for than ranks
nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$1")
tasks=$(sed -n 's/^#SBATCH --ntasks-per-node=//p; s/^#SBATCH --ntasks=//p' "$1")
export SLURM_JOB_ID=7 SLURM_CPUS_PER_TASK=1 SLURM_NTASKS=$((${nodes:-1} * tasks))
exec bash "$@"
"""
_SIZES = "model.hidden=16 training.batch=8 parallel.kernels=reference"
_SET = f"{_SIZES} training.evaluate_batches=1 training.sample=1 run.peak_flops=1 run.forecast=false run.report=false"
SMALL = {
    "train": [word for setting in _SET.split() for word in ("--set", setting)],
    "plan": [word for setting in _SIZES.split() for word in ("--set", setting)],
    "generate": ["-n", "2", "--kernels", "reference"],
    "doctor": ["--seconds", "0.1"],
}
"""Options that tests append to a command, so that it takes seconds."""
COLOSSAL_MPI = """#!{python}
import sys

from colossal_mpi.apps import cli

words = sys.argv[1:]
sys.argv += {small}.get(words[0], [])
if words[0] == "train":  # a run that is resumed goes on
    sys.argv += ["--set", f"training.steps={{1 + ('--resume' in words)}}"]
for option, value in {{"--ranks": "8", "--try": "1"}}.items() if words[0] == "plan" else ():
    if option in words:  # a smaller search
        sys.argv += [option, value]
cli.main()
"""
PYTHON = """#!/bin/sh
case "$*" in *colossal_mpi.apps.examples*) set -- "$@" --steps 1 ;; esac
exec {python} "$@"
"""


def executable(path, text):
    """Write a program."""
    path.write_text(text)
    path.chmod(0o755)


def environment(folder, small=False):
    """Return the environment in which a shell finds the programs of this Python and the stand-ins for others.

    The stand-ins are written to `folder`. With `small`, ``colossal-mpi`` and the examples do a short piece of the work.
    """
    folder.mkdir(exist_ok=True)
    many, extra = mpiexec_command(8, ["true"])
    few, _ = mpiexec_command(2, ["true"])
    start = many if small else few  # a script that sets options itself must not give them twice
    plain = f'#!/bin/sh\nexec {sys.executable} -m colossal_mpi.apps.cli "$@"\n'
    short = COLOSSAL_MPI.format(python=sys.executable, small=json.dumps(SMALL))
    executable(folder / "colossal-mpi", short if small else plain)
    executable(folder / "mpiexec", f'#!/bin/sh\nexec {" ".join(start[:-3])} "$@"\n')
    executable(folder / "srun", SRUN.replace("MPIEXEC", " ".join(many[:-3])))
    executable(folder / "sbatch", SBATCH)
    executable(folder / "scontrol", '#!/bin/sh\necho "scontrol $*" >> called\n')
    if small:
        executable(folder / "python", PYTHON.format(python=sys.executable))
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return inherited | extra | {"PATH": path, "PYTHONPATH": str(Path(__file__).parents[1])}
