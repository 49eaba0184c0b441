"""Oracles of the interop tests."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def timm():
    """timm, imported with a stand-in for torchvision; skips where it is not installed."""
    spec = importlib.util.spec_from_file_location("timm_standin", Path(__file__).with_name("timm_standin.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_timm()
