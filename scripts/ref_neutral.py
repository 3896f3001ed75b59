#!/usr/bin/env python3
"""Independent numpy float64 re-implementation of the neutral case format (README.md, steps 1..8).
Reads only the case file.  usage: ref_neutral.py FILE...   (exit 1 if any file is not reproduced)"""
import json, math, struct, sys
import numpy as np
DT = float                     # set to np.float32 by --f32 (is the file's rtol reachable in single precision?)
NP = {'F32': '<f4', 'F64': '<f8', 'I32': '<i4', 'I64': '<i8'}

def load(path):
    b = open(path, 'rb').read()
    n = struct.unpack('<Q', b[:8])[0]
    h = json.loads(b[8:8 + n])
    meta = json.loads(h.pop('__metadata__')['case'])
    d = {}
    for k, v in h.items():
        a, e = v['data_offsets']
        raw = b[8 + n + a:8 + n + e]
        if v['dtype'] == 'BF16':
            x = (np.frombuffer(raw, '<u2').astype('<u4') << 16).view('<f4')
        else:
            x = np.frombuffer(raw, NP[v['dtype']])
        d[k] = x.reshape(v['shape'])
    return meta, d

_erf = np.vectorize(math.erf, otypes=[float])
def erf(v): return _erf(v).astype(v.dtype)

def sigmoid(z):
    z = np.asarray(z)
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1 / (1 + e), e / (1 + e))

def softmax(z):
    m = z.max(-1, keepdims=True)
    e = np.exp(z - m)
    return e / e.sum(-1, keepdims=True)

def softplus(z):
    return np.log1p(np.exp(-np.abs(z))) + np.maximum(z, 0)

def act(name, g):
    if name in ('silu', 'swish'): return g * sigmoid(g)
    if name == 'gelu': return 0.5 * g * (1 + erf(g / math.sqrt(2)))
    if name in ('gelu_tanh', 'gelu_pytorch_tanh'):
        return 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g ** 3)))
    if name == 'relu': return np.maximum(g, 0)
    if name == 'relu2': return np.maximum(g, 0) ** 2
    raise KeyError(name)

def topk(v, k):
    """ids of the k largest, ties to the lower index, NaN last"""
    return np.argsort(-v, axis=-1, kind='stable')[..., :k]

def glu(spec, g, u):
    """spec: the experts or shared object; u is the only input when not gated"""
    if not spec['gated']: return act(spec['act'], u)
    L = spec['limit']
    c = spec['clamp']
    if c == 'none': return act(spec['act'], g) * u
    if c == 'pre': return act(spec['act'], np.minimum(g, L)) * np.clip(u, -L, L)
    if c == 'post': return np.minimum(act(spec['act'], g), L) * np.clip(u, -L, L)
    if c == 'oai':
        g = np.minimum(g, L); u = np.clip(u, -L, L)
        return (u + 1) * g * sigmoid(spec['alpha'] * g)
    if c == 'softcap':
        G, U = spec['gate_cap'], spec['up_cap']
        return G * np.tanh(g / G) * sigmoid(g) * U * np.tanh(u / U)
    raise KeyError(c)

def route(m, d, x):
    r, sel, wt = m['router'], m['selection'], m['weights']
    T, k, E = m['T'], sel['top_k'], m['E']
    f = lambda n: d[n].astype(DT)
    # 1 logits
    if r['source'] == 'given_logits':
        z = f('given_logits')
    else:
        xi = x
        if r['input_norm'] == 'rms_scaled':
            xi = x / np.sqrt((x * x).mean(-1, keepdims=True) + r['input_norm_eps']) * f('router_in_scale') * r['input_mul']
        z = xi @ f('router_w').T
    if r['bias']: z = z + f('router_b')
    z = z * r['logit_mul']
    c = r['logit_softcap']
    if c > 0: z = c * np.tanh(z / c)
    meth = sel['method']
    if meth == 'product_key':
        n = z.shape[1] // 2
        flat = np.ascontiguousarray(z).reshape(2 * T, n)          # HF: view(2, T, n)
        pair = (flat[:T, :, None] + flat[T:, None, :]).reshape(T, n * n)
        ids = topk(pair, k)
        w = softmax(np.take_along_axis(pair, ids, -1))
        return z, ids, w * wt['scale'], None
    if meth == 'sparsemixer':
        eps = sel['jitter_eps']
        i1 = z.argmax(-1)[:, None]
        def pick(zz, i):
            mx = np.take_along_axis(zz, i, -1)
            with np.errstate(invalid='ignore', divide='ignore'):
                mask = (mx - z) / np.maximum(np.abs(z), mx) > 2 * eps
            return np.take_along_axis(softmax(np.where(mask, -np.inf, zz)), i, -1)
        w1 = pick(z, i1)
        z2 = z.copy(); np.put_along_axis(z2, i1, -np.inf, -1)
        i2 = z2.argmax(-1)[:, None]
        w2 = pick(z2, i2)
        return z, np.concatenate([i1, i2], 1), np.concatenate([w1, w2], 1) * wt['scale'], None
    # 2 score
    with np.errstate(invalid='ignore', over='ignore'):
        s = {'softmax': softmax, 'sigmoid': sigmoid, 'sqrtsoftplus': lambda q: np.sqrt(softplus(q)),
             'identity': lambda q: q}[m['score']](z)
    if meth in ('capacity_top1', 'capacity_top2'):
        cap = m['capacity']; C = cap['per_expert']; scope = cap.get('scope_tokens') or T
        ids = np.full((T, k), -1); w = np.zeros((T, k), DT)
        for a in range(0, T, scope or 1):
            rows = np.arange(a, min(a + scope, T))
            p = s[rows]
            e1 = p.argmax(-1)
            order = np.arange(len(rows))
            if cap.get('batch_prioritized'): order = np.argsort(-p.max(-1), kind='stable')
            cnt = np.zeros(p.shape[1], int); keep1 = np.zeros(len(rows), bool)
            for t in order:
                keep1[t] = cnt[e1[t]] < C; cnt[e1[t]] += 1
            if meth == 'capacity_top1':
                p1 = p[order * 0 + np.arange(len(rows)), e1]
                ids[rows, 0] = np.where(keep1, e1, -1); w[rows, 0] = np.where(keep1, p1, 0)
                continue
            z2 = z[rows].copy(); z2[np.arange(len(rows)), e1] = -np.inf
            e2 = z2.argmax(-1)
            keep2 = np.zeros(len(rows), bool)
            for t in order:                      # cnt already holds all first choices
                keep2[t] = cnt[e2[t]] < C; cnt[e2[t]] += 1
            ar = np.arange(len(rows)); p1, p2 = p[ar, e1], p[ar, e2]
            if not cap['normalize_before_drop']:
                p1, p2 = p1 * keep1, p2 * keep2
            den = np.maximum(p1 + p2, cap['eps'])
            w[rows, 0] = p1 / den * keep1; w[rows, 1] = p2 / den * keep2
            ids[rows, 0] = np.where(keep1, e1, -1); ids[rows, 1] = np.where(keep2, e2, -1)
        return z, ids, w * wt['scale'], None
    # 3 selection
    nsh = m['shared']['n'] if wt['from'] == 'joint_with_shared' else 0
    zr, sr = (z[:, :-nsh], s[:, :-nsh]) if nsh else (z, s)
    if meth == 'given':
        ids = d['given_ids'].astype(int)
    else:
        v = sr if sel['on'] == 'score' else zr
        if sel['correction_bias']: v = v + f('correction_bias')
        if sel['group_score'] != 'none':
            G = sel['n_group']; vg = v.reshape(T, G, v.shape[1] // G)
            gs = vg.max(-1) if sel['group_score'] == 'max' else np.sort(vg, -1)[..., -2:].sum(-1)
            keep = np.zeros((T, G), bool)
            np.put_along_axis(keep, topk(gs, sel['topk_group']), True, -1)
            v = np.where(np.repeat(keep, vg.shape[-1], 1), v, -np.inf if sel['masked_fill'] == 'neg_inf' else 0.0)
        ids = topk(v, k)
    # 4 weights
    gam = None
    if wt['from'] == 'score': w = np.take_along_axis(sr, ids, -1)
    elif wt['from'] == 'softmax_selected_logits': w = softmax(np.take_along_axis(zr, ids, -1))
    elif wt['from'] == 'joint_with_shared':
        j = np.concatenate([np.take_along_axis(zr, ids, -1), z[:, -nsh:]], 1)
        ls = -softplus(-j)
        j = softmax(ls)
        w, gam = j[:, :k], j[:, k:] * wt['scale']
    else: raise KeyError(wt['from'])
    rn = wt['renorm']
    if wt['from'] != 'joint_with_shared':
        with np.errstate(invalid='ignore', divide='ignore'):
            S = w.sum(-1, keepdims=True)
            if rn == 'sum': w = w / S
            elif rn == 'sum_plus_eps': w = w / (S + wt['eps'])
            elif rn == 'sum_clamp_min': w = w / np.maximum(S, wt['eps'])
            elif rn == 'pnorm': w = w / (np.abs(w) ** wt['p']).sum(-1, keepdims=True) ** (1 / wt['p'])
            elif rn != 'none': raise KeyError(rn)
    w = w * wt['scale']
    if wt['per_expert_scale']: w = w * f('per_expert_scale')[ids]
    if m['null_experts']['kind'] == 'zero': w = np.where(ids >= E, 0.0, w)
    return z, ids, w, gam

def rms(v, eps): return v / np.sqrt((v * v).mean(-1, keepdims=True) + eps)

def run(m, d):
    f = lambda n: d[n].astype(DT)
    x = f('x'); T, H = x.shape; E = m['E']; ex = m['experts']; sh = m['shared']
    z, ids, w, gam = route(m, d, x)
    xin = x
    if ex['latent']:
        xin = x @ f('latent_in_w').T
        if ex['latent_in_norm'] != 'none':
            lw = f('latent_in_norm_w')
            xin = rms(xin, ex['latent_in_norm_eps']) * (1 + lw if 'center' in ex['latent_in_norm'] else lw)
    y = np.zeros_like(xin); ident = np.zeros_like(x)
    for e in np.unique(ids):
        if e < 0: continue
        t, p = np.nonzero(ids == e); ww = w[t, p][:, None]
        if e >= E:
            if m['null_experts']['kind'] == 'identity': ident[t] += ww * x[t]
            continue
        xe = xin[t]
        if ex['apply_weight_on'] == 'input': xe = xe * ww
        u = xe @ d['w_up'][e].astype(DT).T
        g = xe @ d['w_gate'][e].astype(DT).T if ex['gated'] else None
        if ex['bias']:
            u = u + f('b_up')[e]
            if g is not None: g = g + f('b_gate')[e]
        o = glu(ex, g, u) @ d['w_down'][e].astype(DT).T
        if ex['bias']: o = o + f('b_down')[e]
        if ex['post_norm'] != 'none':
            pw = f('expert_post_norm_w')
            o = rms(o * (1 + pw if 'center' in ex['post_norm'] else pw), ex['post_norm_eps'])  # input scaled
        if ex['apply_weight_on'] == 'output': o = o * ww
        y[t] += o
    if ex['latent']: y = y @ f('latent_out_w').T
    y = (y + ident) * m['routed_out_scale']
    y_routed = y
    if sh['n'] > 0:
        u = x @ f('shared_w_up').T
        g = x @ f('shared_w_gate').T if sh['gated'] else None
        if sh['bias']:
            u = u + f('shared_b_up')
            if g is not None: g = g + f('shared_b_gate')
        h = glu(sh, g, u)
        if sh['combine'] == 'router_weighted': h = h * np.repeat(gam, h.shape[1] // gam.shape[1], 1)
        s = h @ f('shared_w_down').T
        if sh['bias']: s = s + f('shared_b_down')
        if sh['combine'] == 'sigmoid_gate': s = s * sigmoid(x @ f('shared_gate_w').T)
        y = y + s
        if sh['combine'] == 'average': y = y / 2
    if m['out_norm'] != 'none': y = rms(y, m['out_norm_eps']) * f('out_norm_w')
    if m['out_bias']: y = y + f('out_bias')
    return dict(router_logits=z, topk_ids=ids, topk_weights=w, y=y, y_routed=y_routed)

def loss(m, d):
    z = d['logits'].astype(float); E = z.shape[-1]
    if m['loss_kind'] == 'router_z':
        mx = z.max(-1); lse = mx + np.log(np.exp(z - mx[..., None]).sum(-1))
        return (lse ** 2).mean(), 2 * lse[..., None] * softmax(z) / lse.size
    p = softmax(z); k = m['top_k']; L, T = z.shape[:2]
    mask = np.ones(T)
    if m.get('masked'): mask = d['attention_mask'].reshape(-1).astype(DT)
    hot = np.zeros_like(p); np.put_along_axis(hot, topk(p, k), 1.0, -1)
    N = L * mask.sum(); mm = mask[None, :, None]
    fe = (hot * mm).sum((0, 1)) / N; P = (p * mm).sum((0, 1)) / N
    a = mm * E * fe / N
    return E * (fe * P).sum(), p * (a - (a * p).sum(-1, keepdims=True))

def err(a, b, rows):
    if not rows.any(): return 0.0
    a, b = a[rows], b[rows]
    if not np.array_equal(np.isfinite(a), np.isfinite(b)): return math.inf
    s = np.abs(b).max(initial=0) or 1.0
    return float(np.abs(a - b).max(initial=0) / s)

def margin(m, d):
    """smallest gap between neighbours among the k+1 best selection values (and group scores): below ~1e-5 f32 may differ"""
    sel = m['selection']; k = sel['top_k']; meth = sel['method']
    with np.errstate(all='ignore'): z = route(m, d, d['x'].astype(float))[0]
    if meth == 'given': return math.inf
    gap = lambda v, n: float(np.min(-np.diff(np.sort(v, -1)[:, ::-1][:, :n + 1], axis=-1), initial=math.inf))
    if meth == 'product_key':
        T = m['T']; n = z.shape[1] // 2; f = np.ascontiguousarray(z).reshape(2 * T, n)
        return gap((f[:T, :, None] + f[T:, None, :]).reshape(T, -1), k)
    if meth == 'sparsemixer':
        g = gap(z, 2); s = np.sort(z, -1)[:, ::-1]
        for j in (0, 1):
            r = (s[:, j:j + 1] - z) / np.maximum(np.abs(z), s[:, j:j + 1])
            g = min(g, float(np.abs(r - 2 * sel['jitter_eps']).min()))
        return g
    if meth.startswith('capacity'):
        g = gap(z, k)
        if m['capacity'].get('batch_prioritized'): g = min(g, float(np.diff(np.sort(softmax(z).max(-1))).min(initial=math.inf)))
        return g
    n = m['shared']['n'] if m['weights']['from'] == 'joint_with_shared' else 0
    v = z[:, :-n] if n else z
    if sel['on'] == 'score': v = {'softmax': softmax, 'sigmoid': sigmoid, 'sqrtsoftplus': lambda q: np.sqrt(softplus(q)), 'identity': lambda q: q}[m['score']](v if not n else v)
    if sel['correction_bias']: v = v + d['correction_bias'].astype(float)
    g = math.inf
    if sel['group_score'] != 'none':
        G = sel['n_group']; vg = v.reshape(len(v), G, -1)
        gs = vg.max(-1) if sel['group_score'] == 'max' else np.sort(vg, -1)[..., -2:].sum(-1)
        if sel['topk_group'] < G:
            q = np.sort(gs, -1)[:, ::-1]; g = float((q[:, sel['topk_group'] - 1] - q[:, sel['topk_group']]).min())
        keep = np.zeros((len(v), G), bool); np.put_along_axis(keep, topk(gs, sel['topk_group']), True, -1)
        v = np.where(np.repeat(keep, vg.shape[-1], 1), v, -1e9 - np.arange(v.shape[1]) if sel['masked_fill'] == 'neg_inf' else 0.0)
    return min(g, gap(v, k))

def fd(m, d, n=2, h=1e-6):
    """worst relative error of grad_* against a central difference of sum(y*dy) along random directions"""
    rng = np.random.default_rng(1); worst = 0.0; ids0 = run(m, d)['topk_ids']
    for k in [k for k in d if k.startswith('grad_')]:
        t = k[5:]; base = d[t].astype(DT); g = d[k].astype(DT)
        for _ in range(n):
            v = rng.standard_normal(base.shape); v /= np.linalg.norm(v)
            L = []
            for sgn in (1, -1):
                o = run(m, {**d, t: base + sgn * h * v})
                if not np.array_equal(o['topk_ids'], ids0): L = None; break
                L.append((o['y'] * d['dy'].astype(DT)).sum())
            if L is None: continue
            num = (L[0] - L[1]) / (2 * h)
            worst = max(worst, abs(num - (g * v).sum()) / (np.linalg.norm(g) + 1e-12))
    return worst

def check(path, verbose=True):
    m, d = load(path); f32 = DT is not float
    if m['kind'] == 'loss':
        v, g = loss(m, d)
        e = {'value': abs(v - d['value_f64'][0]) / abs(d['value_f64'][0]),
             'grad': float(np.abs(g - d['grad_logits']).max() / np.abs(d['grad_logits']).max())}
        ok = max(e.values()) < 1e-6
    else:
        with np.errstate(all='ignore'): o = run(m, d)
        rows = np.ones(m['T'], bool); rows[m.get('open_rows', [])] = False
        e = {'ids': int((o['topk_ids'][rows] != d['topk_ids'][rows]).sum())}
        for k in ('router_logits', 'topk_weights', 'y', 'y_routed'):
            if k in d: e[k] = err(o[k], d[k].astype(DT), rows)
        if 'y_f64' in d: e['y_f64'] = err(o['y'], d['y_f64'], rows)
        ok = e['ids'] == 0 and all(v < (1e-11 if k == 'y_f64' else 5e-7) for k, v in e.items())
        if f32:
            ok = e['ids'] == 0 and all(v <= m['rtol'] for k, v in e.items() if k != 'ids')
        elif any(k.startswith('grad_') for k in d):
            e['fd'] = fd(m, d); ok = ok and e['fd'] < 1e-6
    if verbose: print('ok ' if ok else 'BAD', m['id'], {k: (v if k == 'ids' else f'{v:.1e}') for k, v in e.items()})
    return ok

if __name__ == '__main__':
    a = sys.argv[1:]
    if '--f32' in a: a.remove('--f32'); DT = np.float32
    r = [check(p) for p in a]
    print(f'{sum(r)} passed, {len(r) - sum(r)} failed')
    sys.exit(0 if all(r) else 1)
