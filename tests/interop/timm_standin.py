"""timm without torchvision: its vision transformers need nothing of it, but `import timm` asks for its transforms and data sets.

torchvision's builds do not load beside a torch for CPUs of another origin. While timm is imported, a module of that name stands in whose every
attribute is an empty class; afterwards it is gone, so that nothing else takes it for the real one.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types

import pytest

NAME = "torchvision"


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == NAME:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        module = _Module(spec.name)
        if spec.name == f"{NAME}.transforms.functional":
            import enum

            # timm looks at its members.
            module.InterpolationMode = enum.Enum("InterpolationMode", "NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS")
        return module

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def standing_in():
    """A torchvision of empty classes while the block runs, unless there is a real one."""
    try:
        import torchvision  # noqa: F401
    except Exception:  # not there, or not for this torch
        for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
            del sys.modules[name]
    else:
        yield
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
            del sys.modules[name]


def load_timm():
    """timm, or a skip that says what to install."""
    pytest.importorskip("torch", reason="needs torch: pip install -e '.[bench]'")
    with standing_in():
        return pytest.importorskip("timm", reason="needs timm: pip install --no-deps timm")
