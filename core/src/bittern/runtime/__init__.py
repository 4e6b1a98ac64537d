"""What running a model needs: batches, weight access, progress."""

from bittern.runtime.batches import Batch, Data, call_forward, evaluating, length_of, prepare
from bittern.runtime.fingerprint import Fingerprint
from bittern.runtime.progress import SILENT, Progress

__all__ = [
    "SILENT",
    "Batch",
    "Data",
    "Fingerprint",
    "Progress",
    "call_forward",
    "evaluating",
    "length_of",
    "prepare",
]
