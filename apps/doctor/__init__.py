"""``colossal-mpi doctor``: what may be wrong with this machine, environment and job, and what to do about it."""
