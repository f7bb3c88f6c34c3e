"""How the pages are built: `make docs`."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "modelcache"
author = "The modelcache developers"
release = re.findall(r'__version__ = "(.+)"', (ROOT / "modelcache" / "__init__.py").read_text())[0]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["examples"]
html_theme = "furo"
html_title = f"modelcache {release}"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Every reference to a name of ours must lead somewhere. Names of others would need their pages, and so the network.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!modelcache\.).*"),
    (r"py:.*", r"modelcache\.(.*\.)?_\w+"),  # private
    (r"py:.*", r"modelcache\.(.*\.)?[A-Z]"),  # type variables
    (r"py:.*", r"modelcache\.(disk|memory)\..*"),  # parts behind the tiers
    (r"py:.*", r"modelcache\.prefetching\.Flown"),  # what the cache tells the handle
]
