"""Random operands and plain definitions, for every peer the same."""

import torch

import shapes


def normals(generator, *size, scale=1.0, dtype=torch.bfloat16):
    """Made on the device in f32, piece by piece: an f32 copy of all would not fit beside the weights."""
    out = torch.empty(*size, dtype=dtype, device=generator.device)
    flat = out.view(-1)
    for piece in flat.split(1 << 26):
        piece.copy_(torch.randn(piece.numel(), generator=generator, device=generator.device) * scale)
    return out


class Operands:
    """The operands of one kind of work; what a kind does not need is absent."""

    def __init__(self, work, device, seed=0):
        self.work, self.device = work, device
        g = torch.Generator(device=device).manual_seed(seed)
        make = getattr(self, "_" + type(work).__name__.lower())
        make(g)

    def _copy(self, g):
        self.x = normals(g, self.work.bytes // 2)
        self.out = torch.empty_like(self.x)

    def _dense(self, g):
        w = self.work
        self.x, self.w = normals(g, w.rows, w.k), normals(g, w.n, w.k, scale=1 / 32)

    def _product(self, g):
        w = self.work
        self.x, self.w = normals(g, w.experts * w.rows, w.k), normals(g, w.experts, w.n, w.k, scale=1 / 32)
        self.ends = torch.arange(1, w.experts + 1, device=self.device, dtype=torch.int32) * w.rows

    def _layer(self, g):
        w = self.work
        # As many batches of few tokens as ours takes turns with, since few tokens touch few experts.
        self.batches = [
            (normals(g, w.tokens, w.hidden), normals(g, w.tokens, w.experts, dtype=torch.float32)) for _ in range(2 if w.tokens > 512 else 16)
        ]
        self.gate_up = normals(g, w.experts, 2 * w.intermediate, w.hidden, scale=1 / 32)
        self.down = normals(g, w.experts, w.hidden, w.intermediate, scale=1 / 32)

    def _route(self, g):
        w = self.work
        self.batches = [normals(g, w.tokens, w.experts, dtype=torch.float32) for _ in range(4)]

    def _sort(self, g):
        w = self.work
        rows = torch.rand(w.tokens, w.experts, generator=g, device=self.device)
        self.ids = rows.topk(w.top_k, dim=-1).indices.to(torch.int32)

    def _rows(self, g):
        self.x, self.token_of_row, _ = self._permuted(g)

    def _combine(self, g):
        w = self.work
        _, _, self.row_of_pair = self._permuted(g)
        self.ys = normals(g, w.tokens * w.top_k, w.hidden)
        self.weights = normals(g, w.tokens, w.top_k, dtype=torch.float32)

    def _permuted(self, g):
        w = self.work
        ids = torch.rand(w.tokens, 16 * w.top_k, generator=g, device=self.device).topk(w.top_k, dim=-1).indices
        order = ids.view(-1).sort(stable=True).indices
        return normals(g, w.tokens, w.hidden), order // w.top_k, order.argsort()


def route(logits, top_k):
    """Weights and ids of softmax, top-k, renormalised."""
    weights, ids = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), ids


def layer_by_definition(operands, tokens):
    """A few tokens of the first batch, in f64 with h rounded as everybody rounds it."""
    x, logits = operands.batches[0]
    weights, ids = route(logits[tokens], operands.work.top_k)
    out = []
    for row, token in enumerate(tokens):
        y = torch.zeros(operands.work.hidden, dtype=torch.float64, device=x.device)
        for weight, expert in zip(weights[row], ids[row]):
            gate, up = (operands.gate_up[expert].double() @ x[token].double()).chunk(2)
            h = (torch.nn.functional.silu(gate) * up).to(x.dtype).double()
            y += weight.double() * (operands.down[expert].double() @ h)
        out.append(y)
    return torch.stack(out)


def expected(operands):
    """A sample of the answer: what to compare, and how to pick the same from a peer's answer."""
    work = operands.work
    if isinstance(work, shapes.Layer):
        tokens = sorted({0, work.tokens // 2, work.tokens - 1})
        return layer_by_definition(operands, tokens), lambda y: y[tokens]
    if isinstance(work, shapes.Dense):
        rows = list(range(0, work.rows, max(1, work.rows // 16)))
        return operands.x[rows].double() @ operands.w.double().T, lambda y: y[rows]
    if isinstance(work, shapes.Product):
        rows = list(range(0, work.experts * work.rows, max(1, work.rows // 4)))
        sums = [operands.w[row // work.rows].double() @ operands.x[row].double() for row in rows]
        return torch.stack(sums), lambda y: y[rows]
    if isinstance(work, shapes.Route):
        return route(operands.batches[0], work.top_k)[0].double(), lambda answer: answer[0]
    if isinstance(work, shapes.Sort):
        return operands.ids.view(-1).sort(stable=True).indices.double(), lambda answer: answer[0]
    if isinstance(work, shapes.Rows):
        return operands.x[operands.token_of_row[:64]].double(), lambda y: y[:64]
    if isinstance(work, shapes.Combine):
        rows = operands.ys[operands.row_of_pair.view(work.tokens, work.top_k)[:64]].double()
        return (rows * operands.weights[:64, :, None].double()).sum(1), lambda y: y[:64]
    return operands.x[:64].double(), lambda y: y[:64]
