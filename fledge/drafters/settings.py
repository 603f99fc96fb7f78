"""Choices about a head's files and its kind."""

from typing import Literal

TapConvention = Literal["auto", "input", "output"]
