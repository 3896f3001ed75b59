"""Our kernels, in a process of their own that answers line by line (see ../../cuda/serve.rs)."""

import json
import subprocess


class Failed(Exception):
    """What our process answered instead of numbers."""


class Ours:
    def __init__(self, executable, smoke=False):
        command = [str(executable), "--serve"] + ["--smoke"] * smoke
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *words):
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"our process ended with status {self.process.wait()}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise Failed(answer["error"])
        return answer

    def names(self):
        return self.ask("list").split()

    def make(self, name, arch="native"):
        """Makes and checks the operands of a row; its FLOPs, bytes and kernels."""
        return self.ask("make", name, arch)

    def seconds(self):
        """One sample of graph replay: seconds of a call."""
        return self.ask("run", 1)[0]

    def close(self):
        self.process.stdin.close()
        self.process.wait()
