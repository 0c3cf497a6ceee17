"""Communication that goes on while a rank computes: buckets of gradients, and prefetched weights of ZeRO 3.

The pipeline enters both for each step, and a `Sequential` tells them which of its layers computes next. They start
nonblocking redistributions and wait for them as late as possible.
"""

from colossal_mpi.layers.overlap.buckets import BUCKET_BYTES, GradientBuckets
from colossal_mpi.layers.overlap.prefetch import Prefetch

__all__ = ["BUCKET_BYTES", "GradientBuckets", "Prefetch"]
