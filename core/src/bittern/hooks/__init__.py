"""The plugin system: hook specifications, discovery, statuses, attribution.

A plugin's ``hooks.py`` needs one name from here::

    from bittern.hooks import hookimpl
"""

from bittern.hooks.markers import hookimpl, hookspec

__all__ = ["hookimpl", "hookspec"]
