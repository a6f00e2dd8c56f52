"""Detectron2's name of `d2kit.contrib`: ``d2kit.projects.X`` is the module ``d2kit.contrib.X``."""

import sys

from d2kit.contrib import deeplab, panoptic_deeplab, point_rend

for _name in [name for name in sys.modules if name.startswith("d2kit.contrib.")]:
    sys.modules[_name.replace("contrib", "projects", 1)] = sys.modules[_name]
