"""Mixtures of experts in models, by their configurations."""

from __future__ import annotations

from typing import Any


def mixture(config: Any) -> dict[str, Any] | None:
    """Return the options of `MoE` in each block, None where there is one MLP for all tokens.

    Parameters
    ----------
    config : GPTConfig or LlamaConfig
    """
    if not config.experts:
        return None
    losses = {"balance": config.expert_balance, "z_loss": config.expert_z_loss}
    return {"experts": config.experts, "top_k": config.experts_per_token, **losses}
