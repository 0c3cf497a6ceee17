"""The data of the GPT of the exactness tests as microbatches for a pipeline."""

from colossal_mpi import from_global
from colossal_mpi.layers import Context
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layout import part
from tests.reference import gpt_case as case


class GPTFeed:
    def __init__(self, p, microbatches):
        self.p, self.microbatches, self.cross_entropy = p, microbatches, CrossEntropy(p)
        self.loss_backward = self.cross_entropy.backward

    def _cut(self, whole, microbatch):
        rows = slice(*part(case.BATCH, self.microbatches, microbatch))
        return from_global(whole[rows], self.p.grid, self.p.tokens())

    def context(self, microbatch):
        return Context()

    def inputs(self, microbatch):
        return self._cut(case.TOKENS, microbatch)

    def loss(self, y, microbatch):
        return self.cross_entropy.forward(y, self._cut(case.LABELS, microbatch), case.COUNT)

    def activation_spec(self, microbatch):
        first, stop = part(case.BATCH, self.microbatches, microbatch)
        return (stop - first, case.CONFIG.positions, case.CONFIG.hidden), self.p.stream(), "float64"
