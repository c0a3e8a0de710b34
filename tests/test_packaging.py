"""The shape of the package: links, guards, files that ship, and pins that cover what is asked for."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tdpass

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("folder", ["passes", "kernels"])
def test_top_level_folders_are_linked_into_the_package(folder: str) -> None:
    module = importlib.import_module(f"tdpass.{folder}")
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / folder / "__init__.py"


def test_every_folder_of_the_package_is_a_package() -> None:
    package = Path(tdpass.__file__).parent
    folders = {path.parent for path in package.rglob("*.py")} | {package / "passes", package / "kernels"}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_files_that_are_not_python_ship() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    patterns = re.findall(r'"([^"]+)"', re.search(r"^tdpass = \[(.*)\]$", text, re.MULTILINE)[1])
    package = Path(tdpass.__file__).parent
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    files = [
        path for folder in (package, package / "passes", package / "kernels") for path in folder.rglob("*")
    ]
    present = {path for path in files if path.is_file() and path.suffix not in (".py", ".pyc", ".so")}
    assert present == shipped


@pytest.mark.parametrize(
    "use", ["from kernels import get_kernel", "import kernels; kernels.get_kernel", "import passes"]
)
def test_using_a_folder_from_the_repository_root_says_what_to_import(use: str) -> None:
    run = subprocess.run([sys.executable, "-c", use], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "ImportError" in run.stderr
    assert re.search(r"import tdpass\.(kernels|passes)", run.stderr)


def test_asking_for_the_version_of_kernels_is_harmless() -> None:
    command = "import kernels; print(getattr(kernels, '__version__', 'none'))"
    run = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "none"


def _constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_each_package_has_one_exact_pin_on_each_python(python: str) -> None:
    names = [
        canonicalize_name(pin.name)
        for pin in _constraints()
        if pin.marker is None or pin.marker.evaluate({"python_version": python})
    ]
    assert len(names) == len(set(names))
    assert all([specifier.operator for specifier in pin.specifier] == ["=="] for pin in _constraints())


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_what_pyproject_asks_for_is_pinned_within_its_bounds(python: str) -> None:
    asked = [
        Requirement(text)
        for text in re.findall(r'"([A-Za-z][\w.-]*(?:(?:>=|==)[\d.*]+)?)"', _dependency_lists())
    ]
    pins = {
        canonicalize_name(pin.name): pin
        for pin in _constraints()
        if pin.marker is None or pin.marker.evaluate({"python_version": python})
    }
    assert {"torch", "onnx", "pytest", "scikit-learn", "aimet-torch"} <= {
        canonicalize_name(requirement.name) for requirement in asked
    }
    for requirement in asked:
        version = next(iter(pins[canonicalize_name(requirement.name)].specifier)).version
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


def _dependency_lists() -> str:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    runtime = re.search(r"^dependencies = \[.*?^\]", text, re.MULTILINE | re.DOTALL)
    extras = re.search(r"^\[project\.optional-dependencies\].*?^\[", text, re.MULTILINE | re.DOTALL)
    assert runtime is not None
    assert extras is not None
    return runtime[0] + extras[0]


def test_torch_is_pinned_to_the_tried_version() -> None:
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def copied(folder: Path) -> Path:
    """The source as a checkout has it."""
    ignored = shutil.ignore_patterns(".git", ".venv", "out", "build", "*.egg-info", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=ignored))


COMPILER = """
ONNXRUNTIME_LIBRARY = "libtdpass_onnxruntime.so"
compiled_targets = units = lambda *_: ()
build = lambda library, *_: library.write_bytes(b"compiled")
build_onnxruntime = lambda library, *_: library.write_bytes(b"compiled")
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kernels are built into wheels on Linux")
@pytest.mark.parametrize("compiled", [True, False])
def test_a_wheel_with_kernels_is_of_one_platform_and_one_without_of_all(
    compiled: bool, tmp_path: Path
) -> None:
    """What lies among the files of all platforms cannot be repaired to manylinux."""
    source = copied(tmp_path)
    (source / "kernels" / "build.py").write_text(COMPILER)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path / "dist")]
    choice = {"TDPASS_WHEEL": "" if compiled else "pure"}
    subprocess.run(command, cwd=source, check=True, capture_output=True, env=os.environ | choice)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (said,) = (archive.read(name).decode() for name in names if name.endswith("dist-info/WHEEL"))
    assert wheel.name.endswith("-none-any.whl") != compiled
    assert f"Root-Is-Purelib: {str(not compiled).lower()}" in said
    assert ("tdpass/kernels/cpu/libtdpass_cpu.so" in names) == compiled
    assert ("tdpass/kernels/onnxruntime/libtdpass_onnxruntime.so" in names) == compiled
    assert not [name for name in names if ".data/" in name]


@pytest.mark.slow
def test_a_source_distribution_holds_files_and_no_links(tmp_path: Path) -> None:
    """Where there are no links, on Windows and in some archives, passes and kernels are there too."""
    copy = copied(tmp_path)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path / "dist")]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as held:
        members = held.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = {member.name.partition("/")[2] for member in members}
    for folder in ("passes", "kernels"):
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
        assert {f"tdpass/{name}" for name in files} <= names
    assert {"setup.py", "pyproject.toml"} <= names


@pytest.mark.slow
def test_the_documentation_is_a_site_without_dead_links(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    page = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    assert "make_plan" in page
