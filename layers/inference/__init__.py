"""Generation of tokens by a causal model on any grid: the loop over new tokens, sampling, and the KV cache.

The command ``generate`` and the samples of the trainer call `generate`. It runs the forward pass of the model itself,
so that every tensor mode and every pipeline generates, and attention layers call the `KVCache`.
"""

from colossal_mpi.layers.inference.generate import generate
from colossal_mpi.layers.inference.kv_cache import KVCache
from colossal_mpi.layers.inference.sampling import Sampling

__all__ = ["KVCache", "Sampling", "generate"]
