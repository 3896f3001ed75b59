#!/usr/bin/env python3
"""Reads the compiler's output for the register tiles and fails where it is not what was meant.

    scripts/check_tiles.py                x86-64 (AVX-512, AVX2) and aarch64 (NEON), built here; the standard library only
    scripts/check_tiles.py --self-test    feeds itself doctored listings, which must fail

For the loop that holds most of a tile's multiply-adds it counts instructions and asks that

* the multiply-add is the one meant, on whole vectors: vfmadd on zmm or ymm, vdpbf16ps on zmm, fmla, bfmlalb and bfmlalt on .4s (never bfdot or
  bfmmla, whose sums have other bits);
* no vector goes through the stack, in any tile, nor anything else in the largest ones;
* there are few instructions beside the multiply-adds, loads and broadcasts of the drawing in kernel.rs.

It prints instructions for each multiply-add beside the least possible: see `least_for`.
"""

import os
import re
import subprocess
import sys
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Tile = namedtuple("Tile", "isa format m p pace")
# `Pace` of kernel.rs: how the tile asks for what comes next.
PACES = ["counted", "stream", "stream L2", "counted L2"]
# What a tile of each kind multiplies with, and on what.
MEANT = {
    "avx512": (r"^vfn?madd\d+ps\s.*%zmm", "vfmadd on zmm"),
    "avx512 dot": (r"^vdpbf16ps\s.*%zmm", "vdpbf16ps on zmm"),
    "avx2": (r"^vfmadd\d+ps\s.*%ymm", "vfmadd on ymm"),
    "neon": (r"^fmla(\.4s\s|\s+v\d+\.4s)", "fmla on .4s"),
    "neon dot": (r"^bfmlal[bt]\s+v\d+\.4s", "bfmlalb and bfmlalt on .4s"),
}
# Multiply-adds of any shape, to find the loop.
ANY = re.compile(r"^(vfn?madd\d+|vdpbf16ps|fmla|fmadd|bfmlal|bfdot|bfmmla)")
# Frames have no pointer of their own on x86: rbp is a register like others. x29 may be one.
STACK = {"x86": re.compile(r"\(%rsp"), "arm": re.compile(r"\[(sp|x29)")}
VECTOR = {"x86": re.compile(r"%[xyz]mm"), "arm": re.compile(r"\b[qv]\d")}
# Instructions beside multiply-adds, loads and broadcasts, for each multiply-add of the largest tile.
MOST_BESIDE = 0.35


def functions(listing):
    """(name, lines) of each function of an assembly listing; lines are instructions and labels."""
    name, lines = None, []
    for raw in listing.splitlines():
        line = raw.split("\t//")[0].rstrip()
        label = re.match(r"^([\w.$]+):", line)
        if label and not label[1].startswith(".L"):
            if name:
                yield name, lines
            name, lines = label[1], []
        elif label:
            lines.append(label[1] + ":")
        elif line.startswith("\t") and line[1] not in ".#":
            lines.append(line.strip())
    if name:
        yield name, lines


def tile_of(symbol):
    """The tile that a v0-mangled name is about, or None."""
    if "4Tile" not in symbol or "4call" not in symbol and "call_bf16_dot" not in symbol:
        return None
    isa = re.search(r"(avx512|avx2|neon)", symbol)
    # A type that was named before is written as a back reference, so the format may hide: it is named by the instructions then.
    # As many panels as rows: the second number is a back reference, too.
    shape = re.search(r"Kj([0-9a-f]+)_K(?:j([0-9a-f]+)_|B\w*?_)Kh([0-3])_", symbol)
    found = re.search(r"\d+Panel(F32|F16|Bf16Dot|Bf16)", symbol)
    if not (isa and shape and found):
        return None
    m, p, pace = shape.groups()
    return Tile(isa[1], found[1], int(m, 16), int(p or m, 16), int(pace))


def hot_loop(lines):
    """The instructions of the loop with the most multiply-adds, without those of loops inside it that multiply, too (the last steps of a line)."""
    at = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    loops = []
    for i, line in enumerate(lines):
        target = re.match(r"^(?:j\w+|b(?:\.\w+)?|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+(\.L\w+)$", line)
        if target and at.get(target[1], i) < i:
            start = at[target[1]]
            fmas = sum(bool(ANY.match(b)) for b in lines[start:i])
            if fmas:
                loops.append((fmas, start, i))
    # Of several ways back to one beginning, the longest is the loop; what a loop inside holds is not its own.
    ends = {}
    for _, start, end in loops:
        ends[start] = max(ends.get(start, 0), end)
    best, most = [], 0
    for start, end in ends.items():
        nested = set()
        for s, e in ends.items():
            if start < s and e <= end:
                nested.update(range(s, e + 1))
        own = [b for n, b in enumerate(lines[start : end + 1], start) if n not in nested and not b.endswith(":")]
        fmas = sum(bool(ANY.match(b)) for b in own)
        if fmas > most:
            best, most = own, fmas
    return best


def judge(tile, body, hot):
    """(complaints, line of the table) of one tile; `hot`: large batches spend their time in it."""
    kind = f"{tile.isa} dot" if tile.format == "Bf16Dot" else tile.isa
    meant, words = MEANT[kind]
    machine = "arm" if tile.isa == "neon" else "x86"
    fmas = [b for b in body if re.match(meant, b)]
    others = [b for b in body if ANY.match(b) and not re.match(meant, b)]
    counts = Counter()
    for b in body:
        if ANY.match(b):
            continue
        if re.match(r"^(vbroadcast|vpbroadcast|ld1r|dup)", b):
            counts["broadcasts"] += 1
        elif re.match(r"^(v?mov[au]|vmovd|vmovs|ldr|ldp|ldur|ld1|vcvtph2ps|fcvtl|vpslld|vpand|shl|shll|and|ushll|bic)", b):
            counts["loads"] += 1
        elif re.match(r"^(prefetch|prfm)", b):
            counts["prefetches"] += 1
        else:
            counts["beside"] += 1
    stack = [b for b in body if STACK[machine].search(b)]
    spills = [b for b in stack if VECTOR[machine].search(b)]
    n = max(len(fmas), 1)
    complaints = []
    if not fmas or others:
        complaints.append(f"{words} was meant, found {len(fmas)} and {len(others)} others")
    if spills or hot and stack:
        complaints.append(f"{len(stack)} stack accesses in the hot loop, {len(spills)} of vectors")
    if hot and counts["beside"] > MOST_BESIDE * n + 8:
        complaints.append(f"{counts['beside']} instructions beside for {n} multiply-adds")
    least = least_for(tile)
    row = (
        f"{tile.isa:7} {tile.format:8} {tile.m:2} × {tile.p} {PACES[tile.pace]:10}"
        f" {len(fmas):4} FMA {counts['loads']:4} loads {counts['broadcasts']:4} broadcasts {counts['prefetches']:3} prefetches"
        f" {counts['beside']:4} beside {len(stack):3} stack   {len(body) / n:.2f} an FMA, least {least:.2f}"
    )
    return complaints, row


def least_for(tile):
    """The fewest instructions for each multiply-add that the drawing allows."""
    m, p = tile.m, tile.p
    if tile.isa != "neon":
        # A step holds 2·M·P multiply-adds (widened bf16: twice as many), loads of B and broadcasts.
        return 1 + (2 * p + m) / (2 * m * p)
    # Four steps at once: loads of B in pairs of vectors, widenings, and loads of A, of which one brings four words.
    fmas, b, widenings, a = {
        "F32": (8, 4, 0, 1),
        "F16": (8, 2, 8, 1),
        "Bf16": (16, 4, 16, 2),
        "Bf16Dot": (16, 4, 0, 1),
    }[tile.format]
    return 1 + ((b + widenings) * p + a * m) / (fmas * m * p)


def largest(tiles):
    """The tiles in which large batches spend their time: the most rows, one panel, no stream, of each kind and pace."""
    best = {}
    for tile in tiles:
        key = (tile.isa, tile.format, tile.pace)
        if tile.p == 1 and "stream" not in PACES[tile.pace] and (key not in best or tile.m > best[key].m):
            best[key] = tile
    return set(best.values())


def listing(arm):
    """The crate's assembly for AArch64 or for x86-64, by cargo."""
    out = ROOT / "target" / "tiles"
    target = "aarch64-unknown-linux-gnu" if arm else "x86_64-unknown-linux-gnu"
    command = ["scripts/neon-qemu.sh", "rustc"] if arm else ["cargo", "rustc", "--target", target]
    command += ["--locked", "--release", "--lib"]
    command += ["--", "--emit", "asm", "-C", "symbol-mangling-version=v0", "-C", "codegen-units=1", "-C", "debuginfo=0"]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"CARGO_TARGET_DIR": str(out)})
    folder = Path(f"{out}-aarch64" if arm else out) / target / "release" / "deps"
    return max(folder.glob("moe_kernels-*.s"), key=lambda f: f.stat().st_mtime).read_text()


def check(texts, wanted):
    """Checks listings; returns the number of complaints."""
    tiles, bad = {}, 0
    for text in texts:
        for name, lines in functions(text):
            tile = tile_of(name)
            if tile:
                tiles[tile] = hot_loop(lines)
    hot = largest(tiles)
    for tile in sorted(tiles):
        complaints, row = judge(tile, tiles[tile], tile in hot)
        print(row + ("   <- large batches" if tile in hot else ""))
        for complaint in complaints:
            bad += 1
            print(f"    WRONG: {complaint}")
    missing = wanted - {(t.isa, t.format) for t in hot}
    for kind in sorted(missing):
        bad += 1
        print(f"WRONG: no tile of {kind[0]} {kind[1]} was found")
    return bad


X86 = {("avx512", f) for f in ("F32", "F16", "Bf16", "Bf16Dot")} | {("avx2", f) for f in ("F32", "F16", "Bf16")}
NEON = {("neon", f) for f in ("F32", "F16", "Bf16", "Bf16Dot")}


def self_test():
    """A sound listing passes; one with a spill, one on narrower vectors and one without the tile do not."""
    name = "_RINv4avx5124callINtB2_4TileNtB2_8PanelF32Kj2_Kj1_Kh0_EE"
    fma = "\tvfmadd231ps\t(%rax), %zmm1, %zmm2\n"
    sound = f"{name}:\n.LBB0_1:\n" + fma * 16 + "\tvbroadcastss\t(%rdi), %zmm1\n" * 8 + "\tjne\t.LBB0_1\n\tretq\n"
    wanted = {("avx512", "F32")}
    doctored = {
        "a spill": sound.replace("\tjne", "\tvmovups\t%zmm3, 64(%rsp)\n\tjne"),
        "narrow vectors": sound.replace("zmm", "xmm"),
        "no tile": sound.replace("PanelF32", "PanelF31"),
    }
    # As many panels as rows, with a pointer on the stack.
    small = sound.replace("Kj2_Kj1_Kh0_", "Kj2_KB1Q_Kh1_").replace("\tjne", "\tmovq\t8(%rsp), %rax\n\tjne")
    assert check([sound, small], wanted) == 0, "a pointer on the stack fails"
    assert check([sound, small.replace("movq\t8(%rsp), %rax", "vmovups\t64(%rsp), %zmm3")], wanted) > 0, "a spill in a small tile passes"
    arm = "_RINv4neon13call_bf16_dotINtB2_4TileNtB2_12PanelBf16DotKj2_Kj1_Kh0_EE"
    pair = "\tbfmlalt\tv1.4s, v2.8h, v3.h[1]\n\tbfmlalb\tv1.4s, v2.8h, v3.h[0]\n"
    native = f"{arm}:\n.LBB0_1:\n" + pair * 8 + "\tldp\tq2, q4, [x10]\n\tb.ne\t.LBB0_1\n\tret\n"
    assert check([sound], wanted) == 0, "the sound listing fails"
    assert check([native], {("neon", "Bf16Dot")}) == 0, "the sound listing of NEON fails"
    for other in ("\tbfdot\tv1.4s, v2.8h, v3.8h\n", "\tfmla\tv1.4s, v2.4s, v3.4s\n", "\tldr\tq1, [sp]\n"):
        assert check([native.replace("\tldp", other + "\tldp")], {("neon", "Bf16Dot")}) > 0, f"{other.strip()} passes"
    for what, text in doctored.items():
        assert check([text], wanted) > 0, f"{what} passes"
    print("self-test passed")


def main():
    if sys.argv[1:] == ["--self-test"]:
        return self_test()
    if sys.argv[1:]:
        sys.exit(__doc__)
    # Both at once: with one codegen unit each keeps one core busy.
    with ThreadPoolExecutor() as pool:
        texts = list(pool.map(listing, [False, True]))
    bad = check(texts, X86 | NEON)
    if bad:
        sys.exit(f"{bad} complaints about the compiler's output")


if __name__ == "__main__":
    main()
