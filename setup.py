"""Let tools that still call setup.py find the project; everything it says is in pyproject.toml."""
from setuptools import setup

setup()
