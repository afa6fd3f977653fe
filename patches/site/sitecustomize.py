"""Puts hydra-ppo's patch into LLaMA-Factory once it is imported; this folder goes on PYTHONPATH.

`python -m hydra_ppo.patches.llamafactory` prints the folder. Every Python that inherits PYTHONPATH runs this file, whatever
its version and packages, so it imports nothing but the standard library and does nothing until LLaMA-Factory's PPO is asked
for.
"""

import importlib.machinery
import importlib.util
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
TARGET = "llamafactory.train.ppo.workflow"


class Finder:
    """Finds the one module as the other finders would, and binds the patch after it has run."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != TARGET:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is cls or find is None else find(name, path, target)
            if spec is not None:
                _bind_after(spec.loader)
                return spec
        return None


def _bind_after(loader):
    run = loader.exec_module

    def exec_module(module):
        run(module)
        from hydra_ppo.patches import llamafactory

        llamafactory.bind(module)

    loader.exec_module = exec_module


def _import_the_next():
    """Import the sitecustomize that this one hides: Python itself imports the first on the path only."""
    rest = [folder for folder in sys.path if os.path.abspath(folder or os.curdir) != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module  # what it would see without this one
        spec.loader.exec_module(module)


sys.meta_path.insert(0, Finder)
_import_the_next()
