"""Packages are found; configs/, which lies at the top to be edited, goes into the wheel, too."""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = {path.parent.as_posix() for path in Path("configs").rglob("*.yaml")}
CONFIGS = sorted(f"ubmoe.{folder.replace('/', '.')}" for folder in FOLDERS)

setup(
    packages=[*find_packages(include=["ubmoe*"]), *CONFIGS],
    package_dir={"ubmoe.configs": "configs"},
    package_data={name: ["*.yaml"] for name in CONFIGS} | {"ubmoe.dry_run": ["shapes.json"]},
    py_modules=["calculate_dp", "train_bi", "train_ubmoe"],
)
