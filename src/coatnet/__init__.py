"""CoAtNet: convolution and attention for all data sizes (arXiv 2106.04803), exact, trained by one command."""

from __future__ import annotations

__version__ = "0.1.0"
