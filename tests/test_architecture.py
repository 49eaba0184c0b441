"""The shape of the house: imports run downwards, engines stay in their room, files stay short, nothing is unpickled."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "wavepath"
# Rooms by rank; a room may import rooms of a lower rank and itself, never a sibling of the same rank.
RANKS = {
    "": 0, "errors": 0, "console": 0, "files": 0, "config": 0, "defaults": 0,
    "ops": 1, "interop": 2, "data": 3, "models": 3, "tasks": 4, "training": 5, "planning": 6, "inference": 7, "benchmarks": 7,
    "evaluation": 8, "commands": 9, "cli": 10, "__main__": 11,
}  # fmt: skip
BASE = {room for room, rank in RANKS.items() if rank == 0}
TENSORFLOW = {"tensorflow", "tensorflow_datasets"}
SHARDING = {"NamedSharding", "PartitionSpec", "PositionalSharding", "Mesh", "AbstractMesh", "make_mesh", "shard_map", "pmap", "create_device_mesh"}
MOST_LINES = 450
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(tree: ast.AST, path: Path):
    """(module, line, at the top level) of every import of a file, lazy ones too; relative ones made absolute."""
    top = {id(node) for node in getattr(tree, "body", [])}
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from wavepath import files` names a module by its alias.
                whole = f"{module}.{alias.name}"
                yield (whole if module == "wavepath" and alias.name in RANKS else module), node.lineno, id(node) in top


@pytest.fixture(scope="module")
def parsed():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def test_every_room_has_a_rank():
    assert not {room_of(path) for path in FILES} - set(RANKS)


def test_imports_run_downwards(parsed):
    wrong = []
    for path, tree in parsed.items():
        room = room_of(path)
        for module, line, _ in imports(tree, path):
            parts = module.split(".")
            if parts[0] != "wavepath":
                continue
            target = parts[1] if len(parts) > 1 else ""
            assert target in RANKS, f"{path}:{line} imports {module}"
            if target != room and not RANKS[target] < RANKS[room] and not {target, room} <= BASE:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_tensorflow_stays_in_the_data_room_and_is_lazy(parsed):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}" for path, tree in parsed.items() for module, line, top in imports(tree, path)
        if module.split(".")[0] in TENSORFLOW and (top or room_of(path) not in ("data", "benchmarks"))
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_orbax_stays_in_the_checkpoint_file(parsed):
    files = {str(path.relative_to(PACKAGE)) for path, tree in parsed.items() for module, *_ in imports(tree, path) if module.startswith("orbax")}
    assert files <= {"training/checkpoint.py"}


def test_sharding_stays_in_the_parallel_file(parsed):
    wrong = []
    for path, tree in parsed.items():
        if str(path.relative_to(PACKAGE)) == "training/parallel.py" or room_of(path) == "planning":
            continue
        for node in ast.walk(tree):
            named = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else {getattr(node, "attr", getattr(node, "id", ""))}
            if named & SHARDING:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {named & SHARDING}")
    assert not wrong, "\n".join(wrong)


def test_nothing_is_unpickled(parsed):
    wrong = []
    picklers = ("pickle", "dill", "cloudpickle", "joblib")
    for path, tree in parsed.items():
        wrong += [f"{path}:{line} {module}" for module, line, _ in imports(tree, path) if module.split(".")[0] in picklers]
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", True) is not False:
                wrong.append(f"{path}:{node.value.lineno} allow_pickle")
    assert not wrong, "\n".join(wrong)


def test_files_are_short():
    files = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "configs").glob("*.py")]
    long = {str(path.relative_to(ROOT)): count for path in files if (count := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES}
    assert not long


def test_modules_have_docstrings(parsed):
    assert not [str(path) for path, tree in parsed.items() if not ast.get_docstring(tree)]


def test_tests_mirror_the_package():
    """tests/<room>/test_<file>.py belongs to wavepath/<room>/<file>.py or to a room that tests it from outside."""
    rooms = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert not rooms - {room for room in RANKS if room} - {"launch"}


def test_the_rules_can_fail():
    tree = ast.parse("import jax\ndef f():\n    from wavepath.training import loop\n    from ..data import tiles\nfrom wavepath import cli")
    found = set(imports(tree, PACKAGE / "ops" / "x.py"))
    assert found == {("jax", 1, True), ("wavepath.training", 3, False), ("wavepath.data", 4, False), ("wavepath.cli", 5, True)}
