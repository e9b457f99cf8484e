"""The methods by name. To add one: a folder beside these, and its line here (docs/adding_a_method.md)."""

from __future__ import annotations

from . import idadapter, uniid
from .method import Config, Method

METHODS: dict[str, Method] = {method.name: method for method in (uniid.METHOD, idadapter.METHOD)}

__all__ = ["METHODS", "Config", "Method"]
