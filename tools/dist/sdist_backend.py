"""What pip calls in a source distribution: the Python package's own build, from its folder."""

import os
from pathlib import Path

from hatchling.build import *  # noqa: F403

os.chdir(Path(__file__).resolve().parents[2] / "adapters/python")
