"""Layers by PyTorch and ZenTorch beside ours, turn about on the same data. See README.md."""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time

TURNS = 4  # batches that take turns
ROUNDS = (3, 30)  # calls of each engine, at least and at most
SWEEP_BYTES = 256 << 20  # more than the caches hold


def parse():
    parser = argparse.ArgumentParser(description=__doc__)
    words = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--shapes", type=words, default=["qwen3-30b-a3b", "olmoe", "mixtral", "deepseek-v3"])
    parser.add_argument("--dtypes", type=words, default=["bf16", "f32"], help="f32, bf16, f16")
    parser.add_argument("--tokens", type=words, default=["1", "8", "64", "512"])
    parser.add_argument("--loads", type=words, default=["uniform"], help="uniform, zipf")
    parser.add_argument("--engines", type=words, default=["eager", "grouped_mm", "zentorch"], help="also batched_mm, which copies weights for each token")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for each line of the table")
    parser.add_argument("--driver", type=pathlib.Path, help="the binary built in ../rivals")
    parser.add_argument("--record", type=pathlib.Path, help="write the table to this file, too")
    return parser.parse_args()


OPTIONS = parse()
# OpenMP reads it when torch is loaded.
os.environ["OMP_NUM_THREADS"] = str(OPTIONS.threads)

import torch  # noqa: E402

import engines  # noqa: E402
import ours  # noqa: E402


class Report:
    """Lines for the terminal and the file."""

    def __init__(self, path):
        self.path, self.lines = path, []

    def say(self, line):
        print(line, flush=True)
        self.lines.append(line)
        if self.path:
            self.path.write_text("\n".join(self.lines) + "\n")


def tolerance(dtype):
    """As in ../rivals/src/compare.rs: a dozen independent roundings to the format, twice; and f32's own long sums."""
    return 2 * 12**0.5 * torch.finfo(dtype).eps / 2 + 2e-5


def agree(engine, batch, dtype):
    x, logits, expected = batch
    found = engine(x, logits).float()
    error = ((found - expected).norm() / expected.norm()).item()
    # Not `>`: NaN is an error, too.
    if not error <= tolerance(dtype):
        sys.exit(f"error: {engine.name}: its answer is {error:.1e} away from ours, relatively; {tolerance(dtype):.1e} is rounding")


def measure(layer, peers, load, tokens, sweep):
    """Medians in seconds, ours first. Every round begins with another engine."""
    numbers = range(TURNS if tokens <= 512 else 2)
    batches = [layer.batch(load, n, tokens) for n in numbers]
    layer.ceilings()  # forget those of the line before
    for peer in peers:
        agree(peer, batches[0], layer.dtype)
    times = [[] for _ in range(len(peers) + 1)]
    end = time.perf_counter() + OPTIONS.budget
    for n in range(ROUNDS[1]):
        x, logits, _ = batches[n % len(batches)]
        for turn in range(len(times)):
            who = (n + turn) % len(times)
            if who == 0:
                times[0].append(layer.seconds(load, n % len(batches), tokens))
                continue
            sweep.sum()
            start = time.perf_counter()
            peers[who - 1](x, logits)
            times[who].append(time.perf_counter() - start)
        if time.perf_counter() > end and n + 1 >= ROUNDS[0]:
            break
    return [statistics.median(t) for t in times], batches[(n) % len(batches)][1]


def line(report, name, dtype, load, tokens, layer, times, logits):
    """A row of the table. The roof: bytes of the experts that the batch touches, or FLOPs."""
    touched = torch.topk(logits, layer.top_k, dim=-1).indices.unique().numel()
    elements = 3 * layer.hidden * layer.intermediate
    flops = 2 * tokens * layer.top_k * elements
    size = layer.dtype.itemsize * touched * elements
    peak, bandwidth = layer.ceilings()
    by_bytes, by_flops = size / bandwidth, flops / peak
    roof = max(by_bytes, by_flops)
    cells = [name, dtype, load, tokens, f"{times[0] * 1e3:.2f}", f"{roof * 1e3:.2f}", "bytes" if by_bytes > by_flops else "FLOPs"]
    cells += [f"{100 * roof / times[0]:.1f}", f"{flops / times[0] / 1e9:.1f}", f"{peak / 1e9:.0f}"]
    cells += [f"{size / times[0] / 1e9:.1f}", f"{bandwidth / 1e9:.1f}"]
    for theirs in times[1:]:
        cells += [f"{theirs * 1e3:.2f}", f"{theirs / times[0]:.2f}"]
    report.say("| " + " | ".join(map(str, cells)) + " |")


def prepare(layer, shape, dtype):
    """Engines that have run once with every expert, so that those which pack lazily have packed."""
    gate_up, down = layer.weights()
    sizes = (layer.hidden, layer.intermediate, layer.experts, layer.top_k)
    made = []
    for name in OPTIONS.engines:
        try:
            engine = engines.make(name, shape, sizes, gate_up, down)
            x, logits, _ = layer.batch("uniform", 0, 16 * layer.experts // layer.top_k)
            engine(x, logits)
            made.append(engine)
        except (ImportError, AttributeError, RuntimeError, NotImplementedError) as why:
            print(f"{shape} {dtype}: {name} does not run here: {why}", file=sys.stderr)
    return made


def columns(peers):
    titles = ["layer", "weights", "load", "T", "ours, ms", "roof, ms", "bound by", "% of roof", "GFLOP/s", "of", "GB/s", "of"]
    for peer in peers:
        titles += [f"{peer.name}, ms", "ratio"]
    return "| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|"


def layer_lines(report, shape, dtype, sweep, folder):
    most = max(map(int, OPTIONS.tokens))
    driver = OPTIONS.driver or ours.DRIVER
    # Enough for the calls of `prepare`.
    layer = ours.Ours(driver, shape, dtype, OPTIONS.threads, max(most, 512), folder)
    try:
        peers = prepare(layer, shape, dtype)
        report.say("\n" + columns(peers))
        for load in OPTIONS.loads:
            for tokens in map(int, OPTIONS.tokens):
                times, logits = measure(layer, peers, load, tokens, sweep)
                line(report, shape, dtype, load, tokens, layer, times, logits)
    finally:
        layer.close()


def main():
    torch.set_num_threads(OPTIONS.threads)
    torch.set_grad_enabled(False)
    report = Report(OPTIONS.record)
    report.say(f"# Peers, {OPTIONS.threads} thread(s), torch {torch.__version__}\n\nShares are of the ceilings seen between the calls of their line.")
    sweep = torch.ones(SWEEP_BYTES // 4)
    with tempfile.TemporaryDirectory() as folder:
        for shape in OPTIONS.shapes:
            for dtype in OPTIONS.dtypes:
                layer_lines(report, shape, dtype, sweep, folder)


if __name__ == "__main__":
    main()
