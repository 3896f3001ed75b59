"""The peers: Transformers' blocks on PyTorch, and ZenTorch's fused layer.

Each engine is called with x [T, H] and logits [T, E] and returns y [T, H]. The router's product is left out for everybody; softmax, top-k, experts and weighted sum
are part of the call.
"""

import importlib

import torch
from torch import nn


class GivenRouter(nn.Module):
    """Stands where a block has its router, and does what that does after its product."""

    def __init__(self, top_k, renormalise, weights_dtype):
        super().__init__()
        self.top_k, self.renormalise, self.weights_dtype = top_k, renormalise, weights_dtype
        self.logits = None

    def forward(self, _):
        weights, ids = torch.topk(torch.softmax(self.logits, dim=-1, dtype=torch.float), self.top_k, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.logits, weights.to(self.weights_dtype), ids


# Shape: Transformers' module and its names of the block, the experts and the configuration; what the configuration calls E and I; whether weights are renormalised;
# whether they stay in f32. DeepSeek-V3's experts stand in Qwen3's block, as everywhere in these benchmarks: its own adds a shared expert.
FAMILIES = {
    "qwen3-30b-a3b": ("qwen3_moe", "Qwen3MoeSparseMoeBlock", None, "Qwen3MoeConfig", "num_experts", "moe_intermediate_size", True, False),
    "olmoe": ("olmoe", "OlmoeSparseMoeBlock", None, "OlmoeConfig", "num_experts", "intermediate_size", False, False),
    "mixtral": ("mixtral", "MixtralSparseMoeBlock", None, "MixtralConfig", "num_local_experts", "intermediate_size", True, True),
    "deepseek-v3": ("deepseek_v3", None, "DeepseekV3Experts", "DeepseekV3Config", "n_routed_experts", "moe_intermediate_size", True, False),
    "tiny": ("qwen3_moe", "Qwen3MoeSparseMoeBlock", None, "Qwen3MoeConfig", "num_experts", "moe_intermediate_size", True, False),
}


class PlainBlock(nn.Module):
    """A router and experts, for families whose own block has more."""

    def __init__(self, experts):
        super().__init__()
        self.gate, self.experts = nn.Identity(), experts

    def forward(self, x):
        batch, length, hidden = x.shape
        rows = x.view(-1, hidden)
        _, weights, ids = self.gate(rows)
        return self.experts(rows, ids, weights).view(batch, length, hidden)


class Transformers:
    """A block of Transformers with one of its ways to run experts: eager, grouped_mm or batched_mm."""

    def __init__(self, how, shape, sizes, gate_up, down):
        self.name = f"torch {how}"
        hidden, intermediate, experts, top_k = sizes
        module, block, experts_class, config, e_name, i_name, renormalise, f32_weights = FAMILIES[shape]
        configuration = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
        modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        settings = {"hidden_size": hidden, e_name: experts, i_name: intermediate, "num_experts_per_tok": top_k, "hidden_act": "silu"}
        config = getattr(configuration, config)(**settings)
        config._experts_implementation = how
        with torch.device("meta"):
            self.block = getattr(modeling, block)(config) if block else PlainBlock(getattr(modeling, experts_class)(config))
        self.block.gate = GivenRouter(top_k, renormalise, torch.float32 if f32_weights else gate_up.dtype)
        # All ways share one copy of the weights.
        self.block.experts.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        self.block.experts.down_proj = nn.Parameter(down, requires_grad=False)
        self.block.eval()

    def __call__(self, x, logits):
        self.block.gate.logits = logits
        return self.block(x.unsqueeze(0)).squeeze(0)


class ZenTorch:
    """ZenTorch's fused layer of experts, as its vLLM plug-in calls it. It packs the weights itself, in its first calls."""

    name = "zentorch"

    def __init__(self, shape, sizes, gate_up, down):
        import zentorch  # noqa: F401, registers the operators

        self.router = GivenRouter(sizes[3], FAMILIES[shape][6], torch.float32)
        # It packs in place: these must not be the others' weights.
        self.gate_up, self.down = gate_up.clone(), down.clone()

    def __call__(self, x, logits):
        self.router.logits = logits
        _, weights, ids = self.router(x)
        y = torch.empty_like(x)
        torch.ops.zentorch.zentorch_fused_moe(y, x, self.gate_up, self.down, None, None, weights, ids.to(torch.int32), False, "silu")
        return y


def make(name, shape, sizes, gate_up, down):
    """An engine by its name on the command line."""
    if name == "zentorch":
        return ZenTorch(shape, sizes, gate_up, down)
    return Transformers(name, shape, sizes, gate_up, down)
