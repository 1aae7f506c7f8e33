"""Version of the package; `.dev0` between releases."""

__version__ = "0.1.0.dev0"
