"""The methods by name. To add a method, create a package next to these and list it here (docs/adding_a_method.md)."""

from __future__ import annotations

from ..faces.views import VIEWS, View
from . import idadapter, ip_adapter, uniid
from .method import Config, Method

METHODS: dict[str, Method] = {
    method.name: method for method in (uniid.METHOD, idadapter.METHOD, ip_adapter.METHOD)
}


def views_read() -> tuple[View, ...]:
    """Return all views for CLIP vision, besides the head, that any method reads. Features hold them all, for every adapter."""
    names = {name: None for method in METHODS.values() for name in method.needs(method.config()).views}
    return tuple(VIEWS[name] for name in names)


__all__ = ["METHODS", "Config", "Method", "views_read"]
