"""The registry of methods, `METHODS`. To add one, create a package next to these and list it here (docs/adding_a_method.md)."""

from __future__ import annotations

from ..faces.views import VIEWS, View
from . import idadapter, ip_adapter, uniid
from .method import Config, Method

METHODS: dict[str, Method] = {
    method.name: method for method in (uniid.METHOD, idadapter.METHOD, ip_adapter.METHOD)
}


def method_of(config: Config) -> Method:
    """Return the method that a config belongs to."""
    return next(method for method in METHODS.values() if isinstance(config, method.config))


def views_read() -> tuple[View, ...]:
    """Return all views for CLIP vision, besides the head, that any method reads. Features hold them all, for every adapter."""
    names = {name: None for method in METHODS.values() for name in method.usual_needs.views}
    return tuple(VIEWS[name] for name in names)


__all__ = ["METHODS", "Config", "Method", "method_of", "views_read"]
