"""Images with classes: scikit-learn's digits or the user's own, split into training images and held-out ones.

The task ``images`` reads them with `read_images`, moves them with `shifted` and shows some as characters with `draw`.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from colossal_mpi import comm, random
from colossal_mpi.apps.data.digest import digest_of
from colossal_mpi.errors import ColossalError, ConfigError
from colossal_mpi.files import open_regular
from colossal_mpi.grid import Grid

_UNPACKED, _PACKED = 1 << 28, 250
"""Bytes to which any archive may unpack, and how many times its own size a larger one may have."""


@dataclass(frozen=True)
class Images:
    """Images and their classes.

    Parameters
    ----------
    train : array of float64
        Training images ``[n, c, y, x]``, with mean 0 and standard deviation 1.
    train_labels : array of int64
        The class of each training image ``[n]``, from 0.
    validation : array of float64
        Held-out images ``[n, c, y, x]``, shifted and scaled as the training images.
    validation_labels : array of int64
        The class of each held-out image ``[n]``, from 0.
    digest : str
        The digest of all images and labels and of which are held out, ``""`` where a meta grid has no use for it.
    """

    train: np.ndarray
    train_labels: np.ndarray
    validation: np.ndarray
    validation_labels: np.ndarray
    digest: str = ""

    @property
    def classes(self) -> int:
        """Number of classes."""
        return 1 + int(max(self.train_labels.max(), self.validation_labels.max()))

    @property
    def about(self) -> str:
        """Numbers and size of the images, for a reader."""
        size = "x".join(map(str, self.train.shape[1:]))
        return f"{len(self.train):,} images of {size}, {self.classes} classes, {len(self.validation):,} held out"


def read_images(files: Sequence[str], validation: float, grid: Grid) -> Images:
    """Return the images, read by rank 0 and sent to the others.

    Parameters
    ----------
    files : sequence of str
        ``.npz`` files with arrays ``images`` ``[n, y, x]`` or ``[n, c, y, x]`` and ``labels`` ``[n]``, classes from 0.
        Without any, the images are the 1,797 handwritten digits that scikit-learn carries.
    validation : float
        Share of the images that is held out.
    grid : Grid
        All ranks of the run.

    Returns
    -------
    Images
        All images, on every rank.

    Raises
    ------
    ConfigError
        On all ranks, if a file cannot be read or does not fit, or scikit-learn is not installed.

    Notes
    -----
    **Communication:** two bcasts from rank 0 over the grid: the images, in their own dtype, and the labels.

    References
    ----------
    Alpaydin, Kaynak: Optical recognition of handwritten digits, 1998.
    """
    images, labels = np.empty(0, np.uint8), np.empty(0, np.int64)
    with comm.agreed(grid):
        if grid.rank == 0:
            images, labels = _read(files)
    shape, dtype = comm.share((images.shape, images.dtype.str), grid)
    if grid.rank:
        images, labels = np.empty(shape, dtype), np.empty(shape[:1], np.int64)
    # images[n, c, y, x], labels[n] on rank 0  ->  the same on every rank: bcast over all axes
    images, labels = (comm.bcast(array, grid, tuple(grid.axes)) for array in (images, labels))
    held = _held_out(len(labels), validation)
    if not 0 < held.sum() < len(labels):
        raise ConfigError(f"{len(labels)} images with data.validation={validation}: some must be held out; give more")
    found = comm.share("" if grid.rank or grid.is_meta else digest_of((images, labels, held)), grid)
    images = images.astype(np.float64)
    images = (images - images[~held].mean()) / (images[~held].std() or 1.0)
    return Images(images[~held], labels[~held], images[held], labels[held], found)


def _held_out(count: int, share: float) -> np.ndarray:
    """Return which images are held out: the same random ones for any seed of a run.

    They are random because many data sets are ordered: if every fifth digit were held out, 52 would be a 3 and 21 a 1.
    """
    return np.argsort(np.argsort(random.uniform_block(((0, count),), (count,), 0, "data/held"))) < round(count * share)


def _read(files: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    pairs = [_checked(name, *_load(name)) for name in files] or [_digits()]
    images, labels = ([pair[i] for pair in pairs] for i in (0, 1))
    sizes = {array.shape[1:] for array in images}
    if len(sizes) > 1:
        raise ConfigError(
            f"data.files: the images must be of one size [c, y, x]; they are {', '.join(map(str, sorted(sizes)))}"
        )
    return np.concatenate(images), np.concatenate(labels).astype(np.int64)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "the digits come with scikit-learn, which is not installed: pip install 'colossal-mpi[digits]', or name "
            ".npz files of images and labels in data.files"
        ) from None
    digits = load_digits()
    return digits.images[:, None].astype(np.uint8), digits.target


def _load(name: str) -> tuple[Any, Any]:
    try:
        with open_regular(name) as opened:
            _require_size(name, opened)
        with np.load(name, allow_pickle=False) as file:
            return file["images"], file["labels"]
    except ColossalError:
        raise
    except OSError as problem:
        raise ConfigError(f"data.files: cannot read {name}: {problem.strerror or problem}") from None
    except Exception as problem:  # of a header or of packed bytes: whatever NumPy and zipfile raise
        raise ConfigError(f"data.files: {name} must be an .npz file of arrays images and labels: {problem}") from None


def _require_size(name: str, file: BinaryIO) -> None:
    """Refuse an archive that would unpack to far more than its size."""
    size = file.seek(0, io.SEEK_END)
    most = max(_UNPACKED, _PACKED * size)
    with zipfile.ZipFile(file) as archive:
        claimed = sum(entry.file_size for entry in archive.infolist())
    if claimed > most:
        raise ConfigError(
            f"data.files: {name} has {size:,} bytes and unpacks to {claimed:,}, more than {most:,}: save it with "
            "numpy.savez, not compressed"
        )


def _checked(name: str, images: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    images = images[:, None] if images.ndim == 3 else images
    fit = images.ndim == 4 and labels.shape == images.shape[:1] and images.size and images.dtype.kind in "uif"
    if not fit or labels.dtype.kind not in "ui" or labels.min() < 0 or not np.isfinite(images).all():
        raise ConfigError(
            f"data.files: {name} has images {images.dtype} {images.shape} and labels {labels.dtype} {labels.shape}: "
            "images must be finite numbers [n, y, x] or [n, c, y, x], and labels [n] integers from 0"
        )
    return np.ascontiguousarray(images), labels


def shifted(images: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """Return images that are moved; their edge pixels are repeated.

    Parameters
    ----------
    images : array
        Shape ``[n, c, y, x]``.
    moves : array of int64
        By how many pixels each image moves down and to the right, ``[n, 2]``.

    Returns
    -------
    array
        The moved images, of the same shape and dtype.
    """
    most, (ny, nx) = int(abs(moves).max(initial=0)), images.shape[2:]
    padded = np.pad(images, ((0, 0), (0, 0), (most, most), (most, most)), mode="edge")
    starts = most - moves
    pairs = zip(padded, starts, strict=True)
    return np.stack([image[:, y : y + ny, x : x + nx] for image, (y, x) in pairs]) if len(images) else images


def draw(image: np.ndarray) -> list[str]:
    """Return an image as characters, two for each pixel, from dark to light.

    Parameters
    ----------
    image : array
        Shape ``[c, y, x]``.

    Returns
    -------
    list of str
        The rows of the image.
    """
    gray = image.mean(axis=0)
    levels = (gray - gray.min()) / (np.ptp(gray) or 1.0)
    return ["".join(2 * " .:-=+*#%@"[int(9 * level)] for level in row) for row in levels]
