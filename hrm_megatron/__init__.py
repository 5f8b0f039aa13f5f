"""Hierarchical Reasoning Models for text on NVIDIA Megatron-Core."""

__version__ = "0.1.0"
