"""Training data: texts and images, tokenizers, token stores, and the choice of the samples of each step.

The tasks of ``apps.training`` and the commands ``data`` and ``generate`` call it. It moves data with ``comm`` and draws
samples from ``random`` by their global number, so that they are the same on every grid.
"""

from colossal_mpi.apps.data.corpus import (
    Corpus,
    Tokens,
    read_corpus,
    require_vocabulary,
    stored_vocabulary,
)
from colossal_mpi.apps.data.documents import documents_of, foreign_labels
from colossal_mpi.apps.data.formats import FORMATS
from colossal_mpi.apps.data.images import Images, draw, read_images, shifted
from colossal_mpi.apps.data.masked import BYTE_VALUES, MaskedFormat, MaskedRows
from colossal_mpi.apps.data.prepare import show_store, write_store
from colossal_mpi.apps.data.sampling import even_starts, random_shifts, random_starts, sequences, shuffled
from colossal_mpi.apps.data.tokenizer import Bytes, Tokenizer, load_tokenizer

__all__ = [
    "BYTE_VALUES",
    "FORMATS",
    "Bytes",
    "Corpus",
    "Images",
    "MaskedFormat",
    "MaskedRows",
    "Tokenizer",
    "Tokens",
    "documents_of",
    "draw",
    "even_starts",
    "foreign_labels",
    "load_tokenizer",
    "random_shifts",
    "random_starts",
    "read_corpus",
    "read_images",
    "require_vocabulary",
    "sequences",
    "shifted",
    "show_store",
    "shuffled",
    "stored_vocabulary",
    "write_store",
]
