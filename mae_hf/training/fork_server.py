"""Imported in the process from which workers are forked, and only there: what they need, and a quick end.

When the run is gone, so is that process. Python would first take all of torch apart, which is seconds of computing.
"""

import atexit
import os

from . import samples as samples

atexit.register(os._exit, 0)
