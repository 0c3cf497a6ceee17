"""Run ``colossal-mpi`` as ``python -m colossal_mpi.apps.cli``."""

from colossal_mpi.apps.cli.program import main

main()
