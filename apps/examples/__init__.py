"""Programs to start from: run them as ``python -m colossal_mpi.apps.examples.NAME``, or copy them.

Nothing in the library imports them. They use the public names that a program outside of the library uses.
"""
