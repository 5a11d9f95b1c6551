"""What the commands share: one clear line for bad input, a traceback for a bug."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

from lowrank_jax.files import StorageError
from train import processes

_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show the traceback of errors in the input, too.")
_EXPECTED = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    ConnectionError,
    NotImplementedError,
    KeyError,
    RuntimeError,
    StorageError,
)
_OURS = ("lowrank_jax", "train", "configs", "__main__")


def run(main: Callable[[], Any], several: bool = False) -> None:
    """Parses the flags and runs ``main``; an error that this project raised about its input ends in one line and exit status 2.

    Args:
      several: the command may be one of several processes, see `train.processes.start`.
    """

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _exit(f"unexpected argument {argv[1]!r}; options begin with --.")
        # Orbax and JAX report what they do by default.
        logging.set_verbosity(logging.ERROR)
        _use_compilation_cache()
        try:
            main()
        except _EXPECTED as error:
            if _TRACEBACK.value or not raised_here(error):
                raise
            _exit(str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error))

    if several:
        try:
            processes.start()  # before the flags, as a file that --config names may use JAX
        except (RuntimeError, ValueError) as error:
            _exit(str(error))
    try:
        app.run(guarded, flags_parser=_parse)
    except KeyboardInterrupt:
        _exit("interrupted; start the same command again to go on from the newest checkpoint.")


def config(holder: flags.FlagHolder[Any]) -> Any:
    """The configuration that a --config flag names.

    Raises:
      ValueError: no such flag or file.
    """
    try:
        value = holder.value
        if value is None:
            raise ValueError("--config is missing, for example --config=configs/minilm_tweets_lamda.py")
        value["name"]  # a file that could not be loaded raises when a field is first read
    except OSError as error:
        raise FileNotFoundError(f"--config: {' '.join(str(error).split())}") from error
    return value


def raised_here(error: BaseException) -> bool:
    """Whether an exception was raised by this project's code, not by a library it calls."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__", "")).split(".")[0] in _OURS


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _exit(str(error))
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # ml_collections raises these for a field that does not exist or a value of another type, and quotes them twice.
        text = (
            str(error.args[0] if error.args else error)
            .replace("\\n", " ")
            .replace("\\'", "'")
            .removeprefix("'")
            .replace("' Did you mean", ": did you mean")
        )
        text = text.strip("\"'")
        if " " not in text:
            text = f"the configuration has no field {text!r}; train/config.py lists them"
        _exit(f"{' '.join(text.split())} (in {' '.join(a for a in argv[1:] if a.startswith('--config'))})")
    raise AssertionError


def _use_compilation_cache() -> None:
    """Keeps compiled programs between runs, where the user has not said otherwise."""
    import jax

    from lowrank_jax.assets import cache_dir

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _exit(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    processes.leave(2)
