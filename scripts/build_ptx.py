#!/usr/bin/env python3
"""The PTX that ships: compiled from kernels/*.cu, checked, and compared with what is committed.

    scripts/build_ptx.py --install            the pinned compiler from PyPI (277 MB), into target/cuda-toolchain
    scripts/build_ptx.py build [STEM...]      rewrites kernels/ptx and kernels/MANIFEST, of all kernels or of some
    scripts/build_ptx.py check [STEM...]      builds in a temporary folder, in another place, and compares
    scripts/build_ptx.py self-test            whether the checks below can fail
    scripts/build_ptx.py build --out DIR      texts only, of which those are compiled whose sources have changed: for build.rs, feature build-ptx

MOE_CUDA_TOOLCHAIN names another folder with the same wheels. A file *_sm90.cu becomes PTX for sm_90a, every other one for sm_80.

Both commands assemble each text for every GPU that will get it and fail when a kernel spills or needs a stack, when an instruction that a
kernel is built around is missing from its machine code, and when a float operation leaves its rounding open, since ptxas may then fuse it.
The driver's own compiler may choose other registers than the ptxas that is run here.

Only the standard library of Python 3.11 is used; nvcc needs g++.
"""

import argparse
import concurrent.futures
import difflib
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"

# Not newer: what nvcc writes decides which drivers can read it.
WHEELS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-cuobjdump==13.2.86",
    "nvidia-cuda-nvdisasm==13.2.86",
]
NVCC_VERSION = "13.0.88"

# --fmad=false writes every operation with its rounding; what is to be fused says so in the source.
FLAGS = ["-std=c++17", "-O3", "--ptx", "--fmad=false", "--Werror", "all-warnings"]

# The GPUs that get a text: text for sm_80 runs on everything from Ampere on, text for sm_90a on Hopper only.
TARGETS = {"sm_80": ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"], "sm_90a": ["sm_90a"]}

# Ascending. 7.0 is CUDA 11.0 (driver 450), 8.0 CUDA 12.0 (driver 525); the lowest that assembles for all targets is taken.
PTX_VERSIONS = ["7.0", "7.1", "7.2", "7.3", "7.4", "7.5", "7.6", "7.7", "7.8", "8.0", "8.1", "8.2", "8.3", "8.4", "8.5", "8.6", "8.7", "8.8", "9.0"]

# Sixteen bytes from global to shared memory, past the registers and the L1.
ASYNC_COPY = r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128"

# Stem: (kernels, a regular expression; instructions of which each of them must have each, for every target). The evidence that a kernel
# was compiled into what its comments say.
MEANT = {
    "permute": [
        # Equal ids of a warp are counted by one instruction.
        ("moe_permute_(one|count)", [r"ATOMS\.POPC\.INC\.32", r"LDG\.E\.[\w.]*128"]),
        ("moe_permute_(one|place)", [r"MATCH\.ANY", r"LDS\.128"]),
        ("moe_permute_rows_16", [r"LDG\.E\.[\w.]*128", r"STG\.E\.128"]),
    ],
    "combine": [("moe_combine_(f32|f16|bf16)_.*", [r"LDG\.E\.[\w.]*128", r"STG\.E\.(128|64)"])],
    "norm": [("moe_norm_(f32|b?f16)", [r"LDG\.E\.[\w.]*128", r"STS\.128", r"LDS\.128", r"STG\.E\.128"])],
    "grouped_gemm_f32": [
        ("moe_grouped_gemm_f32_exact_m.*", ["FFMA", r"LDS\.128"]),
        ("moe_grouped_gemm_f32_tf32_m(128|32)", [r"HMMA\.1688\.F32\.TF32", ASYNC_COPY]),
    ],
    "grouped_gemm_sm80": [
        ("moe_grouped_gemm_sm80_.*", [r"HMMA\.16816\.F32", r"LDSM\.16\.M"]),
        (r"moe_grouped_gemm_sm80_b?f16_m\d+", [ASYNC_COPY]),
    ],
    "grouped_gemm_decode": [(r"moe_grouped_gemm_decode_(b?f16|f32)", [r"LDG\.E\.[\w.]*128"])],
    "grouped_gemm_sm90": [("moe_grouped_gemm_sm90_.*", ["HGMMA", "UTMALDG", "SYNCS", "USETMAXREG"])],
}


class Failed(Exception):
    """What is wrong, for people."""


def toolchain() -> pathlib.Path:
    return pathlib.Path(os.environ.get("MOE_CUDA_TOOLCHAIN") or ROOT / "target" / "cuda-toolchain")


def tool(name: str) -> str:
    path = toolchain() / "nvidia" / "cu13" / "bin" / name
    if not path.exists():
        raise Failed(f"{path} is not there: run `scripts/build_ptx.py --install`, or name its folder in MOE_CUDA_TOOLCHAIN")
    return str(path)


def run(command: list, **options) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def install() -> None:
    python, folder = sys.executable, toolchain()
    folder.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("pip") is None:
        run([python, "-m", "venv", folder / "venv"])
        python = folder / "venv" / "bin" / "python"
    # --no-deps: the wheels do not pin each other, and newer parts write a newer PTX.
    run([python, "-m", "pip", "install", "-q", "--no-cache-dir", "--no-deps", "--only-binary=:all:", "--upgrade", "--target", folder, *WHEELS])
    print(f"{nvcc_version()} in {folder}")


def nvcc_version() -> str:
    found = re.search(r"V(\d+\.\d+\.\d+)", run([tool("nvcc"), "--version"]))
    version = found.group(1) if found else "unknown"
    if version != NVCC_VERSION:
        raise Failed(f"nvcc {NVCC_VERSION} is wanted, {tool('nvcc')} is {version}")
    return f"nvcc {version}"


def sources_of(path: pathlib.Path, kernels: pathlib.Path) -> list[pathlib.Path]:
    """The file and what it includes of ours, however deep."""
    found, todo = set(), [path]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M):
                # What only the emulator includes is not there in a device build.
                todo += [p for p in [path.parent / name, kernels / "include" / name] if p.exists() and "emulator" not in p.parts][:1]
    return sorted(found)


def source_hash(path: pathlib.Path, kernels: pathlib.Path) -> str:
    sha = hashlib.sha256()
    for source in sources_of(path, kernels):
        sha.update(f"{source.relative_to(kernels)}\0".encode() + source.read_bytes() + b"\0")
    return sha.hexdigest()


def target_of(stem: str) -> str:
    return "sm_90a" if stem.endswith("_sm90") else "sm_80"


def compile_text(path: pathlib.Path, kernels: pathlib.Path, folder: pathlib.Path) -> str:
    """PTX without comments and other things that nobody needs."""
    stem, target = path.stem, target_of(path.stem)
    raw = folder / f"{stem}.raw.ptx"
    run([tool("nvcc"), *FLAGS, f"-arch=compute_{target[3:]}", "-I", kernels / "include", path, "-o", raw])
    text = re.sub(r"//.*", "", raw.read_text())
    # The compiler names what is private to a file after a hash of the file's path.
    text = re.sub(r"(_INTERNAL_|_GLOBAL__N__)[0-9a-f]{8}", r"\g<1>00000000", text)
    # A remark about loads of which a part is not used; it would ask for PTX 8.3.
    text = re.sub(r'\.pragma "used_bytes_mask[^"]*";', "", text)
    lines = [line.rstrip() for line in text.splitlines()]
    header = f"// From kernels/{stem}.cu by {nvcc_version()}. Do not edit: scripts/build_ptx.py.\n"
    return header + "\n".join(line for line in lines if line) + "\n"


def with_version(text: str, version: str) -> str:
    return re.sub(r"^\.version .*$", f".version {version}", text, count=1, flags=re.M)


def lowest_version(text: str, target: str, folder: pathlib.Path, stem: str) -> str:
    """The text with the lowest `.version` that its instructions allow."""
    path, reason = folder / f"{stem}.version.ptx", ""
    for version in PTX_VERSIONS:
        path.write_text(with_version(text, version))
        try:
            run([tool("ptxas"), f"-arch={target}", "-O0", path, "-o", folder / f"{stem}.version.cubin"])
            return with_version(text, version)
        except Failed as failed:
            reason = str(failed)
    raise Failed(reason)


def assemble(stem: str, text: str, target: str, folder: pathlib.Path) -> tuple[list[str], list[str]]:
    """One line of MANIFEST for each kernel, and what is wrong."""
    ptx, cubin = folder / f"{stem}.{target}.ptx", folder / f"{stem}.{target}.cubin"
    ptx.write_text(text)
    report = run([tool("ptxas"), "-v", f"-arch={target}", ptx, "-o", cubin])
    lines, wrong = [], []
    for kernel in sorted(re.findall(r"\.entry\s+(\w+)", text)):
        part = re.search(rf"Function properties for {kernel}\n(.*?)(?=Compiling|Function properties|\Z)", report, re.S)
        if part is None:
            raise Failed(f"ptxas says nothing about {kernel} for {target}:\n{report}")

        def number(pattern: str) -> int:
            found = re.search(pattern, part.group(1))
            return int(found.group(1)) if found else 0

        stack, stores, loads = (number(rf"(\d+) bytes {what}") for what in ["stack frame", "spill stores", "spill loads"])
        registers, shared = number(r"Used (\d+) registers"), number(r"(\d+) bytes smem")
        lines.append(f"  {kernel} {target}: {registers} registers, {shared} shared, {stack} stack, {stores + loads} spilled")
        if stack + stores + loads != 0:
            wrong.append(lines[-1].strip())
    return lines, wrong + missing_instructions(stem, text, target, cubin)


def missing_instructions(stem: str, text: str, target: str, cubin: pathlib.Path) -> list[str]:
    if stem not in MEANT:
        return []
    sass = run([tool("cuobjdump"), "--dump-sass", cubin])
    functions = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function :|\Z)", sass, re.S))
    wrong = []
    for pattern, instructions in MEANT[stem]:
        kernels = [k for k in re.findall(r"\.entry\s+(\w+)", text) if re.fullmatch(pattern, k)]
        if not kernels:
            wrong.append(f"MEANT: no kernel of {stem} is named {pattern}")
        for kernel in kernels:
            for instruction in instructions:
                if not re.search(rf"\b{instruction}", functions.get(kernel, "")):
                    wrong.append(f"{kernel} {target}: no {instruction} in its machine code")
    return wrong


def open_rounding(stem: str, text: str) -> list[str]:
    """Float operations that ptxas is free to fuse."""
    return [f"{stem}: {line.strip()}" for line in text.splitlines() if re.search(r"\b(add|sub|mul)(\.ftz)?\.f(32|64)\b", line)]


def section_of(path: pathlib.Path, kernels: pathlib.Path, text: str, lines: list[str]) -> str:
    """What MANIFEST says about a text."""
    version = re.search(r"^\.version (\S+)$", text, re.M).group(1)
    head = [
        f"ptx/{target_of(path.stem)}/{path.stem}.ptx",
        f"  source sha256 {source_hash(path, kernels)}",
        f"  text sha256 {hashlib.sha256(text.encode()).hexdigest()}",
        f"  {nvcc_version()}, .version {version}",
    ]
    lines = sorted(lines, key=lambda line: line.split()[0])  # Stable: GPUs stay in order.
    return "\n".join(head + lines) + "\n"


MANIFEST_HEAD = """\
# What scripts/build_ptx.py made of each kernel: the hash of its source with all headers, the compiler, and for each GPU that gets the text
# what ptxas needs: registers a thread, bytes of static shared memory a block, of stack a thread, and spilled.

"""


def read_manifest() -> dict[str, str]:
    path = KERNELS / "MANIFEST"
    sections = path.read_text().split("\n\n")[1:] if path.exists() else []
    return {s.split("\n", 1)[0].strip(): s.strip("\n") + "\n" for s in sections if s.strip()}


def manifest_text(sections: dict[str, str]) -> str:
    return MANIFEST_HEAD + "\n".join(sections[key] for key in sorted(sections))


def chosen(stems: list[str], kernels: pathlib.Path) -> list[pathlib.Path]:
    paths = sorted(kernels.glob("*.cu"))
    unknown = set(stems) - {p.stem for p in paths}
    if unknown:
        raise Failed(f"no such kernels: {', '.join(sorted(unknown))}; there are: {', '.join(p.stem for p in paths)}")
    return [p for p in paths if not stems or p.stem in stems]


def build_text(path: pathlib.Path, kernels: pathlib.Path, folder: pathlib.Path) -> str:
    """A text as it is committed."""
    return lowest_version(compile_text(path, kernels, folder), target_of(path.stem), folder, path.stem)


def build_all(paths: list[pathlib.Path], kernels: pathlib.Path, folder: pathlib.Path) -> dict[str, tuple[str, str]]:
    """For each file under ptx/: its text and its section. Raises what is wrong with all of them together."""
    nvcc_version()  # One clear error instead of one for each file.
    results, wrong = {}, []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:

        def all_of(jobs: dict) -> dict:
            done = {}
            for key, job in jobs.items():
                try:
                    done[key] = job.result()
                except Failed as failed:
                    wrong.append(str(failed))
            return done

        texts = all_of({path: pool.submit(build_text, path, kernels, folder) for path in paths})
        gpus = [(path, gpu) for path in texts for gpu in TARGETS[target_of(path.stem)]]
        reports = all_of({key: pool.submit(assemble, key[0].stem, texts[key[0]], key[1], folder) for key in gpus})
    for path, text in texts.items():
        mine = [report for key, report in reports.items() if key[0] == path]
        wrong += open_rounding(path.stem, text) + [error for _, errors in mine for error in errors]
        lines = [line for more, _ in mine for line in more]
        results[f"ptx/{target_of(path.stem)}/{path.stem}.ptx"] = text, section_of(path, kernels, text, lines)
    if wrong:
        raise Failed("\n".join(wrong))
    return results


def build(stems: list[str], folder: pathlib.Path) -> None:
    paths = chosen(stems, KERNELS)
    results = build_all(paths, KERNELS, folder)
    known = {f"ptx/{target_of(p.stem)}/{p.stem}.ptx" for p in KERNELS.glob("*.cu")}
    sections = {key: section for key, section in read_manifest().items() if key in known}
    for key, (text, section) in results.items():
        path = KERNELS / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        sections[key] = section
        print(section, end="")
    (KERNELS / "MANIFEST").write_text(manifest_text(sections))


def build_text_only(stems: list[str], out: pathlib.Path, folder: pathlib.Path) -> None:
    """Compiles what has changed since its text was committed; the other texts are copied and need no compiler: `check` holds them to their sources."""
    sections = read_manifest()
    for path in chosen(stems, KERNELS):
        key = f"ptx/{target_of(path.stem)}/{path.stem}.ptx"
        text = (KERNELS / key).read_text() if (KERNELS / key).exists() else ""
        known = [source_hash(path, KERNELS), hashlib.sha256(text.encode()).hexdigest()]
        if not all(f"sha256 {sha}\n" in sections.get(key, "") for sha in known):
            text = build_text(path, KERNELS, folder)
        target = out / target_of(path.stem) / f"{path.stem}.ptx"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def check(stems: list[str], folder: pathlib.Path) -> None:
    # Built from a copy: the text must not depend on where the sources lie.
    kernels = folder / "elsewhere"
    def others(directory: str, _names: list[str]) -> set[str]:
        return {"ptx", "emulator"} if pathlib.Path(directory) == KERNELS else set()

    shutil.copytree(KERNELS, kernels, ignore=others)
    results = build_all(chosen(stems, kernels), kernels, folder)
    sections, wrong = read_manifest(), []

    def compare(what: str, committed: str, built: str) -> None:
        if committed != built:
            diff = difflib.unified_diff(committed.splitlines(), built.splitlines(), "committed", "built", lineterm="", n=1)
            wrong.append(f"kernels/{what} is not what its sources give:\n" + "\n".join(list(diff)[:20]))

    for key, (text, section) in results.items():
        path = KERNELS / key
        compare(key, path.read_text() if path.exists() else "", text)
        compare(f"MANIFEST, {key}", sections.get(key, ""), section)
    if not stems:
        there = {str(p.relative_to(KERNELS)) for p in KERNELS.glob("ptx/*/*.ptx")}
        wrong += [f"kernels/{key} has no source" for key in sorted(there | sections.keys()) if key not in results]
        compare("MANIFEST", (KERNELS / "MANIFEST").read_text(), manifest_text(sections))
    if wrong:
        raise Failed("\n".join(wrong) + "\nrun `scripts/build_ptx.py build` and commit what it wrote")
    print("".join(section for _, section in results.values()), end="")
    print(f"{len(results)} texts are what their sources give")


# Each is wrong in one way, and must be refused with these words.
WRONG = {
    "spilled": """extern "C" __global__ void moe_wrong(int* p) {
    int v[64];
    for (int i = 0; i < 64; ++i) v[i] = i;
    for (int i = 0; i < 64; ++i) v[p[i] & 63] += i;
    p[0] = v[p[64] & 63];
}""",
    r"mul\.f32": """extern "C" __global__ void moe_wrong(float* p) { float v; asm("mul.f32 %0, %1, %1;" : "=f"(v) : "f"(p[1])); p[0] = v; }""",
    r"MEANT: no kernel of combine": """extern "C" __global__ void moe_wrong(float* p) { p[0] = 1; }""",
    r"no LDG": """extern "C" __global__ void moe_combine_f32_f32(float* p) { p[0] = p[1]; }""",
    "error: ": """extern "C" __global__ void moe_wrong(float* p) { p[0] = nowhere; }""",
}


def self_test(folder: pathlib.Path) -> None:
    """Whether the checks can fail."""
    (folder / "include").mkdir()
    for words, source in WRONG.items():
        path = folder / "combine.cu"
        path.write_text(source)
        try:
            build_all([path], folder, folder)
        except Failed as failed:
            if re.search(words, str(failed)):
                print(f"refused, as it should be: {words}")
                continue
            raise Failed(f"refused for another reason than {words}: {failed}") from None
        raise Failed(f"not refused: {words}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true")
    parser.add_argument("command", choices=["build", "check", "self-test"], nargs="?")
    parser.add_argument("stems", nargs="*", metavar="STEM")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    if not (arguments.install or arguments.command):
        parser.error("nothing to do")
    try:
        if arguments.install:
            install()
        with tempfile.TemporaryDirectory() as folder:
            if arguments.command == "build" and arguments.out:
                build_text_only(arguments.stems, arguments.out, pathlib.Path(folder))
            elif arguments.command == "build":
                build(arguments.stems, pathlib.Path(folder))
            elif arguments.command == "self-test":
                self_test(pathlib.Path(folder))
            elif arguments.command == "check":
                check(arguments.stems, pathlib.Path(folder))
    except Failed as failed:
        sys.exit(f"error: {failed}")


if __name__ == "__main__":
    main()
