"""Longreel: kernels and sequence parallelism for long-video diffusion transformers, and their yardstick."""

__version__ = "0.1.0"
