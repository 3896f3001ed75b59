//! Handles: whose they are, and which threads use them.

use super::*;

#[test]
fn handles_in_use_are_busy_and_experts_stay_with_the_caller_on_error() {
    let pair = Pair::new(1, DType::F32);
    let mut experts = null_mut();
    let act = swiglu();
    let mut layer = null_mut();
    // SAFETY: living handles and places.
    unsafe {
        must(moe_experts_create(
            pair.cpu,
            H,
            I,
            &act,
            MOE_DTYPE_F32,
            &mut experts,
        ));
        let kept = experts;
        assert_eq!(
            moe_layer_create(pair.router, &mut experts, &mut layer),
            MOE_ERROR_VALUE
        ); // there are none
        assert_eq!(
            moe_layer_set_shared(pair.cpu, pair.layer, &mut experts, MOE_JOIN_ADD, null()),
            MOE_ERROR_VALUE
        );
        assert!(experts == kept && layer.is_null());
        assert_eq!(moe_experts_len(experts), 0);
        must(moe_experts_destroy(experts));
        must(moe_experts_destroy(null_mut()));
    }
}

/// Calls from several threads share handles as const; each has its own routing.
#[test]
fn threads_share_a_layer() {
    let pair = Pair::new(*THREADS.last().unwrap(), DType::F32);
    let x = Rng(9).normals(T * H);
    let expected = pair.rust_forward(&x);
    let (cpu, layer, bytes) = (pair.cpu as usize, pair.layer as usize, pair.workspace.len());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let (mut out, mut workspace) = (vec![0.0f32; T * H], vec![0u8; bytes]);
                let x_view = matrix(&x, T, H);
                let y_view = matrix_mut(&mut out, T, H);
                let call = moe_forward {
                    struct_size: size_of::<moe_forward>(),
                    x: &x_view,
                    y: &y_view,
                    workspace: workspace.as_mut_ptr(),
                    workspace_bytes: bytes,
                    ..Zeroable::zeroed()
                };
                let mut routing = null_mut();
                // SAFETY: the handles live until the scope ends; memory is as long as it is told.
                unsafe {
                    must(moe_routing_create(&mut routing));
                    for _ in 0..20 {
                        must(moe_layer_forward(
                            cpu as *const _,
                            layer as *const _,
                            routing,
                            &call,
                        ));
                    }
                    must(moe_routing_destroy(routing));
                }
                assert_same_bits(&out, &expected, "y");
            });
        }
    });
}

/// Without the feature `parallel` a handle of several threads is refused and none is made.
#[test]
fn threads_are_given_or_refused() {
    const PARALLEL: bool = cfg!(feature = "parallel");
    let (made, lacking) = match PARALLEL {
        true => (MOE_OK, ""),
        false => (MOE_ERROR_UNSUPPORTED, "feature `parallel`"),
    };
    let mut cases = vec![(0, MOE_OK, "", 1), (1, MOE_OK, "", 1)];
    cases.extend([2, 3].map(|n| (n, made, lacking, n)));
    cases.extend([4097, usize::MAX].map(|n| (n, MOE_ERROR_VALUE, "at most 4096", 0)));
    for (threads, status, message, count) in cases {
        let options = moe_cpu_options {
            struct_size: size_of::<moe_cpu_options>(),
            threads,
            isa: null(),
        };
        let mut cpu = null_mut();
        // SAFETY: valid options and a place for the handle, which is ended once.
        unsafe {
            let found = moe_cpu_create(&options, &mut cpu);
            assert_eq!(found, status, "{threads} threads: {}", last_error());
            if status == MOE_OK {
                assert_eq!(moe_cpu_threads(cpu), count, "{threads} threads");
                must(moe_cpu_destroy(cpu));
            } else {
                assert!(cpu.is_null(), "{threads} threads");
                let error = last_error();
                assert!(
                    error.starts_with("threads: ") && error.contains(message),
                    "{error}"
                );
            }
        }
    }
}
