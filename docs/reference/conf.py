"""Settings of the API reference, which Sphinx makes from the docstrings; see docs/api.md."""

import fastsam

project = "fastsam"
copyright = "2026, The fastsam authors"
release = version = fastsam.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]

# what the modules for other training loops are for, which need not be installed here
autodoc_mock_imports = ["accelerate", "lightning", "pytorch_lightning", "transformers"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the Args sections say what is allowed; torch's unions fill pages
napoleon_use_param = False  # several names before one colon are several arguments, not a type
napoleon_use_rtype = False

# with -W, a reference to a name that fastsam does not have is an error
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"fastsam\.step\..*"),  # a base class, of which users see two properties
    ("py:.*", r"(torch|numpy|accelerate|lightning|transformers)\..*|Figure"),
    ("py:meth", r"fastsam\.SAM\..*"),  # what is inherited is on the page once, under the base class
]

html_theme = "alabaster"
html_theme_options = {"description": f"version {version}", "page_width": "1100px"}
html_copy_source = False
