#!/usr/bin/env python3
"""Export a model: the script of `d2kit export`; see `export_model.py --help`."""

from d2kit.cli.export import main

if __name__ == "__main__":
    main()
