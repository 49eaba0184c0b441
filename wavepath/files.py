"""Files that are whole or absent: temporary names and renames, JSON, and the lock of an output folder."""

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wavepath.errors import LockedError, WavepathError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that is renamed to it when the block ends without an error.

    A killed process leaves only a `.tmp` file behind, which is never read; a failed block removes it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes the file private to its owner; outputs are shared like any other file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cache_folder() -> Path:
    """Where compiled programs and plans are kept between runs: `$WAVEPATH_CACHE`, else `~/.cache/wavepath`."""
    return Path(os.environ.get("WAVEPATH_CACHE") or Path.home() / ".cache" / "wavepath")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all, keys sorted, so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON; a damaged file is an error that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WavepathError(f"{path} is not valid JSON ({error}); delete it and run the command that writes it again") from None


def writable_folder(path: Path) -> Path:
    """Makes the folder where it is missing and proves that a file can be written there."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise WavepathError(f"cannot write to {path}: {error.strerror}; choose another folder or change its permissions") from None
    return path


def _started(pid: int) -> float | None:
    """When the process with this number started, or None where there is none."""
    import psutil  # not needed by commands that lock nothing

    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None


@contextlib.contextmanager
def folder_lock(folder: Path, name: str = "wavepath.lock") -> Iterator[None]:
    """Refuses a second process in the same folder; a lock whose process has died on this host is taken over.

    Process numbers come again (in a container they nearly always do), so a holder is known by its number and its start.

    Raises:
        LockedError: naming the process that holds the folder, and the file to delete if it is known to be gone.
    """
    path = Path(folder) / name
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}
    while True:
        try:
            # Linked into place with its content: a kill in between leaves no empty lock that nobody could judge.
            with tempfile.NamedTemporaryFile("w", dir=folder, prefix=f".{name}.", suffix=".tmp", encoding="utf-8") as file:
                json.dump(mine, file)
                file.flush()
                os.link(file.name, path)
            break
        except FileExistsError:
            try:
                holder = json.loads(path.read_text(encoding="utf-8"))
                started = _started(int(holder["pid"]))
                stale = holder["host"] == mine["host"] and (started is None or started != holder.get("started", started))
            except (ValueError, KeyError, TypeError):
                holder, stale = {"pid": "unknown", "host": "unknown"}, False
            except FileNotFoundError:
                continue
            if not stale:
                raise LockedError(
                    f"process {holder['pid']} on {holder['host']} is working in {folder}; wait for it, or delete {path} if it is gone"
                ) from None
            path.unlink(missing_ok=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
