"""Datasets as they are made: checking, repair, splitting, leaks, conversion."""
