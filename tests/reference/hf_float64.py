"""transformers in float64, although it computes RMSNorm, rotary tables and some softmaxes in float32."""

import contextlib
import os
from unittest import mock

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers


@contextlib.contextmanager
def double():
    """Replace the float32 that the code of the models names by float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield
    torch.set_default_dtype(before)


def made(kind, options):
    """Return a model of transformers' class `kind`."""
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**options, attn_implementation="eager")).eval()
    assert model.dtype == torch.float64
    return model


def randomised(model):
    """Give every weight random values: transformers starts biases with 0 and gains with 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.ndim == 1 and "weight" in name))
    return model
