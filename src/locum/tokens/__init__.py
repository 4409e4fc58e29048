"""Ground floor: pure tensor functions on per-token quantities. Nothing here imports a model library."""

from locum.tokens.sampling import Sampling

__all__ = ["Sampling"]
