"""Rank 0: what every other part may use and what itself uses no other part of d2kit."""
