"""The tests here share `hard_task.py`, which is also a program that tests start and kill; importlib mode puts no test folder on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
