"""Recipe -> key -> artifact: keys that tell recipes apart, one maker at a time, and nothing half-made."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignmerge.engine.faults import BadRequest, NoRoom
from alignmerge.engine.store import MANIFEST, NotMade, Store, write_json

ROOT = Path(__file__).resolve().parents[2]
RECIPE = {"method": "average", "inputs": ["a", "b"]}

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(-2, 2).map(lambda x: x + 0.0)
    | st.text(max_size=3)
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
recipes = st.dictionaries(st.text(max_size=3), values, max_size=4)


def same(one: object, other: object) -> bool:
    """Equality of JSON values: unlike Python's, 1, 1.0 and true are three things."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=60, deadline=None)
@given(one=recipes, other=recipes)
def test_keys_are_equal_exactly_where_recipes_are(one: dict[str, Any], other: dict[str, Any]) -> None:
    store = Store(Path("unused"))
    assert (store.key("merge", one) == store.key("merge", other)) == same(one, other)
    assert store.key("merge", one) != store.key("score", one)


@settings(max_examples=60, deadline=None)
@given(recipe=recipes, name=st.text(max_size=3), value=values)
def test_one_changed_entry_changes_the_key_and_order_does_not(
    recipe: dict[str, Any], name: str, value: object
) -> None:
    store = Store(Path("unused"))
    assert store.key("merge", reordered(recipe)) == store.key("merge", recipe)
    changed = {**recipe, name: value}
    assert (store.key("merge", changed) == store.key("merge", recipe)) == same(changed, recipe)


def test_key_is_the_same_in_every_process() -> None:
    code = f"from alignmerge.engine.store import *; print(Store(Path('x')).key('merge', {RECIPE}))"
    keys = set()
    for seed in ("0", "1"):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
        keys.add(done.stdout.strip())
    assert keys == {Store(Path("y")).key("merge", RECIPE)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_recipes_hold_no_nan(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Store(Path("unused")).key("merge", {"scale": value})


def make_text(folder: Path) -> Mapping[str, Any]:
    (folder / "weights").write_text("complete")
    return {"digest": "d1g3st"}


def leftovers(store: Store) -> list[Path]:
    staging = store.root / ".staging"
    return sorted(staging.iterdir()) if staging.is_dir() else []


def test_obtain_makes_once_and_finds_afterwards(tmp_path: Path) -> None:
    store, calls = Store(tmp_path / "store"), []

    def make(folder: Path) -> Mapping[str, Any]:
        calls.append(folder)
        return make_text(folder)

    assert store.find("merge", RECIPE) is None
    made = store.obtain("merge", RECIPE, make)
    assert store.obtain("merge", reordered(RECIPE), make) == made == store.find("merge", RECIPE)
    assert len(calls) == 1
    assert made.path == store.root / "merge" / store.key("merge", RECIPE) == store.path("merge", RECIPE)
    assert (made.path / "weights").read_text() == "complete"
    assert made.digest == "d1g3st"
    assert made.manifest["recipe"] == RECIPE
    assert {"versions", "git", "python"} <= made.manifest["provenance"].keys()
    assert leftovers(store) == []


def test_frozen_store_finds_but_does_not_make(tmp_path: Path) -> None:
    frozen = Store(tmp_path / "store", frozen=True)
    with pytest.raises(NotMade, match=f"merge/{frozen.key('merge', RECIPE)}"):
        frozen.obtain("merge", RECIPE, make_text)
    assert not frozen.root.exists()
    made = Store(tmp_path / "store").obtain("merge", RECIPE, make_text)
    assert frozen.obtain("merge", RECIPE, make_text) == made


def test_manifest_names_no_user_and_no_folder(tmp_path: Path) -> None:
    made = Store(tmp_path / "store").obtain("merge", RECIPE, make_text)
    text = (made.path / MANIFEST).read_text()
    assert str(tmp_path) not in text and str(Path.home()) not in text


def test_artifacts_can_be_made_while_making_one(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")

    def outer(folder: Path) -> Mapping[str, Any]:
        (folder / "first").write_text("before")
        inner = store.obtain("fisher", {"of": "base"}, make_text)
        assert (folder / "first").read_text() == "before"  # the inner one swept, but not this
        return {"digest": inner.digest}

    assert store.obtain("merge", RECIPE, outer).digest == "d1g3st"
    assert leftovers(store) == []


def racer(root: Path, barrier: Barrier) -> None:
    def make(folder: Path) -> Mapping[str, Any]:
        with (root / "calls").open("a") as log:
            log.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        return make_text(folder)

    barrier.wait()
    artifact = Store(root / "store").obtain("merge", RECIPE, make)
    assert (artifact.path / "weights").read_text() == "complete"


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    racers = [spawn.Process(target=racer, args=(tmp_path, barrier)) for _ in range(2)]
    for process in racers:
        process.start()
    for process in racers:
        process.join(60)
    assert [process.exitcode for process in racers] == [0, 0]
    assert len((tmp_path / "calls").read_text().split()) == 1
    assert leftovers(Store(tmp_path / "store")) == []


SLOW_MAKER = """
import sys, time
from pathlib import Path
from alignmerge.engine.store import Store

def make(folder):
    (folder / "weights").write_text("comp")
    print("inside", flush=True)
    sys.stdin.readline()
    (folder / "weights").write_text("complete")
    return {"digest": "slow"}

Store(Path(sys.argv[1])).obtain("merge", {"slow": True}, make)
"""


def slow_maker(root: Path) -> subprocess.Popen[str]:
    """Start a process that waits, in the middle of a write, for a line on its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_MAKER, str(root)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "inside\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)


def test_killed_in_the_middle_of_a_write(tmp_path: Path) -> None:
    store, recipe = Store(tmp_path / "store"), {"slow": True}
    kill(slow_maker(store.root))
    assert store.find("merge", recipe) is None
    assert not (store.root / "merge").exists()
    (left,) = leftovers(store)
    assert (left / "weights").read_text() == "comp"
    made = store.obtain("merge", recipe, make_text)
    assert (made.path / "weights").read_text() == "complete"
    assert leftovers(store) == []


def test_sweep_spares_the_living_and_removes_the_dead(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    process = slow_maker(store.root)
    try:
        store.obtain("merge", RECIPE, make_text)
        assert len(leftovers(store)) == 1  # of the living
    finally:
        kill(process)
    store.obtain("merge", {"another": 1}, make_text)
    assert leftovers(store) == []
    process = slow_maker(store.root)
    store.obtain("merge", {"another": 2}, make_text)
    process.communicate("go on\n", timeout=30)
    assert process.returncode == 0
    found = store.find("merge", {"slow": True})
    assert found is not None and (found.path / "weights").read_text() == "complete"


def test_failure_leaves_its_traceback_and_a_later_success_clears_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")

    def failing(folder: Path) -> Mapping[str, Any]:
        (folder / "weights").write_text("half")
        raise ArithmeticError("no numbers today")

    with pytest.raises(ArithmeticError, match="no numbers today"):
        store.obtain("merge", RECIPE, failing)
    assert store.find("merge", RECIPE) is None
    assert not (store.root / "merge").exists() and leftovers(store) == []
    record = store.failure("merge", RECIPE)
    assert record is not None and record.parent == store.root / "failed"
    told = json.loads(record.read_text())
    assert told["recipe"] == RECIPE
    assert "ArithmeticError: no numbers today" in told["traceback"] and "in failing" in told["traceback"]
    store.obtain("merge", {"another": 1}, make_text)
    assert store.failure("merge", RECIPE) == record
    store.obtain("merge", RECIPE, make_text)
    assert store.failure("merge", RECIPE) is None and not record.exists()


@pytest.mark.parametrize("error", [BadRequest.of("method.scale", "-1", "[0, 1]"), KeyboardInterrupt()])
def test_wrong_request_and_interruption_leave_nothing(error: BaseException, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")

    def refuse(folder: Path) -> Mapping[str, Any]:
        (folder / "weights").write_text("half")
        raise error

    with pytest.raises(type(error)):
        store.obtain("merge", RECIPE, refuse)
    assert not (store.root / "merge").exists() and leftovers(store) == []
    assert store.failure("merge", RECIPE) is None and not (store.root / "failed").exists()
    assert store.obtain("merge", RECIPE, make_text).digest == "d1g3st"


def test_facts_that_json_cannot_hold_are_a_failure_not_an_artifact(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(ValueError, match="JSON"):
        store.obtain("score", RECIPE, lambda folder: {"aqi": float("nan")})
    assert store.find("score", RECIPE) is None and leftovers(store) == []
    assert store.failure("score", RECIPE) is not None


def test_write_json_is_sorted_and_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": [1], "a": {"d": None, "c": 1.5}})
    expected = '{\n  "a": {\n    "c": 1.5,\n    "d": null\n  },\n  "b": [\n    1\n  ]\n}\n'  # one entry a line
    assert (tmp_path / "x.json").read_text() == expected


def test_what_a_killed_drop_left_does_not_hinder_the_next_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = store.obtain("weights", RECIPE, make_text)
    left = tmp_path / ".staging" / f"weights-{made.key}.0123abcd"
    left.mkdir(parents=True)
    (left / "half.txt").write_text("left")
    assert store.drop("weights", RECIPE)
    assert not made.path.exists()
    store.obtain("weights", {"another": 1}, make_text)
    assert leftovers(store) == []


DAMAGES = {
    "an empty manifest": (MANIFEST, b"", "manifest.json is empty or cut off"),
    "half a manifest": (MANIFEST, b'{"facts": {"dig', "manifest.json is empty or cut off"),
    "a manifest of bytes": (MANIFEST, b"\xff\xfe\x00", "manifest.json is empty or cut off"),
    "a list": (MANIFEST, b"[]", "manifest.json holds no facts"),
    "no facts": (MANIFEST, b"{}", "manifest.json holds no facts"),
    "no recipe": (MANIFEST, b'{"facts": {}}', "manifest.json holds no recipe"),
    "no manifest": (MANIFEST, None, "no manifest.json"),
    "half a file": ("weights", b"comp", "weights has 4 bytes, not 8"),
    "no file": ("weights", None, "weights is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_artifact_is_named_and_made_again(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, content, said = DAMAGES[name]
    made = Store(tmp_path).obtain("scores", RECIPE, make_text)
    if content is None:
        (made.path / file).unlink()
    else:
        (made.path / file).write_bytes(content)
    frozen, store = Store(tmp_path, frozen=True), Store(tmp_path)
    for _ in range(2):
        with pytest.raises(NotMade):
            frozen.obtain("scores", RECIPE, make_text)
    assert capsys.readouterr().err == f"damaged: {made.path}: {said}; the next run makes it again\n"
    healed = store.obtain("scores", RECIPE, make_text)
    assert capsys.readouterr().err == f"damaged: {made.path}: {said}; it is made again\n"
    assert (healed.path / "weights").read_text() == "complete" and healed.digest == "d1g3st"
    assert frozen.find("scores", RECIPE) == healed and leftovers(store) == []


def test_an_artifact_without_a_record_of_its_files_stays_valid(tmp_path: Path) -> None:
    made = Store(tmp_path).obtain("scores", RECIPE, make_text)
    manifest = dict(made.manifest)
    assert manifest.pop("files") == {"weights": 8}
    write_json(made.path / MANIFEST, manifest)
    (made.path / "weights").write_text("of another size")
    assert Store(tmp_path).obtain("scores", RECIPE, make_text).manifest == manifest


def test_a_link_to_a_damaged_artifact_gives_way_and_its_target_stays(tmp_path: Path) -> None:
    made = Store(tmp_path / "one").obtain("scores", RECIPE, make_text)
    (made.path / "weights").write_text("cut")
    store = Store(tmp_path / "two")
    (store.root / "scores").mkdir(parents=True)
    store.path("scores", RECIPE).symlink_to(made.path)
    assert (store.obtain("scores", RECIPE, make_text).path / "weights").read_text() == "complete"
    assert (made.path / "weights").read_text() == "cut"


def test_without_locks_the_first_rename_wins(tmp_path: Path) -> None:
    """Another process, whose lock this one cannot see, makes the same artifact meanwhile."""
    store = Store(tmp_path)

    def late(folder: Path) -> Mapping[str, Any]:
        other = Store(tmp_path / "other").obtain("scores", RECIPE, make_text)
        (tmp_path / "scores").mkdir()
        other.path.rename(store.path("scores", RECIPE))
        (folder / "weights").write_text("late")
        return {"digest": "late"}

    assert store.obtain("scores", RECIPE, late).digest == "d1g3st"
    assert leftovers(store) == [] and store.failure("scores", RECIPE) is None


def test_without_locks_a_swept_maker_fails_instead_of_publishing_a_half(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def swept(folder: Path) -> Mapping[str, Any]:
        (folder / "weights").write_text("half")
        folder.rename(folder.with_name("elsewhere"))
        return {"digest": "half"}

    with pytest.raises(FileNotFoundError):
        store.obtain("scores", RECIPE, swept)
    assert store.find("scores", RECIPE) is None


def test_a_store_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("no folder")
    for frozen in (False, True):
        with pytest.raises(BadRequest, match=r"^store: .*Not a directory"):
            Store(tmp_path / "store", frozen=frozen).obtain("scores", RECIPE, make_text)


def test_a_store_where_no_folder_can_be_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        Store(Path("/proc/x")).obtain("scores", RECIPE, make_text)
    assert str(caught.value).startswith(
        "store: /proc/x cannot be written (No such file or directory); allowed: a"
    )


def test_a_moved_store_is_the_same_store(tmp_path: Path) -> None:
    made = Store(tmp_path / "one").obtain("scores", RECIPE, make_text)
    (tmp_path / "one").rename(tmp_path / "a b")
    assert Store(tmp_path / "a b", frozen=True).obtain("scores", RECIPE, make_text).manifest == made.manifest


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space left on device (os error 28)")],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(error: Exception, tmp_path: Path) -> None:
    """Python's own files raise an OSError; tokenizers and safetensors say it in words."""
    store = Store(tmp_path / "store")

    def fill(folder: Path) -> Mapping[str, Any]:
        (folder / "weights").write_text("half")
        raise error

    with pytest.raises(NoRoom) as caught:
        store.obtain("merge", RECIPE, fill)
    line = str(caught.value)
    assert line.startswith(f"no room on the disk: {store.root}: more than 4 bytes needed, ") and " free" in line
    assert leftovers(store) == [] and store.failure("merge", RECIPE) is None
    assert str(pickle.loads(pickle.dumps(caught.value))) == line  # from a worker
    assert store.obtain("merge", RECIPE, make_text).digest == "d1g3st"
