"""Settings of the documentation site: `make docs`, or `sphinx-build -W docs site`."""

import pi_finetune

project = "pi_finetune"
author = "The pi_finetune developers"
version = release = pi_finetune.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["requirements.txt"]
myst_heading_anchors = 4  # links to #headings, as code hosts make them
default_role = "code"  # single backticks in docstrings

# Docstrings: NumPy style with SpeechBrain's heading "Arguments", and Google style in soft_dtw.
napoleon_use_rtype = False
napoleon_preprocess_types = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings name types, and shapes
autodoc_default_options = {"members": True, "show-inheritance": True}

html_theme = "furo"
html_title = "pi_finetune"
html_show_sourcelink = False
html_show_copyright = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
