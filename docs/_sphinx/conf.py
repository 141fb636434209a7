"""The site of the documents in docs/: `make docs`. Why it is made like this: docs/decisions/0020-documentation-site.md.

The documents are plain Markdown and know nothing of Sphinx, so that they read as well where the repository is browsed.
What the site has beyond them comes from here: the navigation out of their lists (`contents`), links to files of the
repository (`links`), and pages that are generated from the code (`generated`).
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import contents  # noqa: E402
import docstrings  # noqa: E402
import generated  # noqa: E402
import links  # noqa: E402

from ckptstore import __version__  # noqa: E402

project = "ckptstore"
author = "the authors of ckptstore"
project_copyright = "the authors of ckptstore, Apache 2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
root_doc = "index"
exclude_patterns = ["README.md", "_sphinx"]
default_role = "code"
"""Docstrings write code between single backticks."""

myst_heading_anchors = 4
myst_links_external_new_tab = False

autodoc_mock_imports = generated.MOCKED
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 60
napoleon_numpy_docstring = False
napoleon_use_ivar = True
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True
copybutton_line_continuation_character = "\\"

suppress_warnings = ["ref.python"]
"""Several classes have an attribute `bytes`, and annotations of that type ask which one is meant: none."""

html_theme = "furo"
html_title = "ckptstore"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"top_of_page_buttons": [], "navigation_with_keys": True}


def setup(app: Any) -> None:
    """Connect what stands beside this file."""
    app.connect("builder-inited", lambda app: generated.write(ROOT, Path(app.srcdir)), priority=100)
    app.connect("source-read", contents.add)
    app.connect("source-read", links.resolve)
    app.connect("autodoc-process-docstring", docstrings.mark_code, priority=400)  # before napoleon takes it apart
