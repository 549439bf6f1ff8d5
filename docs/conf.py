"""The documentation: pages in MyST Markdown, the reference from docstrings, offline.

quick:     sphinx-build -W --keep-going docs docs/_build
           (2 minutes at most; tutorials are shown without their output)
executed:  sphinx-build -W --keep-going -D nb_execution_mode=force docs docs/_build
           (10 minutes at most; every tutorial is run, and an error in one fails)
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import stablegrad  # noqa: E402

project = "stablegrad"
author = "The stablegrad authors"
copyright = author
version = release = stablegrad.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "docstrings",
]
exclude_patterns = ["_build", "_ext"]
suppress_warnings = ["myst.header"]  # Reports of benchmarks begin where they like.

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Reference", "References"), "Result"]

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "stablegrad"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "navbar_persistent": [],
    "logo": {"text": "stablegrad"},
}
html_context = {"default_mode": "auto"}
html_favicon = "_static/icon.svg"
html_logo = "_static/icon.svg"
