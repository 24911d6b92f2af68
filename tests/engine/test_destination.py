"""A destination that a user names belongs to one process, and gets its final name when it is whole."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from alignmerge.engine.destination import check_room, claimed, free_path
from alignmerge.engine.faults import BadRequest


def write_slowly(path: Path, text: str) -> None:
    with claimed(path, "out") as staging:
        (staging / path.name).mkdir()
        (staging / path.name / "a").write_text(text)
        time.sleep(1.5)


def test_a_folder_and_a_file_get_their_names_at_the_end_and_nothing_else_stays(tmp_path: Path) -> None:
    with claimed(tmp_path / "new" / "folder", "out") as staging:
        (staging / "folder").mkdir()
        (staging / "folder" / "a").write_text("1")
        assert not (tmp_path / "new" / "folder").exists()
    with claimed(tmp_path / "new" / "file.json", "out") as staging:
        (staging / "file.json").write_text("2")
    assert (tmp_path / "new" / "folder" / "a").read_text() == "1"
    assert (tmp_path / "new" / "file.json").read_text() == "2"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["file.json", "folder"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "new" / "out", "out") as staging:
        (staging / "out").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused_and_named_while_the_first_writes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = multiprocessing.get_context("spawn").Process(target=write_slowly, args=(out, "first"))
    first.start()
    while not list(tmp_path.glob(".out-*.staging/out/a")):
        assert first.is_alive()
        time.sleep(0.02)
    with pytest.raises(BadRequest, match=f"is being written by process {first.pid} "), claimed(out, "out"):
        pass
    first.join()
    assert first.exitcode == 0
    assert (out / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [out]


def test_who_comes_first_is_not_overwritten(tmp_path: Path) -> None:
    """Without locks, as on some shared file systems, the rename decides."""
    for name, kind in (("folder", Path.mkdir), ("file", Path.touch)):
        out = tmp_path / name
        with pytest.raises(BadRequest, match="another process was first"), claimed(out, "out") as staging:
            kind(staging / name)
            out.write_text("first")
        assert out.read_text() == "first"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".out-0123abcd.staging" / "out").mkdir(parents=True)
    with claimed(tmp_path / "out", "out") as staging:
        (staging / "out").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("given", ["there", "there/in", "store/in", "link"])
def test_a_place_that_cannot_be_claimed_is_refused(tmp_path: Path, given: str) -> None:
    (tmp_path / "there").touch()
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadRequest, match=r"^out: "):
        free_path(tmp_path / given, "out", outside=tmp_path / "store")


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    check_room(tmp_path / "new" / "out", "out", 10)
    with pytest.raises(BadRequest, match=r"needs 1e\+06 TB, .* are free"):
        check_room(tmp_path / "new" / "out", "out", 10**18)


def test_a_folder_may_be_replaced_whole_and_one_after_the_other(tmp_path: Path) -> None:
    out = tmp_path / "results"
    for content in ("first", "second"):
        with claimed(out, "results", replace=True) as staging:
            (staging / out.name).mkdir()
            (staging / out.name / content).write_text(content)
        assert [path.name for path in out.iterdir()] == [content]
    assert list(tmp_path.iterdir()) == [out]


def test_what_was_to_be_replaced_stays_if_nothing_comes_of_it(tmp_path: Path) -> None:
    out = tmp_path / "results"
    out.mkdir()
    (out / "first").write_text("first")
    with pytest.raises(RuntimeError), claimed(out, "results", replace=True) as staging:
        (staging / out.name).mkdir()
        raise RuntimeError
    assert [path.name for path in out.iterdir()] == ["first"] and list(tmp_path.iterdir()) == [out]
