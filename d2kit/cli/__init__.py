"""The verbs of the command line `d2kit`, one module each."""
