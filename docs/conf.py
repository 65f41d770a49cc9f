"""How the site is made of these pages: ``make docs``."""

from sphinx.application import Sphinx

from reconciler import __version__

project = "pi-reconciler"
author = "the maintainers of pi-reconciler"
copyright = "MIT licence"  # noqa: A001 - Sphinx's name for it
release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
]
exclude_patterns = ["screens"]
html_theme = "furo"
html_title = f"pi-reconciler {__version__}"
html_static_path = ["static"]

default_role = "literal"  # single backquotes in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]


def setup(app: Sphinx) -> None:
    """Have what stands under an attribute read as a sentence: napoleon takes "a: b" for a type."""
    app.connect("autodoc-process-docstring", _begin_with_a_comment, priority=1)


def _begin_with_a_comment(
    _: Sphinx, what: str, __: str, ___: object, ____: object, lines: list[str]
) -> None:
    if what in {"attribute", "data", "property"}:
        lines[:0] = ["..", ""]
