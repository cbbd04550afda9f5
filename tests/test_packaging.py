"""What is built, what it asks for, and who calls which target of the Makefile."""

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lora_jax

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TARGETS = set(re.findall(r"^([a-z-]+):.* ## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def requirements():
    """Returns all that pyproject.toml asks for, in extras and groups too."""
    lists = [
        PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"].values(),
        *PROJECT["dependency-groups"].values(),
    ]
    return [Requirement(line) for lines in lists for line in lines]


def constraints():
    """Returns the pinned versions of each package, one for each range of Python."""
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            (version,) = (each.version for each in requirement.specifier)
            pinned.setdefault(canonicalize_name(requirement.name), []).append(version)
    return pinned


def floor(requirement):
    return next(each.version for each in requirement.specifier if each.operator == ">=")


# --- versions -----------------------------------------------------------------------------------


def test_the_version_is_that_of_the_metadata():
    assert lora_jax.__version__ == importlib.metadata.version("lora-jax")


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_pinned_versions_are_in_the_bounds(requirement):
    pinned = constraints()
    if not requirement.specifier:
        assert requirement.name == "jax"
        assert requirement.extras, "only JAX's own extras need no lower bound"
        return
    for version in pinned[canonicalize_name(requirement.name)]:
        assert version in requirement.specifier


def test_a_package_has_one_lower_bound():
    """`make lowest` installs it, which for the core is older than the newest that is pinned."""
    floors = {}
    for requirement in requirements():
        if requirement.specifier:
            floors.setdefault(requirement.name, set()).add(floor(requirement))
    assert all(len(each) == 1 for each in floors.values()), floors
    for line in PROJECT["project"]["dependencies"]:
        name = Requirement(line).name
        assert not set(constraints()[name]) <= floors[name], f"{name} has the pinned version"


# --- what is built --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return folder


def test_the_wheel_holds_the_library_alone(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "lora_jax",
        f"lora_jax-{lora_jax.__version__}.dist-info",
    }
    modules = {str(file.relative_to(ROOT)) for file in ROOT.glob("lora_jax/**/*.py")}
    assert modules | {"lora_jax/py.typed"} == {name for name in names if "dist-info" not in name}


def test_the_sdist_holds_all_that_tests_read(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("benchmarks", "docs", "experiments", "lora_jax", "tests", ".github")
    files = [file for folder in folders for file in ROOT.glob(f"{folder}/**/*")]
    files += [ROOT / "Makefile", ROOT / ".ci" / "run", *ROOT.glob("[!.]*.*")]
    expected = {
        str(file.relative_to(ROOT))
        for file in files
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert expected <= names, sorted(expected - names)


# --- who calls which target ---------------------------------------------------------------------


def test_a_job_is_one_target_that_exists():
    for workflow in WORKFLOWS:
        text = workflow.read_text(encoding="utf-8")
        assert set(re.findall(r"run: (.*)", text)) == {"make ${{ matrix.target }}"}
        called = set(re.findall(r"target: ([\w-]+)", text))
        assert called <= TARGETS, f"{workflow.name} calls {called - TARGETS}"


def test_scripts_and_documents_name_targets_that_exist():
    files = [ROOT / ".ci" / "run", *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    for file in files:
        text = file.read_text(encoding="utf-8")
        called = set(re.findall(r"(?:^ *|`)make ([a-z][a-z-]*)", text, re.MULTILINE))
        assert called <= TARGETS, f"{file.name} names {called - TARGETS}"


def test_the_oldest_and_the_newest_python_are_tested():
    classified = [
        line.rpartition(" ")[2]
        for line in PROJECT["project"]["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", line)
    ]
    assert PROJECT["project"]["requires-python"] == f">={classified[0]}"
    (workflow,) = WORKFLOWS
    tested = set(re.findall(r'python: "([\d.]+)"', workflow.read_text(encoding="utf-8")))
    assert tested == {classified[0], classified[-1]}


def test_no_address_of_an_index_is_written_down():
    files = ["Makefile", ".ci/run", "pyproject.toml", "constraints.txt", *map(str, WORKFLOWS)]
    for file in files:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert set(re.findall(r"https?://([^/\s\"']*)", text)) <= {"github.com"}
        indices = re.findall(r"--(?:extra-)?index-url[ =](\S+)", text)
        assert set(indices) <= {'"$(JAX_NIGHTLY_INDEX)"'}
