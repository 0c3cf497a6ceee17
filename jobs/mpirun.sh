#!/usr/bin/env bash
# Train without a scheduler:     jobs/mpirun.sh 4 demo --grid row=2,col=2 --tensor 2d
# On several hosts: HOSTS=a:4,b:4 jobs/mpirun.sh 8 demo --grid data=2,row=2,col=2 --tensor 2d
set -euo pipefail
ranks=$1
shift

options=()
if mpiexec --version 2>&1 | grep -q "Open MPI"; then
    hosts=--host
    options+=(--bind-to none)                    # otherwise Open MPI binds each rank to one core
    export OMPI_MCA_mpi_yield_when_idle=1        # ranks that share a core yield to one another
else # MPICH, Intel MPI
    hosts=-hosts
fi
if [[ -n ${HOSTS:-} ]]; then
    options+=("$hosts" "$HOSTS")
fi
exec mpiexec "${options[@]}" -n "$ranks" colossal-mpi train "$@"
