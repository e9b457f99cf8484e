"""The methods by name. To add one: a folder beside these, and its line here (docs/adding_a_method.md)."""

from __future__ import annotations

from ..faces.views import VIEWS, View
from . import idadapter, ip_adapter, uniid
from .method import Config, Method

METHODS: dict[str, Method] = {
    method.name: method for method in (uniid.METHOD, idadapter.METHOD, ip_adapter.METHOD)
}


def views_read() -> tuple[View, ...]:
    """The views of CLIP vision, beside the head, that any method reads: features hold all of them, since they know no adapter."""
    names = {name: None for method in METHODS.values() for name in method.needs(method.config()).views}
    return tuple(VIEWS[name] for name in names)


__all__ = ["METHODS", "Config", "Method", "views_read"]
