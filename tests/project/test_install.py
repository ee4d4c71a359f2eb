"""sdist → wheel → a clean environment → import; once with a compiler, once without. Builds never see torch.

The sdist holds the checkout's files byte for byte, so that its objects are the checkout's own, as `make build` compiled them from nothing,
where setup.py finds them made by the same command from files as old; the bindings are compiled, and in `make deep` all.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

pytestmark = pytest.mark.slow

REPORT = """
import json, os, sys
import fastsae
from fastsae.native import loader
import fastsae.kernels
print(json.dumps({
    "where": os.path.dirname(fastsae.__file__),
    "reason": loader.unavailable(),
    "levels": loader.isa_levels(),
    "info": loader.build_info(),
}))
"""


def run(*command: object, **kwargs: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds setuptools and pybind11, and in which importing torch is an error."""
    home = tmp_path_factory.mktemp("builder")
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    packages = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    # Links to the running environment's copies: nothing is downloaded.
    import pybind11
    import setuptools

    beside = Path(setuptools.__file__).parent.parent
    links = [Path(pybind11.__file__).parent]
    for pattern in ("setuptools", "setuptools-*.dist-info", "_distutils_hack", "distutils-precedence.pth", "pkg_resources"):
        links += beside.glob(pattern)
    for source in links:
        (packages / source.name).symlink_to(source)
    (packages / "torch.py").write_text("raise RuntimeError('the build imported torch')\n")
    return python


@pytest.fixture(scope="module")
def sdist(builder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: building must not leave files in the checkout, nor take stale ones from it.
    copy = tmp_path_factory.mktemp("checkout") / "fastsae"
    ignore = shutil.ignore_patterns("build", "dist", "*.egg-info", "*.so", "_build_info.json", "__pycache__", ".*", "tests", "bench")
    shutil.copytree(ROOT, copy, ignore=ignore)
    out = tmp_path_factory.mktemp("sdist")
    run(builder, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})", cwd=copy)
    (made,) = out.glob("*.tar.gz")
    return made


def wheel_from(sdist: Path, builder: Path, folder: Path, environment: dict[str, str]) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    objects = Path("build") / f"objects{sysconfig.get_config_var('EXT_SUFFIX')}"
    if os.environ.get("HYPOTHESIS_PROFILE") != "deep" and (ROOT / objects).is_dir():
        shutil.copytree(ROOT / objects, source / objects, ignore=shutil.ignore_patterns("bind.*", "cuda"))
    out = folder / "wheel"
    out.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    run(builder, "-c", code, cwd=source, env={**os.environ, **environment})
    (made,) = out.glob("*.whl")
    return made


def report_from(wheel: Path, folder: Path) -> dict[str, Any]:
    """Installs the wheel in a fresh environment that sees the running one's torch, and imports it there."""
    home = folder / "clean"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    packages = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    # After the own packages on the path, and without its .pth files, so that an editable install of the checkout stays out.
    (packages / "outer.pth").write_text("\n".join(p for p in [*site.getsitepackages(), site.getusersitepackages()] if Path(p).is_dir()))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTSAE_ISA")}
    report = json.loads(run(python, "-c", REPORT, cwd=folder, env=environment).splitlines()[-1])
    assert Path(report["where"]) == packages / "fastsae"
    return report


def test_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = {m.name.partition("/")[2]: m for m in archive.getmembers() if m.isfile()}
        for pattern in ("csrc/**/*.h", "csrc/**/*.cu", "csrc/**/*.cpp", "fastsae/**/*.py", "kernels/**/*.py"):
            for file in ROOT.glob(pattern):
                held = archive.extractfile(members[str(file.relative_to(ROOT))])
                assert held is not None and held.read() == file.read_bytes()
    assert {"pyproject.toml", "setup.py", "fastsae/py.typed"} <= members.keys()


def test_with_a_compiler(sdist: Path, builder: Path, tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler on this machine")
    # Without the CUDA module: it costs a minute, and an editable build (`make build`) makes it in the same way.
    report = report_from(wheel_from(sdist, builder, tmp_path, {"FASTSAE_CUDA": "0"}), tmp_path)
    assert report["info"]["cuda"] == {"built": False, "reason": "left out by FASTSAE_CUDA=0", "nvcc": "", "archs": []}
    assert report["reason"] is None
    assert report["levels"][0] == "portable"
    assert report["info"]["native"]
    assert report["info"]["compiler"]


def test_without_a_compiler(sdist: Path, builder: Path, tmp_path: Path) -> None:
    wheel = wheel_from(sdist, builder, tmp_path, {"CC": "/bin/false", "CXX": "/bin/false"})
    with zipfile.ZipFile(wheel) as archive:
        assert not [n for n in archive.namelist() if n.endswith((".so", ".pyd"))]
    report = report_from(wheel, tmp_path)
    assert "was not built" in report["reason"]
    assert "/bin/false" in report["reason"]
    assert report["levels"] == []
    assert report["info"]["native"] is False
    assert report["info"]["cuda"]["built"] is False
    assert report["info"]["cuda"]["reason"]
