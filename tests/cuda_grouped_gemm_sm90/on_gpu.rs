//! The GPU's answer: operands on the device, and the launch.

use super::*;

/// What comes out: the whole buffer, with a canary before and behind.
pub const CANARY: usize = 64;

pub struct Device {
    pub buffers: Vec<Buffer<u8>>,
    pub floats: Vec<Buffer<f32>>,
    pub ints: Vec<Buffer<i32>>,
    pub pairs: Buffer<u32>,
    pub out: Buffer<u8>,
}

pub fn upload(gpu: &Gpu, case: &Case, data: &Data) -> (Device, GroupedGemmParams) {
    let (e, n, k, rows) = (case.counts.len(), case.n, case.k, case.rows());
    let element = case.out.size();
    let weights = if case.interleaved {
        // Row 2i of gate, row 2i + 1 of up.
        let rows = data.gate.chunks(k).zip(data.up.chunks(k));
        vec![
            rows.flat_map(|(g, u)| [g, u].concat())
                .collect::<Vec<f32>>(),
        ]
    } else {
        vec![data.gate.clone(), data.up.clone()]
    };
    let mut buffers = vec![gpu.upload(&bytes(case.dtype, &data.a))];
    buffers.extend(weights.iter().map(|w| gpu.upload(&bytes(case.dtype, w))));
    let floats = vec![
        gpu.upload(&data.gate_bias),
        gpu.upload(&data.up_bias),
        gpu.upload(&data.scale),
    ];
    let counts: Vec<i32> = case.counts.iter().map(|&c| c as i32).collect();
    let ints = vec![gpu.upload(&case.offsets()), gpu.upload(&counts)];
    let pairs = gpu.upload(&data.pair_of_row);
    let out = gpu.filled::<u8>((2 * CANARY + rows * n) * element, 0xff);
    let row = k as i64 * if case.interleaved { 2 } else { 1 };
    let present = |yes: bool, ptr: DevicePtr| if yes { ptr } else { DevicePtr::NULL };
    let gated = case.is_gated();
    let up = if case.interleaved {
        buffers[1].ptr().add(2 * k as u64)
    } else {
        buffers[2].ptr()
    };
    let params = GroupedGemmParams {
        a: buffers[0].ptr(),
        pair_of_row: present(case.slots > 0, pairs.ptr()),
        input_scale: present(case.scale, floats[2].ptr()),
        offsets: ints[0].ptr(),
        counts: ints[1].ptr(),
        gate: present(gated, buffers[1].ptr()),
        up,
        gate_bias: present(case.bias && gated, floats[0].ptr()),
        up_bias: present(case.bias, floats[1].ptr()),
        out: out.ptr().add((CANARY * element) as u64),
        a_row_stride: k as i64,
        gate_row_stride: row,
        gate_expert_stride: n as i64 * row,
        up_row_stride: row,
        up_expert_stride: n as i64 * row,
        gate_bias_expert_stride: n as i64,
        up_bias_expert_stride: n as i64,
        out_row_stride: n as i64,
        gate_bias_stride: 1,
        up_bias_stride: 1,
        experts: e as u32,
        rows: rows as u32,
        n: n as u32,
        k: k as u32,
        slots: case.slots.max(1) as u32,
        flags: Flags::ALIGNED_OUT,
        a_dtype: case.dtype as u32,
        w_dtype: case.dtype as u32,
        bias_dtype: DType::F32 as u32,
        out_dtype: case.out as u32,
        a_rows: (data.a.len() / k) as u32,
        reserved: 0,
        activation: ActivationParams::new(case.activation),
    };
    (
        Device {
            buffers,
            floats,
            ints,
            pairs,
            out,
        },
        params,
    )
}

/// The output rows as f32, after a look at the canaries and at the rows of padding.
pub fn run(gpu: &Gpu, case: &Case, data: &Data) -> Vec<f32> {
    run_planned(gpu, case, data, |params, info| {
        plan_with_cluster(params, case.cluster, info)
    })
}

/// The same by the kernel of a plan.
pub fn run_planned(
    gpu: &Gpu,
    case: &Case,
    data: &Data,
    plan: impl Fn(&GroupedGemmParams, &DeviceInfo) -> Result<Launch, Error>,
) -> Vec<f32> {
    let (device, params) = upload(gpu, case, data);
    let info = DeviceInfo {
        sm_count: case.sms,
        ..*gpu.cuda.device_info()
    };
    gpu.launch(&plan(&params, &info).unwrap());
    let found = gpu.download(&device.out);
    drop((device.buffers, device.floats, device.ints, device.pairs));
    let edge = CANARY * case.out.size();
    assert!(
        found[..edge].iter().all(|&b| b == 0xff),
        "written before the output"
    );
    assert!(
        found[found.len() - edge..].iter().all(|&b| b == 0xff),
        "written behind the output"
    );
    let inside = &found[edge..found.len() - edge];
    for (r, row) in inside.chunks(case.n * case.out.size()).enumerate() {
        if data.pair_of_row[r] == u32::MAX {
            assert!(
                row.iter().all(|&b| b == 0xff),
                "row {r} is padding and was written"
            );
        }
    }
    numbers(case.out, inside)
}
