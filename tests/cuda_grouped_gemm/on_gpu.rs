//! The GPU's answer: operands on the device in every layout, and the launch.

use super::*;

/// Matrices of `n` rows as they lie in memory, all experts' one after another: gate and up, which may be one, with elements from row to row and where up begins.
pub fn lay_out(case: &Case, data: &Data) -> (Vec<Vec<u8>>, usize, usize) {
    let (e, n, k, size) = (case.counts.len(), case.n, case.k, case.w.size());
    let (gate, up) = (data.gate.bytes(), data.up.bytes());
    let row = |v: &[u8], r: usize| v[r * k * size..][..k * size].to_vec();
    if case.layout.stacked() == Layout::Separate {
        let stride = k.next_multiple_of(8) + 8;
        let spread = |v: &[u8]| {
            let mut all = vec![0xff; e * n * stride * size];
            for i in 0..e * n {
                all[i * stride * size..][..k * size].copy_from_slice(&row(v, i));
            }
            all
        };
        return (vec![spread(&gate), spread(&up)], stride, 0);
    }
    let fused = case.layout.stacked() == Layout::Fused;
    let mut all = Vec::new();
    for expert in 0..e {
        let rows = expert * n..(expert + 1) * n;
        if fused {
            rows.clone().for_each(|r| all.extend(row(&gate, r)));
            rows.for_each(|r| all.extend(row(&up, r)));
        } else {
            rows.for_each(|r| all.extend([row(&gate, r), row(&up, r)].concat()));
        }
    }
    let (second, stride) = if fused { (n * k, k) } else { (k, 2 * k) };
    (vec![all], stride, second)
}

/// One allocation for each expert and the table of their addresses. The bytes that it keeps must live.
pub fn upload_apart(gpu: &Gpu, all: &[u8], experts: usize) -> (Vec<Buffer<u8>>, Buffer<u64>) {
    let one = all.len() / experts;
    // From the last to the first, so that addresses do not ascend.
    let mut buffers: Vec<_> = (0..experts)
        .rev()
        .map(|e| gpu.upload(&all[e * one..][..one]))
        .collect();
    buffers.reverse();
    let addresses: Vec<u64> = buffers.iter().map(|b| b.ptr().0).collect();
    let table = gpu.upload(&addresses);
    (buffers, table)
}

/// What must live while a launch runs.
#[derive(Default)]
pub struct Kept {
    pub buffers: Vec<Buffer<u8>>,
    pub tables: Vec<Buffer<u64>>,
}

impl Kept {
    /// Uploads what all experts have, apart or not: the address to begin at.
    pub fn upload(&mut self, gpu: &Gpu, all: &[u8], experts: usize, apart: bool) -> DevicePtr {
        if !apart {
            self.buffers.push(gpu.upload(all));
            return self.buffers[self.buffers.len() - 1].ptr();
        }
        let (buffers, table) = upload_apart(gpu, all, experts);
        let ptr = table.ptr();
        self.buffers.extend(buffers);
        self.tables.push(table);
        ptr
    }
}

/// Weights on the device as the layout has them: what must live, and gate and up.
pub fn upload_weights(
    gpu: &Gpu,
    case: &Case,
    data: &Data,
) -> (Kept, WeightPointers, WeightPointers) {
    let (e, n) = (case.counts.len(), case.n);
    let (matrices, stride, second) = lay_out(case, data);
    let apart = case.layout != case.layout.stacked();
    let mut kept = Kept::default();
    let ptrs: Vec<DevicePtr> = matrices
        .iter()
        .map(|m| kept.upload(gpu, m, e, apart))
        .collect();
    let rows = if ptrs.len() == 1 {
        2 * n * case.k
    } else {
        n * stride
    };
    let pointers = |ptr: DevicePtr, first: usize| match apart {
        false => WeightPointers::strided(
            ptr.add((first * case.w.size()) as u64),
            case.w,
            stride,
            rows,
        ),
        true => WeightPointers {
            placement: Placement::Table {
                offset: first,
                alignment: 256,
            },
            ..WeightPointers::table(ptr, case.w, stride, 256)
        },
    };
    let (gate, up) = (ptrs[0], ptrs[ptrs.len() - 1]);
    (kept, pointers(gate, 0), pointers(up, second))
}

/// The GPU's answer `[rows, n]` as f32 and the kernel that gave it. Checks that nothing but real rows was written.
pub fn on_gpu(gpu: &Gpu, case: &Case, data: &Data) -> (Vec<f32>, &'static str) {
    let (n, k, rows, size) = (case.n, case.k, case.rows(), case.out.size());
    let stride = if n.is_multiple_of(8) { n + 8 } else { n + 3 };
    let x = gpu.upload(&data.x.bytes());
    let pairs = gpu.upload(&data.pair_of_row);
    let scale = gpu.upload(&data.scale);
    let offsets: Vec<i32> = case.offsets().iter().map(|&o| o as i32).collect();
    let counts: Vec<i32> = case.counts.iter().map(|&c| c as i32).collect();
    let (mut offsets, mut counts) = (gpu.upload(&offsets), gpu.upload(&counts));
    let mut pairs = pairs;
    if case.hostile {
        let e = case.counts.len();
        let bad = |i: usize| [2, i32::MAX, -7, 1000, 0, i32::MIN, 3, 1][i % 8];
        gpu.write(
            &mut offsets,
            &(0..=e).map(|i| bad(i + 3)).collect::<Vec<_>>(),
        );
        gpu.write(&mut counts, &(0..e).map(bad).collect::<Vec<_>>());
        gpu.write(&mut pairs, &vec![u32::MAX - 1; rows]);
    }
    let capacity = rows + case.spare;
    let out = gpu.filled::<u8>(capacity * stride * size, 0xff);
    let (mut kept, gate, up) = upload_weights(gpu, case, data);
    let apart = case.layout == Layout::Table;
    let mut bias = |b: &[f32]| {
        let ptr = kept.upload(gpu, bytemuck::cast_slice(b), case.counts.len(), apart);
        match apart {
            false => BiasPointers::strided(ptr, DType::F32, n),
            true => BiasPointers::table(ptr, DType::F32),
        }
    };
    let gated = case.activation.gated;
    let product = GroupedGemm {
        a: DeviceRows {
            ptr: x.ptr(),
            dtype: case.a,
            stride: k,
        },
        a_rows: data.a_rows,
        gather: (case.slots > 0).then(|| GatherPointers {
            pair_of_row: pairs.ptr(),
            slots: case.slots,
            input_scale: if case.scale {
                scale.ptr()
            } else {
                DevicePtr::NULL
            },
        }),
        groups: GroupPointers::Ragged {
            offsets: offsets.ptr(),
            counts: counts.ptr(),
            experts: case.counts.len(),
        },
        gate: gated.then_some(gate),
        up,
        gate_bias: (case.bias && gated).then(|| bias(&data.gate_bias)),
        up_bias: case.bias.then(|| bias(&data.up_bias)),
        activation: case.activation,
        out: DeviceRows {
            ptr: out.ptr(),
            dtype: case.out,
            stride,
        },
        rows: capacity,
        n,
        k,
        numerics: case.numerics,
        strict: case.strict,
    };
    // pair_of_row covers the rows that there are; the spare ones belong to no expert.
    let launch = plan_grouped_gemm(&product, &DEVICE).unwrap();
    if !launch.is_empty() {
        gpu.launch(&launch);
    }
    let raw = gpu.download(&out);
    let found = numbers(case.out, &raw);
    let mut real = vec![false; capacity];
    for (o, c) in case.offsets().iter().zip(&case.counts) {
        real[*o..o + c].fill(true);
    }
    let mut values = vec![f32::NAN; rows * n];
    for r in 0..capacity {
        for c in 0..stride {
            let at = r * stride + c;
            if (real[r] || case.hostile) && c < n {
                values[r * n + c] = found[at];
            } else {
                assert!(
                    raw[at * size..][..size].iter().all(|&b| b == 0xff),
                    "{case:?}: row {r}, column {c} was written"
                );
            }
        }
    }
    (values, launch.kernel)
}
