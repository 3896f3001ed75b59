//! A call on the CPU and on the GPU, and the comparison.

use super::*;

/// Words behind each output that must keep their poison.
pub const GUARD: usize = 33;

/// Logits in a format, and the same for both sides.
pub enum Encoded {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Encoded {
    /// `[tokens, r]` at a row stride of `r + pad`; what is between rows is NaN.
    pub fn new(values: &[f32], r: usize, pad: usize, dtype: DType) -> Self {
        let mut padded = Vec::new();
        for row in values.chunks_exact(r) {
            padded.extend_from_slice(row);
            padded.extend(vec![f32::NAN; pad]);
        }
        match dtype {
            DType::F32 => Self::F32(padded),
            DType::F16 => Self::F16(padded.iter().map(|&x| f16::from_f32(x)).collect()),
            _ => Self::BF16(padded.iter().map(|&x| bf16::from_f32(x)).collect()),
        }
    }

    pub fn matrix(&self, tokens: usize, r: usize, pad: usize) -> AnyMatRef<'_> {
        match self {
            Self::F32(v) => MatRef::with_strides(v, tokens, r, r + pad, 1)
                .unwrap()
                .into(),
            Self::F16(v) => MatRef::with_strides(v, tokens, r, r + pad, 1)
                .unwrap()
                .into(),
            Self::BF16(v) => MatRef::with_strides(v, tokens, r, r + pad, 1)
                .unwrap()
                .into(),
        }
    }

    pub fn upload(&self, gpu: &Gpu) -> gpu::Buffer<u8> {
        match self {
            Self::F32(v) => gpu.upload(bytemuck::cast_slice(v)),
            Self::F16(v) => gpu.upload(bytemuck::cast_slice(v)),
            Self::BF16(v) => gpu.upload(bytemuck::cast_slice(v)),
        }
    }
}

/// What a call answers.
#[derive(Debug)]
pub struct Answer {
    pub ids: Vec<i32>,
    pub weights: Vec<f32>,
    pub shared: Vec<f32>,
}

pub fn on_cpu(setup: &Setup, dtype: DType, pad: usize) -> Answer {
    let (t, r) = (setup.tokens, setup.config.num_logits());
    let logits = Encoded::new(&setup.logits, r, pad, dtype);
    let noise = Encoded::new(&setup.noise_logits, r, pad, dtype);
    let mut input = RouteInput::new(logits.matrix(t, r, pad)).position(1000);
    if setup.config.noise_seed.is_some() {
        input = input.noise_logits(noise.matrix(t, r, pad));
    }
    if setup.config.selection == Selection::Given {
        input = input.given_ids(&setup.given_ids);
    }
    let mut routing = Routing::new();
    setup
        .router()
        .route(&Cpu::new(), &input, &mut routing)
        .expect(setup.name);
    Answer {
        ids: routing.ids().to_vec(),
        weights: routing.weights().to_vec(),
        shared: routing.shared_weights().to_vec(),
    }
}

/// Output memory, poisoned, with a guard behind it.
pub fn poisoned(gpu: &Gpu, len: usize) -> gpu::Buffer<u32> {
    gpu.filled(len + GUARD, 0xa5)
}

/// The first `len` words of an output, whose guard must be whole.
pub fn unguarded<T: bytemuck::Pod>(gpu: &Gpu, buffer: &gpu::Buffer<u32>, len: usize) -> Vec<T> {
    let words = gpu.download(buffer);
    assert!(
        words[len..].iter().all(|&w| w == 0xa5a5_a5a5),
        "written beyond the end"
    );
    bytemuck::cast_slice(&words[..len]).to_vec()
}

/// Routes `tokens` tokens on the GPU, the first at row `first` of the logits.
pub fn on_gpu_from(
    gpu: &Gpu,
    setup: &Setup,
    dtype: DType,
    pad: usize,
    first: usize,
    tokens: usize,
) -> Answer {
    let (r, slots) = (setup.config.num_logits(), setup.config.slots());
    let rows = |v: &[f32]| match v.len() {
        0 => Vec::new(),
        _ => v[first * r..(first + tokens) * r].to_vec(),
    };
    let logits = Encoded::new(&rows(&setup.logits), r, pad, dtype).upload(gpu);
    let noise = Encoded::new(&rows(&setup.noise_logits), r, pad, dtype).upload(gpu);
    let bias = gpu.upload(&setup.bias);
    let scale = gpu.upload(&setup.per_expert_scale);
    let given = match setup.given_ids.len() {
        0 => Vec::new(),
        _ => setup.given_ids[first * slots..(first + tokens) * slots].to_vec(),
    };
    let given = gpu.upload(&given);
    let ids = poisoned(gpu, tokens * slots);
    let weights = poisoned(gpu, tokens * slots);
    let shared = poisoned(gpu, tokens * setup.config.joint_shared);
    let bytes = workspace_size(&setup.config, tokens).expect(setup.name);
    let workspace = poisoned(gpu, bytes / 4);
    let some = |ptr: DevicePtr, wanted| if wanted { ptr } else { DevicePtr::NULL };
    let pointers = RoutePointers {
        logits: logits.ptr(),
        logits_stride: (r + pad) as u64,
        noise_logits: some(noise.ptr(), setup.config.noise_seed.is_some()),
        noise_stride: (r + pad) as u64,
        correction_bias: some(bias.ptr(), bias.len() > 0),
        per_expert_scale: some(scale.ptr(), scale.len() > 0),
        given_ids: some(given.ptr(), setup.config.selection == Selection::Given),
        ids: ids.ptr(),
        weights: weights.ptr(),
        shared_weights: some(shared.ptr(), setup.config.joint_shared > 0),
        workspace: some(workspace.ptr(), bytes > 0),
    };
    let plan = plan_route(
        &setup.config,
        tokens,
        dtype,
        1000 + first as u64,
        &pointers,
        gpu.cuda.device_info(),
    )
    .expect(setup.name);
    for launch in plan.iter() {
        gpu.launch(launch);
    }
    unguarded::<u32>(gpu, &workspace, bytes / 4);
    Answer {
        ids: unguarded(gpu, &ids, tokens * slots),
        weights: unguarded(gpu, &weights, tokens * slots),
        shared: unguarded(gpu, &shared, tokens * setup.config.joint_shared),
    }
}

pub fn on_gpu(gpu: &Gpu, setup: &Setup, dtype: DType, pad: usize) -> Answer {
    on_gpu_from(gpu, setup, dtype, pad, 0, setup.tokens)
}

#[track_caller]
pub fn assert_equal(found: &Answer, expected: &Answer, what: &str) {
    assert_eq!(found.ids, expected.ids, "{what}: ids");
    assert_same_bits(&found.weights, &expected.weights, what);
    assert_same_bits(&found.shared, &expected.shared, what);
    // NaN weights have one pattern of bits, too: `assert_same_bits` would not see another.
    for w in found.weights.iter().chain(&found.shared) {
        assert!(
            !w.is_nan() || w.to_bits() == f32::NAN.to_bits(),
            "{what}: {:08x}",
            w.to_bits()
        );
    }
}

#[track_caller]
pub fn check(gpu: &Gpu, setup: &Setup, dtype: DType, pad: usize) {
    let what = format!(
        "{} E={} K={} T={} {dtype}",
        setup.name,
        setup.config.num_experts,
        setup.config.slots(),
        setup.tokens
    );
    let found = on_gpu(gpu, setup, dtype, pad);
    assert_equal(&found, &on_cpu(setup, dtype, pad), &what);
}
