"""What running a model needs: batches, weight access, progress."""

from bittern.runtime.batches import Batch, Data, call_forward, evaluating, length_of, prepare
from bittern.runtime.progress import SILENT, Progress

__all__ = [
    "SILENT",
    "Batch",
    "Data",
    "Progress",
    "call_forward",
    "evaluating",
    "length_of",
    "prepare",
]
