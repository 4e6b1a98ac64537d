"""The plugin passes the conformance kit."""

from __future__ import annotations

from bittern.testing import PluginConformance


class TestPlugin(PluginConformance):
    plugin = "huggingface"
