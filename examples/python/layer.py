#!/usr/bin/env python3
"""A layer on NumPy arrays through ctypes: the library reads and writes the arrays where they are.

    scripts/install-capi.sh /tmp/moe
    python3 examples/python/layer.py /tmp/moe/lib/libmoe_kernels.so

Computes a Qwen3-shaped layer of strided, transposed and half-precision arrays, compares it with NumPy in double precision, and shows that what is wrong is refused.
Exits with 0 when every check holds. Nothing but NumPy is needed.
"""
import ctypes as c
import os
import sys

import numpy as np

P, Z, S, U, F = c.c_void_p, c.c_size_t, c.c_ssize_t, c.c_uint32, c.c_float
MOE_OK, MOE_ERROR_SHAPE, MOE_ERROR_VALUE, MOE_ERROR_BUFFER_TOO_SMALL, MOE_ERROR_OVERLAP = 0, 1, 2, 3, 10
DTYPES = {np.dtype(np.float32): 1, np.dtype(np.float16): 2}
LAYOUT_SEPARATE = 0


class Matrix(c.Structure):
    _fields_ = [("data", P), ("bytes", Z), ("rows", Z), ("cols", Z), ("row_stride", S), ("col_stride", S), ("dtype", U), ("reserved", U)]


class MatrixMut(c.Structure):
    _fields_ = [("data", P), ("bytes", Z), ("rows", Z), ("cols", Z), ("row_stride", S), ("dtype", U), ("reserved", U)]


class Sized(c.Structure):
    """A struct whose first field is its size; the others are zero unless named."""

    def __init__(self, **fields):
        super().__init__(struct_size=c.sizeof(self), **fields)


class CpuOptions(Sized):
    _fields_ = [("struct_size", Z), ("threads", Z), ("isa", c.c_char_p)]


class Activation(Sized):
    _fields_ = [("struct_size", Z), ("function", U), ("gated", U), ("clamp", U), ("limit", F), ("alpha", F)]


class ExpertWeights(Sized):
    _fields_ = [("struct_size", Z)] + [(n, c.POINTER(Matrix)) for n in ("gate", "up", "gate_up", "down")] + [
        ("gate_bias", P), ("gate_bias_len", Z), ("up_bias", P), ("up_bias_len", Z), ("down_bias", P), ("down_bias_len", Z),
        ("layout", U), ("reserved", U)]


class Forward(Sized):
    _fields_ = [("struct_size", Z), ("x", c.POINTER(Matrix)), ("y", c.POINTER(MatrixMut)), ("logits", c.POINTER(Matrix)), ("given_ids", P),
                ("given_ids_len", Z), ("residual", c.POINTER(Matrix)), ("position", c.c_uint64), ("workspace", P), ("workspace_bytes", Z),
                ("use_routing", U), ("reserved", U)]


class RoutingBuffers(Sized):
    _fields_ = [("struct_size", Z), ("ids", P), ("ids_len", Z), ("weights", P), ("weights_len", Z), ("shared_weights", P),
                ("shared_weights_len", Z)]


class RouterConfig(Sized):
    # Only what comes first is used here; the rest is filled by the library. Its size is the header's: 8 + 10 * 8 + 18 * 4 bytes.
    _fields_ = [("struct_size", Z), ("num_experts", Z), ("top_k", Z), ("rest", c.c_uint8 * 136)]


def extent(array):
    """Bytes from the first to one past the last element."""
    return sum((n - 1) * s for n, s in zip(array.shape, array.strides)) + array.itemsize if array.size else 0


def view(array):
    """A matrix that is read: any strides that are not negative (the library says so if one is)."""
    rows, cols = array.shape
    row, col = (s // array.itemsize for s in array.strides)
    return Matrix(array.ctypes.data, extent(array), rows, cols, row, col, DTYPES[array.dtype], 0)


def output(array):
    """A matrix that is written: rows of neighbours."""
    assert array.strides[1] == array.itemsize
    return MatrixMut(array.ctypes.data, extent(array), *array.shape, array.strides[0] // array.itemsize, DTYPES[array.dtype], 0)


class Library:
    """Checks statuses; everything else is the library's own names."""

    def __init__(self, path):
        self.lib = c.CDLL(path)
        for name in ("moe_last_error", "moe_status_name", "moe_version", "moe_cpu_isa"):
            getattr(self.lib, name).restype = c.c_char_p
        self.lib.moe_abi_version.restype = U

    def status(self, name, *args):
        function = getattr(self.lib, name)
        function.restype = c.c_int32
        return function(*args)

    def __call__(self, name, *args):
        if self.status(name, *args) != MOE_OK:
            raise RuntimeError(f"{name}: {self.lib.moe_last_error().decode()}")

    def make(self, name, *args):
        handle = P()
        self(name, *args, c.byref(handle))
        return handle


def numpy_layer(x, gate, gates, ups, downs, k):
    """The layer in double precision."""
    x, gate = x.astype(np.float64), gate.astype(np.float64)
    logits = x @ gate.T
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    ids = np.argsort(-p, axis=1, kind="stable")[:, :k]
    weights = np.take_along_axis(p, ids, axis=1)
    weights /= weights.sum(axis=1, keepdims=True)
    y = np.zeros_like(x)
    for t in range(len(x)):
        for e, w in zip(ids[t], weights[t]):
            g, u = gates[e].astype(np.float64) @ x[t], ups[e].astype(np.float64) @ x[t]
            y[t] += w * (downs[e].astype(np.float64) @ (g / (1 + np.exp(-g)) * u))
    return y, ids, weights


def main(path):
    moe = Library(path)
    assert moe.lib.moe_abi_version() == 1, "another version of the interface"
    tokens, hidden, intermediate, experts, k = 9, 64, 48, 8, 2
    random = np.random.default_rng(1)

    def normal(*shape):
        return random.standard_normal(shape, dtype=np.float32)

    # Arrays as they come: x is every other row of a larger one, experts are stacked in half precision, down projections lie transposed.
    x = normal(2 * tokens, hidden)[::2]
    gate = normal(experts, hidden) / 8
    gates, ups = ((normal(experts, intermediate, hidden) / 8).astype(np.float16) for _ in range(2))
    downs = (normal(experts, intermediate, hidden) / 8).astype(np.float16).transpose(0, 2, 1)
    wide = np.full((tokens, hidden + 3), 7.0, dtype=np.float32)
    y = wide[:, 2:-1]

    cpu = moe.make("moe_cpu_create", c.byref(CpuOptions(threads=2)))
    config = RouterConfig()
    moe("moe_router_config_family", c.byref(config), b"qwen3_moe", Z(experts), Z(k))
    router = moe.make("moe_router_create", c.byref(config))
    packed = moe.make("moe_experts_create", cpu, Z(hidden), Z(intermediate), c.byref(Activation(function=1, gated=1)), U(2))
    for e in range(experts):
        matrices = [c.pointer(view(m[e])) for m in (gates, ups, downs)]
        weights = ExpertWeights(gate=matrices[0], up=matrices[1], down=matrices[2], layout=LAYOUT_SEPARATE)
        moe("moe_experts_push", cpu, packed, c.byref(weights))
    layer = moe.make("moe_layer_create", router, c.byref(packed))
    assert not packed, "the layer has taken the experts over"
    moe("moe_layer_set_gate", cpu, layer, c.byref(view(gate)), None, Z(0), None, None)
    routing = moe.make("moe_routing_create")
    size = Z()
    moe("moe_layer_workspace_size", cpu, layer, Z(tokens), c.byref(size))
    workspace = np.empty(size.value, dtype=np.uint8)

    def forward(x, y, workspace=workspace):
        call = Forward(x=c.pointer(view(x)), y=c.pointer(output(y)), workspace=workspace.ctypes.data, workspace_bytes=workspace.nbytes)
        return moe.status("moe_layer_forward", cpu, layer, routing, c.byref(call))

    assert forward(x, y) == MOE_OK, moe.lib.moe_last_error()
    expected, expected_ids, expected_weights = numpy_layer(x, gate, gates, ups, downs, k)
    worst = np.abs(y - expected).max()
    print(f"moe-kernels {moe.lib.moe_version().decode()} on {moe.lib.moe_cpu_isa(cpu).decode()}: largest difference from NumPy {worst:.1e}")
    assert worst < 1e-4 * np.abs(expected).max()
    assert (wide[:, :2] == 7).all() and (wide[:, -1] == 7).all(), "nothing beside y was written"

    ids, weights = np.empty((tokens, k), dtype=np.int32), np.empty((tokens, k), dtype=np.float32)
    moe("moe_routing_read", routing, c.byref(RoutingBuffers(ids=ids.ctypes.data, ids_len=ids.size, weights=weights.ctypes.data, weights_len=weights.size)))
    assert (ids == expected_ids).all() and np.abs(weights - expected_weights).max() < 1e-5

    before = wide.copy()
    for what, status, arguments in [
        ("a reversed array", MOE_ERROR_VALUE, (x[::-1], y)),
        ("too few columns", MOE_ERROR_SHAPE, (x[:, 1:], y)),
        ("an output over its input", MOE_ERROR_OVERLAP, (y, y)),
        ("a short workspace", MOE_ERROR_BUFFER_TOO_SMALL, (x, y, workspace[:-1])),
    ]:
        found = forward(*arguments)
        print(f"{what}: {moe.lib.moe_last_error().decode()}")
        assert found == status, (what, found)
    assert (wide == before).all(), "a refused call writes nothing"

    # A handle of one thread starts none, and gives the same bits.
    threads = lambda: len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
    before, count = y.copy(), threads()
    cpu_of_one = moe.make("moe_cpu_create", None)
    moe("moe_routing_reserve", cpu_of_one, routing, router, Z(tokens))
    call = Forward(x=c.pointer(view(x)), y=c.pointer(output(y)), workspace=workspace.ctypes.data, workspace_bytes=workspace.nbytes)
    moe("moe_layer_forward", cpu_of_one, layer, routing, c.byref(call))
    assert (y == before).all() and threads() == count, (threads(), count)
    moe("moe_cpu_destroy", cpu_of_one)

    for name, handle in [("routing", routing), ("layer", layer), ("router", router), ("cpu", cpu)]:
        moe(f"moe_{name}_destroy", handle)
    print("all checks hold")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
