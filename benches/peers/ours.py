"""Our layer, in a process of its own that answers commands (see ../rivals/src/serve.rs)."""

import pathlib
import subprocess

import numpy
import torch

DRIVER = pathlib.Path(__file__).parent / "../rivals/target/release/moe-kernels-rivals"


class Ours:
    """A driver that holds one layer: a shape, a format, a number of threads."""

    name = "ours"

    def __init__(self, driver, shape, dtype, threads, most_tokens, folder):
        self.folder = pathlib.Path(folder)
        arguments = ["--serve", "--shapes", shape, "--dtypes", dtype, "--threads", threads, "--tokens", most_tokens]
        self.process = subprocess.Popen(
            [str(driver), *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        words = self._answer().split()
        self.hidden, self.intermediate, self.experts, self.top_k = map(int, words[:4])
        self.isa = words[4]
        self.dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[dtype]

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the driver ended with status {self.process.wait()}")
        return line.strip()

    def _ask(self, *words):
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def ceilings(self):
        """FLOP/s of this format and bytes/s read: the best seen since the last question."""
        return [float(word) for word in self._ask("ceilings").split()]

    def seconds(self, load, number, tokens):
        """One call on a batch, with swept caches."""
        return float(self._ask("time", load, number, tokens))

    def weights(self):
        """The layer's weights: gate_up [E, 2I, H] and down [E, H, I]."""
        path = self.folder / "weights"
        self._ask("weights", path)
        e, h, i = self.experts, self.hidden, self.intermediate
        return self._take(path, "gate_up", self.dtype, (e, 2 * i, h)), self._take(path, "down", self.dtype, (e, h, i))

    def batch(self, load, number, tokens):
        """A batch: x [T, H] in the layer's format, logits [T, E] and our y [T, H] in f32, checked against the f64 reference."""
        path = self.folder / "batch"
        self._ask("batch", load, number, tokens, path)
        x = self._take(path, "x", torch.float32, (tokens, self.hidden))
        logits = self._take(path, "logits", torch.float32, (tokens, self.experts))
        return x.to(self.dtype), logits, self._take(path, "y", torch.float32, (tokens, self.hidden))

    def _take(self, path, suffix, dtype, shape):
        """Reads raw numbers and removes the file."""
        file = pathlib.Path(f"{path}.{suffix}")
        raw = numpy.fromfile(file, dtype=numpy.uint8)
        file.unlink()
        return torch.from_numpy(raw).view(dtype).view(shape)

    def close(self):
        self.process.stdin.close()
        self.process.wait()
