#!/usr/bin/env python3
"""Writes random layers in the neutral case format: any combination of fields that the format allows, not only those that models have.

What they must give is computed by ref_neutral.py in float64. Needs numpy only.
usage: fuzz_cases.py OUTDIR [COUNT] [FIRST-SEED]"""
import json, math, os, struct, sys
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import numpy as np                                                     # noqa: E402
import ref_neutral                                                     # noqa: E402


def bf16(a):
    """Rounded to what bf16 holds, as f32."""
    u = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return ((u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000).astype(np.uint32).view(np.float32)


def write(path, meta, tensors):
    """tensors: name -> array; bf16 weights where the metadata says so"""
    header, offset, blobs = {'__metadata__': {'case': json.dumps(meta, sort_keys=True)}}, 0, []
    for name, a in sorted(tensors.items(), key=lambda item: (item[1].dtype != np.float64, item[0])):
        if meta['bf16_weights'] and name.removeprefix('shared_') in ('w_gate', 'w_up', 'w_down'):
            kind, raw = 'BF16', (np.ascontiguousarray(a, '<f4').view('<u4') >> 16).astype('<u2').tobytes()
        elif a.dtype == np.float64 and name.endswith('_f64'):
            kind, raw = 'F64', a.astype('<f8').tobytes()
        elif a.dtype.kind == 'i':
            kind, raw = 'I32', a.astype('<i4').tobytes()
        else:
            kind, raw = 'F32', a.astype('<f4').tobytes()
        header[name] = {'dtype': kind, 'shape': list(a.shape), 'data_offsets': [offset, offset + len(raw)]}
        offset += len(raw)
        blobs.append(raw)
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as f:
        f.write(struct.pack('<Q', len(text)) + text + b''.join(blobs))


class Draw:
    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def one(self, *options):
        return options[self.rng.integers(len(options))]

    def maybe(self, p=0.5):
        return bool(self.rng.random() < p)

    def normal(self, *shape, scale=1.0):
        return (self.rng.standard_normal(shape) * scale).astype(np.float32)


def mlp(draw, bias):
    """The fields of an MLP."""
    gated = draw.maybe(0.8)
    m = dict(act=draw.one('silu', 'gelu', 'gelu_tanh', 'relu', 'relu2'), gated=gated, bias=bias, clamp='none', limit=0.0, alpha=0.0)
    if gated:
        m['clamp'] = draw.one('none', 'none', 'pre', 'post', 'oai')
        if m['clamp'] != 'none':
            m |= dict(limit=draw.one(0.3, 0.7, 7.0), alpha=draw.one(1.0, 1.702))
    return m


def selection(draw, E, nulls):
    """Selection, weights, score and capacity, and K."""
    method = draw.one('topk', 'topk', 'topk', 'topk', 'given', 'sparsemixer', 'capacity_top1', 'capacity_top2', 'product_key')
    if E < 2 and method in ('sparsemixer', 'capacity_top2') or math.isqrt(E) ** 2 != E and method == 'product_key':
        method = 'topk'
    if method != 'topk': nulls = 0
    sel = dict(correction_bias=False, group_score='none', masked_fill=draw.one('neg_inf', 'zero'), method=method, n_group=1, on='score',
               top_k=1, topk_group=1)
    w = {'eps': 0.0, 'from': 'score', 'p': 1.0, 'per_expert_scale': nulls == 0 and draw.maybe(0.3), 'renorm': 'none', 'scale': draw.one(1.0, 2.5)}
    score, capacity = draw.one('softmax', 'sigmoid', 'sqrtsoftplus', 'softmax', 'sigmoid', 'identity'), None
    if method == 'sparsemixer':
        sel |= dict(top_k=2, jitter_eps=draw.one(0.01, 0.1))
        w |= {'from': 'sparsemixer', 'per_expert_scale': False}
    elif method == 'product_key':
        sel['top_k'] = int(draw.rng.integers(1, E + 1))
        w |= {'from': 'softmax_selected_logits', 'per_expert_scale': False}
    elif method.startswith('capacity'):
        score = 'softmax'
        w['per_expert_scale'] = False
        sel['top_k'] = int(method[-1])
        capacity = dict(per_expert=draw.one(0, 2, 5, 100), scope_tokens=draw.one(0, 5, 16))
        if method == 'capacity_top2':
            capacity |= dict(batch_prioritized=draw.maybe(), normalize_before_drop=draw.maybe(), eps=2.220446049250313e-16)
    else:
        groups = method == 'topk' and (E + nulls) % 4 == 0 and draw.maybe()
        sel['on'] = draw.one('score', 'logit')
        sel['correction_bias'] = method == 'topk' and draw.maybe()
        most = E + nulls
        if groups:
            kept = draw.one(1, 2, 4)
            sel |= dict(group_score=draw.one('max', 'top2_sum'), n_group=4, topk_group=kept)
            most = (E + nulls) // 4 * kept
        sel['top_k'] = int(draw.rng.integers(1, most + 1))
        if draw.maybe(0.3):
            w['from'] = 'softmax_selected_logits'
        w |= dict(renorm=draw.one('none', 'sum', 'sum_plus_eps', 'sum_clamp_min', 'pnorm'), eps=draw.one(0.0, 1e-20, 1e-3), p=draw.one(1.0, 2.0, 3.0))
        if score == 'identity' and w['renorm'] != 'pnorm':
            w['renorm'] = 'none'                 # a sum of logits may be near zero: nothing says how close f32 must come
    return sel, w, score, capacity


def metadata(draw, seed):
    E = draw.one(1, 2, 3, 4, 8, 12, 40, 100)
    T, H = draw.one(0, 1, 2, 7, 33), draw.one(1, 5, 16, 50)
    nulls = draw.one(0, 0, 0, 1, 4)
    sel, w, score, capacity = selection(draw, E, nulls)
    if sel['method'] != 'topk':
        nulls = 0
    kind = draw.one('identity', 'zero') if nulls else 'none'
    on_input, latent = draw.maybe(0.2), draw.maybe(0.2)
    experts = mlp(draw, draw.maybe(0.3)) | dict(apply_weight_on='input' if on_input else 'output', latent=latent, latent_in_norm='none',
              latent_in_norm_eps=0.0, post_norm='none', post_norm_eps=0.0, gate_cap=0.0, up_cap=0.0)
    if experts['gated'] and draw.maybe(0.15):
        experts |= dict(act='silu', clamp='softcap', gate_cap=1.0, up_cap=1.5)
    if latent and draw.maybe():
        experts |= dict(latent_in_norm='rms_centered', latent_in_norm_eps=1e-5)
    if draw.maybe(0.15):
        experts |= dict(post_norm='rms_input_scaled_centered', post_norm_eps=1e-3)
    joint = sel['method'] == 'topk' and score == 'sigmoid' and nulls == 0 and sel['group_score'] == 'none' and draw.maybe(0.3)
    shared = mlp(draw, draw.maybe(0.2)) | dict(combine='add', n=0)
    if joint:
        w |= {'from': 'joint_with_shared', 'renorm': 'none', 'per_expert_scale': False}
        shared |= dict(combine='router_weighted', n=draw.one(1, 2), bias=False)
    elif draw.maybe():
        shared |= dict(combine=draw.one('add', 'sigmoid_gate', 'average'), n=draw.one(1, 2))
    source = draw.one('linear', 'linear', 'given_logits')
    router = dict(bias=source == 'linear' and draw.maybe(0.3), input_mul=1.0, input_norm='none', input_norm_eps=0.0, source=source,
                  logit_mul=draw.one(1.0, 1.0, 0.7), logit_softcap=draw.one(0.0, 0.0, 2.0))
    if source == 'linear' and draw.maybe(0.2):
        router |= dict(input_norm='rms_scaled', input_norm_eps=1e-6, input_mul=0.25)
    return dict(format='moe-case-1', id=f'fuzz_{seed:05}', kind='forward', E=E, T=T, H=H, I=draw.one(1, 3, 8, 21), k=sel['top_k'],
                bf16_weights=draw.maybe(), capacity=capacity, experts=experts, null_experts=dict(kind=kind, n=nulls), out_bias=draw.maybe(0.2),
                out_norm='rms' if draw.maybe(0.2) else 'none', out_norm_eps=1e-5, routed_out_scale=draw.one(1.0, 1.0, 0.6), router=router,
                rtol=5e-5, score=score, selection=sel, shared=shared, weights=w)


def tensors(draw, m):
    E, T, H, I, sel, sh, ex = m['E'], m['T'], m['H'], m['I'], m['selection'], m['shared'], m['experts']
    L = draw.one(3, 8, 24) if ex['latent'] else H
    R = E + m['null_experts']['n'] + (sh['n'] if m['weights']['from'] == 'joint_with_shared' else 0)
    if sel['method'] == 'product_key': R = 2 * math.isqrt(E)
    matrix = (lambda *s: bf16(draw.normal(*s, scale=s[-1] ** -0.5))) if m['bf16_weights'] else (lambda *s: draw.normal(*s, scale=s[-1] ** -0.5))
    d = {'x': draw.normal(T, H), 'w_up': matrix(E, I, L), 'w_down': matrix(E, L, I)}
    if m['router']['source'] == 'linear':
        d['router_w'] = draw.normal(R, H, scale=2 * H ** -0.5)
    else:
        d['given_logits'] = draw.normal(T, R, scale=2)
    if m['router']['bias']: d['router_b'] = draw.normal(R)
    if m['router']['input_norm'] != 'none': d['router_in_scale'] = 4 + draw.normal(H)
    if sel['correction_bias']: d['correction_bias'] = draw.normal(E + m['null_experts']['n'], scale=0.3)
    if sel['method'] == 'given': d['given_ids'] = np.stack([draw.rng.permutation(E)[:sel['top_k']] for _ in range(T)] or [np.zeros(sel['top_k'])])[:T].astype(np.int32)
    if m['weights']['per_expert_scale']: d['per_expert_scale'] = 1 + draw.normal(E, scale=0.3)
    if ex['gated']: d['w_gate'] = matrix(E, I, L)
    if ex['bias']:
        d |= {'b_up': draw.normal(E, I), 'b_down': draw.normal(E, L)} | ({'b_gate': draw.normal(E, I)} if ex['gated'] else {})
    if ex['latent']: d |= {'latent_in_w': draw.normal(L, H, scale=H ** -0.5), 'latent_out_w': draw.normal(H, L, scale=L ** -0.5)}
    if ex['latent_in_norm'] != 'none': d['latent_in_norm_w'] = draw.normal(L, scale=0.1)
    if ex['post_norm'] != 'none': d['expert_post_norm_w'] = draw.normal(L, scale=0.1)
    if sh['n']:
        S = sh['n'] * draw.one(1, 4, 9)
        d |= {'shared_w_up': matrix(S, H), 'shared_w_down': matrix(H, S)} | ({'shared_w_gate': matrix(S, H)} if sh['gated'] else {})
        if sh['bias']: d |= {'shared_b_up': draw.normal(S), 'shared_b_down': draw.normal(H)} | ({'shared_b_gate': draw.normal(S)} if sh['gated'] else {})
        if sh['combine'] == 'sigmoid_gate': d['shared_gate_w'] = draw.normal(1, H, scale=H ** -0.5)
    if m['out_norm'] != 'none': d['out_norm_w'] = 1 + draw.normal(H, scale=0.1)
    if m['out_bias']: d['out_bias'] = draw.normal(H)
    return d


def expect(m, d):
    """The tensors with what they must give; None where f32 might choose other experts."""
    if m['T']:
        with np.errstate(all='ignore'):
            if not ref_neutral.margin(m, d) > 1e-5: return None
    with np.errstate(all='ignore'):
        o = ref_neutral.run(m, d)
    if not all(np.isfinite(v).all() for v in o.values()): return None
    f = np.float32
    return d | {'router_logits': o['router_logits'].astype(f), 'topk_ids': o['topk_ids'].astype(np.int32), 'topk_weights': o['topk_weights'].astype(f),
                'y': o['y'].astype(f), 'y_f64': o['y'], 'y_routed': o['y_routed'].astype(f)}


def main():
    out, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 300
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    os.makedirs(out, exist_ok=True)
    written = 0
    while written < count:
        draw = Draw(seed)
        m = metadata(draw, seed)
        d = expect(m, tensors(draw, m))
        seed += 1
        if d is None: continue
        write(f"{out}/{m['id']}.safetensors", m, d)
        written += 1
    print(f'{written} cases written, seeds below {seed}')


if __name__ == '__main__':
    main()
