"""The ViT of `vit_case` in PyTorch with autograd, as an independent reference."""

import torch
from torch.nn import functional as F  # noqa: N812

from colossal_mpi import random
from tests.reference.torch_layers import attention, layer_norm, mlp, part


def logits(x, w, config, step):
    """Return the logits of images ``[b, c, y, x]``; dropout masks are drawn for the whole batch of a step."""

    def drop(y, name, rate, shape):
        kept = random.mask_block([(0, n) for n in shape], shape, config.seed, f"{name}/{step}", rate)
        return y * torch.tensor(kept).reshape(*shape, *[1] * (y.ndim - len(shape))) / (1 - rate) if rate else y

    def both(y, name, rate):
        y = drop(y, f"{name}.dropout", config.dropout, y.shape)
        return drop(y, f"{name}.drop_path", rate, y.shape[:1])

    kernel = w["patches.weight"].permute(3, 0, 1, 2)
    x = F.conv2d(x, kernel, w["patches.bias"], stride=config.patch).flatten(2).transpose(1, 2)
    if config.pool == "first":
        x = torch.cat([w["patches.token"].expand(len(x), 1, -1), x], 1)
    x = x + w["positions.weight"]
    x = drop(x, "dropout", config.dropout, x.shape)
    for i in range(config.layers):
        p, rate = part(w, f"blocks.{i}"), config.drop_path * i / (config.layers - 1)
        y = attention(layer_norm(x, part(p, "norm1"), config.eps), p, causal=False)
        x = x + both(y, f"blocks.{i}.attention", rate)
        y = mlp(layer_norm(x, part(p, "norm2"), config.eps), part(p, "mlp"), F.gelu)
        x = x + both(y, f"blocks.{i}.mlp", rate)
    x = layer_norm(x, part(w, "norm"), config.eps)
    return (x[:, 0] if config.pool == "first" else x.mean(1)) @ w["head.weight"] + w["head.bias"]
