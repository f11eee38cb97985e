"""The package version, read by setup.py and by genrec_ext."""

__version__ = "0.1.0"
