"""The version of this package, for ``clp --version``, ``clp.json`` and the build."""

__version__ = "0.2.0"
