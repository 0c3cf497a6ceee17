#!/usr/bin/env bash
# Train on one node, without a scheduler:  jobs/train.sh 4 demo --grid row=2,col=2 --tensor 2d
set -euo pipefail
ranks=$1
shift
exec mpiexec -n "$ranks" colossal-mpi train "$@"
