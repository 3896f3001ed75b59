//! A layer of both languages.

use super::*;

/// A layer made through C, and the same one in Rust.
pub struct Pair {
    pub cpu: *mut moe_cpu,
    pub router: *mut moe_router,
    pub layer: *mut moe_layer,
    pub routing: *mut moe_routing,
    rust: MoeLayer,
    pub workspace: Vec<u8>,
}

impl Pair {
    pub fn new(threads: usize, dtype: DType) -> Self {
        let mut rng = Rng(7);
        let weights: Vec<[Vec<f32>; 2]> = (0..E)
            .map(|_| [rng.normals(2 * I * H), rng.normals(H * I)])
            .collect();
        let gate = rng.normals(E * H);
        let rust_cpu = Cpu::new();
        let mut experts = PackedExperts::new(&rust_cpu, H, I, Activation::SWIGLU, dtype).unwrap();
        for [up, down] in &weights {
            let up = MatRef::new(up, 2 * I, H).unwrap();
            let down = MatRef::new(down, H, I).unwrap();
            experts
                .push(
                    &rust_cpu,
                    &ExpertWeights::fused(up.into(), down.into()).unwrap(),
                )
                .unwrap();
        }
        let rust_gate =
            Gate::new(&rust_cpu, MatRef::new(&gate, E, H).unwrap().into(), None).unwrap();
        let router = Router::new(RouterConfig::mixtral(E, K)).unwrap();
        let rust = MoeLayer::new(router, experts)
            .unwrap()
            .with_gate(rust_gate)
            .unwrap();

        let options = moe_cpu_options {
            struct_size: size_of::<moe_cpu_options>(),
            threads,
            isa: null(),
        };
        let mut config = moe_router_config::zeroed();
        config.struct_size = size_of::<moe_router_config>();
        let act = swiglu();
        let (mut cpu, mut router, mut packed) = (null_mut(), null_mut(), null_mut());
        let (mut layer, mut routing, mut bytes) = (null_mut(), null_mut(), 0);
        // SAFETY: every struct and array lives here and is as long as it says.
        unsafe {
            must(moe_cpu_create(&options, &mut cpu));
            must(moe_router_config_family(
                &mut config,
                c"mixtral".as_ptr(),
                E,
                K,
            ));
            must(moe_router_create(&config, &mut router));
            must(moe_experts_create(
                cpu,
                H,
                I,
                &act,
                format(dtype),
                &mut packed,
            ));
            for [up, down] in &weights {
                let (up, down) = (matrix(up, 2 * I, H), matrix(down, H, I));
                let w = moe_expert_weights {
                    struct_size: size_of::<moe_expert_weights>(),
                    gate_up: &up,
                    down: &down,
                    layout: MOE_LAYOUT_FUSED,
                    ..Zeroable::zeroed()
                };
                must(moe_experts_push(cpu, packed, &w));
            }
            must(moe_layer_create(router, &mut packed, &mut layer));
            assert!(packed.is_null());
            let gate = matrix(&gate, E, H);
            must(moe_layer_set_gate(
                cpu,
                layer,
                &gate,
                null(),
                0,
                null(),
                null(),
            ));
            must(moe_routing_create(&mut routing));
            must(moe_routing_reserve(cpu, routing, router, T));
            must(moe_layer_workspace_size(cpu, layer, T, &mut bytes));
        }
        Self {
            cpu,
            router,
            layer,
            routing,
            rust,
            workspace: vec![0; bytes],
        }
    }

    pub fn rust_forward<X: Element, Y: Element>(&self, x: &[X]) -> Vec<Y>
    where
        for<'a> AnyMatRef<'a>: From<MatRef<'a, X>>,
        for<'a> AnyMatMut<'a>: From<MatMut<'a, Y>>,
    {
        let cpu = Cpu::new();
        let mut y = vec![Y::from_f32_nearest(f32::NAN); T * H];
        let mut routing = Routing::new();
        let mut workspace = vec![0; self.rust.workspace_size(&cpu, T).unwrap()];
        let (x, out) = (
            MatRef::new(x, T, H).unwrap(),
            MatMut::new(&mut y, T, H).unwrap(),
        );
        self.rust
            .forward(&cpu, x.into(), out.into(), &mut routing, &mut workspace)
            .unwrap();
        y
    }

    pub fn call(&mut self, x: *const moe_matrix, y: *const moe_matrix_mut) -> moe_forward {
        moe_forward {
            struct_size: size_of::<moe_forward>(),
            x,
            y,
            workspace: self.workspace.as_mut_ptr(),
            workspace_bytes: self.workspace.len(),
            ..Zeroable::zeroed()
        }
    }

    pub fn forward(&self, call: &moe_forward) -> moe_status {
        // SAFETY: the handles live as long as `self`; callers' memory is as long as they say.
        unsafe { moe_layer_forward(self.cpu, self.layer, self.routing, call) }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // SAFETY: living handles, used no more.
        unsafe {
            for status in [
                moe_layer_destroy(self.layer),
                moe_routing_destroy(self.routing),
                moe_router_destroy(self.router),
                moe_cpu_destroy(self.cpu),
            ] {
                must(status);
            }
        }
    }
}
