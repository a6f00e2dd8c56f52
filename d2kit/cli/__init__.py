"""The command line `d2kit`: one module per verb."""
