"""Core's rules for attention layers, as data."""

from __future__ import annotations

from bittern.records import ModuleRule

__all__ = ["ATTENTION_RULES"]

ATTENTION_RULES: tuple[ModuleRule, ...] = ()
