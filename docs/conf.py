from xai_edit import __version__

project = "xai_edit"
author = "the xai_edit authors"
copyright = f"2026, {author}"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = f"xai_edit {release}"
exclude_patterns = ["_build"]
default_role = "code"
myst_enable_extensions = ["dollarmath", "colon_fence"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_ivar = True
