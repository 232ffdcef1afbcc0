"""The lens: a low-rank shift of a router's input, where it points, and how it reads that a token is there."""

from chronomoe_hf.lens.lens import ChronoLens, IdentityLens

__all__ = ["ChronoLens", "IdentityLens"]
