"""Small models and physical tests that judge any tracer, without using its code.

The models have random weights in float64, so that an output which should not change does not, to
nine digits, and one which should change does.
"""

from __future__ import annotations

from tracing_zoo.convolutional import CONVOLUTIONAL
from tracing_zoo.entry import Entry, Example
from tracing_zoo.sequential import SEQUENTIAL
from tracing_zoo.tricky import TRICKY

__all__ = ["ZOO", "Entry", "Example"]

ZOO = (*CONVOLUTIONAL, *SEQUENTIAL, *TRICKY)
