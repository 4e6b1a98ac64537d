"""Tiny models of transformers, from their configs: those the tracer is made for, and others."""

from __future__ import annotations

from transformers_zoo.decoders import DECODERS
from transformers_zoo.others import OTHERS

__all__ = ["DECODERS", "ZOO"]

ZOO = (*DECODERS, *OTHERS)
