"""Checkpoints: a directory of HDF5 files that any grid, and any HDF5 tool, can read.

Training and the commands of ``apps`` save, load, verify and compare checkpoints with this package, and ``linalg.save``
and ``linalg.load`` are its module `hdf5`, which keeps single arrays as datasets of one file. The package calls
``comm`` for agreement among ranks, ``distarray`` for the arrays and h5py for the files.

==================  ====================================================================================
``rank00003.h5``    The blocks that rank 3 owns; each global element stands in exactly one file.
``index.h5``        Every array as one plain global dataset (virtual: it points into the rank files) with its
                    layout, and single values such as the step and the learning rate.
``manifest.json``   Format version; shape, dtype and layout of every array; the values; the caller's
                    metadata; a checksum of every part of every file. It is written last.
``tokenizer.json``  and other files that the caller wants to lie beside the arrays.
==================  ====================================================================================

A checkpoint is written under a temporary name, flushed to the disk and then renamed. A directory with the final name is
therefore complete.

**Checksums are verified in one place**, `colossal_mpi.checkpoint.checksums.find_damage`: `load` (through
`~colossal_mpi.checkpoint.checksums.require_undamaged`) and `verify` call it before HDF5 parses a file. HDF5 itself can
crash on a flipped bit in its metadata, and it reads a missing file under a virtual dataset as zeros. The manifest
carries a SHA-256 of itself, which `read_manifest` checks.

A newer version of colossal_mpi reads the checkpoints of every older version. An older version refuses a format that is
newer than its own: see `colossal_mpi.checkpoint.manifest`.

Modules
-------
saving, async_checkpointer
    Save at once, or while the caller goes on.
loading
    Verify a checkpoint and fill distributed arrays from it.
inspection
    Verify, read and compare checkpoints without distributed arrays.
directory, rank_file, index, manifest, checksums
    The format on disk: names and renaming, and the three kinds of files.
hdf5
    Distributed arrays as datasets of one HDF5 file.
"""

from colossal_mpi.checkpoint.async_checkpointer import AsyncCheckpointer
from colossal_mpi.checkpoint.directory import flush, point_latest, remove
from colossal_mpi.checkpoint.inspection import Difference, array_bytes, differences, is_whole, missing_files, verify
from colossal_mpi.checkpoint.loading import load
from colossal_mpi.checkpoint.manifest import FORMAT_VERSION, ArrayRecord, Manifest, read_manifest
from colossal_mpi.checkpoint.saving import owned_bytes, save

__all__ = [
    "FORMAT_VERSION",
    "ArrayRecord",
    "AsyncCheckpointer",
    "Difference",
    "Manifest",
    "array_bytes",
    "differences",
    "flush",
    "is_whole",
    "load",
    "missing_files",
    "owned_bytes",
    "point_latest",
    "read_manifest",
    "remove",
    "save",
    "verify",
]
