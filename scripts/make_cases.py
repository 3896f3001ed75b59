#!/usr/bin/env python3
"""Instantiates transformers' own MoE modules (tiny, float64, eager) and writes cases in the neutral format.

Needs torch (CPU) and transformers 5.23.0.
usage: make_cases.py OUTDIR [ID-PREFIX]"""
import copy, importlib, inspect, json, math, os, re, struct, sys, types, zlib
os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np, torch
import torch.nn.functional as F
torch.set_num_threads(1)
torch.manual_seed(0)
import transformers                                                    # noqa: E402
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import ref_neutral
OUT = sys.argv[1]
ONLY = sys.argv[2] if len(sys.argv) > 2 else ''
F32 = torch.float32
_mods = {}
def mod(fam):
    if fam not in _mods: _mods[fam] = importlib.import_module(f'transformers.models.{fam}.modeling_{fam}')
    return _mods[fam]
FAMS = ('afmoe aria axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v4 doge dots1 '
        'ernie4_5_moe exaone_moe flex_olmo flint gemma4 glm4_moe glm5_next gpt_oss granitemoe granitemoeshared hunyuan_v1_moe '
        'hy_v3 hy_v4 inkling inkling2 jamba jetmoe kimi_linear kolibri1 laguna lfm2_moe llama4 longcat_flash mellum '
        'mimo_v2_flash minimax minimax_m2 minimax_m3_vl mistral4 mistral_large4 mixtral muse_spark nemotron_h nllb_moe olmoe '
        'openai_privacy_filter phimoe qwen2_moe qwen3_5_moe qwen3_moe qwen3_next qwen3_vl_moe solar_open step3p7 '
        'switch_transformers zaya').split()
for fam in FAMS: mod(fam)
# ---- every "float32" upcast of the modules becomes float64, top-k becomes the rule (stable, sorted) --------------------
torch.float32 = torch.float = torch.float64
torch.Tensor.float = lambda self, *a, **k: self.double()
torch.set_default_dtype(torch.float64)
def _topk(x, k, dim=-1, largest=True, sorted=True):
    v, i = torch.sort(x, dim=dim, descending=True, stable=True)
    return torch.return_types.topk((v.narrow(dim, 0, k), i.narrow(dim, 0, k)))
torch.topk = _topk
torch.Tensor.topk = lambda self, *a, **kw: _topk(self, *a, **kw)

def write(path, meta, t):
    """t: name -> (dtype, numpy array)"""
    rank = {'F64': 0, 'F32': 1, 'I32': 2, 'BF16': 3}
    h, off, blobs = {'__metadata__': {'case': json.dumps(meta, sort_keys=True)}}, 0, []
    for k in sorted(t, key=lambda n: (rank[t[n][0]], n)):
        dt, a = t[k]
        if dt == 'BF16':
            u = np.ascontiguousarray(a, '<f4').view('<u4')
            fin = np.isfinite(a)
            assert not (u[fin] & 0xffff).any(), f'{k}: not exact in bf16'
            raw = (u >> 16).astype('<u2').tobytes()
        else:
            raw = np.ascontiguousarray(a, {'F64': '<f8', 'F32': '<f4', 'I32': '<i4'}[dt]).tobytes()
        h[k] = {'dtype': dt, 'shape': list(a.shape), 'data_offsets': [off, off + len(raw)]}
        off += len(raw); blobs.append(raw)
    j = json.dumps(h).encode(); j += b' ' * (-len(j) % 8)
    open(path, 'wb').write(struct.pack('<Q', len(j)) + j + b''.join(blobs))

def base_meta():
    return {"bf16_weights": False, "capacity": None,
        "experts": {"act": "silu", "alpha": 0.0, "apply_weight_on": "output", "bias": False, "clamp": "none", "gate_cap": 0.0,
            "gated": True, "latent": False, "latent_in_norm": "none", "latent_in_norm_eps": 0.0, "limit": 0.0,
            "post_norm": "none", "post_norm_eps": 0.0, "up_cap": 0.0},
        "format": "moe-case-1", "note": "", "null_experts": {"kind": "none", "n": 0}, "out_bias": False, "out_norm": "none",
        "out_norm_eps": 0.0, "routed_out_scale": 1.0,
        "router": {"bias": False, "input_mul": 1.0, "input_norm": "none", "input_norm_eps": 0.0, "logit_mul": 1.0,
            "logit_softcap": 0.0, "source": "linear"},
        "rtol": 2e-5, "score": "softmax",
        "selection": {"correction_bias": False, "group_score": "none", "masked_fill": "neg_inf", "method": "topk", "n_group": 1,
            "on": "score", "top_k": 2, "topk_group": 1},
        "shared": {"act": "silu", "alpha": 0.0, "bias": False, "clamp": "none", "combine": "add", "gated": True, "limit": 0.0, "n": 0},
        "weights": {"eps": 0.0, "from": "score", "p": 1.0, "per_expert_scale": False, "renorm": "none", "scale": 1.0}}

def deep(m, over):
    for k, v in over.items():
        if isinstance(v, dict) and isinstance(m.get(k), dict): deep(m[k], v)
        else: m[k] = v

def config(E, k, H, I, **over):
    c = dict(hidden_size=H, d_model=H, intermediate_size=I, moe_intermediate_size=I, num_experts=E, num_local_experts=E,
        n_routed_experts=E, moe_num_experts=E, num_experts_per_tok=k, moe_topk=k, moe_top_k=k, top_k_experts=k, hidden_act='silu',
        hidden_activation='gelu_pytorch_tanh', activation_function='silu', mlp_hidden_act='relu2', norm_topk_prob=True, n_group=1,
        topk_group=1, routed_scaling_factor=1.0, n_shared_experts=1, num_shared_experts=1, moe_num_shared_experts=1,
        shared_expert_intermediate_size=28, mlp_bias=False, use_bias=False, rms_norm_eps=1e-6, router_jitter_noise=0.0,
        input_jitter_noise=0.0, _experts_implementation='eager', router_bias=False, router_dtype='float32', dropout_rate=0.0,
        activation_dropout=0.0, dropout=0.0, router_ignore_padding_tokens=False, use_kernels=False)
    c.update(over)
    ns = types.SimpleNamespace(**c)
    ns.get = lambda key, default=None: c.get(key, default)
    return ns

def fill(m, rng, bf16, zero_norm=()):
    """seeded weights, exact in f32 (expert and shared matrices in bf16 when asked)"""
    ps = list(m.named_parameters()) + list(m.named_buffers())
    for n, p in sorted(ps, key=lambda q: q[0]):
        if p.dtype in (torch.int64, torch.int32, torch.bool): continue
        sh = tuple(p.shape)
        expert = ('expert' in n or 'shared' in n or 'mlp.' in n or n.startswith(('gate_proj', 'up_proj', 'down_proj', 'down_embed', 'up_embed', 'input_linear', 'output_linear'))) \
                 and len(sh) >= 2 and not n.endswith('shared_expert_gate.weight') and 'gate.' not in n.split('experts')[0].replace('gate_proj', '')
        if re.search(r'correction_bias|expert_bias|balancing_bias', n): a = rng.uniform(-0.15, 0.15, sh)
        elif n.endswith('global_scale'): a = np.ones(sh)
        elif 'per_expert_scale' in n: a = 1 + 0.3 * rng.standard_normal(sh)
        elif 'norm' in n: a = (0 if any(z in n for z in zero_norm) else 1) + 0.1 * rng.standard_normal(sh)
        elif n.endswith('.scale'): a = math.sqrt(m_H[0]) * (0.2 + 0.05 * rng.standard_normal(sh)) if False else 1 + 0.2 * rng.standard_normal(sh)
        elif len(sh) == 1 or 'bias' in n: a = 0.3 * rng.standard_normal(sh)
        elif n.endswith('shared_expert_gate.weight'): a = rng.standard_normal(sh) * 0.1
        elif not expert: a = rng.standard_normal(sh) * 1.6 / math.sqrt(sh[-1])
        else: a = rng.standard_normal(sh) / math.sqrt(sh[-1])
        a = a.astype(np.float32)
        if bf16 and expert:
            u = a.view(np.uint32); a = ((u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000).astype(np.uint32).view(np.float32)
        with torch.no_grad(): p.data = torch.from_numpy(np.asarray(a, np.float64).reshape(sh))

def sub(m, path):
    for s in path.split('.'): m = m[int(s)] if s.isdigit() else getattr(m, s)
    return m

# ---- un-fusing: g(param) returns the tensor (or its gradient) ----------------------------------------------------------
def ex_gate_up(e, g):
    gu = g(e.gate_up_proj); E = e.down_proj.shape[0]; gu = gu[:E]; I = gu.shape[1] // 2
    return {'w_gate': gu[:, :I], 'w_up': gu[:, I:], 'w_down': g(e.down_proj)}
def ex_gate_up_t(e, g):
    gu = g(e.gate_up_proj).transpose(1, 2); I = gu.shape[1] // 2
    r = {'w_gate': gu[:, :I], 'w_up': gu[:, I:], 'w_down': g(e.down_proj).transpose(1, 2)}
    if hasattr(e, 'gate_up_proj_bias'):
        b = g(e.gate_up_proj_bias); r |= {'b_gate': b[:, :I], 'b_up': b[:, I:], 'b_down': g(e.down_proj_bias)}
    return r
def ex_gpt_oss(e, g):
    gu = g(e.gate_up_proj).transpose(1, 2); b = g(e.gate_up_proj_bias)
    return {'w_gate': gu[:, ::2], 'w_up': gu[:, 1::2], 'w_down': g(e.down_proj).transpose(1, 2), 'b_gate': b[:, ::2], 'b_up': b[:, 1::2],
            'b_down': g(e.down_proj_bias)}
def ex_dbrx(e, g):
    E, I, H = e.num_experts, e.ffn_hidden_size, e.hidden_size
    v = lambda p: g(p).view(E, I, H)
    return {'w_gate': v(e.mlp.w1), 'w_up': v(e.mlp.v1), 'w_down': v(e.mlp.w2).transpose(1, 2)}
def ex_nemotron(e, g): return {'w_up': g(e.up_proj), 'w_down': g(e.down_proj)}
def ex_jetmoe(m, g):
    w = g(m.input_linear.weight); I = w.shape[1] // 2
    return {'w_gate': w[:, :I], 'w_up': w[:, I:], 'w_down': g(m.output_linear.weight)}
def ex_list(a, b, bias):
    def f(e, g):
        xs = [e[f'expert_{i}'] for i in range(e.num_experts)]
        st = lambda nm, at: torch.stack([g(getattr(getattr(q, nm), at)) for q in xs])
        r = {'w_up': st(a, 'weight'), 'w_down': st(b, 'weight')}
        if bias: r |= {'b_up': st(a, 'bias'), 'b_down': st(b, 'bias')}
        return r
    return f
def ex_doge(m, g): return {'w_up': g(m.down_embed.weight)[:, None, :], 'w_down': g(m.up_embed.weight)[:, :, None]}
def sh_mlp(s, g):
    r = {'shared_w_gate': g(s.gate_proj.weight), 'shared_w_up': g(s.up_proj.weight), 'shared_w_down': g(s.down_proj.weight)}
    if s.up_proj.bias is not None:
        r |= {'shared_b_gate': g(s.gate_proj.bias), 'shared_b_up': g(s.up_proj.bias), 'shared_b_down': g(s.down_proj.bias)}
    return r
def sh_plain(s, g): return {'shared_w_up': g(s.up_proj.weight), 'shared_w_down': g(s.down_proj.weight)}
def sh_fused(s, g):
    w = g(s.gate_up_proj.weight); I = w.shape[0] // 2
    return {'shared_w_gate': w[:I], 'shared_w_up': w[I:], 'shared_w_down': g(s.down_proj.weight)}
def sh_granite(s, g):
    w = g(s.input_linear.weight); I = w.shape[0] // 2
    return {'shared_w_gate': w[:I], 'shared_w_up': w[I:], 'shared_w_down': g(s.output_linear.weight)}
def sh_inkling(s, g):
    H = s.gate_proj.shape[2]
    return {'shared_w_gate': g(s.gate_proj).reshape(-1, H), 'shared_w_up': g(s.up_proj).reshape(-1, H),
            'shared_w_down': g(s.down_proj).permute(1, 0, 2).reshape(H, -1)}

class Wrap(torch.nn.Module):
    """a decoder-level composition that HF does in the layer, not in a module"""
    def __init__(self, fwd, **kids):
        super().__init__()
        for k, v in kids.items(): setattr(self, k, v)
        self.fwd = fwd
    def forward(self, x): return self.fwd(self, x)

# ---- family table ------------------------------------------------------------------------------------------------------
FAM = {}
def fam(name, cls, meta, *, cfg=None, router='gate', rw='weight', cap='lwi', experts='experts', ex=ex_gate_up, shared=None, shf=sh_mlp,
        cb=None, extra=None, args=(), build=None, zero_norm=(), defaults=None, routed=None, src=None):
    FAM[name] = dict(fam=src or name, cls=cls, meta=meta, cfg=cfg or {}, router=router, rw=rw, cap=cap, experts=experts, ex=ex, shared=shared,
                     shf=shf, cb=cb, extra=extra, args=args, build=build, zero_norm=zero_norm, defaults=defaults or {}, routed=routed)
SUM = {'weights': {'renorm': 'sum'}}
SIG = lambda **w: {'score': 'sigmoid', 'selection': {'correction_bias': True}, 'weights': w}
V3M = lambda eps=1e-20, **kw: {'score': 'sigmoid', 'selection': {'correction_bias': True, 'group_score': 'top2_sum'},
        'weights': {'renorm': 'sum_plus_eps', 'eps': eps}, **kw}
CB = 'gate.e_score_correction_bias'
for n, c in [('mixtral', 'MixtralSparseMoeBlock'), ('minimax', 'MiniMaxSparseMoeBlock'), ('qwen3_moe', 'Qwen3MoeSparseMoeBlock'),
             ('olmoe', 'OlmoeSparseMoeBlock'), ('flex_olmo', 'FlexOlmoSparseMoeBlock'), ('mellum', 'MellumSparseMoeBlock'),
             ('qwen3_vl_moe', 'Qwen3VLMoeTextSparseMoeBlock')]:
    fam(n, c, SUM)
fam('hunyuan_v1_moe', 'HunYuanMoEV1Moe', SUM, rw='wg.weight', shared='shared_mlp')
for n, c in [('qwen2_moe', 'Qwen2MoeSparseMoeBlock'), ('qwen3_next', 'Qwen3NextSparseMoeBlock'), ('qwen3_5_moe', 'Qwen3_5MoeSparseMoeBlock')]:
    fam(n, c, deep_m := {'weights': {'renorm': 'sum'}, 'shared': {'combine': 'sigmoid_gate'}}, shared='shared_expert',
        extra=lambda m, g: {'shared_gate_w': g(m.shared_expert_gate.weight)})
fam('jamba', 'JambaSparseMoeBlock', {}, router='router')
fam('deepseek_v2', 'DeepseekV2Moe', {}, shared='shared_experts', cfg=dict(topk_method='greedy'))
fam('dbrx', 'DbrxFFN', {'weights': {'renorm': 'pnorm'}}, router='router', rw='layer.weight', cap='dbrx', ex=ex_dbrx)
SEL = {'selection': {'on': 'logit'}, 'weights': {'from': 'softmax_selected_logits'}}
GPT = {**copy.deepcopy(SEL), 'router': {'bias': True}, 'experts': {'bias': True, 'clamp': 'oai', 'alpha': 1.702, 'limit': 7.0}}
fam('gpt_oss', 'GptOssMLP', GPT, router='router', ex=ex_gpt_oss, cfg=dict(swiglu_alpha=1.702, swiglu_limit=7.0),
    extra=lambda m, g: {'router_b': g(m.router.bias)})
fam('openai_privacy_filter', 'OpenAIPrivacyFilterMLP', GPT, router='router', ex=ex_gate_up_t, cfg=dict(swiglu_alpha=1.702, swiglu_limit=7.0),
    extra=lambda m, g: {'router_b': g(m.router.bias)}, routed=lambda m: m.num_experts)
fam('granitemoe', 'GraniteMoeMoE', SEL, router='router')
fam('granitemoeshared', None, SEL, router='moe.router', experts='moe.experts', shared='mlp', shf=sh_granite,
    build=lambda M, c: Wrap(lambda s, x: s.moe(x) + s.mlp(x), moe=M.GraniteMoeSharedMoE(c), mlp=M.GraniteMoeSharedMLP(c)),
    cfg=dict(shared_intermediate_size=28))
fam('aria', 'AriaTextMoELayer', SEL, router='router', ex=ex_gate_up_t, shared='shared_experts', cfg=dict(moe_num_shared_experts=2))
fam('jetmoe', 'JetMoeMoE', {**copy.deepcopy(SEL), 'out_bias': True}, router='router', rw='layer.weight', cap='jetmoe', experts='', ex=ex_jetmoe,
    extra=lambda m, g: {'out_bias': g(m.bias)}, routed=lambda m: 'minus_bias')
fam('cohere2_moe', 'Cohere2MoeSparseMoeBlock', {**copy.deepcopy(SEL), 'shared': {'combine': 'average', 'n': 2}}, shared='shared_experts',
    cfg=dict(expert_selection_fn='softmax', num_shared_experts=2, shared_expert_combination_strategy='average'))
fam('cohere2_moe_sigmoid', 'Cohere2MoeSparseMoeBlock', {'score': 'sigmoid', 'selection': {'on': 'logit'}, 'weights': {'renorm': 'sum'}},
    shared='shared_experts', src='cohere2_moe',
    cfg=dict(expert_selection_fn='sigmoid', num_shared_experts=1, shared_expert_combination_strategy='sum'))
for n, c in [('deepseek_v3', 'DeepseekV3MoE'), ('glm4_moe', 'Glm4MoeMoE'), ('dots1', 'Dots1MoE'), ('kimi_linear', 'KimiLinearMoE'),
             ('bailing_hybrid', 'BailingHybridMoE'), ('exaone_moe', 'ExaoneMoeSparseMoEBlock'), ('solar_open', 'SolarOpenMoE')]:
    fam(n, c, V3M(), shared='shared_experts', cb=CB)
fam('axk2', 'AXK2MoE', V3M(**{}) | {'selection': {'correction_bias': True, 'group_score': 'top2_sum', 'masked_fill': 'zero'}},
    shared='shared_experts', cb=CB)
fam('axk1', 'AXK1MoE', V3M(out_norm='rms', out_norm_eps=1e-6), shared='shared_experts', cb=CB,
    extra=lambda m, g: {'out_norm_w': g(m.post_mlp_layernorm.weight)})
fam('mimo_v2_flash', 'MiMoV2FlashMoE', V3M(), cb=CB)
fam('beam', 'BeamMoE', V3M(), cb=CB, routed=lambda m: m.routed_scaling_factor)
PRE = dict(experts={'clamp': 'pre', 'limit': 0.5})
fam('hy_v4', 'HYV4MoE', V3M(**PRE), shared='shared_experts', cb=CB, cfg=dict(swiglu_limit=0.5))
fam('glm5_next', 'Glm5NextTextMoE', V3M(**PRE, shared={'clamp': 'pre', 'limit': 0.5}), shared='shared_experts', cb=CB, cfg=dict(swiglu_limit=0.5))
NEM = V3M(experts={'act': 'relu2', 'gated': False}, shared={'act': 'relu2', 'gated': False})
fam('nemotron_h', 'NemotronHMoE', NEM, ex=ex_nemotron, shared='shared_experts', shf=sh_plain, cb=CB,
    cfg=dict(moe_latent_size=None, moe_shared_expert_intermediate_size=28))
NEML = copy.deepcopy(NEM); NEML['experts']['latent'] = True
fam('nemotron_h_latent', 'NemotronHMoE', NEML, ex=ex_nemotron, shared='shared_experts', shf=sh_plain, cb=CB, src='nemotron_h',
    cfg=dict(moe_latent_size=24, moe_shared_expert_intermediate_size=28), routed=lambda m: 'fc2_latent_proj',
    extra=lambda m, g: {'latent_in_w': g(m.fc1_latent_proj.weight), 'latent_out_w': g(m.fc2_latent_proj.weight)})
fam('minimax_m2', 'MiniMaxM2SparseMoeBlock', SIG(renorm='sum'), cb='e_score_correction_bias')
OAI = {'clamp': 'oai', 'alpha': 1.702, 'limit': 0.7}
fam('minimax_m3_vl', 'MiniMaxM3VLSparseMoeBlock', {**SIG(renorm='sum'), 'experts': OAI, 'shared': OAI}, cb=CB, shared='shared_experts', shf=sh_fused,
    cfg=dict(swiglu_alpha=1.702, swiglu_limit=0.7, shared_intermediate_size=28), routed=lambda m: m.routed_scaling_factor)
fam('step3p7', 'Step3p7SparseMoeBlock', {**SIG(renorm='sum'), 'experts': {'clamp': 'post', 'limit': 0.4}, 'shared': {'clamp': 'post', 'limit': 0.6}},
    cb=CB, shared='shared_experts', args=(0,), routed=lambda m: m.routed_scaling_factor,
    cfg=dict(swiglu_limits=[0.4], swiglu_limits_shared=[0.6], share_expert_dim=28, moe_router_scaling_factor=2.0))
fam('laguna', 'LagunaSparseMoeBlock', {**SIG(renorm='sum'), 'router': {'logit_softcap': 2.0}}, cb=CB, shared='shared_experts',
    cfg=dict(moe_router_logit_softcapping=2.0, moe_routed_scaling_factor=2.5), routed=lambda m: m.routed_scaling_factor)
fam('afmoe', 'AfmoeSparseMoeBlock', SIG(renorm='sum_plus_eps', eps=1e-20, scale=2.5), router='router', rw='gate.weight', cb='expert_bias',
    shared='shared_experts', cfg=dict(route_scale=2.5, num_shared_experts=2))
fam('hy_v3', 'HYV3MoE', SIG(renorm='sum_plus_eps', eps=1e-20, scale=2.8), cb='e_score_correction_bias', shared='shared_experts',
    cfg=dict(router_scaling_factor=2.8, enable_moe_fp32_combine=True))
fam('lfm2_moe', 'Lfm2MoeSparseMoeBlock', SIG(renorm='sum_plus_eps', eps=1e-6, scale=1.5), cb='expert_bias', cfg=dict(use_expert_bias=True, routed_scaling_factor=1.5))
fam('inkling2', 'Inkling2SparseMoeBlock', {**SIG(renorm='sum_plus_eps', eps=1e-20, scale=8.0),
    'experts': {'clamp': 'softcap', 'gate_cap': 1.0, 'up_cap': 1.5}}, cb=CB,
    cfg=dict(scoring_func='sigmoid', routed_scaling_factor=8.0, mlp_gate_softcap=1.0, mlp_up_softcap=1.5))
fam('muse_spark', 'MuseSparkMoE', {**SIG(renorm='sum_plus_eps', eps=1e-15, scale=1.3), 'router': {'logit_mul': 0.7},
    'experts': {'latent': True, 'latent_in_norm': 'rms_centered', 'latent_in_norm_eps': 1e-5, 'post_norm': 'rms_input_scaled_centered', 'post_norm_eps': 1e-8}},
    cb=CB, cfg=dict(moe_hidden_size=24, output_multiplier=0.7, routed_scaling_factor=1.3, rms_norm_eps=1e-5, post_norm_eps=1e-8),
    zero_norm=('norm',), routed=lambda m: 'post_expert_proj',
    extra=lambda m, g: {'latent_in_w': g(m.pre_expert_proj.weight), 'latent_out_w': g(m.post_expert_proj.weight),
                        'latent_in_norm_w': g(m.pre_expert_norm.weight), 'expert_post_norm_w': g(m.experts.post_expert_norm.weight)})
fam('flint', 'FlintSparseMoeBlock', {'score': 'sigmoid', 'weights': {'renorm': 'sum'}}, shared='shared_expert')
fam('kolibri1', 'Kolibri1SparseMoeBlock', {'score': 'sigmoid', 'selection': {'on': 'logit', 'correction_bias': True}, 'weights': {'renorm': 'sum'}},
    cb=CB, shared='shared_experts')
fam('llama4', 'Llama4TextMoe', {'score': 'sigmoid', 'selection': {'on': 'logit'}, 'experts': {'apply_weight_on': 'input'}}, router='router', cap='llama4',
    ex=ex_gate_up_t, shared='shared_expert')
fam('ernie4_5_moe', 'Ernie4_5_MoeSparseMoeBlock', {'selection': {'correction_bias': True}, 'weights': {'renorm': 'sum_clamp_min', 'eps': 1e-12}},
    cb='gate.moe_statics.e_score_correction_bias', shared='shared_experts', cfg=dict(moe_norm_min=1e-12, moe_num_shared_experts=2))
fam('longcat_flash', 'LongcatFlashMoE', {'selection': {'correction_bias': True}, 'weights': {'scale': 6.0}, 'null_experts': {'kind': 'identity', 'n': 4}},
    router='router', rw='classifier.weight', cb='router.e_score_correction_bias',
    cfg=dict(zero_expert_num=4, expert_ffn_hidden_size=20, routed_scaling_factor=6.0))
fam('zaya', 'ZayaSparseMoeBlock', {'router': {'source': 'given_logits'}, 'selection': {'correction_bias': True}, 'null_experts': {'kind': 'zero', 'n': 1}},
    cap='zaya', rw=None, args=(0,), cb='gate.balancing_biases', cfg=dict(router_hidden_size=16))
L4 = {'selection': {'group_score': 'top2_sum', 'masked_fill': 'zero'}, 'weights': {'renorm': 'sum_plus_eps', 'eps': 1e-20, 'scale': 1.5}}
fam('mistral4', 'Mistral4MoE', L4, shared='shared_experts', cfg=dict(routed_scaling_factor=1.5))
fam('mistral_large4', 'MistralLarge4TextMoE', L4, shared='shared_experts', cfg=dict(routed_scaling_factor=1.5))
V4 = {'score': 'sqrtsoftplus', 'weights': {'renorm': 'sum_plus_eps', 'eps': 1e-20, 'scale': 1.5},
      'experts': {'clamp': 'pre', 'limit': 0.6}, 'shared': {'clamp': 'pre', 'limit': 0.6}}
fam('deepseek_v4', 'DeepseekV4SparseMoeBlock', {**copy.deepcopy(V4), 'selection': {'correction_bias': True}}, args=(0,), cb=CB, shared='shared_experts',
    cfg=dict(scoring_func='sqrtsoftplus', routed_scaling_factor=1.5, swiglu_limit=0.6, mlp_layer_types=['moe'], vocab_size=50))
fam('deepseek_v4_hash', 'DeepseekV4SparseMoeBlock', {**copy.deepcopy(V4), 'selection': {'method': 'given'}}, args=(0,), shared='shared_experts', src='deepseek_v4',
    cfg=dict(scoring_func='sqrtsoftplus', routed_scaling_factor=1.5, swiglu_limit=0.6, mlp_layer_types=['hash_moe'], vocab_size=50))
fam('inkling', 'InklingMoE', {'score': 'sigmoid', 'selection': {'correction_bias': True}, 'weights': {'from': 'joint_with_shared', 'renorm': 'none', 'scale': 8.0},
    'shared': {'combine': 'router_weighted', 'n': 2}}, cb=CB, shared='shared_experts', shf=sh_inkling, cap='inkling', cfg=dict(n_shared_experts=2, route_scale=8.0))
fam('phimoe', 'PhimoeSparseMoeBlock', {'selection': {'method': 'sparsemixer', 'jitter_eps': 0.1}, 'weights': {'from': 'sparsemixer'}}, router='router',
    cfg=dict(router_jitter_noise=0.1))
fam('switch_transformers', 'SwitchTransformersSparseMLP', {'selection': {'method': 'capacity_top1'}, 'experts': {'act': 'relu', 'gated': False}}, router='router',
    rw='classifier.weight', cap='switch', ex=ex_list('wi', 'wo', False), cfg=dict(d_ff=20, dense_act_fn='relu', expert_capacity=8))
def nllb_fwd(s, x):
    """HF's router + the experts as meant (NllbMoeExperts.forward of 5.23 indexes the 0/1 mask as expert ids)"""
    h = x.reshape(-1, x.shape[-1])
    _, probs, logits = s.router(h)
    y = torch.zeros_like(h)
    for e in range(s.experts.num_experts):
        t = (probs[:, e] > 0).nonzero()[:, 0]
        y = y.index_add(0, t, s.experts[f'expert_{e}'](h[t]) * probs[t, e, None] * s.keep)
    return y.view_as(x)
def nllb_build(M, c):
    w = Wrap(nllb_fwd, router=M.NllbMoeTop2Router(c), experts=M.NllbMoeExperts(c, c.d_ff)); w.keep = 1 - c.moe_token_dropout; return w
fam('nllb_moe', None, {'selection': {'method': 'capacity_top2'}, 'experts': {'act': 'relu', 'gated': False, 'bias': True}}, router='router', rw='classifier.weight',
    cap='nllb', ex=ex_list('fc1', 'fc2', True), build=nllb_build,
    cfg=dict(d_ff=20, activation_function='relu', expert_capacity=8, second_expert_policy='all', normalize_router_prob_before_dropping=False,
             batch_prioritized_routing=False, moe_eval_capacity_token_fraction=-1.0, moe_token_dropout=0.0))
fam('gemma4', None, {'router': {'input_norm': 'rms_scaled', 'input_norm_eps': 1e-6}, 'weights': {'renorm': 'sum', 'per_expert_scale': True},
    'experts': {'act': 'gelu_tanh'}}, router='router', rw='proj.weight', cap='gemma4',
    build=lambda M, c: Wrap(lambda s, x: (lambda h: (lambda r: s.experts(h, r[2], r[1]).view_as(x))(s.router(h)))(x.reshape(-1, x.shape[-1])),
                            router=M.Gemma4TextRouter(c), experts=M.Gemma4TextExperts(c)),
    extra=lambda m, g: {'router_in_scale': g(m.router.scale), 'per_expert_scale': g(m.router.per_expert_scale)})
fam('doge', 'DogeCDMoE', {'selection': {'method': 'product_key'}, 'weights': {'from': 'softmax_selected_logits'}, 'experts': {'act': 'silu', 'gated': False}},
    router='router_gate', cap='doge', experts='', ex=ex_doge, shared='')

# ---- one case ----------------------------------------------------------------------------------------------------------
BIG = ('w_gate', 'w_up', 'w_down', 'shared_w_gate', 'shared_w_up', 'shared_w_down')
done = []
def case(cid, name, E=8, k=2, H=36, I=20, T=17, B=1, bf16=False, meta=None, cfg=None, kind='forward', note='', xs=1.0, tweak=None, groups=None,
         shape_x=None, rtol=None):
    if not cid.startswith(ONLY): return
    kw = dict(E=E, k=k, H=H, I=I, T=T, B=B, bf16=bf16, meta=meta, cfg=cfg, kind=kind, note=note, xs=xs, tweak=tweak, groups=groups, shape_x=shape_x, rtol=rtol)
    for salt in range(40):
        one(cid, name, salt, **kw)
        mg = ref_neutral.margin(*ref_neutral.load(f'{OUT}/{cid}.safetensors'))
        if kind == 'tie' or rtol or mg > 1e-5: return
    print('margin', cid, mg)
def one(cid, name, salt, *, E, k, H, I, T, B, bf16, meta, cfg, kind, note, xs, tweak, groups, shape_x, rtol):
    fm = FAM[name]; M = mod(fm['fam']); rng = np.random.default_rng(zlib.crc32(cid.encode()) + salt)
    over = dict(fm['cfg']); mt = base_meta(); deep(mt, copy.deepcopy(fm['meta'])); deep(mt, copy.deepcopy(meta or {}))
    if groups: over |= dict(n_group=groups[0], topk_group=groups[1]); deep(mt, {'selection': dict(n_group=groups[0], topk_group=groups[1])})
    over |= {key: I for key in ('d_ff', 'expert_ffn_hidden_size') if key in over} | (cfg or {})
    c = config(E, k, H, I, **over)
    if fm['fam'] == 'dbrx':
        c.ffn_hidden_size = I; c.ffn_act_fn = {'name': c.hidden_act}; c.moe_jitter_eps = None
        c.moe_normalize_expert_weights = over.get('p', 1.0); c.ffn_config = c
    torch.manual_seed(zlib.crc32(cid.encode()))
    m = fm['build'](M, c) if fm['build'] else getattr(M, fm['cls'])(c, *fm['args'])
    m = m.double().eval()
    fill(m, rng, bf16, fm['zero_norm'])
    if tweak: tweak(m, rng)
    for p in list(m.parameters()) + list(m.buffers()):
        if p.is_floating_point(): p.data = p.data.to(F32).double()
    x = rng.standard_normal((B, T // B, H)) * xs
    if shape_x: x = shape_x(x, rng)
    x = torch.from_numpy(np.asarray(x, np.float32).astype(np.float64))
    ids_in = None
    if fm['fam'] == 'deepseek_v4' and mt['selection']['method'] == 'given':
        tab = np.stack([rng.permutation(E)[:k] for _ in range(50)]); m.gate.tid2eid.data = torch.from_numpy(tab)
        ids_in = torch.from_numpy(rng.integers(0, 50, (B, T // B)))
    cap = {}
    r = sub(m, fm['router']); hs = [r.register_forward_hook(lambda mo, i, o: cap.__setitem__('r', o))]
    if fm['fam'] == 'zaya': hs.append(m.gate.register_forward_hook(lambda mo, i, o: cap.__setitem__('r', o)))
    ro = fm['routed'](m) if fm['routed'] else None
    probe = ro if isinstance(ro, str) and ro != 'minus_bias' else fm['experts']
    if probe: hs.append(sub(m, probe).register_forward_hook(lambda mo, i, o: cap.__setitem__('y', o)))
    if fm['fam'] == 'zaya': hs.append(m.gate.router_mlp.register_forward_hook(lambda mo, i, o: (cap.__setitem__('z', o.to(F32).double()), cap['z'])[1]))
    train = kind == 'train'
    if train:
        x.requires_grad_(True)
        for p in m.parameters(): p.requires_grad_(True)
    with torch.set_grad_enabled(train):
        y = m(x, ids_in) if ids_in is not None else m(x)
    if isinstance(y, tuple): y = y[0]
    for q in hs: q.remove()
    y2 = y.reshape(T, H)
    o = cap['r']
    if fm['cap'] == 'zaya':
        z = cap['z'].reshape(T, -1).detach()
        # HF reports a skip as id 0 with weight 0: put the class back
        pr = torch.softmax(z, -1); sel = torch.topk(pr + m.gate.balancing_biases, k)[1]
        skip = sel == E
        w, ids = o[1].reshape(T, k), torch.where(skip, sel, o[2].reshape(T, k))
        assert torch.equal(sel, ids)
    elif fm['cap'] == 'lwi': z, w, ids = o
    elif fm['cap'] == 'inkling': z, w, ids = F.linear(x.reshape(T, H), r.weight), o[1], o[2]
    elif fm['cap'] == 'dbrx': z = o; w, ids = m.route_tokens_to_experts(o)
    elif fm['cap'] == 'jetmoe':
        z = o[4]; tl, ids = torch.topk(z, k); w = torch.softmax(tl, -1)
    elif fm['cap'] == 'llama4': z = o[1]; ids = torch.topk(z, k)[1]; w = o[0].gather(1, ids)
    elif fm['cap'] == 'gemma4': z = F.linear(r.norm(x.reshape(T, H)) * r.scale * r.scalar_root_size, r.proj.weight); w, ids = o[1], o[2]
    elif fm['cap'] == 'switch':
        oh, p, z = o; oh = oh.view(T, E); z = z.view(T, E); kept = oh.sum(-1) > 0
        ids = torch.where(kept, oh.argmax(-1), -1)[:, None]; w = p.view(T, 1) * kept[:, None]
    elif fm['cap'] == 'nllb':
        m1, p, z = o
        e1 = z.argmax(-1); z2 = z.scatter(1, e1[:, None], -math.inf); e2 = z2.argmax(-1)
        pair = torch.stack([e1, e2], 1); w = p.gather(1, pair)
        assert torch.allclose(w.sum(1), p.sum(1)) and torch.equal(m1.sum(1) > 0, w[:, 0] > 0)
        ids = torch.where(w > 0, pair, -1)
    elif fm['cap'] == 'doge':
        z = o.reshape(T, -1)
        n = z.shape[1] // 2; rl = o.view(2, T, n)
        (sx, sy), (ix, iy) = rl.topk(n, dim=-1)           # the module's own lines
        a = (sx.unsqueeze(-1) + sy.unsqueeze(-2)).view(T, -1); ai = (ix.unsqueeze(-1) * n + iy.unsqueeze(-2)).view(T, -1)
        sc, pos = a.topk(k); ids = ai.gather(-1, pos); w = F.softmax(sc, -1)
    z, w = z.detach().double(), w.detach().double()
    # weights as HF reports them; shared/other outputs
    g = lambda p: p.detach()
    t = {k2: ('BF16' if bf16 and k2 in BIG else 'F32', v.numpy()) for k2, v in tensors(m, fm, g).items()}
    if fm['cb'] and mt['selection']['correction_bias']: t['correction_bias'] = ('F32', sub(m, fm['cb']).detach().reshape(-1).numpy())
    t['x'] = ('F32', x.detach().reshape(T, H).numpy()); t['y'] = ('F32', y2.detach().numpy())
    t['topk_ids'] = ('I32', ids.numpy()); t['topk_weights'] = ('F32', w.numpy())
    if not train: t['router_logits'] = ('F32', z.numpy())
    if mt['router']['source'] == 'given_logits':
        t['given_logits'] = ('F32', z.numpy())
    if ids_in is not None: t['given_ids'] = ('I32', ids.numpy())
    if not bf16 and not train: t['y_f64'] = ('F64', y2.detach().numpy())
    has_sh = fm['shared'] is not None and not (name.startswith('cohere') and c.num_shared_experts == 0)
    if has_sh and mt['shared']['n'] == 0: mt['shared']['n'] = 1
    sc = ro if isinstance(ro, (int, float)) else 1.0
    if not train and (has_sh or mt['out_norm'] != 'none' or mt['out_bias']):
        if ro == 'minus_bias': yr = y2 - m.bias
        elif name == 'doge': yr = y2 - (m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x))).reshape(T, H)
        elif name == 'llama4': yr = cap['y'].reshape(E, T, H).sum(0)
        else: yr = cap['y'].reshape(T, H) * sc
        t['y_routed'] = ('F32', yr.detach().numpy())
    mt['routed_out_scale'] = float(sc)
    if name == 'nllb_moe': mt['routed_out_scale'] = float(m.keep)
    mt |= dict(E=E, H=H, I=1 if name == 'doge' else I, T=T, k=k, bf16_weights=bf16, family=fm['fam'], id=cid, kind=kind, note=note,
               hf_class=fm['cls'] or type(r).__name__, dropped=int((ids < 0).sum()),
               hf_source=f"transformers/models/{fm['fam']}/modeling_{fm['fam']}.py:{inspect.getsourcelines(getattr(M, fm['cls']) if fm['cls'] else type(r))[1]}")
    mt['selection']['top_k'] = k
    if mt['selection']['method'] == 'capacity_top1': mt['capacity'] = {'per_expert': c.expert_capacity, 'scope_tokens': T // B}
    if mt['selection']['method'] == 'capacity_top2':
        mt['capacity'] = {'per_expert': int(r.expert_capacity), 'scope_tokens': T, 'batch_prioritized': c.batch_prioritized_routing,
                          'normalize_before_drop': c.normalize_router_prob_before_dropping, 'eps': float(np.finfo(np.float64).eps)}
    if name == 'gemma4': mt['router']['input_mul'] = H ** -0.5
    if mt['weights']['renorm'] == 'pnorm': mt['weights']['p'] = c.moe_normalize_expert_weights
    if train:
        dy = np.asarray(rng.standard_normal((T, H)), np.float32); t['dy'] = ('F32', dy)
        L = (y2 * torch.from_numpy(dy.astype(np.float64))).sum(); L.backward(); mt['loss'] = float(L.detach()); mt['rtol'] = 5e-5
        gg = lambda p: p.grad if p.grad is not None else torch.zeros_like(p)
        t['grad_x'] = ('F32', x.grad.reshape(T, H).numpy())
        for k2, v in tensors(m, fm, gg).items(): t['grad_' + k2] = ('F32', v.numpy())
    os.makedirs(OUT, exist_ok=True)
    if rtol: mt['rtol'] = rtol
    mt['min_selection_margin'] = 0.0
    write(f'{OUT}/{cid}.safetensors', mt, t)
    mg = ref_neutral.margin(*ref_neutral.load(f'{OUT}/{cid}.safetensors')); mt['min_selection_margin'] = mg if math.isfinite(mg) else None
    write(f'{OUT}/{cid}.safetensors', mt, t)
    if cid not in done: done.append(cid)

def tensors(m, fm, g):
    r = {}
    if fm['rw']: r['router_w'] = g(sub(sub(m, fm['router']), fm['rw']))
    r |= fm['ex'](sub(m, fm['experts']) if fm['experts'] else m, g)
    if fm['shared'] is not None: r |= fm['shf'](sub(m, fm['shared']) if fm['shared'] else m, g)
    if fm['extra']: r |= fm['extra'](m, g)
    return {k: v.contiguous() for k, v in r.items()}

def main():
    G = dict(groups=(4, 2), E=16, k=4)
    sc25 = dict(cfg=dict(routed_scaling_factor=2.5), meta={'weights': {'scale': 2.5}})
    case('fwd_mixtral', 'mixtral')
    case('fwd_mixtral_t1', 'mixtral', T=1)
    case('fwd_mixtral_t130_bf16', 'mixtral', T=130, bf16=True, E=16, k=4)
    case('fwd_mixtral_k1', 'mixtral', k=1, E=4)
    case('fwd_mixtral_k_eq_e', 'mixtral', k=4, E=4, note='dense: every expert')
    case('fwd_mixtral_e1', 'mixtral', k=1, E=1, note='one expert')
    case('fwd_mixtral_odd_shapes', 'mixtral', E=5, k=3, H=50, I=27, T=7)
    def hog(m, rng):
        m.gate.weight.data[:] = 0; m.gate.weight.data[3, 0] = 8.0; m.gate.weight.data[1, 0] = 4.0
    case('fwd_mixtral_one_expert_hog', 'mixtral', T=130, tweak=hog, shape_x=lambda x, r: np.concatenate([np.abs(x[..., :1]) + .1, x[..., 1:]], -1),
         note='expert 3 then 1 take every token; the other six none')
    case('fwd_mixtral_large_logits', 'mixtral', tweak=lambda m, r: m.gate.weight.data.mul_(10), rtol=5e-5, note='softmax saturates')
    case('fwd_mixtral_gelu', 'mixtral', cfg=dict(hidden_act='gelu'), meta={'experts': {'act': 'gelu'}})
    case('fwd_minimax', 'minimax', bf16=True)
    case('fwd_hunyuan_v1_moe', 'hunyuan_v1_moe')
    case('fwd_qwen3_vl_moe', 'qwen3_vl_moe', k=3)
    case('fwd_qwen3_5_moe', 'qwen3_5_moe', k=3)
    case('fwd_qwen3_moe_norm', 'qwen3_moe', k=4)
    case('fwd_qwen3_moe_raw', 'qwen3_moe', k=4, cfg=dict(norm_topk_prob=False), meta={'weights': {'renorm': 'none'}})
    case('fwd_qwen3_next', 'qwen3_next', bf16=True, k=3)
    case('fwd_mellum', 'mellum')
    case('fwd_jamba', 'jamba')
    case('fwd_olmoe', 'olmoe', E=16, k=8, cfg=dict(norm_topk_prob=False), meta={'weights': {'renorm': 'none'}})
    case('fwd_flex_olmo', 'flex_olmo', cfg=dict(norm_topk_prob=False), meta={'weights': {'renorm': 'none'}})
    case('fwd_qwen2_moe', 'qwen2_moe', k=4, cfg=dict(norm_topk_prob=False), meta={'weights': {'renorm': 'none'}})
    case('fwd_qwen2_moe_t1', 'qwen2_moe', k=4, T=1, cfg=dict(norm_topk_prob=False), meta={'weights': {'renorm': 'none'}})
    case('fwd_deepseek_v2', 'deepseek_v2', k=4, cfg=dict(routed_scaling_factor=16.0, n_shared_experts=2), meta={'weights': {'scale': 16.0}, 'shared': {'n': 2}})
    case('fwd_deepseek_v2_group', 'deepseek_v2', **G, cfg=dict(topk_method='group_limited_greedy', routed_scaling_factor=16.0),
         meta={'weights': {'scale': 16.0}, 'selection': {'group_score': 'max', 'masked_fill': 'zero'}})
    for p in (1.0, 2.0, 3.0): case(f'fwd_dbrx_p{p:g}', 'dbrx', k=4, cfg=dict(p=p))
    case('fwd_gpt_oss', 'gpt_oss', H=96, I=36, tweak=lambda m, r: [q.data.copy_(q.data.mul(3.0).to(F32).double()) for q in m.experts.parameters()])
    case('fwd_gpt_oss_bf16', 'gpt_oss', bf16=True, k=4, xs=3.0)
    case('fwd_gpt_oss_alpha_limit', 'gpt_oss', cfg=dict(swiglu_alpha=1.0, swiglu_limit=1.5), meta={'experts': {'alpha': 1.0, 'limit': 1.5}}, xs=2.0)
    case('fwd_openai_privacy_filter', 'openai_privacy_filter', k=4, xs=4.0, meta={'weights': {'scale': 0.25}})
    case('fwd_granitemoe', 'granitemoe'); case('fwd_granitemoeshared', 'granitemoeshared')
    case('fwd_aria', 'aria', meta={'shared': {'n': 2}}); case('fwd_jetmoe', 'jetmoe')
    case('fwd_cohere2_moe_average', 'cohere2_moe')
    case('fwd_cohere2_moe_sigmoid', 'cohere2_moe_sigmoid')
    for n in ('deepseek_v3', 'glm4_moe', 'dots1', 'kimi_linear', 'bailing_hybrid', 'exaone_moe', 'solar_open', 'axk1', 'mimo_v2_flash', 'hy_v4', 'glm5_next'):
        case(f'fwd_{n}', n, **G, **sc25)
    case('fwd_deepseek_v3_nonorm', 'deepseek_v3', **G, cfg=dict(norm_topk_prob=False, routed_scaling_factor=2.5), meta={'weights': {'scale': 2.5, 'renorm': 'none', 'eps': 0.0}})
    case('fwd_deepseek_v3_t1', 'deepseek_v3', **G, **sc25, T=1)
    case('fwd_deepseek_v3_t130_bf16', 'deepseek_v3', **G, **sc25, T=130, bf16=True)
    case('fwd_deepseek_v3_1group', 'deepseek_v3', E=8, k=3, groups=(1, 1), **sc25)
    def negb(m, r): m.gate.e_score_correction_bias.data -= 0.75
    def negb32(m, r): negb(m, r); m.gate.e_score_correction_bias.data = m.gate.e_score_correction_bias.data.to(F32).double()
    case('fwd_axk2_zero_fill', 'axk2', **G, **sc25)
    case('fwd_axk2_zero_fill_negative', 'axk2', **G, **sc25, tweak=negb32, note='negative biases: masked experts (0.0) outrank kept ones')
    case('fwd_deepseek_v3_negative_bias', 'deepseek_v3', **G, **sc25, tweak=negb32)
    def under(m, r):
        m.gate.weight.data[:] = 0; m.gate.weight.data[:, 0] = torch.linspace(-40, -46, 16)
    case('fwd_deepseek_v3_tiny_scores', 'deepseek_v3', **G, **sc25, tweak=lambda m, r: (under(m, r), m.gate.weight.data.copy_(m.gate.weight.data.to(F32).double())),
         shape_x=lambda x, r: np.concatenate([np.abs(x[..., :1]) * 0.4 + 0.9, x[..., 1:]], -1), rtol=5e-5, note='scores about 1e-20: the eps matters')
    def under2(lo, hi):
        def f(m, r): m.gate.weight.data[:] = 0; m.gate.weight.data[:, 0] = torch.linspace(lo, hi, m.gate.weight.shape[0])
        return f
    tiny = lambda x, r: np.concatenate([np.abs(x[..., :1]) * 0.1 + 0.95, x[..., 1:]], -1)
    case('fwd_lfm2_moe_tiny_scores', 'lfm2_moe', k=3, tweak=under2(-13, -14), shape_x=tiny, rtol=5e-5, note='scores about the eps 1e-6')
    case('fwd_muse_spark_tiny_scores', 'muse_spark', k=3, tweak=under2(-46, -50), shape_x=tiny, rtol=1e-4, note='scores about the eps 1e-15')
    case('fwd_beam', 'beam', **G, cfg=dict(routed_scaling_factor=2.5))
    case('fwd_nemotron_h', 'nemotron_h', **G, **sc25); case('fwd_nemotron_h_latent', 'nemotron_h_latent', **G, **sc25)
    case('fwd_nemotron_h_latent_bf16', 'nemotron_h_latent', **G, **sc25, bf16=True)
    for n in ('minimax_m2', 'step3p7', 'laguna', 'afmoe', 'hy_v3', 'lfm2_moe', 'inkling2', 'muse_spark', 'flint', 'kolibri1'):
        case(f'fwd_{n}', n, k=3, **({'meta': {'shared': {'n': 2}}} if n == 'afmoe' else {}))
    case('fwd_minimax_m3_vl', 'minimax_m3_vl', cfg=dict(routed_scaling_factor=2.5))
    case('fwd_lfm2_moe_nobias', 'lfm2_moe', cfg=dict(use_expert_bias=False), meta={'selection': {'correction_bias': False}})
    case('fwd_inkling2_wide', 'inkling2', k=3, xs=8.0, note='large gates: softcap saturates, the sigmoid must see the raw gate')
    case('fwd_muse_spark_bf16_t130', 'muse_spark', k=3, T=130, bf16=True)
    case('fwd_step3p7_bf16', 'step3p7', k=3, bf16=True, xs=3.0)
    case('fwd_kolibri1_bf16', 'kolibri1', k=3, bf16=True, tweak=lambda m, r: m.gate.e_score_correction_bias.data.mul_(16))
    case('fwd_llama4_top1', 'llama4', k=1); case('fwd_llama4_top2', 'llama4', k=2)
    case('fwd_llama4_top2_bf16_t130', 'llama4', k=2, bf16=True, T=130)
    case('fwd_ernie4_5_moe', 'ernie4_5_moe', k=3, meta={'shared': {'n': 2}})
    def ern(m, r):
        m.gate.weight.data[:] = 0; m.gate.weight.data[:, 0] = torch.tensor([27., 26.5, 0., -.5, 0.25, .5, 1, 1.5])
        m.gate.moe_statics.e_score_correction_bias.data[:] = torch.tensor([[-2., -2, 0, 0.5, .25, .75, 1, 1.25]])
    case('fwd_ernie4_5_moe_clamp', 'ernie4_5_moe', k=3, tweak=ern, rtol=5e-5, meta={'shared': {'n': 2}},
         shape_x=lambda x, r: np.concatenate([np.abs(x[..., :1]) * 0.2 + 0.9, x[..., 1:]], -1), note='selected probabilities sum to about 1e-12: the clamp matters')
    case('fwd_longcat_flash', 'longcat_flash', k=3); case('fwd_longcat_flash_bf16', 'longcat_flash', k=4, bf16=True, T=130)
    zb = lambda m, r: m.gate.balancing_biases.data[-1:].fill_(0.4)
    case('fwd_zaya', 'zaya', k=1, tweak=zb); case('fwd_zaya_k2', 'zaya', k=2, T=130, tweak=lambda m, r: m.gate.balancing_biases.data.mul_(1.0))
    case('fwd_mistral4', 'mistral4', **G, meta={}); case('fwd_mistral_large4', 'mistral_large4', **G)
    case('fwd_deepseek_v4', 'deepseek_v4', k=3); case('fwd_deepseek_v4_hash', 'deepseek_v4_hash', k=3)
    case('fwd_deepseek_v4_bf16', 'deepseek_v4', k=3, bf16=True, T=130, xs=2.0)
    case('fwd_inkling', 'inkling', k=3)
    case('fwd_inkling_1shared', 'inkling', k=2, cfg=dict(n_shared_experts=1), meta={'shared': {'n': 1}})
    case('fwd_inkling_bf16', 'inkling', k=3, bf16=True, T=130)
    case('fwd_inkling_tiny', 'inkling', k=2, tweak=lambda m, r: (m.gate.weight.data.zero_(), m.gate.weight.data[:, 0].copy_(torch.linspace(-200, -220, 10).to(F32).double())),
         shape_x=lambda x, r: np.concatenate([np.abs(x[..., :1]) * 0.2 + 0.9, x[..., 1:]], -1), rtol=2e-4, note='all sigmoids about 1e-87 (0 in f32): normalise in the log domain')
    case('fwd_phimoe', 'phimoe'); case('fwd_phimoe_jitter001', 'phimoe', cfg=dict(router_jitter_noise=0.01), meta={'selection': {'jitter_eps': 0.01}}, E=16)
    case('fwd_phimoe_all_negative', 'phimoe', tweak=lambda m, r: (m.router.weight.data.mul_(0.1), m.router.weight.data[:, 0].sub_(1.0), m.router.weight.data.copy_(m.router.weight.data.to(F32).double())),
         shape_x=lambda x, r: np.concatenate([np.abs(x[..., :1]) + 1, x[..., 1:]], -1), note='all logits negative')
    case('fwd_switch', 'switch_transformers', k=1, E=4, cfg=dict(expert_capacity=64))
    case('fwd_switch_drop', 'switch_transformers', k=1, E=4)
    case('fwd_switch_drop_3seq', 'switch_transformers', k=1, E=4, T=129, B=3, bf16=True)
    case('fwd_switch_capacity0', 'switch_transformers', k=1, E=4, cfg=dict(expert_capacity=0), note='everything dropped')
    for nm, kw in [('', {}), ('_prioritized', dict(batch_prioritized_routing=True)), ('_before', dict(normalize_router_prob_before_dropping=True)),
                   ('_before_prioritized', dict(batch_prioritized_routing=True, normalize_router_prob_before_dropping=True)),
                   ('_nodrop', dict(moe_eval_capacity_token_fraction=1.0))]:
        case(f'fwd_nllb_moe{nm}', 'nllb_moe', E=4, cfg=dict(expert_capacity=12) | kw, T=66, B=2, note='HF router; experts applied as meant (5.23 experts loop is broken)')
    case('fwd_nllb_moe_token_dropout', 'nllb_moe', E=4, cfg=dict(expert_capacity=16, moe_token_dropout=0.2), bf16=True, note='eval scales by 1 - 0.2')
    FAM['switch_bias'] = dict(FAM['switch_transformers'], extra=lambda m, g: {'router_b': g(m.router.classifier.bias)})
    case('fwd_switch_router_bias', 'switch_bias', k=1, E=4, cfg=dict(router_bias=True), meta={'router': {'bias': True}})
    case('fwd_hy_v3_shared_bias', 'hy_v3', k=3, cfg=dict(mlp_bias=True), meta={'shared': {'bias': True}})
    case('fwd_deepseek_v4_shared_bias', 'deepseek_v4', k=3, cfg=dict(mlp_bias=True), meta={'shared': {'bias': True}}, bf16=True)
    case('fwd_gemma4', 'gemma4', k=3, tweak=lambda m, r: m.router.proj.weight.data.mul_(8)); case('fwd_gemma4_bf16', 'gemma4', bf16=True, T=130, tweak=lambda m, r: m.router.proj.weight.data.mul_(8))
    case('fwd_doge_hf_view', 'doge', E=16, k=4, T=33, note='HF view(2, T, n) mixes the logits of different tokens')
    case('fwd_doge_t1', 'doge', E=64, k=8, T=1)
    case('fwd_doge_even_2seq', 'doge', E=25, k=3, T=34, B=2)
    # training
    for n, kw in {'mixtral': {}, 'qwen3_moe': dict(k=3), 'qwen2_moe': dict(k=3), 'deepseek_v3': G | sc25, 'gpt_oss': dict(xs=2.0), 'llama4': dict(k=2), 'nemotron_h_latent': G | sc25,
                  'gemma4': dict(k=3, tweak=lambda m, r: m.router.proj.weight.data.mul_(8)), 'inkling': dict(k=3), 'kolibri1': {}, 'longcat_flash': dict(k=3), 'dbrx': dict(k=4, cfg=dict(p=2.0)), 'mistral4': G, 'deepseek_v4': dict(k=3),
                  'muse_spark': {}, 'laguna': {}, 'inkling2': {}, 'step3p7': {}, 'cohere2_moe': {}, 'ernie4_5_moe': {}, 'axk1': G | sc25, 'jetmoe': {}, 'phimoe': {},
                  'switch_transformers': dict(k=1, E=4), 'nllb_moe': dict(E=4, cfg=dict(expert_capacity=12)), 'minimax_m3_vl': {}, 'openai_privacy_filter': dict(meta={'weights': {'scale': 0.5}}),
                  'doge': dict(E=16, k=4, cfg=dict(norm_topk_prob=False)), 'hy_v3': {}, 'jamba': {}, 'deepseek_v2': dict(k=4), 'deepseek_v4_hash': dict(k=3), 'flint': {}}.items():
        kw = {**dict(H=32), **kw}
        case(f'train_{n}', n, kind='train', bf16=True, note='loss = sum(y*dy); selection is treated as constant', **kw)
    extra()
    print(len(done), 'cases written')

# ---- adversarial, ties, losses -----------------------------------------------------------------------------------------
def synthetic(cid, logits, k, meta, kind='adversarial', open_rows=(), note='', ex=None, H=32, I=16, x_edit=None, w_edit=None, bias=None, weights=None, xq=None):
    """given_logits through torch's own ops + Mixtral's expert loop"""
    if not cid.startswith(ONLY): return
    rng = np.random.default_rng(zlib.crc32(cid.encode()))
    M = mod('mixtral'); T, E = logits.shape
    e = M.MixtralExperts(config(E, k, H, I)).double(); fill(Wrap(None, experts=e), rng, True)
    x = rng.standard_normal((T, H)).astype(np.float32)
    if x_edit: x_edit(x)
    if w_edit: w_edit(e)
    z = torch.from_numpy(np.asarray(logits, np.float32).astype(np.float64))
    mt = base_meta(); deep(mt, meta)
    s = torch.softmax(z, -1) if mt['score'] == 'softmax' else torch.sigmoid(z)
    v = s if mt['selection']['on'] == 'score' else z
    if bias is not None: v = v + torch.from_numpy(bias.astype(np.float64)); mt['selection']['correction_bias'] = True
    ids = torch.topk(v, k)[1]
    w = torch.softmax(z.gather(1, ids), -1) if mt['weights']['from'] == 'softmax_selected_logits' else s.gather(1, ids)
    S = w.sum(-1, keepdim=True); rn = mt['weights']['renorm']
    if rn == 'sum': w = w / S
    elif rn == 'sum_plus_eps': w = w / (S + mt['weights']['eps'])
    elif rn == 'sum_clamp_min': w = w / S.clamp(min=mt['weights']['eps'])
    w = w * mt['weights']['scale']
    with torch.no_grad(): y = e(torch.from_numpy(x.astype(np.float64)), ids, w)
    ids = ids.numpy().copy(); w = w.numpy().copy(); y = y.numpy().copy()
    for r in open_rows: ids[r] = -1; w[r] = np.nan; y[r] = np.nan
    gu = e.gate_up_proj.detach().numpy()
    t = {'given_logits': ('F32', z.numpy()), 'topk_ids': ('I32', ids), 'topk_weights': ('F32', w), 'x': ('F32', x), 'y': ('F32', y),
         'w_gate': ('BF16', gu[:, :I]), 'w_up': ('BF16', gu[:, I:]), 'w_down': ('BF16', e.down_proj.detach().numpy())}
    if bias is not None: t['correction_bias'] = ('F32', bias)
    mt['router']['source'] = 'given_logits'; mt['selection']['top_k'] = k
    mt |= dict(E=E, H=H, I=I, T=T, k=k, bf16_weights=True, family='synthetic', id=cid, kind=kind, note=note, open_rows=list(open_rows))
    write(f'{OUT}/{cid}.safetensors', mt, t); done.append(cid)

def extra():
    inf, nan = math.inf, math.nan
    R = {'weights': {'renorm': 'sum'}}; SG = {'score': 'sigmoid', 'weights': {'renorm': 'sum_plus_eps', 'eps': 1e-20}}
    SS = {'selection': {'on': 'logit'}, 'weights': {'from': 'softmax_selected_logits'}}
    base = np.array([[1.25, -.25, .5, -1.]] * 6) ; base = np.stack([np.roll(base[i], i) for i in range(6)])
    def put(**rows):
        b = base.copy()
        for r, val in rows.items(): b[int(r[1:])] = val
        return b
    for nm, M_ in (('softmax', R), ('sigmoid', SG), ('selected', SS)):
        synthetic(f'adv_all_equal_{nm}', np.zeros((6, 4)), 2, M_, note='all logits equal: lowest indices')
        synthetic(f'adv_neg_inf_some_{nm}', put(r1=[-inf, .5, -inf, 1.], r3=[2., -inf, 0, 0]), 2, M_, note='-inf on unselected experts')
        synthetic(f'adv_nan_rows_{nm}', put(r0=[nan] * 4, r4=[0, nan, 1, 2]), 2, M_, open_rows=[0, 4])
        synthetic(f'adv_pos_inf_{nm}', put(r2=[inf, 0, 1, 2]), 2, M_, open_rows=[] if nm == 'sigmoid' else [2])
        synthetic(f'adv_all_neg_inf_{nm}', put(r2=[-inf] * 4), 2, M_, open_rows=[] if nm == 'sigmoid' else [2])
        synthetic(f'adv_huge_{nm}', put(r0=[3e38, -3e38, 1e30, 0], r1=[1e4, 1e4, -1e4, 0], r2=[-3e38] * 4), 2, M_, note='finite but huge')
        synthetic(f'adv_only_one_finite_{nm}', put(r5=[-inf, -inf, 3., -inf]), 2, M_, open_rows=[5] if nm == 'x' else [])
    def xnan(x): x[2, 5] = nan; x[4, 0] = inf
    synthetic('adv_nan_token', base, 2, R, open_rows=[2, 4], x_edit=xnan, note='a NaN token must not leak')
    def wnan(e): e.gate_up_proj.data[3] = nan; e.down_proj.data[3] = inf
    b50 = base.copy(); b50[:, 3] = -50; b50[:, :3] = [[1, .5, 0], [0, 1, .5], [.5, 0, 1]] * 2
    synthetic('adv_unselected_nan_weights_sigmoid', b50, 2, SG, w_edit=wnan)
    synthetic('adv_zero_rows', np.zeros((0, 4)), 2, R, note='T = 0') if False else None
    # ties: exact logits, expected by the rule
    rng = np.random.default_rng(5); q = np.round(rng.standard_normal((33, 8)) * 2) / 2
    synthetic('tie_logits_softmax', q, 3, R, kind='tie', note='exact ties'); synthetic('tie_logits_sigmoid', q, 3, SG, kind='tie')
    synthetic('tie_logits_selected', q, 3, SS, kind='tie')
    synthetic('tie_biased_logit', q, 3, {'score': 'sigmoid', 'selection': {'on': 'logit'}, 'weights': {'renorm': 'sum'}}, kind='tie',
              bias=np.array([0, .5, 0, -.5, 1, 0, .5, 0], np.float32), note='bias on the logit creates exact ties')
    def tie_router(mw):
        def f(m, r):
            w = sub(m, mw); a = np.round(r.standard_normal(tuple(w.shape)) * 4) / 32
            a[8:] = a[:8]; w.data = torch.from_numpy(a)
            for n, b in m.named_buffers():
                if 'correction' in n: v = np.round(r.standard_normal(16)) / 16; v[8:] = v[:8]; b.data = torch.from_numpy(v)
        return f
    xq = lambda x, r: np.round(x * 4) / 4
    for n, mw, kw in (('mixtral', 'gate.weight', dict(E=16, k=3)), ('deepseek_v3', 'gate.weight', dict(E=16, k=4, groups=(4, 2))), ('mistral4', 'gate.weight', dict(E=16, k=4, groups=(4, 2))),
                      ('granitemoe', 'router.weight', dict(E=16, k=3)), ('phimoe', 'router.weight', dict(E=16)), ('kolibri1', 'gate.weight', dict(E=16, k=3)),
                      ('deepseek_v4', 'gate.weight', dict(E=16, k=3)), ('switch_transformers', 'router.classifier.weight', dict(E=16, k=1))):
        case(f'tie_{n}', n, H=32, I=16, bf16=True, kind='tie', tweak=tie_router(mw), shape_x=xq, note='experts e and e+8 have the same router row', **kw)
    # losses
    lb = mod('mixtral').load_balancing_loss_func
    for cid, L, B, S, E, k, masked in [('loss_lb_2layers', 2, 1, 33, 8, 2, False), ('loss_lb_3layers_k4', 3, 1, 40, 16, 4, False), ('loss_lb_2layers_masked', 2, 2, 20, 8, 2, True),
                                       ('loss_lb_1layer_k1', 1, 1, 33, 4, 1, False), ('loss_lb_masked_1layer', 1, 3, 11, 8, 2, True)]:
        if not cid.startswith(ONLY): continue
        rng = np.random.default_rng(zlib.crc32(cid.encode()))
        z = torch.from_numpy((rng.standard_normal((L, B * S, E)) * 1.5 + 0.3 * rng.standard_normal(E)).astype(np.float32).astype(np.float64)).requires_grad_(True)
        mask = None
        if masked:
            mask = np.ones((B, S)); [mask[b].__setitem__(slice(S - 3 * b - 2, None), 0) for b in range(B)]
        v = lb(tuple(z), E, k, None if mask is None else torch.from_numpy(mask)); v.backward()
        t = {'logits': ('F32', z.detach().numpy()), 'grad_logits': ('F32', z.grad.numpy()), 'value_f64': ('F64', np.array([float(v.detach())]))}
        if masked: t['attention_mask'] = ('I32', mask)
        write(f'{OUT}/{cid}.safetensors', {"format": "moe-case-1", "hf_source": "models/mixtral/modeling_mixtral.py:474", "id": cid, "kind": "loss", "loss_kind": "load_balancing",
            "masked": masked, "note": "", "num_layers": L, "rtol": 2e-5, "top_k": k, "value": float(v.detach())}, t); done.append(cid)
    zl = mod('switch_transformers').router_z_loss_func
    for cid, shp, sc in [('loss_z_1group', (1, 33, 4), 1.0), ('loss_z_large', (2, 16, 8), 40.0)]:
        if not cid.startswith(ONLY): continue
        z = torch.from_numpy((np.random.default_rng(zlib.crc32(cid.encode())).standard_normal(shp) * sc).astype(np.float32).astype(np.float64)).requires_grad_(True)
        v = zl(z); v.backward()
        write(f'{OUT}/{cid}.safetensors', {"format": "moe-case-1", "hf_source": "models/switch_transformers/modeling_switch_transformers.py:880", "id": cid, "kind": "loss",
            "loss_kind": "router_z", "note": "", "rtol": 2e-5, "value": float(v.detach())},
            {'logits': ('F32', z.detach().numpy()), 'grad_logits': ('F32', z.grad.numpy()), 'value_f64': ('F64', np.array([float(v.detach())]))}); done.append(cid)

m_H = [64]
if __name__ == '__main__': main()
