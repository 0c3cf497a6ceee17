"""``colossal-mpi doctor``: find what is wrong with the machine, the environment and the job, and name a remedy.

The command calls `diagnose` on every rank. Each rank states plain facts (`facts`), the checks (`program`, `mpi`,
`gpus`, `cores`, `disk`, `network`) turn them into findings (`finding`), and rank 0 prints these (`show`).
"""

from colossal_mpi.apps.doctor.examine import diagnose

__all__ = ["diagnose"]
