"""A user's plugin: one of everything that a file outside the package can register."""

from dataclasses import dataclass

from pydantic import Field

from colossal_mpi.apps.training.tasks import CausalLanguage, LanguageSection, register_section, register_task
from colossal_mpi.layers import Embedding, Linear, Parallelism, Sequential
from colossal_mpi.layers.models import register_model
from colossal_mpi.layers.optim import Optimizer, register_learning_rate, register_optimizer
from colossal_mpi.layers.parallelism import INNER, Mode, Template, register_mode
from colossal_mpi.layers.pipeline import BackwardInput, BackwardWeight, Forward, register_schedule

_PRODUCTS = {"data": "b", "seq": "s", "ulysses": "s", "col": INNER}
_CUT = {"b": ("data",), "s": ("seq", "ulysses")}
REPLICATED = Template(
    stream={**_CUT, "h": ()}, inside={**_CUT, INNER: ("col",)}, up=_PRODUCTS, down=_PRODUCTS, stored=("col",)
)
register_mode(Mode("replicated", REPLICATED, ("col",), "Keep the stream whole on every rank of col (Megatron-LM)."))


@register_optimizer("scaled-descent")
class ScaledDescent(Optimizer):
    """Gradient descent by a multiple of the gradient.

    Parameters
    ----------
    parameters : iterable of Parameter or of Group
        The weights.
    lr : float
        Learning rate.
    factor : float
        The multiple.
    clip : float, optional
        Norm that longer gradients are scaled down to.
    weight_decay : float
        Decay of the weights.
    **rest
        Options that every optimizer has.
    """

    def __init__(self, parameters, lr=0.1, factor: float = 1.0, clip=None, weight_decay=0.0, **rest):
        super().__init__(parameters, lr, clip, weight_decay, factor=factor, **rest)

    def update(self, parameter, w, g, slots, lr, **options):
        w.local[...] -= lr * options["factor"] * g.local


@register_schedule("one-by-one", "Finish each microbatch before the next one starts.")
def one_by_one(stages, microbatches, chunks, stage):
    for i in range(microbatches):
        yield from (Forward(i), BackwardInput(i), BackwardWeight(i))


@register_learning_rate("square-root")
def square_root(step, progress, *, least: float = 0.0):
    """Fall with the root of what is left.

    Parameters
    ----------
    step : int
        Number of the step.
    progress : float
        Share of the steps that are done.
    least : float
        Share of the peak at the end.
    """
    return max(least, (1 - progress) ** 0.5)


@dataclass(frozen=True)
class BigramConfig:
    vocabulary: int = 256
    hidden: int = 8
    layers: int = 1
    spread: float = 0.1
    seed: int | None = 0
    dtype: str = "float32"


@register_model("bigram", BigramConfig, task="next-byte")
class Bigram(Sequential):
    """A table of tokens and a matrix: the logits of the next token from the last one alone."""

    def __init__(self, config: BigramConfig, parallelism: Parallelism) -> None:
        self.config = config
        common = {"std": config.spread, "seed": config.seed, "dtype": config.dtype}
        sizes = {"h": config.hidden, "v": config.vocabulary}
        super().__init__(
            Embedding(config.vocabulary, config.hidden, parallelism, "tokens", **common),
            Linear("bsh,hv->bsv", sizes, "v", parallelism, "head", **common),
        )


class BigramSection(LanguageSection):
    """A bigram model."""

    spread: float = Field(0.1, gt=0, description="standard deviation of the initial weights")


class NextByte(CausalLanguage):
    """Predict the next byte, and show nothing."""

    def sample(self, count):
        return b"as the plugin says"


register_task("next-byte", NextByte)
register_section("bigram", BigramSection)
register_model("unigram", BigramConfig, task="language")(type("Unigram", (Bigram,), {}))  # whose section is derived
