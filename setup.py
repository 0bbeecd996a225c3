"""Packages are found; configs/, which lies at the top to be edited, goes into the wheel, too."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ubmoe*"]), "ubmoe.configs", "ubmoe.configs.tasks"],
    package_dir={"ubmoe.configs": "configs"},
    package_data={"ubmoe.configs": ["*.yaml"], "ubmoe.configs.tasks": ["*.yaml"]},
    py_modules=["calculate_dp", "train_bi", "train_ubmoe"],
)
