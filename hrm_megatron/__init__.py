"""Hierarchical Reasoning Models for text on NVIDIA Megatron-Core."""
import logging

__version__ = "0.1.0"

# Its warnings are of its own cache folder and fonts, and would stand among the lines of every program that draws.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
