pytest_plugins = ["colossal_mpi.testing.plugin"]
