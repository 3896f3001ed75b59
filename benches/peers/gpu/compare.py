"""Our CUDA kernels and other people's on the same work, turn about on one GPU. See ../README.md.

    compare.py --ours bin/benches/cuda            measure
    compare.py --can-run                          whether it could: says why not and fails
    compare.py --dry-run [--ours …]               every peer on tiny work on the CPU, answers checked, nothing worth timing
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

TOLERANCE = 0.02  # roundings to bf16 at every step, relative to the norm
BLOCK = 2e-3  # seconds of a sample at least


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=pathlib.Path, help="our bench executable")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[""], help="rows whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=15, help="samples of everybody for each row")
    parser.add_argument("--out", type=pathlib.Path, help="folder for peers.md and peers.jsonl")
    parser.add_argument("--can-run", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args()


OPTIONS = parse()
try:
    import torch
except ImportError as error:
    sys.exit(f"torch is not installed: {error}")
if not OPTIONS.dry_run and not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU")
if OPTIONS.can_run:
    sys.exit(0)

import data  # noqa: E402
import engines  # noqa: E402
import ours  # noqa: E402
import shapes  # noqa: E402

DEVICE = "cpu" if OPTIONS.dry_run else "cuda"


def check(engine, operands, reference):
    expected, pick = reference
    found = pick(engine(0)).double()
    error = ((found - expected).norm() / expected.norm()).item()
    # Not `>`: NaN is an error, too.
    if not error <= TOLERANCE:
        raise AssertionError(f"its answer is {error:.1e} away from the definition, relatively")


class Timed:
    """Samples of one engine: replays of a graph of several calls, or of calls one by one where they cannot be captured."""

    def __init__(self, engine):
        self.engine, self.name, self.graph, self.how = engine, engine.name, None, "eager"
        batches = len(getattr(engine.o, "batches", [None]))
        for n in range(batches):
            engine(n)
        self.calls = batches
        once = self.seconds()
        self.calls = -(-max(1, min(256, int(BLOCK / max(once, 1e-7)))) // batches) * batches
        if DEVICE == "cuda":
            self.capture()

    def run(self):
        for n in range(self.calls):
            self.engine(n)

    def capture(self):
        try:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.run()
            graph.replay()
            torch.cuda.synchronize()
            self.graph, self.how = graph, "graph"
        except Exception as why:  # whatever a library raises when it waits for the device inside a capture
            torch.cuda.synchronize()
            self.how = f"eager: no graph ({type(why).__name__})"

    def seconds(self):
        if DEVICE == "cpu":
            start = time.perf_counter()
            self.run()
            return (time.perf_counter() - start) / self.calls
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.graph.replay() if self.graph else self.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / self.calls


def prepare(work, name, absent):
    """The engines for this work that are here and right."""
    operands = data.Operands(work, DEVICE)
    reference = data.expected(operands)
    made, failed = [], []
    for kind in engines.ALL:
        if type(work) not in kind.kinds:
            continue
        try:
            engine = kind(operands)
            check(engine, operands, reference)
            made.append(Timed(engine))
        except engines.Absent as why:
            absent[kind.name] = str(why)
        except Exception as why:
            failed.append(f"{kind.name}: {type(why).__name__}: {str(why).splitlines()[0] if str(why) else ''}")
            print(f"     {name}: {failed[-1]}", file=sys.stderr)
    return made, failed


def measure(mine, peers):
    """Medians, ours first; every round begins with somebody else."""
    everybody = ([mine] if mine else []) + peers
    times = [[] for _ in everybody]
    for turn in range(OPTIONS.rounds if DEVICE == "cuda" else 1):
        for i in range(len(everybody)):
            who = (turn + i) % len(everybody)
            times[who].append(everybody[who].seconds())
            if DEVICE == "cuda":
                torch.cuda.synchronize()
    return [statistics.median(t) for t in times]


class Report:
    def __init__(self, folder):
        self.folder = folder
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            for file in ("peers.md", "peers.jsonl"):
                (folder / file).write_text("")

    def append(self, file, line):
        if self.folder:
            with (self.folder / file).open("a") as out:
                out.write(line + "\n")

    def say(self, line):
        print(line, flush=True)
        self.append("peers.md", line)

    def row(self, name, arch, work, mine, peers, times, ceilings):
        ours_time = times[0] if mine else None
        rates = {}
        if work and ours_time:
            rates = {"tflops": work["flops"] / ours_time / 1e12, "tbps": work["bytes"] / ours_time / 1e12}
            if ceilings.get("cuBLAS") and work["flops"]:
                rates["of cuBLAS dense"] = work["flops"] / ours_time / ceilings["cuBLAS"]
            if ceilings.get("copy"):
                rates["of torch copy"] = work["bytes"] / ours_time / ceilings["copy"]
        for peer, seconds in zip(peers, times[1 if mine else 0 :]):
            ratio = seconds / ours_time if ours_time else float("nan")
            ours_cell = f"{ours_time * 1e6:.2f}" if ours_time else "-"
            self.say(f"| {name} | {arch} | {ours_cell} | {peer.name} | {peer.how} | {seconds * 1e6:.2f} | {ratio:.2f} |")
            line = {"name": name, "arch": arch, "ours": ours_time, "peer": peer.name, "how": peer.how, "seconds": seconds, "ratio": ratio}
            self.append("peers.jsonl", json.dumps(line))
        if rates:
            self.say(f"| {name} | {arch} | ours | " + ", ".join(f"{k} {v:.3f}" for k, v in rates.items()) + " | | | |")
            self.append("peers.jsonl", json.dumps({"name": name, "arch": arch, "seconds": ours_time, **rates}))


def row(name, server, report, absent, ceilings):
    """One row of our table against everybody who does the same. Whether nobody failed."""
    work = shapes.parse(name)
    peers, failed = prepare(shapes.tiny(work) if OPTIONS.dry_run else work, name, absent)
    arches = ["native", "sm_80"] if isinstance(work, (shapes.Dense, shapes.Product, shapes.Layer)) else ["native"]
    seen = []
    for arch in arches if server else ["-"]:
        mine, least = None, None
        if server:
            try:
                least = server.make(name, arch)
            except ours.Failed as why:
                failed.append(f"ours: {why}")
                report.say(f"| {name} | {arch} | FAILED: {why} | | | | |")
                continue
            if least["kernels"] and least["kernels"] in seen:
                continue  # the same kernels for both
            seen.append(least["kernels"])
            mine = server
        times = measure(mine, peers)
        if name == "ceiling/dense" and DEVICE == "cuda":
            flops = 2 * work.rows * work.n * work.k
            ceilings.update({p.name: flops / t for p, t in zip(peers, times[1 if mine else 0 :]) if p.name == "cuBLAS"})
        if name == "ceiling/copy" and DEVICE == "cuda" and peers:
            ceilings["copy"] = 2 * work.bytes / times[-1]
        report.row(name, arch, least, mine, peers, times, ceilings)
    return not failed


NAMES_WITHOUT_OURS = [
    "ceiling/copy", "ceiling/dense", "grouped_gemm/4x8192/6144x7168", "moe/32768/H2048-I768-E128-K8", "routing/16384/E128-K8",
    "permute/8192/E256-K8", "rows/32768/H4096-K8", "combine/32768/H4096-K8",
]  # fmt: skip


def main():
    torch.set_grad_enabled(False)
    server = ours.Ours(OPTIONS.ours, smoke=OPTIONS.dry_run) if OPTIONS.ours else None
    report, absent, ceilings, fine = Report(OPTIONS.out), {}, {}, True
    where = "the CPU, tiny sizes: times mean nothing" if OPTIONS.dry_run else torch.cuda.get_device_name()
    report.say(f"# Peers on {where}, torch {torch.__version__}\n\nMedians of {OPTIONS.rounds} samples, turn about.\n")
    report.say("| what | our kernels | ours, us | peer | how | peer, us | peer / ours |\n|---|---|---|---|---|---|---|")
    try:
        names = server.names() if server else NAMES_WITHOUT_OURS
        wanted = [n for n in names if n.startswith("ceiling/") or any(o in n for o in OPTIONS.only)]
        for name in wanted:
            fine &= row(name, server, report, absent, ceilings)
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
    finally:
        if server:
            server.close()
    for peer, why in sorted(absent.items()):
        report.say(f"\nNOT RUN: {peer}: {why}")
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
