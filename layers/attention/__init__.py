"""Self-attention on any grid: heads cut over a tensor axis, the sequence cut as a ring or by Ulysses.

The transformer block and the models build these layers. They call the attention kernels of ``layers.kernels`` for
blocks and send keys and values round the ring with ``comm``.
"""
