"""What is written appears whole or not at all."""

import os

import pytest

from lowrank_jax.files import write_directory, write_file


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
