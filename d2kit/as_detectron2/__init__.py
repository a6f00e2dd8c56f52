"""Lets code written for Detectron2 run on d2kit, unchanged.

``import d2kit.as_detectron2`` before the first ``import detectron2``, or
``python -m d2kit.as_detectron2 script.py ...``: from then on ``detectron2`` and everything below it
is d2kit, the same modules and the same classes. ``python -m d2kit.as_detectron2 --scan PATH`` tells
what of somebody's code is supported.

Where the original is installed, or already imported, this stops and says so; set
``D2KIT_AS_DETECTRON2=d2kit`` to use d2kit nevertheless, ``original`` to leave it alone.
"""

from d2kit.as_detectron2.redirect import install

install()
