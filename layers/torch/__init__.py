"""PyTorch on either side of our layers: a layer as a ``torch.nn.Module``, and layers made of torch modules.

User programs that keep their PyTorch training loop call it. Tensors share memory with our blocks by DLPack; with
``kernels.torch`` and ``dlpack`` this package is the only one that imports torch.
"""
