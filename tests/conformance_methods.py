"""The table of the conformance suite: a new method is one row in a module of `conformance_rows`, and nothing else to write."""

from __future__ import annotations

import importlib
import pkgutil

import conformance_rows

_modules = sorted(module.name for module in pkgutil.iter_modules(conformance_rows.__path__))
METHODS = [row for name in _modules for row in importlib.import_module(f"conformance_rows.{name}").ROWS]
