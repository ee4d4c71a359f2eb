"""Builds fastsae._C and, with nvcc, fastsae._cuda, both without torch, and never fails an install: what could not be built, and why, is in
fastsae/_build_info.json.

The CUDA module costs minutes of compiling: it is built where the machine has a GPU, for that GPU, or where FASTSAE_CUDA=1 asks for it, for
all of CUDA_ARCHS; FASTSAE_CUDA=0 leaves it out. FASTSAE_CUDA_ARCHS names other architectures ("80,90"; "native": the GPU of this machine).
FASTSAE_NVCC names the compiler; default CUDA_HOME's, the one on the path, or /usr/local/cuda's. Lines that begin with "fastsae: " say what
is compiled and how long it took (pip shows them with -v).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

ROOT = Path(__file__).parent

# Of a kind of CPU, ascending; each level needs the ones before it. The probe is a real function of that level, because a compiler may
# accept a flag that its assembler does not know.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86: dict[str, tuple[list[str], str]] = {
    "avx2": (
        ["-mavx2", "-mfma", "-mf16c"],
        "__m256 f(__m256 a, __m128i h) { return _mm256_fmadd_ps(a, _mm256_cvtph_ps(h), a); }"
        "__m256i g(__m256i a) { return _mm256_add_epi32(a, a); }",
    ),
    "avx512": (
        AVX512,
        "__m512 f(__m512 a) { return _mm512_and_ps(_mm512_fmadd_ps(a, a, a), a); }"
        "__m256i g(const void* p) { return _mm256_maskz_loadu_epi16(3, p); }",
    ),
    "avx512_vnni": (["-mavx512vnni"], "__m512i f(__m512i s, __m512i a) { return _mm512_dpbusd_epi32(s, a, a); }"),
    "avx512_bf16": (["-mavx512bf16"], "__m512 f(__m512 s, __m512bh a) { return _mm512_dpbf16_ps(s, a, a); }"),
}
ARM: dict[str, tuple[list[str], str]] = {
    "neon": ([], "float32x4_t f(float32x4_t a) { return vfmaq_f32(a, a, a); }"),
    "neon_dotprod": (["-march=armv8.2-a+dotprod"], "int32x4_t f(int32x4_t s, int8x16_t a) { return vdotq_s32(s, a, a); }"),
    "neon_i8mm": (
        ["-march=armv8.2-a+dotprod+i8mm"],
        "int32x4_t f(int32x4_t s, uint8x16_t a, int8x16_t b) { return vusmmlaq_s32(s, a, b); }",
    ),
}

# Fused multiply-adds are written where they are meant: a compiler that fuses on its own would change bits between levels.
# No -march and no -ffast-math, ever: baseline files must run on every CPU of the platform, and NaN and -0 must survive.
FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
# gcc 12 takes its own intrinsics for uninitialised.
ISA_FLAGS = ["-fno-exceptions", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]

CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
# PTX of the lowest: the driver can compile it for every architecture that is not in the list, older than the newest or newer.
CUDA_PTX = "80"
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-fmad=false", "-Icsrc"]  # fma only where it is written
CUDA_FLAGS += ["-Xptxas", "-v"]  # registers and spills, which tests/gpu/test_cuda.py reads

FAILURES = (CCompilerError, ExecError, PlatformError, OSError)


def _run_compiler(command: list[str]) -> str:
    """What it says beside its result."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CCompilerError(f"{' '.join(command)}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stderr


def has_gpu() -> bool:
    """Whether the driver of this machine has an NVIDIA GPU."""
    return any(Path("/proc/driver/nvidia/gpus").glob("*")) or any(Path("/dev").glob("nvidia[0-9]*"))


def included(source: str) -> set[str]:
    """`source` and every file of csrc that it includes."""
    files, new = set(), {source}
    while new:
        files |= new
        names = {f"csrc/{name}" for file in new for name in re.findall(r'#include "(.+)"', Path(file).read_text())}
        new = set(filter(os.path.exists, names)) - files
    return files


class BuildExt(build_ext):
    """Compiles *.isa.cpp once per instruction set level with that level's flags, everything else once with baseline flags."""

    def run(self) -> None:
        self.info: dict[str, Any] = {"native": False, "reason": "", "compiler": "", "flags": FLAGS, "levels": {}}
        self.info["cuda"] = {"built": False, "reason": "", "nvcc": "", "archs": []}
        try:
            super().run()
        except FAILURES as error:
            self._give_up(str(error))
        self.info["native"] = self.info["native"] and not self.info["reason"]
        # A library left by an earlier build would contradict the reason. Not earlier: inside super().run() `inplace` is off.
        for name, built in (("fastsae._C", self.info["native"]), ("fastsae._cuda", self.info["cuda"]["built"])):
            if not built:
                (Path(self.build_lib) / self.get_ext_filename(name)).unlink(missing_ok=True)
                if self.inplace:
                    (ROOT / self.get_ext_filename(name)).unlink(missing_ok=True)
        home = ROOT / "fastsae" if self.inplace else Path(self.build_lib) / "fastsae"
        home.mkdir(parents=True, exist_ok=True)
        (home / "_build_info.json").write_text(json.dumps(self.info, indent=1) + "\n")

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "fastsae._cuda":
            try:
                begun = time.monotonic()
                self._build_cuda(ext)
                self.info["cuda"]["built"] = True
                print(f"fastsae: CUDA C++ kernels built in {time.monotonic() - begun:.0f} s", file=sys.stderr)
            except (*FAILURES, subprocess.SubprocessError) as error:
                self.info["cuda"]["reason"] = str(error)
                print(f"fastsae: no CUDA C++ kernels: {error}", file=sys.stderr)
            return
        try:
            begun = time.monotonic()
            self._build(ext)
            self.info["native"] = True
            levels = ", ".join(level for level, note in self.info["levels"].items() if note.startswith("built"))
            print(f"fastsae: native kernels built in {time.monotonic() - begun:.0f} s: {levels}", file=sys.stderr)
        except FAILURES as error:
            self._give_up(str(error))

    def _give_up(self, reason: str) -> None:
        self.info["reason"] = reason
        print(f"fastsae: no native kernels: {reason}", file=sys.stderr)

    def _build(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "msvc":
            raise PlatformError("MSVC cannot build the kernels; gcc and clang can")
        try:
            import pybind11
        except ImportError as error:
            raise PlatformError("pybind11 is missing in the build environment") from error
        python = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        self.info["compiler"] = self._compiler_version()
        if reason := self._rejects(FLAGS, "int f() { return 0; }", header=""):
            raise CCompilerError(f"the C++ compiler does not work: {reason}")

        isa_sources = [s for s in ext.sources if s.endswith(".isa.cpp")]
        baseline = [s for s in ext.sources if not s.endswith(".isa.cpp")]
        objects = self._compile_all([(s, "portable", FLAGS + ISA_FLAGS) for s in isa_sources], [])
        built, flags, notes = ["portable"], [], {"portable": "built"}
        # Asked of the compiler: it may be one for another CPU. A universal macOS build compiles for both, rejects the flags of one for the
        # other, and has the portable code only.
        compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
        target = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, timeout=60, check=False).stdout
        arm = target.startswith(("aarch64", "arm64"))
        header = f"#include <{'arm_neon' if arm else 'immintrin'}.h>\n"
        for level, (extra, probe) in (ARM if arm else X86).items():
            reason = self._rejects([*FLAGS, *flags, *extra], probe, header)
            if not reason:
                flags = flags + extra
                try:
                    objects += self._compile_all([(s, level, FLAGS + ISA_FLAGS + flags) for s in isa_sources], [])
                    built.append(level)
                except FAILURES as error:
                    reason = str(error)
            notes[level] = f"built with {' '.join(flags)}" if not reason else f"not built: {reason}"
            if reason:
                break
        self.info["levels"] = notes

        macros = [(f"FASTSAE_BUILT_{level}", "1") for level in built]
        objects += self._compile_all([(s, "", FLAGS) for s in baseline], macros, python)
        self.compiler.link_shared_object(
            sorted(objects),
            self.get_ext_fullpath(ext.name),
            libraries=["dl"] if sys.platform == "linux" else [],  # dlsym is not in libc before glibc 2.34
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def _build_cuda(self, ext: Extension) -> None:
        wish = os.environ.get("FASTSAE_CUDA", "")
        if wish not in ("", "0", "1"):
            raise PlatformError(f"FASTSAE_CUDA must be 0 or 1, got {wish!r}")
        if wish == "0":
            raise PlatformError("left out by FASTSAE_CUDA=0")
        if not wish and not has_gpu():
            raise PlatformError("no NVIDIA GPU where the package was built; FASTSAE_CUDA=1 builds it nevertheless")
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        places = [home and str(Path(home) / "bin"), None, "/usr/local/cuda/bin"]
        nvcc = os.environ.get("FASTSAE_NVCC") or next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
        if not nvcc:
            raise PlatformError("nvcc was not found when the package was built (CUDA_HOME, on the path, or in /usr/local/cuda)")
        if not self.info["compiler"] or self.info["reason"]:
            raise PlatformError("it needs the C++ compiler and pybind11 as well")
        import pybind11

        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()[-2:]
        wanted = os.environ.get("FASTSAE_CUDA_ARCHS", "").replace(",", " ").split() or (list(CUDA_ARCHS) if wish else ["native"])
        if wanted == ["native"]:
            targets = ["-arch=native"]
        else:
            targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in wanted]
            targets.append(f"-gencode=arch=compute_{CUDA_PTX},code=compute_{CUDA_PTX}")
        self.info["cuda"].update(nvcc=" ".join(version), archs=wanted)
        print(f"fastsae: compiling CUDA C++ kernels for {', '.join(wanted)} (minutes; FASTSAE_CUDA=0 leaves them out)", file=sys.stderr)
        out = Path("build") / f"objects{sysconfig.get_config_var('EXT_SUFFIX')}" / "cuda"
        include = str(Path(nvcc).resolve().parent.parent / "include")
        toolkit = [path for path in (include, *([str(Path(home) / "include")] if home else [])) if Path(path).is_dir()]
        bind = ["-std=c++17", "-O2", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc"]
        bind += [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"], *toolkit)]

        def compile_one(source: str) -> str:
            target = out / (os.path.basename(source) + ".o")
            command = [nvcc, *([*CUDA_FLAGS, *targets] if source.endswith(".cu") else bind), "-c", source, "-o", str(target)]
            return self._made(source, target, [version, command], lambda: target.with_suffix(".log").write_text(_run_compiler(command)))

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            # The sort first: it takes longest.
            objects = list(pool.map(compile_one, sorted(ext.sources, key=lambda s: "sort" not in s)))
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        _run_compiler([nvcc, "-shared", "--cudart=static", "--no-device-link", *objects, "-o", target])

    def _compile_all(self, jobs: list[tuple[str, str, list[str]]], macros: list[tuple[str, str]], python: Sequence[str] = ()) -> list[str]:
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            return list(pool.map(lambda job: self._compile(job[0], job[1], job[2], macros, python), jobs))

    def _compile(self, source: str, level: str, flags: list[str], macros: list[tuple[str, str]], python: Sequence[str]) -> str:
        # Only bind.cpp sees Python: its headers lie elsewhere in each isolated build, and the kernels need not be compiled again for that.
        include = ["csrc", *(python if os.path.basename(source) == "bind.cpp" else [])]
        if level:
            macros = [*macros, ("FASTSAE_ISA", level), (f"FASTSAE_LEVEL_{level}", "1")]
        # Not build_temp: an editable install gets a fresh one each time and would compile everything again.
        out = Path("build") / f"objects{sysconfig.get_config_var('EXT_SUFFIX')}" / (level or "baseline")
        compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
        options: dict[str, Any] = {"macros": macros, "include_dirs": include, "extra_postargs": flags}
        command = [self.info["compiler"], compiler, flags, include, macros]
        return self._made(
            source, (out / source).with_suffix(".o"), command, lambda: self.compiler.compile([source], output_dir=str(out), **options)
        )

    def _made(self, source: str, target: Path, command: list[Any], make: Callable[[], object]) -> str:
        """An object, made unless it is newer than every file that it may depend on and comes from the same command."""
        stamp, said = target.with_suffix(".command"), json.dumps(command)
        newest = max(map(os.path.getmtime, included(source)))
        if self.force or not target.exists() or target.stat().st_mtime <= newest or not stamp.exists() or stamp.read_text() != said:
            target.parent.mkdir(parents=True, exist_ok=True)
            stamp.unlink(missing_ok=True)
            make()
            stamp.write_text(said)
        return str(target)

    def _compiler_version(self) -> str:
        command = (getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so)[0]
        try:
            lines = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout.splitlines()
        except OSError as error:
            raise CCompilerError(f"no C++ compiler: {error}") from error
        return lines[0] if lines else command

    def _rejects(self, flags: list[str], code: str, header: str) -> str:
        """Why the compiler cannot compile `code`, or an empty string."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(header + code + "\n")
            try:
                self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
            except FAILURES as error:
                return str(error)
        return ""


setup(
    ext_modules=[
        Extension(
            "fastsae._C",
            sorted(f for f in glob("csrc/**/*.cpp", recursive=True) if not f.startswith("csrc/cuda")),
            depends=sorted(glob("csrc/**/*.h", recursive=True)),  # what the sdist must hold besides the sources
            language="c++",
            optional=True,  # tells setuptools that the library may be absent when it copies it
        ),
        Extension("fastsae._cuda", [*sorted(glob("csrc/cuda/*.cu")), "csrc/cuda/bind.cpp"], language="c++", optional=True),
    ],
    cmdclass={"build_ext": BuildExt},
)
