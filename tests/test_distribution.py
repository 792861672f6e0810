"""The source distribution, the wheel that is built from it, and a run of what that installs."""

import configparser
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

from tests.experiments.gpt_runs import QUICK, TEXT
from tests.experiments.runs import ENVIRONMENT

pytest.importorskip("setuptools", minversion="77")
pytest.importorskip("pip")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = ("core", "nets", "train", "experiments")
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff", "constraints.txt")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
OTHERS = ["python3.13"]
"""Interpreters that are tested too where they are on the PATH, beside the one that runs the tests."""
CPU = "https://download.pytorch.org/whl/cpu"


def run(*command, **options) -> str:
    """Output of a command, which must succeed."""
    process = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def source_files(folder: Path) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source distribution, built from a copy, as building leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, folder / name)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    run(sys.executable, "-c", code, cwd=folder)
    return folder / "dist" / f"functree-{VERSION}.tar.gz"


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """The wheel, built from the source distribution alone."""
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    return folder / f"functree-{VERSION}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder that the wheel is installed into."""
    folder = tmp_path_factory.mktemp("installed")
    run(*PIP, "install", "--no-index", "--no-deps", "--no-compile", "--target", folder, wheel)
    return folder


@pytest.fixture
def environment(installed, tmp_path, monkeypatch):
    """The environment of a process in an empty folder, which finds the installed packages."""
    monkeypatch.chdir(tmp_path)
    return ENVIRONMENT | {"PYTHONPATH": str(installed)}


def test_source_distribution_has_the_sources_the_tests_and_the_pages(source):
    with tarfile.open(source) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    inside = set().union(*(source_files(ROOT / folder) for folder in (*PACKAGES, "tests")))
    top = {path.name for path in ROOT.glob("*.md")} | set(FILES)
    generated = {"PKG-INFO", "setup.cfg"}
    assert {name for name in names if not name.startswith("functree.egg-info/")} == inside | top | generated


def test_wheel_has_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = f"functree-{VERSION}.dist-info"
        metadata = archive.read(f"{about}/METADATA").decode()
        commands = configparser.ConfigParser()
        commands.read_string(archive.read(f"{about}/entry_points.txt").decode())
    files = {name for folder in PACKAGES for name in source_files(ROOT / folder)}
    # Of modules, those in packages: strip.py beside the pictures of the gallery is none.
    modules = {name for name in files if name.endswith(".py") and (ROOT / name).with_name("__init__.py").exists()}
    others = {"nets/classifiers/imagenet_classes.txt", "experiments/parts/serve.html"}
    others |= {f"train/report/page.{end}" for end in ("css", "html", "js")}
    modules |= {name for name in files if name.endswith("py.typed") or name in others}
    assert {name for name in names if not name.startswith(f"{about}/")} == modules
    assert {"core/py.typed", "nets/py.typed", "train/py.typed"} <= modules
    assert f"{about}/licenses/LICENSE" in names
    for line in ("License-Expression: MIT", "Author: The functree authors", "Requires-Python: >=3.11"):
        assert f"\n{line}\n" in metadata
    assert dict(commands["console_scripts"]) == {"functree": "experiments.__main__:main"}


def test_installed_packages_are_imported(installed, environment):
    names = ", ".join(PACKAGES)
    out = run(sys.executable, "-c", f"import {names}\nfor m in ({names}): print(m.__file__)", env=environment)
    assert out.splitlines() == [str(installed / name / "__init__.py") for name in PACKAGES]


def code_that_imports(folder: Path) -> str:
    """Code that imports every module of the packages in a folder; a tutorial is a script, which would run."""
    modules = [
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        for name in PACKAGES
        for path in sorted((folder / name).rglob("*.py"))
        if path.parent.name != "tutorials" or path.stem.startswith("__")
    ]
    return f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"


def test_every_installed_module_is_imported(installed, environment):
    run(sys.executable, "-c", code_that_imports(installed), env=environment)


def test_installed_command_lists_and_trains(installed, environment, tmp_path):
    command = (sys.executable, installed / "bin" / "functree")
    assert "  gpt  " in run(*command, env=environment)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    out = run(*command, "gpt", *QUICK, "--steps", "3", "--name", "a", env=environment)
    assert "step 3/3" in out and (tmp_path / "runs/gpt/a/result.json").exists()


@pytest.fixture(scope="module", params=OTHERS)
def other(request, wheel, tmp_path_factory):
    """The folder of another interpreter's new environment, which has the wheel and nothing else."""
    program = shutil.which(request.param)
    if program is None or subprocess.run([program, "-c", "import ensurepip, venv"], capture_output=True).returncode:
        pytest.skip(f"no {request.param} that makes environments on the PATH")
    folder = tmp_path_factory.mktemp("other")
    run(program, "-m", "venv", folder)
    run(folder / "bin" / "python", *PIP[1:], "install", "--no-index", "--no-deps", "--no-compile", wheel)
    return folder


def without_path() -> dict[str, str]:
    """The environment of a process that finds what is installed beside its interpreter."""
    return {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}


def test_another_python_compiles_every_module_and_lists_the_experiments(other, tmp_path):
    (site,) = other.glob("lib/python3.*/site-packages")
    folders = [site / name for name in PACKAGES]
    run(other / "bin" / "python", "-W", "error", "-m", "compileall", "-q", *folders, cwd=tmp_path)
    assert all(any(folder.rglob("*.pyc")) for folder in folders)
    listing = run(other / "bin" / "functree", env=without_path(), cwd=tmp_path)
    assert all(f"  {path.stem} " in listing for path in site.glob("experiments/[a-z]*.py"))


@pytest.mark.long
def test_another_python_trains(other, wheel, tmp_path):
    """With all that the wheel requires and this torch, some of which pip has to download."""
    pip, version = (other / "bin" / "python", *PIP[1:]), torch.__version__.partition("+")[0]
    command = (*pip, "install", "--extra-index-url", CPU, f"torch=={version}", wheel)
    process = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if "No matching distribution found" in process.stderr and "(from versions: none)" in process.stderr:
        pytest.skip(f"no connection to download from: {process.stderr.splitlines()[-1]}")
    assert process.returncode == 0, process.stderr
    run(*pip, "check")
    (site,) = other.glob("lib/python3.*/site-packages")
    run(other / "bin" / "python", "-c", code_that_imports(site), env=without_path(), cwd=tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    flags = ("gpt", *QUICK, "--steps", "3", "--name", "a")
    assert "step 3/3" in run(other / "bin" / "functree", *flags, env=without_path(), cwd=tmp_path)
