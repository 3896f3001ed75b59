//! A layer with everything that a call can have, made through C on both sides.

use crate::common::Rng;
use crate::world::*;
use crate::{E, H, I, T, must};
use bytemuck::Zeroable;
use moe_kernels::ffi::*;
use std::ffi::CStr;
use std::ptr::{null, null_mut};

/// I of the shared expert.
pub const SHARED_I: usize = 16;

/// What a layer has.
#[derive(Clone)]
pub struct Case {
    pub family: &'static CStr,
    pub layout: u32,
    pub gated: u32,
    pub clamp: u32,
    pub dtype: moe_dtype,
    pub biases: bool,
    /// MOE_JOIN_*
    pub shared: Option<u32>,
    /// Correction bias and per-expert scale.
    pub router_tensors: bool,
    /// Logits come with the call.
    pub logits: bool,
    /// Norm, bias and residual.
    pub output_steps: bool,
    pub weight_on_input: u32,
    pub routed_scale: f32,
}

impl Case {
    pub const PLAIN: Self = Self {
        family: c"mixtral",
        layout: MOE_LAYOUT_FUSED,
        gated: 1,
        clamp: MOE_CLAMP_NONE,
        dtype: MOE_DTYPE_F32,
        biases: false,
        shared: None,
        router_tensors: false,
        logits: false,
        output_steps: false,
        weight_on_input: 0,
        routed_scale: 1.0,
    };

    /// Everything at once.
    pub const FULL: Self = Self {
        family: c"deepseek_v3",
        biases: true,
        shared: Some(MOE_JOIN_SIGMOID_GATE),
        router_tensors: true,
        output_steps: true,
        routed_scale: 0.75,
        ..Self::PLAIN
    };

    pub fn router(&self) -> RouterHandle {
        let deepseek = self.family == c"deepseek_v3";
        RouterHandle::new(self.family, |config| {
            if deepseek {
                (config.n_group, config.topk_group, config.scale) = (4, 2, 2.5);
            }
        })
    }

    pub fn activation(&self) -> moe_activation {
        moe_activation {
            struct_size: size_of::<moe_activation>(),
            function: MOE_ACT_SILU,
            gated: self.gated,
            clamp: self.clamp,
            limit: 0.5,
            alpha: 1.7,
        }
    }
}

/// The case's numbers on the host.
pub struct Numbers {
    pub x: Stored,
    pub gate: Vec<f32>,
    pub gate_bias: Vec<f32>,
    pub logits: Stored,
    /// `[E, 2I, H]` as the layout has it, or gate, or up alone.
    pub up: Stored,
    pub gate_up_bias: Vec<f32>,
    /// Of MOE_LAYOUT_SEPARATE, `[E, I, H]`.
    pub gate_proj: Stored,
    pub down: Stored,
    pub down_bias: Vec<f32>,
    pub shared_up: Stored,
    pub shared_down: Stored,
    pub shared_gate: Stored,
    pub correction: Vec<f32>,
    pub scale: Vec<f32>,
    pub norm: Vec<f32>,
    pub out_bias: Vec<f32>,
    pub residual: Vec<f32>,
}

impl Numbers {
    pub fn new(case: &Case) -> Self {
        let mut rng = Rng(11);
        let r = &mut rng;
        let dtype = case.dtype;
        Self {
            x: Stored::new(dtype, &r.normals(T * H)),
            gate: scaled(r, E * H, H),
            gate_bias: scaled(r, E, 4),
            logits: Stored::new(MOE_DTYPE_F16, &r.normals(T * E)),
            up: Stored::new(dtype, &scaled(r, E * 2 * I * H, H)),
            gate_up_bias: scaled(r, E * 2 * I, 1),
            gate_proj: Stored::new(dtype, &scaled(r, E * I * H, H)),
            down: Stored::new(dtype, &scaled(r, E * H * I, I)),
            down_bias: scaled(r, E * H, 1),
            shared_up: Stored::new(dtype, &scaled(r, 2 * SHARED_I * H, H)),
            shared_down: Stored::new(dtype, &scaled(r, H * SHARED_I, SHARED_I)),
            shared_gate: Stored::new(dtype, &scaled(r, H, H)),
            correction: scaled(r, E, 1),
            scale: r.normals(E).iter().map(|v| 1.0 + 0.1 * v).collect(),
            norm: r.normals(H),
            out_bias: r.normals(H),
            residual: r.normals(T * H),
        }
    }
}

/// The case on the GPU: the structs of a call, which tests bend.
pub struct Operands {
    pub case: Case,
    pub layer: *mut moe_cuda_layer,
    pub x: moe_device_matrix,
    pub y: moe_device_matrix,
    pub y_place: Place,
    pub gate: moe_device_matrix,
    pub gate_bias: Place,
    pub logits: moe_device_matrix,
    pub up: moe_device_weights,
    pub gate_proj: moe_device_weights,
    pub down: moe_device_weights,
    pub gate_up_bias: moe_device_matrix,
    pub down_bias: moe_device_matrix,
    pub experts: moe_cuda_expert_weights,
    pub shared_up: moe_device_weights,
    pub shared_down: moe_device_weights,
    pub shared: moe_cuda_expert_weights,
    pub shared_gate: moe_device_matrix,
    pub correction: Place,
    pub scale: Place,
    pub norm: moe_cuda_rms_norm,
    pub out_bias: Place,
    pub residual: moe_device_matrix,
    pub workspace: Place,
}

impl Operands {
    pub fn new(device: &mut Device, case: &Case, router: &RouterHandle) -> Self {
        let n = Numbers::new(case);
        if case.router_tensors {
            router.set(&n.correction, &n.scale);
        }
        let layer = create(&config(case), &case.activation(), router)
            .unwrap_or_else(|s| panic!("{s}: {}", crate::last_error()));
        let separate = case.layout == MOE_LAYOUT_SEPARATE;
        let up_rows = if separate { I } else { 2 * I };
        let y_place = device.poisoned(T * H);
        let f32s = |v: &[f32]| Stored::new(MOE_DTYPE_F32, v);
        let norm = device.put(&n.norm);
        let mut bytes = 1 << 16;
        if device.gpu.is_some() {
            // SAFETY: a living handle and a place.
            must(unsafe { moe_cuda_layer_workspace_size(layer, T, &mut bytes) });
        }
        Self {
            layer,
            x: device.store(&n.x, T, H),
            y: device_matrix(y_place.data, T, H, MOE_DTYPE_F32),
            y_place,
            gate: device.store(&f32s(&n.gate), E, H),
            gate_bias: device.put(&n.gate_bias),
            logits: device.store(&n.logits, T, E),
            up: {
                let mut up = device.store_weights(&n.up, [E, up_rows, H]);
                up.expert_stride = (2 * I * H) as isize; // the separate layout uses the first I rows of each
                up
            },
            gate_proj: device.store_weights(&n.gate_proj, [E, I, H]),
            down: device.store_weights(&n.down, [E, H, I]),
            gate_up_bias: device.store(&f32s(&n.gate_up_bias), E, 2 * I),
            down_bias: device.store(&f32s(&n.down_bias), E, H),
            experts: Zeroable::zeroed(),
            shared_up: device.store_weights(&n.shared_up, [1, 2 * SHARED_I, H]),
            shared_down: device.store_weights(&n.shared_down, [1, H, SHARED_I]),
            shared: Zeroable::zeroed(),
            shared_gate: device.store(&n.shared_gate, 1, H),
            correction: device.put(&n.correction),
            scale: device.put(&n.scale),
            norm: moe_cuda_rms_norm {
                struct_size: size_of::<moe_cuda_rms_norm>(),
                weight: norm.data,
                len: H,
                eps: 1e-5,
                multiplier: 0.0,
            },
            out_bias: device.put(&n.out_bias),
            residual: device.store(&f32s(&n.residual), T, H),
            workspace: device.put(&vec![0xa5u8; bytes]),
            case: case.clone(),
        }
    }

    /// Names the experts' matrices in their structs.
    pub fn link(&mut self) {
        let separate = self.case.layout == MOE_LAYOUT_SEPARATE;
        let (up, bias) = (&raw const self.up, &raw const self.gate_up_bias);
        self.experts = moe_cuda_expert_weights {
            struct_size: size_of::<moe_cuda_expert_weights>(),
            down: &self.down,
            layout: self.case.layout,
            ..Zeroable::zeroed()
        };
        match separate {
            true => self.experts.up = up,
            false => self.experts.gate_up = up,
        }
        if separate && self.case.gated == 1 {
            self.experts.gate = &self.gate_proj;
        }
        if self.case.biases {
            self.experts.gate_up_bias = bias;
            self.experts.down_bias = &self.down_bias;
        }
        self.shared = moe_cuda_expert_weights {
            struct_size: size_of::<moe_cuda_expert_weights>(),
            gate_up: &self.shared_up,
            down: &self.shared_down,
            layout: MOE_LAYOUT_FUSED,
            ..Zeroable::zeroed()
        };
    }

    /// The call. Its pointers lead into `self`.
    pub fn args(&self) -> moe_cuda_forward {
        let case = &self.case;
        let mut args = moe_cuda_forward {
            struct_size: size_of::<moe_cuda_forward>(),
            x: &self.x,
            y: &self.y,
            experts: &self.experts,
            workspace: self.workspace.data,
            workspace_bytes: self.workspace.len,
            ..Zeroable::zeroed()
        };
        match case.logits {
            true => args.logits = &self.logits,
            false => {
                args.gate = &self.gate;
                (args.gate_bias, args.gate_bias_len) = (self.gate_bias.data, self.gate_bias.len);
            }
        }
        if case.router_tensors {
            (args.correction_bias, args.correction_bias_len) =
                (self.correction.data, self.correction.len);
            (args.per_expert_scale, args.per_expert_scale_len) = (self.scale.data, self.scale.len);
        }
        if let Some(join) = case.shared {
            args.shared = &self.shared;
            if join == MOE_JOIN_SIGMOID_GATE {
                args.shared_gate = &self.shared_gate;
            }
        }
        if case.output_steps {
            args.out_norm = &self.norm;
            (args.out_bias, args.out_bias_len) = (self.out_bias.data, self.out_bias.len);
            args.residual = &self.residual;
        }
        args
    }
}

impl Drop for Operands {
    fn drop(&mut self) {
        // SAFETY: a living handle, used no more.
        must(unsafe { moe_cuda_layer_destroy(self.layer) });
    }
}

pub fn config(case: &Case) -> moe_cuda_layer_config {
    moe_cuda_layer_config {
        struct_size: size_of::<moe_cuda_layer_config>(),
        hidden: H,
        intermediate: I,
        shared_intermediate: case.shared.map_or(0, |_| SHARED_I),
        shared_join: case.shared.unwrap_or(0),
        dtype: case.dtype,
        numerics: MOE_CUDA_EXACT,
        weight_on_input: case.weight_on_input,
        routed_scale: case.routed_scale,
        ..Zeroable::zeroed()
    }
}

pub fn create(
    config: &moe_cuda_layer_config,
    activation: &moe_activation,
    router: &RouterHandle,
) -> Result<*mut moe_cuda_layer, moe_status> {
    let config = moe_cuda_layer_config {
        activation,
        ..*config
    };
    let mut layer = null_mut();
    // SAFETY: a living handle, structs as long as they say, a place.
    match unsafe { moe_cuda_layer_create(router.0, &config, &mut layer) } {
        MOE_OK => Ok(layer),
        status => Err(status),
    }
}

/// The case through the CPU's calls.
pub fn on_cpu(case: &Case, router: &RouterHandle) -> Vec<f32> {
    let (n, cpu) = (Numbers::new(case), CpuHandle::new());
    let experts = pack(case, &n, &cpu);
    let (mut experts, mut layer, mut routing) = (experts, null_mut(), null_mut());
    let mut y = vec![f32::NAN; T * H];
    // SAFETY: living handles, structs and arrays as long as they say.
    unsafe {
        must(moe_layer_create(router.0, &mut experts, &mut layer));
        let gate = Stored::new(MOE_DTYPE_F32, &n.gate);
        let (w, bias) = (gate.host(0, E, H), &n.gate_bias);
        must(moe_layer_set_gate(
            cpu.0,
            layer,
            &w,
            bias.as_ptr(),
            E,
            null(),
            null(),
        ));
        must(moe_layer_set_routed_scale(layer, case.routed_scale));
        must(moe_layer_set_weight_on_input(layer, case.weight_on_input));
        if let Some(join) = case.shared {
            set_shared(case, &n, &cpu, layer, join);
        }
        let residual = Stored::new(MOE_DTYPE_F32, &n.residual);
        let residual = residual.host(0, T, H);
        let (x, out, logits) = (
            n.x.host(0, T, H),
            host_out(&mut y, T, H),
            n.logits.host(0, T, E),
        );
        if case.output_steps {
            let norm = moe_rms_norm {
                struct_size: size_of::<moe_rms_norm>(),
                weight: n.norm.as_ptr(),
                len: H,
                eps: 1e-5,
                multiplier: 0.0,
            };
            must(moe_layer_set_out_norm(layer, &norm));
            must(moe_layer_set_out_bias(layer, n.out_bias.as_ptr(), H));
        }
        let mut bytes = 0;
        must(moe_layer_workspace_size(cpu.0, layer, T, &mut bytes));
        let mut workspace = vec![0u8; bytes];
        let call = moe_forward {
            struct_size: size_of::<moe_forward>(),
            x: &x,
            y: &out,
            logits: if case.logits { &logits } else { null() },
            residual: if case.output_steps { &residual } else { null() },
            workspace: workspace.as_mut_ptr(),
            workspace_bytes: bytes,
            ..Zeroable::zeroed()
        };
        must(moe_routing_create(&mut routing));
        must(moe_layer_forward(cpu.0, layer, routing, &call));
        must(moe_routing_destroy(routing));
        must(moe_layer_destroy(layer));
    }
    y
}

fn pack(case: &Case, n: &Numbers, cpu: &CpuHandle) -> *mut moe_experts {
    let mut experts = null_mut();
    // SAFETY: living handles, structs and arrays as long as they say.
    unsafe {
        must(moe_experts_create(
            cpu.0,
            H,
            I,
            &case.activation(),
            case.dtype,
            &mut experts,
        ));
        for e in 0..E {
            let separate = case.layout == MOE_LAYOUT_SEPARATE;
            let up =
                n.up.host(e * 2 * I * H, if separate { I } else { 2 * I }, H);
            let (gate, down) = (
                n.gate_proj.host(e * I * H, I, H),
                n.down.host(e * H * I, H, I),
            );
            let bias = &n.gate_up_bias[e * 2 * I..][..2 * I];
            // The C interface of the CPU has biases apart; an interleaved one is taken apart here.
            let half = |first: usize| -> Vec<f32> {
                match case.layout {
                    MOE_LAYOUT_INTERLEAVED => bias.iter().skip(first).step_by(2).copied().collect(),
                    _ => bias[first * I..][..I].to_vec(),
                }
            };
            let (gate_bias, up_bias) = (half(0), half(1));
            let mut w = moe_expert_weights {
                struct_size: size_of::<moe_expert_weights>(),
                down: &down,
                layout: case.layout,
                ..Zeroable::zeroed()
            };
            match separate {
                true => w.up = &up,
                false => w.gate_up = &up,
            }
            if separate && case.gated == 1 {
                w.gate = &gate;
            }
            if case.biases {
                (w.gate_bias, w.gate_bias_len) = (gate_bias.as_ptr(), I);
                (w.up_bias, w.up_bias_len) = (up_bias.as_ptr(), I);
                (w.down_bias, w.down_bias_len) = (n.down_bias[e * H..].as_ptr(), H);
            }
            must(moe_experts_push(cpu.0, experts, &w));
        }
    }
    experts
}

/// # Safety
/// `layer` is a living handle.
unsafe fn set_shared(case: &Case, n: &Numbers, cpu: &CpuHandle, layer: *mut moe_layer, join: u32) {
    let mut shared = null_mut();
    let (up, down) = (
        n.shared_up.host(0, 2 * SHARED_I, H),
        n.shared_down.host(0, H, SHARED_I),
    );
    let gate = n.shared_gate.host(0, 1, H);
    let w = moe_expert_weights {
        struct_size: size_of::<moe_expert_weights>(),
        gate_up: &up,
        down: &down,
        layout: MOE_LAYOUT_FUSED,
        ..Zeroable::zeroed()
    };
    let gate = if join == MOE_JOIN_SIGMOID_GATE {
        &raw const gate
    } else {
        null()
    };
    // SAFETY: living handles, structs and arrays as long as they say.
    unsafe {
        must(moe_experts_create(
            cpu.0,
            H,
            SHARED_I,
            &case.activation(),
            case.dtype,
            &mut shared,
        ));
        must(moe_experts_push(cpu.0, shared, &w));
        must(moe_layer_set_shared(cpu.0, layer, &mut shared, join, gate));
    }
}
