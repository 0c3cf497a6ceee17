"""Communication that goes on while a rank computes: gradient buckets, and prefetched weights of ZeRO 3.

The pipeline visits these objects between the layers of a model. They start nonblocking redistributions and wait for
them as late as possible.
"""
