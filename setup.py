"""Packages of the distribution; everything else is in pyproject.toml. Needs no compiler."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["vlmo_kernels", "vlmo_kernels.*"]),
        *find_packages(where="python", include=["vlmo", "vlmo.*"]),
    ],
    package_dir={"vlmo": "python/vlmo"},
    package_data={
        "vlmo_kernels.demo_data": ["captions.json", "photos/*.jpg"],
        "vlmo_kernels.tuning": ["measured/*"],
    },
    include_package_data=False,
    zip_safe=False,
)
