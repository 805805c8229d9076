"""Settings of the API reference, which Sphinx makes from the docstrings; see docs/api.md."""

import sys
from pathlib import Path

import fastsam

sys.path.insert(0, str(Path(__file__).parent))  # mathml.py

project = "fastsam"
copyright = "2026, The fastsam authors"
release = version = fastsam.__version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "mathml",
]

# what the modules for other training loops are for, which need not be installed here
autodoc_mock_imports = ["accelerate", "lightning", "pytorch_lightning", "transformers"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the Args sections say what is allowed; torch's unions fill pages
autosummary_generate = False  # tables that link to the same page
napoleon_use_param = False  # several names before one colon are several arguments, not a type
napoleon_use_rtype = False

# torch's pages are linked to without a look at the network: see torch.inv
intersphinx_mapping = {"torch": ("https://docs.pytorch.org/docs/stable/", "torch.inv")}

# with -W, a reference to a name that neither fastsam nor torch.inv has is an error
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"fastsam\.step\..*"),  # a base class, of which users see two properties
    ("py:class", r"torch\.(utils\.data\.sampler|optim\.optimizer)\..*"),  # where torch defines them
    ("py:.*", r"(numpy|accelerate|lightning|transformers)\..*|Figure"),
    ("py:meth", r"fastsam\.SAM\..*"),  # what is inherited is on a page once, under the base class
]

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"fastsam {version}"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["equations.css"]
