"""What is written appears whole or not at all."""

import errno
import os

import pytest

from lowrank_jax.files import StorageError, sweep, write_directory, write_file


def test_a_file_replaces_another_or_leaves_it(tmp_path):
    file = tmp_path / "weights"
    write_file(file, [b"one", b"two"])
    assert file.read_bytes() == b"onetwo"

    def broken():
        yield b"half"
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_file(file, broken())
    assert file.read_bytes() == b"onetwo" and os.listdir(tmp_path) == ["weights"]


def test_a_directory_replaces_another_or_leaves_it(tmp_path):
    out = tmp_path / "deep" / "adapter"
    write_directory(out, lambda folder: (folder / "a").write_text("1"))
    write_directory(out, lambda folder: (folder / "b").write_text("2"))
    assert os.listdir(out) == ["b"]

    def broken(folder):
        (folder / "c").write_text("3")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_directory(out, broken)
    assert os.listdir(out) == ["b"] and os.listdir(out.parent) == ["adapter"]


def test_rights_follow_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        write_directory(tmp_path / "d", lambda folder: write_file(folder / "f", [b""]))
    finally:
        os.umask(before)
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "d" / "f").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_full_or_failing_disk_is_named_with_what_to_do(tmp_path, monkeypatch, number):
    write_directory(tmp_path / "adapter", lambda folder: (folder / "a").write_text("1"))

    def fail(handle):
        raise OSError(number, "no")

    monkeypatch.setattr(os, "fsync", fail)
    for write in (
        lambda: write_file(tmp_path / "adapter", [b"2"]),
        lambda: write_directory(tmp_path / "adapter", lambda folder: write_file(folder / "a", [b"2"])),
    ):
        with pytest.raises(StorageError, match=r"adapter.*could not be written.*untouched\. Make room and save again"):
            write()
    assert (tmp_path / "adapter" / "a").read_text() == "1" and os.listdir(tmp_path) == ["adapter"]


def test_what_killed_writers_left_is_swept_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.unlink", lambda *args, **kwargs: None)
    monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)

    def killed(*args):
        raise KeyboardInterrupt

    for write in (
        lambda: write_file(tmp_path / "metrics.jsonl", map(killed, [0])),
        lambda: write_directory(tmp_path / "adapter", killed),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
    monkeypatch.undo()
    for name in ("run.part", ".cache", ".metrics.jsonl"):
        (tmp_path / name).write_text("the user's")
    assert len(os.listdir(tmp_path)) == 5
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".cache", ".metrics.jsonl", "run.part"]
