"""Programs to start from, run as ``python -m colossal_mpi.apps.examples.NAME``."""
