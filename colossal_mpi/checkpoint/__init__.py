"""Checkpoints: a directory of HDF5 files that any grid, and any HDF5 tool, can read.

==================  ====================================================================================
``rank00003.h5``    the blocks that rank 3 owns; each global element stands in exactly one file
``index.h5``        every array as one plain global dataset (virtual, pointing into the rank files) with its
                    layout, and single values: the step, the learning rate, ...
``manifest.json``   format version, shape, dtype and layout of every array, the values, what the caller adds,
                    and a checksum of every part of every file; written last
==================  ====================================================================================

A checkpoint is written under a temporary name, flushed to disk and renamed, so that a directory of its final name is
whole. Checksums are verified before HDF5 parses a file: a flipped bit in its metadata can crash it, and a missing file
under a virtual dataset silently reads as zeros. Single arrays as datasets of one file: `colossal_mpi.checkpoint.hdf5`.

A newer version of colossal_mpi reads the checkpoints of every older one, and an older one refuses what is newer than
itself: see `colossal_mpi.checkpoint.manifest`.

Modules
-------
entries : what all ranks save together
shard : the file of one rank
parts : checksums
index, manifest : what describes the whole
place : directories and their names
writing, background : saving, at once or while the caller goes on
loading : loading
contents, compare : what a checkpoint holds, is worth and differs in, for people
"""

from colossal_mpi.checkpoint.background import AsyncCheckpointer
from colossal_mpi.checkpoint.entries import owned_bytes
from colossal_mpi.checkpoint.loading import load
from colossal_mpi.checkpoint.manifest import FORMAT_VERSION, read_manifest
from colossal_mpi.checkpoint.place import flush, point_latest
from colossal_mpi.checkpoint.writing import save

__all__ = [
    "FORMAT_VERSION",
    "AsyncCheckpointer",
    "flush",
    "load",
    "owned_bytes",
    "point_latest",
    "read_manifest",
    "save",
]
