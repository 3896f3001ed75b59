"""The peers. An engine is made from operands and called with the number of the batch; it raises `Absent` where its package or operator is missing.

The router's product is left out for everybody, as in ours; softmax, top-k, sort, experts and weighted sum are part of a layer's call.
"""

import importlib

import torch

import data
import shapes


class Absent(Exception):
    """Why an engine does not run here."""


def package(name):
    try:
        return importlib.import_module(name)
    except Exception as why:  # a package that is there and does not load is absent, too
        raise Absent(f"{name}: {type(why).__name__}: {str(why).splitlines()[0] if str(why) else ''}") from why


class Engine:
    name, kinds = "", ()

    def __init__(self, operands):
        self.o, self.work = operands, operands.work
        self.prepare()

    def prepare(self):
        """Raises `Absent`; makes what is not part of a call."""


class Copy(Engine):
    name, kinds = "torch copy_", (shapes.Copy,)

    def __call__(self, _):
        return self.o.out.copy_(self.o.x)


class CuBlas(Engine):
    """Dense: the ceiling. A grouped product with as many rows for each expert: a batched product, which only equal counts allow."""

    name, kinds = "cuBLAS", (shapes.Dense, shapes.Product)

    def __call__(self, _):
        if isinstance(self.work, shapes.Dense):
            return self.o.x @ self.o.w.T
        x = self.o.x.view(self.work.experts, self.work.rows, self.work.k)
        return torch.bmm(x, self.o.w.transpose(1, 2)).view(-1, self.work.n)


def loop_mm(x, w, ends):
    """The definition, whose loop the host has to know the counts for: it stands in on the CPU, so that a dry run sees what is around it."""
    starts = [0, *ends.tolist()]
    return torch.cat([x[first:end] @ w[e].T for e, (first, end) in enumerate(zip(starts, starts[1:]))])


def torch_grouped_mm(operands):
    """torch's operator under whichever name this version has."""
    if operands.device == "cpu":
        return loop_mm
    found = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if found is None:
        raise Absent(f"torch {torch.__version__} has no grouped_mm")
    return lambda x, w, ends: found(x, w.transpose(-2, -1), offs=ends)


class TorchGrouped(Engine):
    name, kinds = "torch grouped_mm", (shapes.Product,)

    def prepare(self):
        self.mm = torch_grouped_mm(self.o)

    def __call__(self, _):
        return self.mm(self.o.x, self.o.w, self.o.ends)


class TritonGrouped(Engine):
    name, kinds = "Triton", (shapes.Product,)

    def prepare(self):
        package("triton")
        self.mm = package("triton_gemm").grouped
        zero = torch.zeros(1, dtype=torch.int32, device=self.o.device)
        self.offsets = torch.cat([zero, self.o.ends])

    def __call__(self, _):
        return self.mm(self.o.x, self.o.w, self.offsets)


class DeepGemm(Engine):
    name, kinds = "DeepGEMM", (shapes.Product,)

    def prepare(self):
        self.lib = package("deep_gemm")
        if not hasattr(self.lib, "m_grouped_bf16_gemm_nt_contiguous"):
            raise Absent("this deep_gemm has no m_grouped_bf16_gemm_nt_contiguous")
        experts = torch.arange(self.work.experts, device=self.o.device, dtype=torch.int32)
        self.of_row = experts.repeat_interleave(self.work.rows)
        self.out = torch.empty(len(self.of_row), self.work.n, dtype=self.o.x.dtype, device=self.o.device)

    def __call__(self, _):
        self.lib.m_grouped_bf16_gemm_nt_contiguous(self.o.x, self.o.w, self.out, self.of_row)
        return self.out


class SortedLayer(Engine):
    """A layer of torch's own operators around a grouped product: everything stays on the device."""

    kinds = (shapes.Layer,)

    def products(self, x, ids_sorted, token_of_row):
        raise NotImplementedError

    def ends(self, ids_sorted):
        experts = torch.arange(self.work.experts, device=ids_sorted.device, dtype=ids_sorted.dtype)
        return torch.searchsorted(ids_sorted, experts, right=True).to(torch.int32)

    @staticmethod
    def swiglu(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def __call__(self, n):
        x, logits = self.o.batches[n % len(self.o.batches)]
        weights, ids = data.route(logits, self.work.top_k)
        ids_sorted, pair_of_row = ids.view(-1).sort(stable=True)
        ys = self.products(x, ids_sorted, pair_of_row // self.work.top_k)
        back = torch.empty_like(ys).index_copy_(0, pair_of_row, ys)
        return (back.view(*ids.shape, -1) * weights.unsqueeze(-1).to(ys.dtype)).sum(1)


class TorchLayer(SortedLayer):
    name = "torch grouped_mm"

    def prepare(self):
        self.mm = torch_grouped_mm(self.o)

    def products(self, x, ids_sorted, token_of_row):
        ends = self.ends(ids_sorted)
        return self.mm(self.swiglu(self.mm(x[token_of_row], self.o.gate_up, ends)), self.o.down, ends)


class TritonLayer(SortedLayer):
    name = "Triton"

    def prepare(self):
        package("triton")
        self.mm = package("triton_gemm").grouped
        self.zero = torch.zeros(1, dtype=torch.int32, device=self.o.device)

    def products(self, x, ids_sorted, token_of_row):
        offsets = torch.cat([self.zero, self.ends(ids_sorted)])
        h = self.swiglu(self.mm(x, self.o.gate_up, offsets, token_of_row, len(token_of_row)))
        return self.mm(h, self.o.down, offsets)


class Transformers(Engine):
    """Qwen3-MoE's experts in Transformers' own grouped_mm way, behind the same softmax and top-k."""

    name, kinds = "Transformers grouped_mm", (shapes.Layer,)

    def prepare(self):
        modeling = package("transformers.models.qwen3_moe.modeling_qwen3_moe")
        config = package("transformers.models.qwen3_moe.configuration_qwen3_moe").Qwen3MoeConfig(
            hidden_size=self.work.hidden, num_experts=self.work.experts, moe_intermediate_size=self.work.intermediate,
            num_experts_per_tok=self.work.top_k, hidden_act="silu",
        )  # fmt: skip
        config._experts_implementation = "grouped_mm"
        if not hasattr(modeling, "Qwen3MoeExperts"):
            raise Absent("this transformers has no Qwen3MoeExperts (5.0 or later has)")
        with torch.device("meta"):
            self.experts = modeling.Qwen3MoeExperts(config)
        self.experts.gate_up_proj = torch.nn.Parameter(self.o.gate_up, requires_grad=False)
        self.experts.down_proj = torch.nn.Parameter(self.o.down, requires_grad=False)
        self.experts.eval()

    def __call__(self, n):
        x, logits = self.o.batches[n % len(self.o.batches)]
        weights, ids = data.route(logits, self.work.top_k)
        return self.experts(x, ids, weights.to(x.dtype))


class VLlm(Engine):
    name, kinds = "vLLM fused_experts", (shapes.Layer,)

    def prepare(self):
        self.fused = getattr(package("vllm.model_executor.layers.fused_moe"), "fused_experts", None)
        if self.fused is None:
            raise Absent("this vllm has no fused_experts")

    def __call__(self, n):
        x, logits = self.o.batches[n % len(self.o.batches)]
        weights, ids = data.route(logits, self.work.top_k)
        return self.fused(x, self.o.gate_up, self.o.down, weights, ids.to(torch.int32))


class TorchRoute(Engine):
    name, kinds = "torch softmax + topk", (shapes.Route,)

    def __call__(self, n):
        return data.route(self.o.batches[n % len(self.o.batches)], self.work.top_k)


class TorchSort(Engine):
    """Both permutations and the offsets."""

    name, kinds = "torch sort", (shapes.Sort,)

    def __call__(self, _):
        ids, pair_of_row = self.o.ids.view(-1).sort(stable=True)
        row_of_pair = torch.empty_like(pair_of_row)
        row_of_pair.scatter_(0, pair_of_row, torch.arange(len(ids), device=ids.device))
        experts = torch.arange(self.work.experts + 1, device=ids.device, dtype=ids.dtype)
        return pair_of_row, row_of_pair, torch.searchsorted(ids, experts)


class TorchRows(Engine):
    name, kinds = "torch index_select", (shapes.Rows,)

    def __call__(self, _):
        return self.o.x.index_select(0, self.o.token_of_row)


class TorchCombine(Engine):
    name, kinds = "torch gather + sum", (shapes.Combine,)

    def __call__(self, _):
        rows = self.o.ys[self.o.row_of_pair].view(self.work.tokens, self.work.top_k, self.work.hidden)
        return torch.einsum("tkh,tk->th", rows, self.o.weights.to(rows.dtype))


ALL = [Copy, CuBlas, TorchGrouped, TritonGrouped, DeepGemm, TorchLayer, TritonLayer, Transformers, VLlm, TorchRoute, TorchSort, TorchRows, TorchCombine]
