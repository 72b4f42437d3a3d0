"""Finds templates/ and containers/: under `hpc/_assets` in a wheel, beside `hpc` in a checkout or a snapshot."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent.parent
PACKAGES = _HERE.parent
"""The folder that holds the packages `hpc` and `stages`."""
_ROOT = _HERE / "_assets" if (_HERE / "_assets").is_dir() else PACKAGES
TEMPLATES, CONTAINERS = _ROOT / "templates", _ROOT / "containers"
