"""A directory for PYTHONPATH in which a device type is installed, as pip would: one file and its entry point."""

from __future__ import annotations

from pathlib import Path


def install(where: Path, name: str, source: str, more: str = "") -> Path:
    """Install the class `Name` of `source` as device type `name`, and `more` entry points; returns the directory."""
    site = where / "site"
    info = site / f"{name}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    entry = f"{name} = {name}_device:{name.capitalize()}"
    (info / "entry_points.txt").write_text(f"[cellvisor.devices]\n{entry}\n{more}")
    (site / f"{name}_device.py").write_text(source)
    return site
