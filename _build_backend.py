"""setuptools' build backend; but a source distribution, which compiles nothing, needs no torch."""

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (all other hooks are its own)


def get_requires_for_build_sdist(config_settings=None):
    wanted = build_meta.get_requires_for_build_sdist(config_settings)
    return [requirement for requirement in wanted if not requirement.startswith("torch")]
