#!/usr/bin/env python3
"""Evaluate published models: the script of `d2kit verify-zoo`; see `verify_zoo.py --help`."""

from d2kit.cli.verify_zoo import main

if __name__ == "__main__":
    main()
