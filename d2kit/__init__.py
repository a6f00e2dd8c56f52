"""d2kit: Detectron2's workflow after one ``pip install``.

Importing this package is cheap: nothing but the version is loaded until a subpackage is used.
"""

__version__ = "0.1.0"
