"""Lets `python scripts/NAME.py` import the project it stands in.

The brief fixes these command lines, and Python starts them with `scripts/` on its path instead of the project. This is the one place
that touches sys.path.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
