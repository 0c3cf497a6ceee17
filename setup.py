"""Find the packages; everything else about the project is in pyproject.toml."""

from setuptools import find_packages, setup

# colossal_mpi/{linalg,layers,apps} are relative symlinks to the top-level folders, so one
# pattern finds all of them and nothing but `colossal_mpi` is installed.
setup(packages=find_packages(include=["colossal_mpi", "colossal_mpi.*"]))
