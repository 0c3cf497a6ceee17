"""PyTorch's own kernels, forward and backward, on the memory of the blocks, without autograd.

`kernels.use` chooses them. The reference computes a block that torch cannot view (another library, a negative stride, a
dtype that it lacks), a case that torch has no kernel for, and every kernel that is not here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from array_api_compat import is_cupy_array

from colossal_mpi.dlpack import from_torch, to_torch
from colossal_mpi.errors import DTypeError, SharingError
from colossal_mpi.layers.kernels import reference
from colossal_mpi.platform.backend import Block

Tensor = Any
"""``torch.Tensor``, for a checker that has no torch."""
_aten = torch.ops.aten
_GPU = torch.cuda.is_available()


def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel of blocks for one of tensors, which calls the reference if that returns NotImplemented."""
    formula = getattr(reference, function.__name__)

    @functools.wraps(formula)
    def kernel(*values: Any, **options: Any) -> Any:
        try:
            tensors = [_view(value) for value in values]
        except (SharingError, DTypeError):
            return formula(*values, **options)
        floats = {t.dtype for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()}
        result = function(*tensors, **options) if len(floats) == 1 else NotImplemented
        return formula(*values, **options) if result is NotImplemented else _share(result)

    return kernel


def _view(value: Any) -> Any:
    """Return an argument with tensors in place of its blocks, which are only read."""
    if isinstance(value, tuple):
        return tuple(_view(item) for item in value)
    if not hasattr(value, "dtype"):
        return value
    if is_cupy_array(value) and not _GPU:
        raise SharingError("this PyTorch has no CUDA")
    return to_torch(value, writable=False)


def _share(result: Any) -> Any:
    """Return a result with blocks in place of its tensors."""
    if isinstance(result, tuple):
        return tuple(_share(item) for item in result)
    return from_torch(result) if isinstance(result, torch.Tensor) else result


def _is_half(x: Tensor) -> bool:
    """Say whether a block has 16-bit floats, whose sums ATen would return in 16 bits."""
    return bool(x.dtype.itemsize == 2)


@_kernel
def gelu(x: Tensor) -> Any:
    if x.device.type == "cpu" and torch.get_num_threads() == 1:
        return NotImplemented  # on one thread NumPy's tanh takes half the time of ATen's
    return _aten.gelu(x, approximate="tanh")


@_kernel
def gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    return _aten.gelu_backward(dy, x, approximate="tanh")


@_kernel
def gelu_erf(x: Tensor) -> Tensor:
    return _aten.gelu(x)


@_kernel
def gelu_erf_backward(dy: Tensor, x: Tensor) -> Tensor:
    return _aten.gelu_backward(dy, x)


@_kernel
def silu(x: Tensor) -> Tensor:
    return _aten.silu(x)


@_kernel
def silu_backward(dy: Tensor, x: Tensor) -> Tensor:
    return _aten.silu_backward(dy, x)


@_kernel
def relu(x: Tensor) -> Tensor:
    return _aten.relu(x)


@_kernel
def relu_backward(dy: Tensor, x: Tensor) -> Tensor:
    return _aten.threshold_backward(dy, x, 0)


@_kernel
def norm(x: Tensor, gain: Tensor, bias: Tensor | None, centred: bool, eps: float, size: int, total: Any = None) -> Any:
    if total is not None or not x.numel() or _is_half(x):
        return NotImplemented
    if centred:
        y, mean, rstd = _aten.native_layer_norm(x, [size], gain, bias, eps)
        return y, (mean[..., 0], rstd[..., 0])
    if x.device.type == "cpu" or bias is not None:
        return NotImplemented
    y, rstd = _aten._fused_rms_norm(x, [size], gain, eps)
    return y, (None, rstd[..., 0])


@_kernel
def norm_backward(dy: Tensor, x: Tensor, gain: Tensor, statistics: Any, size: int, total: Any = None) -> Any:
    mean, rstd = statistics
    if total is not None or not x.numel() or _is_half(x):
        return NotImplemented
    if mean is not None:
        parts = mean[..., None], rstd[..., None], gain, gain, [True] * 3
        return _aten.native_layer_norm_backward(dy, x, [size], *parts)
    if x.device.type == "cpu":
        return NotImplemented
    return *_aten._fused_rms_norm_backward(dy, x, [size], rstd[..., None], gain, [True] * 2), None


@_kernel
def lookup_backward(dy: Tensor, ids: Tensor, start: int, count: int) -> Tensor:
    """Return the reference's result: ids of other parts are mapped to one extra row, which ATen takes for padding."""
    if _is_half(dy):
        return NotImplemented
    local = ids - start
    local = torch.where((local >= 0) & (local < count), local, count).long()
    return _aten.embedding_dense_backward(dy, local, count + 1, count, False)[:count]


@_kernel
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    mask: Tensor | None = None,
    positions: Any = None,
    window: int | Tensor | None = None,
) -> Any:
    if not _flash(q, k, causal, positions, window):
        return NotImplemented
    bias = _bias(mask, q.dtype)
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*_heads(q, k, v), 0.0, causal, attn_mask=bias)
    return out.transpose(1, 2), _statistics(lse, causal, mask)


@_kernel
def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    statistics: Tensor,
    causal: bool = True,
    mask: Tensor | None = None,
    positions: Any = None,
    window: int | Tensor | None = None,
) -> Any:
    if not _flash(q, k, causal, positions, window):
        return NotImplemented
    (peaks, sums), heads = statistics[..., 0], _heads(q, k, v)
    lse = torch.where(sums > 0, peaks + sums.log(), torch.inf)  # infinity makes all probabilities 0
    do, o = (_rows(x).transpose(1, 2) for x in (do, o))
    dq, *rest = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, *heads, o, lse, 0.0, causal, attn_mask=_bias(mask, q.dtype)
    )
    return dq.transpose(1, 2), *(_grouped(d, k).transpose(1, 2) for d in rest)


def _flash(q: Tensor, k: Tensor, causal: bool, positions: Any, window: int | Tensor | None) -> bool:
    """Say whether the flash kernel for CPUs covers the case. An empty array would crash the process."""
    whole = window is None or (isinstance(window, int) and window >= k.shape[1])
    order = not causal or (positions is None and q.shape[1] == k.shape[1] and whole)
    return q.device.type == "cpu" and order and q.numel() > 0 and k.numel() > 0


def _rows(x: Tensor) -> Tensor:
    """Return the array with a contiguous last dim, which the kernels for CPUs require."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Return ``[b, a, s, d]`` of ``[b, s, a, d]``, with keys and values repeated for each query head of their group."""
    r = q.shape[2] // k.shape[2]
    spread = (x if r == 1 else x.repeat_interleave(r, 2) for x in (k, v))
    return [_rows(x).transpose(1, 2) for x in (q, *spread)]


def _grouped(d: Tensor, k: Tensor) -> Tensor:
    """Return ``[b, a, s, d]`` summed over the query heads of each group."""
    groups = k.shape[2]
    return d if d.shape[1] == groups else d.unflatten(1, (groups, -1)).sum(2)


def _statistics(lse: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """Return the reference's statistics: log-sum-exps as peaks, with sums 1, or 0 if no key is seen."""
    sums = torch.ones_like(lse)
    if mask is not None:
        seen = mask.cumsum(1) > 0 if causal else mask.any(1, keepdim=True)
        sums *= seen[:, None, :]
        lse = torch.where(sums > 0, lse, -torch.inf)
    return torch.stack([lse, sums])[..., None]


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the term that is added to scores: minus infinity where a key is hidden."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)[:, None, None, :]


def adamw(w: Block, g: Block, m: Block, v: Block, step: int, **options: Any) -> None:
    tensors = _dense(w, g, m, v)
    if tensors is None:
        reference.adamw(w, g, m, v, step, **options)
        return
    b1, b2 = options.pop("betas")
    count = torch.tensor(float(step), device=tensors[0].device)
    lists = *([tensor] for tensor in tensors), [], [count]
    _aten._fused_adamw_(*lists, beta1=b1, beta2=b2, amsgrad=False, maximize=False, **options)


def _dense(*blocks: Block) -> list[Tensor] | None:
    """Return blocks as writable tensors, None unless all lie in C order, which the fused kernels need."""
    try:
        tensors = [to_torch(block) for block in blocks]
    except (SharingError, DTypeError):
        return None
    alike = len({(t.dtype, t.device) for t in tensors}) == 1
    return tensors if alike and all(t.is_contiguous() for t in tensors) else None
