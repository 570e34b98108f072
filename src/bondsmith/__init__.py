"""Makes language models small with tensor networks."""

from bondsmith._version import __version__

__all__ = ["__version__"]
