"""The command line ``colossal-mpi``: one file for each command.

The console script calls `main`. A command parses its options, starts ranks where it needs them, and calls the package
of ``apps`` that does the work.
"""
