"""Fast kernels for Bittern."""

__version__ = "0.1.0"
