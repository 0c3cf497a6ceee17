"""``colossal-mpi bench``: how fast the library is beside its peers, all of them in one run."""
