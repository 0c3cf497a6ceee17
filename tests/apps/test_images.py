"""The images are scikit-learn's digits or the user's own; all ranks refuse wrong files in one message."""

import sys

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import ConfigError, Grid, comm
from colossal_mpi.apps.data.images import draw, read_images, shifted

SELF = Grid(MPI.COMM_SELF)


@pytest.mark.grids({}, {"row": 2, "col": 2})
def test_the_digits_are_the_default(grid):
    images = read_images([], 0.2, grid)
    assert (images.train.shape, images.validation.shape, images.classes) == ((1438, 1, 8, 8), (359, 1, 8, 8), 10)
    assert len(np.unique(np.concatenate([images.train, images.validation]), axis=0)) == 1797
    assert abs(images.train.mean()) < 1e-12
    assert abs(images.train.std() - 1) < 1e-12
    hashes = comm.collect((images.train.tobytes(), images.validation_labels.tobytes()), grid)
    assert len(set(hashes)) == 1
    assert np.bincount(images.validation_labels).min() > 20


@pytest.mark.parametrize("dtype", ["uint8", "float32", ">i2"])
def test_the_user_names_files(tmp_path, dtype):
    whole, labels = np.random.default_rng(0).integers(0, 250, (10, 3, 4, 6)).astype(dtype), np.arange(10)
    files = save(tmp_path / "a.npz", whole[:4], labels[:4]) + save(tmp_path / "b.npz", whole[4:], labels[4:])
    images = read_images(files, 0.2, SELF)
    assert np.array_equal(np.sort(np.r_[images.train_labels, images.validation_labels]), labels)
    assert len(images.validation) == 2
    used, held = (whole[which].astype(float) for which in (images.train_labels, images.validation_labels))
    assert np.array_equal(images.train, (used - used.mean()) / used.std())
    assert np.array_equal(images.validation, (held - used.mean()) / used.std())


def save(path, images, labels):
    np.savez(path, images=images, labels=labels)
    return [str(path)]


@pytest.mark.grids({}, {"data": 2})
def test_what_does_not_fit_is_refused_on_all_ranks(grid, shared_path):
    ones, labels = np.ones((4, 5, 5)), np.arange(4)
    cases = [
        (["/nowhere.npz"], "cannot read /nowhere.npz: No such file"),
        ([__file__], "must be an .npz file of arrays images and labels"),
        ((ones, labels[:3]), r"images float64 \(4, 1, 5, 5\) and labels int64 \(3,\): images must be finite numbers"),
        ((ones[0], labels), r"images float64 \(5, 5\)"),
        ((ones, labels - 1), "integers from 0"),
        ((ones, labels + 0.5), "labels float64"),
        ((ones * np.nan, labels), "finite"),
        ((ones.astype(str), labels), "images <U"),
        ((ones[:1], labels[:1]), "1 images with data.validation=0.2: some must be held out"),
    ]
    for i, (source, message) in enumerate(cases):
        files = source if isinstance(source, list) else [str(shared_path / f"{i}.npz")]
        with comm.agreed(grid):
            if grid.rank == 0 and isinstance(source, tuple):
                save(files[0], *source)
        with pytest.raises(ConfigError, match=message):
            read_images(files, 0.2, grid)


def test_images_of_two_sizes_are_refused(tmp_path):
    files = save(tmp_path / "a.npz", np.ones((4, 5, 5)), np.arange(4))
    files += save(tmp_path / "b.npz", np.ones((4, 5, 6)), np.arange(4))
    with pytest.raises(ConfigError, match=r"of one size \[c, y, x\]; they are \(1, 5, 5\), \(1, 5, 6\)"):
        read_images(files, 0.2, SELF)


@pytest.mark.grids({}, {"data": 2})
def test_without_scikit_learn_the_error_says_what_to_install(grid, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'colossal-mpi\[digits\]', or name .npz files"):
        read_images([], 0.2, grid)


def test_shifted_images_keep_their_size_and_draw_out_their_edges():
    image = np.arange(12.0).reshape(1, 1, 3, 4)
    moved = shifted(np.concatenate([image, image]), np.array([[1, 0], [0, -2]]))
    assert np.array_equal(moved[0, 0], image[0, 0][[0, 0, 1]])
    assert np.array_equal(moved[1, 0], image[0, 0][:, [2, 3, 3, 3]])
    assert shifted(image[:0], np.zeros((0, 2), int)).shape == (0, 1, 3, 4)


def test_images_are_drawn_from_dark_to_light():
    assert draw(np.array([[[0, 9], [5, 9]]])) == ["  @@", "++@@"]
    assert draw(np.ones((3, 1, 2))) == ["    "]
