"""The version of the library: the package's metadata are made of it."""

__version__ = "0.1.0"
