"""MegJAX: Mobile Edge Generation in JAX."""

__version__ = "0.1.0"
