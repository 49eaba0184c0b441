"""Configs: a python file with `get_config(arg)`, a typed argument behind a colon, and single fields overridden by flags.

    load_config("configs/wise_mae.py:variant=B,smoke", ["lr=3e-4", "config.train.steps=200"])

The result is a locked `ml_collections.ConfigDict`. Every mistake of a user (a file, an argument, a field or a value that is not there or
does not fit) is a `ConfigError` of one line which proposes the nearest name.
"""

import ast
import difflib
import sys
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from wavepath.errors import ConfigError, WavepathError
from wavepath.files import read_json, write_json

_TRUE, _FALSE = ("true", "1"), ("false", "0")


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The closest of `names` to a mistyped `name`, best first; empty where nothing is close.

    A dotted name is compared as a whole and by its last part, so that `steps` finds `train.steps`.
    """
    names = list(dict.fromkeys(names))
    last = name.rpartition(".")[2].lower()
    scores = {}
    for candidate in names:
        whole = difflib.SequenceMatcher(None, name.lower(), candidate.lower()).ratio()
        tail = difflib.SequenceMatcher(None, last, candidate.rpartition(".")[2].lower()).ratio()
        # The last part alone counts a little less, so that a whole match wins over a namesake in another group.
        scores[candidate] = max(whole, 0.97 * tail) + 0.01 * whole
    ranked = sorted((candidate for candidate in names if scores[candidate] >= 0.6), key=lambda candidate: -scores[candidate])
    # Far runners-up beside a near hit only confuse.
    return [candidate for candidate in ranked[:count] if scores[candidate] >= scores[ranked[0]] - 0.15]


def propose(name: str, names: Iterable[str], noun: str = "one of") -> str:
    """The tail of an error message: `did you mean a or b?`, or the list of what there is where nothing is near."""
    names = list(names)
    found = nearest(name, names)
    if found:
        return f"did you mean {' or '.join(found)}?"
    return f"{noun} {', '.join(names)}" if names else "there are none"


def split_list(text: str) -> list[str]:
    """Splits at commas outside brackets and quotes: `"1,(2,3),'a,b'"` -> `["1", "(2,3)", "'a,b'"]`.

    Raises:
        ConfigError: a bracket or quote that is not closed.
    """
    parts, depth, quote, current = [], 0, "", ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
            continue
        current += char
    if depth or quote:
        raise ConfigError(f"a bracket or quote is not closed in {text!r}")
    return [*parts, current.strip()]


def parse_value(text: str, default: Any, name: str) -> Any:
    """Reads `text` as the type of `default`; `name` is for the message.

    Booleans are `true`, `false`, `1` or `0`; an integer may be written `1e4`; a float takes an integer; a tuple is a literal, its
    brackets may be left out; a string stays as it is; where the default is None, any literal, else a string.

    Raises:
        ConfigError: the text does not fit the type.
    """
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
        raise ConfigError(f"{name} is true or false, not {text!r}")
    if isinstance(default, int):
        try:
            return int(text)
        except ValueError:
            pass
        try:
            number = float(text)
            if number == int(number):
                return int(number)
        except (ValueError, OverflowError):
            pass
        raise ConfigError(f"{name} is a whole number such as {default}, not {text!r}")
    if isinstance(default, float):
        try:
            return float(text)
        except ValueError:
            raise ConfigError(f"{name} is a number such as {default}, not {text!r}") from None
    if isinstance(default, tuple | list):
        return _parse_tuple(text, default, name)
    if default is None:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    raise ConfigError(f"{name} holds a {type(default).__name__} and cannot be given as text; change it in the config file")


def _parse_tuple(text: str, default: tuple | list, name: str) -> tuple:
    inner = text.strip()
    if inner and inner[0] in "([" and inner[-1] in ")]":
        inner = inner[1:-1]
    parts = [part for part in split_list(inner) if part != ""]
    if not default:
        return tuple(parse_value(part, None, name) for part in parts)
    # Elements take the type of their own place, and of the last one beyond the default's length.
    kinds = [default[min(index, len(default) - 1)] for index in range(len(parts))]
    values = [_unquote(part) if isinstance(kind, str) else parse_value(part, kind, f"{name}[{index}]")
              for index, (part, kind) in enumerate(zip(parts, kinds, strict=True))]
    return tuple(values)


def _unquote(text: str) -> str:
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" else text


def parse_arg(arg: str | None, /, *, choices: Mapping[str, Iterable[Any]] | None = None, **defaults: Any) -> SimpleNamespace:
    """Reads a config file's argument: `parse_arg("variant=B,smoke", variant="B", smoke=False).smoke` is True.

    Args:
        arg: `key=value` pairs between commas; a boolean's bare name means True. Empty or None gives the defaults.
        choices: the values that a key may take.
        defaults: every key with its default, whose type the value must have (bool, int, float, str, tuple).

    Raises:
        ConfigError: an unknown key (the nearest is proposed), a value of the wrong type, or one that is not among the choices.
    """
    values = dict(defaults)
    given = set()
    for part in split_list(arg or ""):
        if not part:
            continue
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if key not in defaults:
            raise ConfigError(f"unknown config argument {key!r}; {propose(key, defaults, 'the arguments are')}")
        if key in given:
            raise ConfigError(f"the config argument {key!r} is given twice")
        given.add(key)
        if not equals:
            if not isinstance(defaults[key], bool):
                raise ConfigError(f"the config argument {key!r} needs a value, as in {key}={defaults[key]}")
            text = "true"
        values[key] = parse_value(_unquote(text), defaults[key], f"the config argument {key!r}")
        allowed = [str(choice) for choice in (choices or {}).get(key, ())]
        if allowed and str(values[key]) not in allowed:
            raise ConfigError(f"{key}={text} is not known; {propose(text, allowed, 'choose from')}")
    return SimpleNamespace(**values)


def config_folders() -> list[Path]:
    """Where named configs are looked for: inside the installed package, and beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]


def split_spec(spec: str) -> tuple[str, str]:
    """`"configs/x.py:a=1,b"` -> `("configs/x.py", "a=1,b")`; a colon inside the name of an existing file stays in the name."""
    if Path(spec).is_file():
        return spec, ""
    stem, found, arg = spec.partition(".py:")
    if found:
        return stem + ".py", arg
    path, _, arg = spec.partition(":")
    return path, arg


def find_config(spec: str) -> tuple[Path, str]:
    """`path[.py][:arg]` -> (file, arg). The path is tried as given, then in `config_folders()`, with or without `configs/` and `.py`.

    Raises:
        ConfigError: there is no such file; the nearest name is proposed.
    """
    path, arg = split_spec(spec)
    if not path:
        raise ConfigError("the config needs a file, as in --config=configs/wise_mae.py:smoke")
    given = Path(path).expanduser()
    names = [given] if given.suffix == ".py" else [given.with_name(given.name + ".py")]
    if given.parts[0] == "configs" and len(given.parts) > 1:
        names.append(Path(*given.parts[1:]).with_name(names[0].name))
    candidates = [names[0], *(folder / name for folder in config_folders() for name in names if not name.is_absolute())]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve(), arg
    known = {file.stem: f"configs/{file.name}" for folder in config_folders() for file in sorted(folder.glob("[!_]*.py"))}
    beside = {file.stem: str(file) for file in sorted(names[0].parent.glob("[!_]*.py"))} if names[0].parent != Path(".") else {}
    found = [{**beside, **known}[stem] for stem in nearest(names[0].stem, {**known, **beside})]
    hint = f"did you mean {' or '.join(found)}?" if found else f"there are {', '.join(sorted(known.values()))}"
    raise ConfigError(f"no config file {path}; {hint}")


@contextmanager
def _siblings_importable(folder: Path) -> Iterator[None]:
    """Lets a config import its neighbours (`from wise_mae import smoke`) and takes them out of `sys.modules` again.

    Without that, two config folders with files of one name would see each other's modules. No bytecode is written beside configs.
    """
    before, bytecode = set(sys.modules), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = bytecode
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).parent == folder:
                del sys.modules[name]


def _run_file(path: Path, arg: str) -> ConfigDict:
    """Executes a config file and calls its `get_config(arg)`; a defect in the file is reported with its line."""
    module = types.ModuleType(f"wavepath_config_{path.stem}")
    module.__file__ = str(path)
    with _siblings_importable(path.parent):
        sys.modules[module.__name__] = module  # dataclasses look their module up there while the file runs
        try:
            exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
            if not callable(getattr(module, "get_config", None)):
                raise ConfigError(f"{path} defines no get_config(arg)")
            config = module.get_config(arg)
        except WavepathError:
            raise
        except SyntaxError as error:
            raise ConfigError(f"{error.filename or path}:{error.lineno}: {error.msg}") from error
        except Exception as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
            place = f"{path}:{lines[-1]}" if lines else str(path)
            raise ConfigError(f"{place}: {type(error).__name__}: {error}") from error
        finally:
            sys.modules.pop(module.__name__, None)
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"get_config of {path} returns a {type(config).__name__}, not an ml_collections.ConfigDict")
    return config


def load_config(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """Builds the config that `spec` names, applies `overrides` in their order, and locks it.

    Args:
        spec: `configs/wise_mae.py:variant=B,smoke`; see `find_config` for the short forms.
        overrides: `a.b=value` or `config.a.b=value`; see `apply_overrides`.

    Raises:
        ConfigError: of one line, with the nearest name.
    """
    path, arg = find_config(spec)
    config = _run_file(path, arg)
    apply_overrides(config, overrides)
    config.lock()
    return config


def apply_overrides(config: ConfigDict, overrides: Iterable[str]) -> None:
    """Sets single fields of `config` from texts such as `train.steps=200`, in the type of the value that is there.

    Raises:
        ConfigError: a field that does not exist, a group instead of a field, or a value of the wrong type.
    """
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip().removeprefix("--").removeprefix("config.")
        if not equals:
            raise ConfigError(f"the override {override!r} needs a value, as in {name}=VALUE")
        *groups, field = name.split(".")
        node = config
        for group in groups:
            node = node[group] if isinstance(node, ConfigDict) and group in node else None
        if not isinstance(node, ConfigDict) or field not in node:
            found = nearest(name, flatten(config))
            hint = f"did you mean {' or '.join('config.' + other for other in found)}?" if found else f"groups and fields: {', '.join(config)}"
            raise ConfigError(f"the config has no field config.{name}; {hint}")
        if isinstance(node[field], ConfigDict):
            raise ConfigError(f"config.{name} is a group; set one of its fields: {', '.join(f'{name}.{key}' for key in node[field])}")
        with node.ignore_type():  # a field of an int and a float value of it were told apart by parse_value already
            node[field] = parse_value(text, node[field], f"config.{name}")


def flatten(config: ConfigDict) -> dict[str, Any]:
    """`{"a.b": value}` of every field, in order."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update({f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def diff(a: ConfigDict, b: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs differ: `{"a.b": (value in a, value in b)}`; a field that only one has is None in the other."""
    left, right = flatten(a), flatten(b)
    return {key: (left.get(key), right.get(key)) for key in {**left, **right} if left.get(key) != right.get(key)}


def save_json(config: ConfigDict, path: Path) -> None:
    """Writes a config as JSON, whole or not at all; `load_json` gives it back equal."""
    write_json(path, config.to_dict())


def load_json(path: Path) -> ConfigDict:
    """Reads what `save_json` wrote; locked. JSON has no tuples, configs no lists: every sequence comes back as a tuple.

    Raises:
        ConfigError: no such file, or not a config.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no saved config at {path}; is {path.parent} the folder of a run?")
    value = read_json(path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a saved config")
    return ConfigDict(_tuples(value)).lock()


def filled(path: str, config: ConfigDict) -> str:
    """`pre/fold{fold}/seed{seed}` with the run's own: one text for all runs of a cross-validation that take something of their fold or seed."""
    return path.replace("{fold}", str(config.data.fold)).replace("{seed}", str(config.seed))


def complete(config: ConfigDict, defaults: ConfigDict) -> ConfigDict:
    """A locked copy of `config` with the fields of `defaults` that it lacks: a run of an older version has newer fields at their defaults."""
    whole = config.copy_and_resolve_references()
    with whole.unlocked():
        _fill(whole, defaults)
    return whole.lock()


def _fill(config: ConfigDict, defaults: ConfigDict) -> None:
    for key, value in defaults.items():
        if key not in config:
            config[key] = value
        elif isinstance(value, ConfigDict) and isinstance(config[key], ConfigDict):
            _fill(config[key], value)


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list) else value
