"""DeX-Portrait in JAX: explicit head pose, latent expression, each controllable alone.

Importing this package loads nothing heavy; the parts load what they need.
"""

__version__ = "0.1.0"
