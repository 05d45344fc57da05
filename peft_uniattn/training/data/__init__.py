"""Training data: from a name on the Hub or a file to token ids with the loss on the answer only."""

from .arguments import DataArguments
from .encoding import IGNORE
from .load import LoadedData, check_files, load_data
from .padding import batches
from .prompt import PAPER_PROMPT, encode_pairs
from .report import DataReport
from .tokenization import TokenizedData, tokenize

__all__ = [
    "IGNORE",
    "PAPER_PROMPT",
    "DataArguments",
    "DataReport",
    "LoadedData",
    "TokenizedData",
    "batches",
    "check_files",
    "encode_pairs",
    "load_data",
    "tokenize",
]
