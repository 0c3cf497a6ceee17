"""Files from outside: the one package that opens them, so that nothing in a file is trusted before it is checked.

Checkpoints, ``linalg.load``, token stores, configurations, tokenizers, run directories and Hugging Face directories
read and write through it. The package calls the operating system and h5py.

Reading takes regular files only: a pipe in place of a file would block, and a device would never end. A size is
compared with a limit before memory is taken. JSON and TOML have limits of size and depth. HDF5 can hide other files
behind a name (external links, external storage, virtual datasets); `find_dataset` returns none of them.

Writing makes a new file beside the old one, flushes it to the disk and renames it, so that a crash leaves the old file
or the new one, and a link in its place is replaced and not followed.

Failures are an `OSError` with a reason in ``strerror``, or a `ValueError` for what a file holds. Callers turn them into
an error of this package that names the file.

Modules
-------
regular
    Read regular files, write new ones.
text
    JSON and TOML of limited depth.
hdf5
    Datasets of an HDF5 file, and writing that survives a full disk.
"""

from colossal_mpi.files.hdf5 import Hdf5Output, find_dataset, new_hdf5, open_hdf5
from colossal_mpi.files.regular import (
    LARGEST_CONFIG,
    LARGEST_TEXT,
    append,
    open_regular,
    open_to_append,
    read_bytes,
    write_new,
)
from colossal_mpi.files.text import DEPTH, parse_json, parse_toml

__all__ = [
    "DEPTH",
    "LARGEST_CONFIG",
    "LARGEST_TEXT",
    "Hdf5Output",
    "append",
    "find_dataset",
    "new_hdf5",
    "open_hdf5",
    "open_regular",
    "open_to_append",
    "parse_json",
    "parse_toml",
    "read_bytes",
    "write_new",
]
