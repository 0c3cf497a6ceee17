"""The sections of a configuration: every key with its range, a default and a reason."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A table of a TOML file: keys that are not listed are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Transformer(Section):
    kind: str
    layers: int = Field(4, ge=1, description="transformer blocks")
    hidden: int = Field(128, ge=1, description="width of the residual stream")
    heads: int = Field(4, ge=1, description="attention heads; must divide hidden")
    std: float = Field(0.02, gt=0, allow_inf_nan=False, description="standard deviation of the initial weights")


class Text(_Transformer):
    """A model of bytes."""

    context: int = Field(64, ge=1, description="tokens per sequence")


class _Mixture(Text):
    """A model whose MLPs may be mixtures of experts."""

    experts: int = Field(0, ge=0, description="experts of each MLP; 0: one MLP for all tokens")
    experts_per_token: int = Field(2, ge=1, description="experts that a token goes through")
    expert_balance: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="coefficient of the loss that balances the experts"
    )
    expert_z_loss: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="coefficient of the loss that keeps the router's logits small"
    )

    @model_validator(mode="after")
    def _experts_fit(self) -> _Mixture:
        if 0 < self.experts < self.experts_per_token:
            raise ValueError(f"experts_per_token={self.experts_per_token} must be at most experts={self.experts}")
        return self


class GPT(_Mixture):
    """GPT-2, which predicts the next byte of a text."""

    kind: Literal["gpt"] = Field("gpt", description="of the model: gpt, llama, bert or vit")
    dropout: float = Field(0.0, ge=0, lt=1, description="rate at which elements are dropped")
    vocabulary: int = Field(256, ge=1, description="tokens; bytes need 256; by default that of a token store")


class Llama(_Mixture):
    """Llama, which predicts the next byte of a text: rotary positions, grouped queries and a gated MLP."""

    kind: Literal["llama"] = Field("llama", description="of the model: gpt, llama, bert or vit")
    vocabulary: int = Field(256, ge=1, description="tokens; bytes need 256; by default that of a token store")
    groups: int = Field(2, ge=1, description="groups of heads that share keys and values; must divide heads")
    inner: int = Field(352, ge=1, description="width of the gated MLP; Llama has 8/3 x hidden")
    theta: float = Field(10000.0, gt=0, allow_inf_nan=False, description="base of the rotary frequencies")


class Bert(Text):
    """BERT, which fills in hidden bytes of a text."""

    kind: Literal["bert"] = Field("bert", description="of the model: gpt, llama, bert or vit")
    context: int = Field(64, ge=5, description="tokens per sequence, with two or three marks among them")
    vocabulary: int = Field(259, ge=259, description="tokens: 256 bytes and three marks")
    masked: float = Field(0.15, gt=0, lt=1, description="share of the tokens that are hidden")
    next_sentence: bool = Field(False, description="also tell whether the second half of a sequence follows the first")
    dropout: float = Field(0.0, ge=0, lt=1, description="rate at which elements are dropped")


class ViT(_Transformer):
    """A Vision Transformer, which names the class of an image."""

    kind: Literal["vit"] = Field("vit", description="of the model: gpt, llama, bert or vit")
    patch: int = Field(2, ge=1, description="side of a patch in pixels")
    pool: Literal["first", "mean"] = Field("first", description="classify a class token, or the mean of the patches")
    dropout: float = Field(0.0, ge=0, lt=1, description="rate at which elements are dropped")
    drop_path: float = Field(0.0, ge=0, lt=1, description="rate at which whole branches are dropped, in the last block")


KINDS: dict[str, type[Section]] = {"gpt": GPT, "llama": Llama, "bert": Bert, "vit": ViT}


def _gpt_by_default(table: Any) -> Any:
    return {"kind": "gpt", **table} if isinstance(table, dict) else table


Model = Annotated[GPT | Llama | Bert | ViT, Field(discriminator="kind"), BeforeValidator(_gpt_by_default)]
"""What is trained, by ``kind``; without one it is a GPT."""


class Data(Section):
    """What it is trained on: a corpus as bytes, or images."""

    files: list[str] = Field(
        [],
        description="text files, or token stores (.h5, of `colossal-mpi data prepare`) and arrays of tokens (.npy); of "
        "a vit .npz files with arrays images and labels. None: CPython's own documentation (pydoc_data.topics), or "
        "scikit-learn's digits",
    )
    shift: int = Field(0, ge=0, description="images: greatest number of pixels that one is moved by before each use")
    validation: float = Field(0.1, gt=0, le=0.5, description="share that is held out: stretches of a text, any images")


class Training(Section):
    """The optimisation."""

    steps: int = Field(400, ge=1, description="of the optimizer")
    batch: int = Field(16, ge=1, description="samples per step, over all ranks and microbatches")
    microbatches: int = Field(1, ge=1, description="parts of the batch whose gradients are accumulated")
    optimizer: Literal["adamw", "sgd", "lamb", "lars", "adafactor", "muon"] = Field(
        "adamw", description="how gradients change weights"
    )
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False, description="greatest learning rate")
    warmup: int = Field(20, ge=0, description="steps of linear warm-up")
    rate: Literal["constant", "linear", "cosine", "polynomial", "wsd", "multi-step", "one-cycle"] = Field(
        "cosine", description="how the learning rate falls after the warm-up"
    )
    floor: float = Field(0.1, ge=0, le=1, description="share of lr at the end")
    milestones: list[int] = Field([], description="of rate multi-step: from each of these steps on a tenth")
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False, description="of weights and tables")
    clip: float = Field(1.0, gt=0, description="greatest norm of the gradient")
    average: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of a moving average of the weights, of which validations are; 0: none",
    )
    seed: int = Field(0, description="of the initial weights, dropout and the order of the samples")
    evaluate_every: int = Field(100, ge=1, description="steps between validations")
    evaluate_batches: int = Field(8, ge=1, description="batches of text per validation; of images, all are taken")
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep_last: int = Field(0, ge=0, description="newest checkpoints that are kept; 0 keeps all")
    keep_every: int = Field(0, ge=0, description="with keep_last: checkpoints after each so many steps stay, too")
    background_checkpoints: bool = Field(
        True, description="train on while a thread writes a copy of the state, which takes that much host memory"
    )
    log_every: int = Field(20, ge=1, description="steps between lines of progress without a terminal")
    sample: int = Field(160, ge=0, description="bytes of text shown at the end; 0 shows nothing, of images either")

    @model_validator(mode="after")
    def _microbatches_fit(self) -> Training:
        if self.microbatches > self.batch:
            raise ValueError(f"microbatches={self.microbatches} must be at most batch={self.batch}")
        return self


class Parallel(Section):
    """The grid and the mode."""

    grid: dict[Literal["pipe", "data", "seq", "ulysses", "depth", "row", "col"], Annotated[int, Field(ge=1)]] = Field(
        {}, description="size of each axis, outermost first; empty: data over all ranks"
    )
    tensor: Literal["none", "1d", "2d", "2.5d", "3d"] = Field(
        "none", description="how weights and activations are cut over col, row and depth"
    )
    sequence: Literal["ring", "ulysses"] = Field(
        "ring",
        description="what attention does over seq: keys and values travel round it, or it cuts heads instead, as an "
        "axis ulysses always does",
    )
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble"] = Field(
        "1f1b", description="order of the microbatches on the stages of pipe"
    )
    virtual_stages: int = Field(1, ge=1, description="pieces of the model on each stage; 2 or more if interleaved")
    zero: Literal[0, 1, 2, 3] = Field(
        0,
        description="stored once over data, seq, ulysses: 1 the optimizer's state, 2 also gradients, 3 also weights",
    )
    bucket: int = Field(
        1 << 20, ge=0, description="bytes of gradients reduced together, while the backward pass goes on"
    )
    keep_gathered: bool = Field(True, description="keep gathered operands for the backward pass: faster, more memory")
    offload: bool = Field(False, description="keep the optimizer's state in host memory; of GPUs, on CPUs it is there")
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="made again in the backward pass: selective, outputs of norms and activations; full, whole blocks",
    )
    dtype: Literal["float32", "float64", "float16", "bfloat16"] = Field(
        "float32", description="of weights and activations; with 16 bits, the optimizer has float32 masters"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where CuPy finds one")
    kernels: Literal["auto", "reference", "torch"] = Field(
        "auto", description="local maths: PyTorch's kernels where it is installed, or the formulas in NumPy and CuPy"
    )


class Run(Section):
    """Where the results go."""

    directory: str = Field("runs/run", description="config, metrics, report and checkpoints")
    peak_flops: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="flop/s of all ranks, for MFU; 0: that of products, as measured"
    )
    trace_steps: list[Annotated[int, Field(ge=1)]] = Field(
        [3], description="steps of which trace.json has what each rank did when"
    )
    tensorboard: bool = Field(False, description="write the metrics as event files, too, into events/ of the directory")
