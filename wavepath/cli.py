"""The command `wavepath`: one table of commands, each a module of `wavepath.commands` that is imported only when it is chosen.

A command module has `add_arguments(parser)`, `run(args) -> exit code` and, where it takes a config, `uses_config = True`: then flags such
as `--config.train.steps=200` arrive as `args.config_overrides == ["train.steps=200"]`. Its docstring heads its help, and `EPILOG`, where it has
one, stands in for the example of the table. Heavy imports (JAX, TensorFlow) belong inside `run`,
so that every `--help` answers at once. Exit codes are those of `wavepath.errors`; 130 is an interrupt.
"""

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from wavepath.errors import EXIT_NOTHING, ConfigError, WavepathError
from wavepath.files import cache_folder

# name: (module under wavepath.commands, one line, example). The order is the order of a first use.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "doctor": ("doctor", "check this machine: versions, devices, libraries, disk", "wavepath doctor"),
    "phantom": ("phantom", "make procedural H&E slides with known regions, or stained pairs", "wavepath phantom --out slides --slides 8 --seed 0"),
    "info": ("info", "show what a slide is: size, levels, mpp, vendor", "wavepath info slides/phantom_000.tiff"),
    "prepare": ("prepare", "slides to tiles: tissue, wavelet screening, extraction", "wavepath prepare --slides slides --out tiles"),
    "pyramids": (
        "pyramids", "slides or images to aligned crops for super-resolution", "wavepath pyramids --slides slides --out pyramids",
    ),
    "pairs": ("pairs", "H&E and immunostain of one place to checked pairs, for staining", "wavepath pairs --folders stained --out pairs"),
    "train": (
        "train", "pretrain or train; run it again to resume",
        "wavepath train --config=configs/wise_mae.py:variant=S --config.data.dir=tiles --workdir=run",
    ),
    "import": ("import_", "weights of others (timm, transformers, MAE, .pth) to a run folder", "wavepath import vit_folder --out run"),
    "embed": (
        "embed", "features of every tile by a trained encoder, one HDF5 a slide",
        "wavepath embed --checkpoint run --data tiles --out features",
    ),
    "convert": (
        "convert", "tiles and features for other tools: TRIDENT, CLAM, QuPath",
        "wavepath convert features --to trident --out trident",
    ),
    "export": (
        "export", "a trained encoder for timm, transformers, numpy, or as a StableHLO program",
        "wavepath export run --format timm --out encoder_timm",
    ),
    "superres": (
        "superres", "enlarge a slide by a trained network into a pyramidal TIFF",
        "wavepath superres slide.svs --checkpoint run --out slide_2x.tiff",
    ),
    "stain": (
        "stain", "stain an H&E slide virtually by a trained network into a pyramidal TIFF",
        "wavepath stain slide.svs --checkpoint run --out slide_ihc.tiff",
    ),
    "evaluate": (
        "evaluate", "probe features on labels: accuracy, AUC, intervals",
        "wavepath evaluate --features features --labels slides/labels.csv --out evaluation",
    ),
    "heatmap": (
        "heatmap", "attention of slides as pictures, QuPath objects and strips of tiles",
        "wavepath heatmap evaluation/attention --tiles tiles --out heatmaps",
    ),
    "report": ("report", "one HTML page with regions, curves, reconstructions, probes", "wavepath report run --out report.html"),
    "sweep": (
        "sweep", "train every combination of config values and seeds, resumable",
        "wavepath sweep --config=configs/wise_mae.py:smoke --grid 'config.lr=1e-4,3e-4' --seeds 3 --workdir sweep",
    ),
    "compare": ("compare", "mean and spread over the seeds of runs, with curves", "wavepath compare sweep --out comparison"),
    "plan": (
        "plan", "what a run will take on devices that are not here: memory, collectives, time",
        "wavepath plan --config=configs/wise_mae.py:variant=L --topology v5e:16x16 --batch 4096",
    ),
    "bench": ("bench", "measure reading, operators, steps, input pipeline", "wavepath bench data"),
}
ORDER = "Order of a first use: phantom (or your own slides) -> prepare -> train -> embed -> evaluate -> report"
EXIT_INTERRUPTED = 130  # what a shell gives for SIGINT
EXIT_BROKEN_PIPE = 141  # and for SIGPIPE


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours: one line, with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")

    def flags(self) -> list[str]:
        """Every long flag it knows."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]


def _nearest(name: str, names: Sequence[str]) -> str:
    from wavepath.config import propose

    return propose(name, names, "choose from")


def _take_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates `--config.a.b=v` and `--config.a.b v` from the other arguments.

    Done before argparse, which would take the `v` of the second form for a positional argument.
    """
    rest: list[str] = []
    overrides: list[str] = []
    queue = list(argv)
    while queue:
        token = queue.pop(0)
        if token == "--":
            return [*rest, token, *queue], overrides
        if not token.startswith("--config."):
            rest.append(token)
            continue
        name, equals, value = token.removeprefix("--config.").partition("=")
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise ConfigError(f"{token} needs a value, as in {token}=VALUE")
            value = queue.pop(0)
        overrides.append(f"{name}={value}")
    return rest, overrides


def build_parser(name: str) -> tuple[argparse.ArgumentParser, Any]:
    """Imports the module of one command; returns its parser and the module."""
    module_name, line, example = COMMANDS[name]
    module = importlib.import_module(f"wavepath.commands.{module_name}")
    examples = getattr(module, "EPILOG", f"example:\n  {example}").strip()
    parser = _Parser(
        prog=f"wavepath {name}",
        description=(module.__doc__ or line).strip(),
        epilog=f"{examples}\n\n{ORDER}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    if ORDER not in (parser.epilog or ""):  # a module may set an epilog of its own
        parser.epilog = f"{parser.epilog or ''}\n\n{ORDER}"
    return parser, module


def parse(name: str, argv: Sequence[str]) -> tuple[argparse.Namespace, Any]:
    """The arguments of one command and its module.

    Raises:
        ConfigError: an unknown or incomplete flag, or config overrides for a command that takes none.
    """
    parser, module = build_parser(name)
    rest, overrides = _take_overrides(argv)
    args, unknown = parser.parse_known_args(rest)
    if unknown:
        flag = unknown[0].partition("=")[0]
        if flag.startswith("-"):
            hint = " (fields of the config are set as --config.FIELD=VALUE)" if getattr(module, "uses_config", False) else ""
            raise ConfigError(f"unknown flag {flag} of wavepath {name}; {_nearest(flag, parser.flags())}{hint}")
        raise ConfigError(f"unexpected argument {unknown[0]!r}; see `wavepath {name} --help`")
    if overrides and not getattr(module, "uses_config", False):
        raise ConfigError(f"wavepath {name} has no config, so it takes no --config.{overrides[0].partition('=')[0]}")
    args.config_overrides = overrides
    return args, module


def overview() -> str:
    """What `wavepath --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, (_, line, _) in COMMANDS.items()]
    return "\n".join([
        "usage: wavepath COMMAND [arguments]", "",
        "Texture-aware learning for histopathology in JAX: slides to tiles to encoders to numbers.", "",
        "commands:", *lines, "", ORDER, "", "example:", *(f"  {COMMANDS[name][2]}" for name in ("phantom", "prepare", "train", "report")), "",
        "`wavepath COMMAND --help` tells the rest; `wavepath --version` the version.",
        "Exit codes: 0 all whole, 1 nothing done, 3 done with parts reported as failed, 4 a plan does not fit, 85 stopped by a signal after saving.",
    ])


def prepare_environment() -> None:
    """Sets what JAX and TensorFlow read when they are imported; whatever the user has set stays."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # TensorFlow only feeds data here, and announces oneDNN past its log level
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    from logging import CRITICAL, getLogger

    from absl import logging

    # Orbax and TFDS report every step of theirs through absl, and on a damaged file that we pass over and name ourselves, at ERROR.
    # What matters they raise. tifffile likewise, as soon as absl has given the root logger a handler.
    logging.set_verbosity(logging.FATAL)
    logging.set_stderrthreshold("fatal")
    getLogger("tifffile").setLevel(CRITICAL)


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        if len(argv) > 1 and argv[0] == "help" and argv[1] in COMMANDS:
            build_parser(argv[1])[0].print_help()
        else:
            print(overview())
        return 0
    if argv[0] in ("--version", "-V"):
        from wavepath import __version__

        print(f"wavepath {__version__}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        raise ConfigError(f"no command {name!r}; {_nearest(name, list(COMMANDS))}")
    args, module = parse(name, argv[1:])
    prepare_environment()
    return int(module.run(args) or 0)


def _fail(message: object) -> None:
    line = " ".join(str(message).split("\n"))
    print(f"wavepath: error: {line}", file=sys.stderr, flush=True)


def _storage_message(error: OSError) -> str | None:
    """What to tell the user about a disk that is full or a place that may not be used; None for any other error, which is a defect."""
    where = error.filename or "the output"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk of {where}; free some and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}: {error.strerror}; change its permissions, or choose another place"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. `WAVEPATH_TRACEBACK=1` shows where an error came from."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except SystemExit as end:  # argparse after --help
        return end.code if isinstance(end.code, int) else EXIT_NOTHING
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except WavepathError as error:
        if os.environ.get("WAVEPATH_TRACEBACK"):
            raise
        _fail(error)
        return error.exit_code
    except OSError as error:
        message = _storage_message(error)
        if message is None or os.environ.get("WAVEPATH_TRACEBACK"):
            raise
        _fail(message)
        return EXIT_NOTHING
