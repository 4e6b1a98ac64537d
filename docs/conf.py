"""Sphinx configuration: MyST pages, the furo theme, references cut out of the code."""

from __future__ import annotations

import sys
from pathlib import Path

from bittern import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "Bittern"
author = "The Bittern developers"
copyright = "The Bittern developers"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "references",
    "lifecycle",
]
exclude_patterns = ["_build", "_ext"]

# Docstrings name other objects in single backticks, as in `ModuleRule`.
default_role = "py:obj"
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"Bittern {release}"
html_static_path = ["_static"]
html_css_files = ["bittern.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_show_sphinx = False
