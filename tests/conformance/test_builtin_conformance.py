"""Core's own rules pass the kit that every plugin passes."""

from __future__ import annotations

from bittern.testing import PluginConformance

CORE = "bittern.builtin.hooks"


class TestPlugin(PluginConformance):
    hooks = CORE
