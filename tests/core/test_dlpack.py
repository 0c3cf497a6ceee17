"""Blocks and tensors share memory as long as either lives, and memory that cannot be shared is refused."""

import gc
import weakref

import numpy as np
import pytest

from colossal_mpi import DTypeError, Layout, SharingError, dlpack, from_global
from tests.cases import integers

torch = pytest.importorskip("torch")
ml_dtypes = pytest.importorskip("ml_dtypes")

DTYPES = [
    *["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"],
    *["float16", "bfloat16", "float32", "float64", "complex64", "complex128"],
]
VIEWS = {
    "whole": lambda x: x,
    "fortran": lambda x: x.T,
    "steps": lambda x: x[1::2, ::3],
    "row": lambda x: x[2],
    "0-d": lambda x: x[1, 2, ...],
    "0-d of its own": lambda x: x[1, 2, ...].copy(),
    "empty": lambda x: x[:, 3:3],
    "none": lambda x: x[:0].T,
    "one": lambda x: x[:1, ::6],
    "repeated": lambda x: np.lib.stride_tricks.as_strided(x[0], (4, 3), (0, x.strides[1])),
    "misshaped": lambda x: x[None, :, None],
}


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def whole(name):
    return integers((5, 7), "complex128" if name.startswith("complex") else "int64").astype(numpy_dtype(name))


def assert_same_memory(block, tensor):
    assert str(tensor.dtype) == f"torch.{block.dtype.name}"
    assert tuple(tensor.shape) == block.shape
    if block.size:
        assert tensor.data_ptr() == block.__array_interface__["data"][0]
    strides = tuple(stride * block.itemsize for stride in tensor.stride())
    assert all(n < 2 or s == t for n, s, t in zip(block.shape, strides, block.strides, strict=True)) or not block.size


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("name", DTYPES)
def test_a_block_and_its_tensor_are_one_memory(name, view):
    block = view(whole(name))
    tensor = dlpack.to_torch(block)
    assert_same_memory(block, tensor)
    back = dlpack.from_torch(tensor)
    assert back.dtype == block.dtype
    assert back.flags.writeable
    assert_same_memory(back, tensor)
    assert back.tobytes() == block.tobytes()
    if block.size:
        tensor.fill_(1)
        assert np.all(block == np.ones((), block.dtype))
        back[...] = 0
        assert not np.any(block)
        assert not torch.any(tensor != 0)


@pytest.mark.parametrize("name", DTYPES)
def test_a_tensor_and_its_block_are_one_memory(name):
    dtype = getattr(torch, name)
    own = torch.arange(35).reshape(5, 7).to(dtype)
    for tensor in (own, own.T, own[1::2, ::3], own[2], own[1, 2], own[:, 3:3], own[0].expand(4, 7), own[:0]):
        block = dlpack.from_torch(tensor)
        assert block.dtype == numpy_dtype(name)
        assert_same_memory(block, tensor)
    dlpack.from_torch(own)[...] = 1
    assert torch.all(own == 1)


@pytest.mark.grids({"row": 1})
def test_the_block_of_a_distributed_array_is_shared(grid):
    array = from_global(grid.xp.ones((3, 4)), grid, Layout("row", None))
    if grid.device.startswith("fake"):
        with pytest.raises(SharingError, match="takes a NumPy or CuPy array or a DistArray, not DeviceArray"):
            dlpack.to_torch(array)
        return
    dlpack.to_torch(array).mul_(2)
    assert array.sum() == 24


def test_the_memory_lives_as_long_as_either_side():
    class Watched(np.ndarray):
        """An array that can be watched."""

    block = np.full(1 << 16, 3.0).view(Watched)
    gone = weakref.ref(block)
    tensor = dlpack.to_torch(block)
    del block
    gc.collect()
    assert gone() is not None
    assert torch.all(tensor == 3)
    part = tensor[:2]
    del tensor
    gc.collect()
    assert gone() is not None
    del part
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_block_keeps_the_memory_of_the_tensor(dtype):
    tensor = torch.full((1 << 16,), 3, dtype=dtype)
    gone = weakref.ref(tensor.untyped_storage())
    block = dlpack.from_torch(tensor)[::2]
    where = tensor.data_ptr()
    del tensor
    gc.collect()
    other = torch.zeros(1 << 16, dtype=dtype)  # takes the memory if it was given back
    assert gone() is None or other.data_ptr() != where
    assert np.all(block == 3)


def test_a_tensor_is_shared_without_its_graph():
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    block = dlpack.from_torch(weight)
    block *= 2
    assert weight.tolist() == [2, 2, 2]
    dlpack.from_torch(weight * weight)
    assert not dlpack.to_torch(block).requires_grad


def test_read_only_memory_is_shared_for_reading_on_request():
    block = np.arange(6.0)
    block.flags.writeable = False
    with pytest.raises(SharingError, match=r"read-only.*copy\(\).*writable=False"):
        dlpack.to_torch(block)
    tensor = dlpack.to_torch(block, writable=False)
    assert_same_memory(block, tensor)
    halves = np.broadcast_to(np.ones(3, ml_dtypes.bfloat16), (2, 3))
    assert_same_memory(halves, dlpack.to_torch(halves, writable=False))


REFUSED_BLOCKS = {
    "backwards": (lambda: np.arange(6.0)[::-1], SharingError, r"strides \(-8,\).*copy\(\)"),
    "one dim backwards": (lambda: np.ones((1, 3), "float16")[::-1], SharingError, "strides"),
    "unaligned": (lambda: np.frombuffer(bytearray(25), "f8", 3, 1), SharingError, "whole steps"),
    "a field": (lambda: np.zeros(3, [("a", "i1"), ("b", "f8")])["b"], SharingError, "whole steps"),
    "list": (lambda: [1.0, 2.0], SharingError, "not list"),
    "scalar": (lambda: np.float64(1), SharingError, "not float64"),
    "tensor": (lambda: torch.ones(2), SharingError, "not Tensor"),
    "byte order": (lambda: np.zeros(3, np.dtype("f8").newbyteorder()), DTypeError, "byte order"),
    "longdouble": (lambda: np.zeros(3, "longdouble"), DTypeError, "torch has no (float128|float96|longdouble)"),
    "objects": (lambda: np.zeros(3, object), DTypeError, "torch has no object"),
    "text": (lambda: np.zeros(3, "U4"), DTypeError, "torch has no str"),
    "dates": (lambda: np.zeros(3, "M8[s]"), DTypeError, "torch has no datetime"),
    "nothing": (lambda: np.zeros(3, "V0"), DTypeError, "torch has no void"),
    "quarter": (lambda: np.zeros(3, ml_dtypes.float8_e4m3fn), DTypeError, "torch has no float8"),
}


@pytest.mark.parametrize(("make", "error", "words"), REFUSED_BLOCKS.values(), ids=REFUSED_BLOCKS)
def test_other_blocks_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        dlpack.to_torch(make())


REFUSED_TENSORS = {
    "array": (lambda: np.ones(2), SharingError, "not ndarray"),
    "meta": (lambda: torch.ones(2, device="meta"), SharingError, "'meta'"),
    "sparse": (lambda: torch.eye(3).to_sparse(), SharingError, "sparse_coo"),
    "conjugate": (lambda: torch.ones(2, dtype=torch.complex64).conj(), SharingError, "resolve_conj"),
    "negative": (lambda: torch.ones(2, dtype=torch.complex64).conj().imag, SharingError, "resolve_neg"),
    "float8": (lambda: torch.ones(2).to(torch.float8_e5m2), DTypeError, "NumPy has no torch.float8"),
}


@pytest.mark.parametrize(("make", "error", "words"), REFUSED_TENSORS.values(), ids=REFUSED_TENSORS)
def test_other_tensors_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        dlpack.from_torch(make())


GIVEN = {
    "with a graph": lambda: torch.arange(6.0, dtype=torch.float64, requires_grad=True).reshape(3, 2),
    "bfloat16": lambda: torch.arange(6).reshape(3, 2).to(torch.bfloat16),
    "conjugate": lambda: torch.complex(torch.arange(6.0), torch.ones(6)).reshape(3, 2).conj(),
    "negative": lambda: torch.complex(torch.arange(6.0), torch.ones(6)).reshape(3, 2).conj().imag,
}
WAYS = {
    "whole": lambda tensor, grid, layout: from_global(tensor, grid, layout),
    "by indices": lambda tensor, grid, layout: from_global(tensor.__getitem__, grid, layout, tensor.shape),
    "rows": lambda tensor, grid, layout: from_global(list(tensor), grid, layout),
}


@pytest.mark.grids({"row": 1}, {"row": 2})
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("make", GIVEN.values(), ids=GIVEN)
def test_from_global_takes_every_tensor_in_its_dtype(grid, make, way):
    tensor = make()
    array = way(tensor, grid, Layout("row", None))
    wanted = tensor.detach().resolve_conj().resolve_neg()
    assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
    whole = array.gather()
    assert np.array_equal(whole.astype("complex64"), wanted.to(torch.complex64).numpy())


@pytest.mark.grids({"row": 1})
def test_a_tensor_of_no_dims_is_a_number_for_arithmetic(grid):
    array = from_global(np.ones(3), grid, Layout("row"))
    assert (array * torch.tensor(2.0, requires_grad=True)).sum() == 6


@pytest.mark.grids({"row": 1})
@pytest.mark.parametrize("name", ["meta", "sparse", "float8"])
def test_from_global_refuses_what_cannot_be_shared(grid, name):
    make, error, words = REFUSED_TENSORS[name]
    with pytest.raises(error, match=words):
        from_global(make(), grid, Layout(*[None] * make().ndim))


def test_on_a_gpu_the_tensor_is_shared_too():
    cupy = pytest.importorskip("cupy")
    if not torch.cuda.is_available():
        pytest.skip("torch has no GPU")
    block = cupy.arange(35.0).reshape(5, 7)[1::2, ::3]
    tensor = dlpack.to_torch(block)
    assert tensor.is_cuda
    assert tensor.data_ptr() == block.data.ptr
    tensor.mul_(2)
    back = dlpack.from_torch(tensor)
    assert back.data.ptr == block.data.ptr
    assert cupy.all(back == block)
