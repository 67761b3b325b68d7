"""Built by setuptools from pyproject.toml; the native part will hook its build steps in here."""

from setuptools import setup

setup()
