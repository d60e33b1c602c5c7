"""Lets `python scripts/NAME.py` import the project it stands in.

The brief fixes these command lines, and Python starts them with `scripts/` on its path instead of the project. This is the one place
that touches sys.path. What scripts write, and servers they start, is for nobody else's eyes, as in the daemons: the umask.
"""

import os
import sys
from pathlib import Path

os.umask(0o077)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
