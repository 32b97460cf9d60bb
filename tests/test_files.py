"""Files and folders are whole or not there."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from megjax.errors import MegError
from megjax.files import replacing, replacing_folder, writable, writable_folder, write_file


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
    with pytest.raises(FileNotFoundError), replacing_folder(folder) as temporary:
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
    with pytest.raises(OSError, match="no"), replacing_folder(folder) as temporary:
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


def test_folders_that_cannot_be_written_are_refused(tmp_path):
    assert writable_folder(tmp_path / "new" / "folder").is_dir()
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(MegError, match=r"--folder .* cannot be written"):
        writable_folder(tmp_path / "file" / "run", "folder")
