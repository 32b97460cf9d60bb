"""Files and folders are whole or not there."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from megjax.client.channel import Throughput
from megjax.client.memory import recall, remember
from megjax.compilation import keep_compilations
from megjax.errors import MegError
from megjax.files import cache_folder, replacing, replacing_folder, writable, writable_folder, write_file


def test_a_file_is_replaced_whole_and_readable_by_others(tmp_path):
    path = tmp_path / "new" / "file.txt"
    umask = os.umask(0o022)
    try:
        write_file(path, "one")
        write_file(path, b"two")
    finally:
        os.umask(umask)
    assert path.read_text() == "two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(path.parent.iterdir()) == [path]


def test_what_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    write_file(path, "old")

    def half(temporary):
        temporary.write_text("ne")
        assert path.read_text() == "old"
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk"), replacing(path) as temporary:
        half(temporary)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "new" / "model"
    for name in ("one", "two"):
        with replacing_folder(folder) as temporary:
            (temporary / "part").mkdir()
            (temporary / "part" / name).write_text(name)
            assert folder.exists() == (name == "two")
    with pytest.raises(MegError, match="No such file"), replacing_folder(folder) as temporary:
        shutil.copytree(folder, temporary / "three").rename(temporary / "no" / "such")
    assert [path.name for path in (folder / "part").iterdir()] == ["two"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    with replacing_folder(folder) as temporary:
        (temporary / "old").touch()
    rename = Path.rename

    def refuse(path, target):
        if target == folder and "old" not in path.name:
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(MegError, match="model cannot be written: no;"), replacing_folder(folder) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


def test_a_folder_is_readable_by_others(tmp_path):
    umask = os.umask(0o022)
    try:
        with replacing_folder(tmp_path / "model"):
            pass
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o755


def test_places_that_cannot_be_written_are_refused(tmp_path):
    assert writable(tmp_path / "file") == tmp_path / "file"
    with pytest.raises(MegError, match=r"json .*: there is no folder .*; create it first"):
        writable(tmp_path / "no" / "file", "json")
    with pytest.raises(MegError, match=r"output .*: is a folder"):
        writable(tmp_path)
    if os.geteuid():  # root may write everywhere
        tmp_path.chmod(0o500)
        with pytest.raises(MegError, match="not writable"):
            writable(tmp_path / "file")


def test_what_is_no_file_is_refused_and_stays(tmp_path):
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/null")):
        with pytest.raises(MegError, match="is a pipe or a device"):
            writable(path)
        with pytest.raises(MegError, match="is a pipe or a device"):
            write_file(path, "text")
    assert fifo.is_fifo()
    with pytest.raises(MegError, match="is a folder"):
        write_file(tmp_path, "text")
    assert list(tmp_path.iterdir()) == [fifo]


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "file.txt", tmp_path / "link.txt"
    link.symlink_to(target)
    for text in ("one", "two"):
        assert writable(link) == link
        write_file(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    folder = tmp_path / "folder"
    folder.symlink_to(tmp_path / "there")
    with replacing_folder(folder) as temporary:
        (temporary / "new").touch()
    assert folder.is_symlink()
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["new"]
    assert {path.name for path in tmp_path.iterdir()} == {"there", "link.txt", "folder"}
    link.unlink()
    link.symlink_to(tmp_path / "nowhere" / "file.txt")
    with pytest.raises(MegError, match=r"there is no folder .*/nowhere; create it first"):
        writable(link)
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one).symlink_to(tmp_path / other)
    with pytest.raises(MegError, match="symbolic links"):
        writable(tmp_path / "a")


def test_a_file_in_a_folder_that_is_not_writable_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.touch()
    # As for anyone but root, who may write everywhere.
    monkeypatch.setattr(os, "access", lambda asked, mode: Path(asked) == path)
    with pytest.raises(MegError, match="not writable"):
        writable(path)


@pytest.mark.parametrize("name", ["n" * 251 + ".txt", "ä" * 127])
def test_the_longest_name_is_written(tmp_path, name):
    write_file(writable(tmp_path / name), "text")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_names_too_long_and_a_full_disk_are_one_line(tmp_path, monkeypatch):
    for path in (tmp_path / ("n" * 256), tmp_path / ("n" * 300) / "file"):
        with pytest.raises(MegError, match="File name too long; choose another file"):
            writable(path)
        with pytest.raises(MegError, match="cannot be written: File name too long"):
            write_file(path, "text")

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MegError, match=r"file cannot be written: No space left on device; "):
        write_file(tmp_path / "file", "text")
    whole = replacing_folder(tmp_path / "model")
    with pytest.raises(MegError, match="model cannot be written: No space left on"), whole as temporary:
        (temporary / "part").write_bytes(b"part")
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "/else")
    assert cache_folder() == Path("/else/megjax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "megjax"
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert cache_folder() is None
    keep_compilations()
    remember("http://edge", Throughput(1.0, 1.0))
    assert recall("http://edge") == Throughput()


def test_folders_that_cannot_be_written_are_refused(tmp_path):
    assert writable_folder(tmp_path / "new" / "folder").is_dir()
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(MegError, match=r"--folder .* cannot be written"):
        writable_folder(tmp_path / "file" / "run", "folder")
