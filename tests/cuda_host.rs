//! The host side of the GPU backend: what happens without a driver, with an old one, on an old GPU, and what exactly a launch hands to the driver.
//!
//! Each test of the second kind runs a scenario in a process of its own, with a `libcuda.so.1` that only writes down what it is asked
//! (`tests/common/mock_cuda.c`, built with the C compiler that links Rust). They say nothing about kernels.
#![cfg(all(feature = "cuda", target_os = "linux"))]
#![allow(unsafe_code)] // launches

#[path = "common/gpu.rs"]
mod gpu;

use moe_kernels::cuda::{
    Cuda, DevicePtr, Launch, Module, RawStream, Swizzle, TensorMap, launch_raw, ptx,
};
use moe_kernels::{DType, Error};
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

#[test]
fn a_device_says_what_it_is() {
    let Some(gpu) = gpu::open() else { return };
    let info = gpu.cuda.device_info();
    assert!(info.compute_capability >= (8, 0), "{info:?}");
    assert!(
        info.sm_count > 0 && info.shared_per_block >= 48 << 10,
        "{info:?}"
    );
}

#[test]
fn memory_comes_back_as_it_went() {
    let Some(gpu) = gpu::open() else { return };
    let values: Vec<u32> = (0..1000).collect();
    assert_eq!(gpu.download(&gpu.upload(&values)), values);
    assert_eq!(gpu.download(&gpu.filled::<i32>(7, 0xff)), [-1; 7]);
    assert_eq!(gpu.download(&gpu.zeros::<u64>(0)), [0u64; 0]);
}

/// A folder whose libcuda is `content` (the mock's binary, or nothing that loads), under every name that is tried.
fn library_folder(name: &str, content: &[u8]) -> PathBuf {
    let folder =
        PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for file in ["libcuda.so.1", "libcuda.so", "nvcuda.dll", "cuda.dll"] {
        std::fs::write(folder.join(file), content).unwrap();
    }
    folder
}

fn mock() -> &'static PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/mock_cuda.c");
        let built = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("mock-{}.so", std::process::id()));
        let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
        let status = Command::new(compiler)
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"])
            .arg(&built)
            .arg(source)
            .status();
        assert!(
            status.expect("a C compiler").success(),
            "the mock does not compile"
        );
        library_folder("mock", &std::fs::read(built).unwrap())
    })
}

/// Runs `scenario` (a test below that is ignored) in a process that finds libcuda in `folder` first, and gives back its output.
fn run(scenario: &str, folder: &PathBuf, environment: &[(&str, &str)]) -> String {
    let out = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            scenario,
            "--nocapture",
            "--test-threads=1",
        ])
        .env("LD_LIBRARY_PATH", folder)
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(out.status.success(), "{scenario}:\n{text}");
    assert!(text.contains("1 passed"), "{scenario} did not run:\n{text}");
    text
}

/// What a scenario prints of an error.
fn say<T>(what: &str, result: Result<T, Error>) {
    match result {
        Ok(_) => println!("{what}: fine"),
        Err(e) => println!("{what}: {e} {e:?}"),
    }
}

#[track_caller]
fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing from\n{text}");
    }
}

#[test]
#[ignore = "a scenario, run by other tests"]
fn scenario_open() {
    let cuda = Cuda::new(0);
    if let Ok(cuda) = &cuda {
        println!("{cuda:?} {:?} {:?}", cuda.name(), cuda.driver_version());
        say("preload sm_80", cuda.preload(Module::Routing));
        say("preload sm_90a", cuda.preload(Module::GroupedGemmSm90));
    }
    say("open", cuda);
    say("open again", Cuda::new(0));
    say("second device", Cuda::new(1));
}

#[test]
fn without_a_driver_the_error_says_to_install_one() {
    let nothing = library_folder("nothing", b"");
    let text = run("scenario_open", &nothing, &[]);
    assert_says(
        &text,
        &[
            "open: cuda: no NVIDIA driver: libcuda.so.1 was not found; install the driver",
            "open again: cuda: no",
            "CudaUnavailable",
        ],
    );
    let text = run("scenario_raw_without_context", &nothing, &[]);
    assert_says(&text, &["raw: cuda: no NVIDIA driver"]);
}

#[test]
fn a_gpu_opens() {
    let text = run("scenario_open", mock(), &[]);
    assert_says(
        &text,
        &[
            "open: fine",
            "compute_capability: (8, 0), sm_count: 108, shared_per_block: 166912, l2_bytes: 41943040",
            "Ok(\"mock 0\") Ok((12, 8))",
            "preload sm_80: fine",
            "preload sm_90a: cuda: grouped_gemm_sm90 needs a GPU of compute capability 9.0, this one has 8.0",
            "second device: ordinal: expected a GPU from 0 to 0, got 1",
        ],
    );
}

#[test]
fn without_a_gpu_the_error_says_what_to_look_at() {
    for environment in [("MOCK_CUDA_DEVICES", "0"), ("MOCK_CUDA_INIT", "100")] {
        let text = run("scenario_open", mock(), &[environment]);
        assert_says(
            &text,
            &["open: cuda: the driver sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"],
        );
    }
    let text = run("scenario_open", mock(), &[("MOCK_CUDA_INIT", "999")]);
    assert_says(
        &text,
        &["open: cuda: the driver does not start: MOCK_ERROR: as the test wished"],
    );
}

#[test]
fn an_old_gpu_is_refused_by_its_number() {
    let text = run("scenario_open", mock(), &[("MOCK_CUDA_SM", "75")]);
    assert_says(
        &text,
        &[
            "open: cuda: every kernel needs a GPU of compute capability 8.0 or later, this one has 7.5",
            "CudaUnsupportedGpu",
        ],
    );
}

#[test]
fn an_old_driver_is_refused_by_its_number() {
    let text = run("scenario_open", mock(), &[("MOCK_CUDA_DRIVER", "11030")]);
    assert_says(
        &text,
        &[
            "open: cuda: the driver supports CUDA 11.3, but this crate needs CUDA 11.4; install a newer NVIDIA driver",
        ],
    );
    // New enough for the sm_80 texts, too old for TMA and wgmma: refused before the driver sees the text.
    let text = run(
        "scenario_open",
        mock(),
        &[("MOCK_CUDA_DRIVER", "11080"), ("MOCK_CUDA_SM", "90")],
    );
    assert_says(
        &text,
        &[
            "open: fine",
            "preload sm_80: fine",
            "preload sm_90a: cuda: the driver supports CUDA 11.8, but grouped_gemm_sm90 needs CUDA 12.",
        ],
    );
    assert!(!text.contains("cuModuleLoadData .target sm_90a"), "{text}");
}

#[test]
fn a_text_that_the_driver_refuses_is_explained() {
    let text = run("scenario_open", mock(), &[("MOCK_CUDA_LOAD", "222")]);
    assert_says(
        &text,
        &[
            "preload sm_80: cuda: the driver supports CUDA 12.8, but routing needs CUDA",
            "CudaDriverTooOld",
        ],
    );
    let text = run("scenario_open", mock(), &[("MOCK_CUDA_LOAD", "209")]);
    assert_says(&text, &["CudaUnsupportedGpu"]);
    let text = run("scenario_open", mock(), &[("MOCK_CUDA_LOAD", "218")]);
    assert_says(
        &text,
        &[
            "preload sm_80: cuda: cuModuleLoadData failed with MOCK_ERROR: as the test wished (CUresult 218)",
        ],
    );
}

#[test]
#[ignore = "a scenario, run by other tests"]
fn scenario_raw_without_context() {
    let launch = Launch::new(Module::Routing, "k4", &1u32);
    // SAFETY: never reaches a device.
    say("raw", unsafe { launch_raw(RawStream::LEGACY, &launch) });
}

#[test]
fn the_raw_level_wants_a_current_context() {
    let text = run("scenario_raw_without_context", mock(), &[]);
    assert_says(&text, &["raw: cuda: no context is current on this thread"]);
}

#[test]
#[ignore = "a scenario, run by other tests"]
fn scenario_launch() {
    let cuda = Cuda::new(0).unwrap();
    let stream = cuda.context().new_stream().unwrap();
    // SAFETY: a mock that follows no pointer.
    let launch = |launch: &Launch| unsafe { cuda.launch(&stream, launch) };
    let params = [
        DevicePtr(0x0102_0304_0506_0708),
        DevicePtr::NULL,
        DevicePtr(u64::MAX),
    ];
    let plain = Launch::new(Module::Routing, "k24", &params)
        .grid([7, 2, 1])
        .block([128, 1, 1]);
    say("plain", launch(&plain));
    say("plain again", launch(&plain.clone().shared(1000)));
    say("much shared memory", launch(&plain.clone().shared(100_000)));
    say("more", launch(&plain.clone().shared(120_000)));
    say("less", launch(&plain.clone().shared(100_000)));
    say("too much", launch(&plain.clone().shared(200_000)));
    say("nothing to do", launch(&plain.clone().grid([0, 1, 1])));
    let map = TensorMap {
        address: DevicePtr(0xabc0),
        dtype: DType::BF16,
        rank: 3,
        dims: [64, 32, 5, 0, 0],
        strides: [128, 4096, 0, 0],
        boxes: [64, 16, 1, 0, 0],
        swizzle: Swizzle::Bytes128,
    };
    let clustered = Launch::new(Module::Permute, "k4m2", &9u32)
        .grid([4, 1, 1])
        .block([32, 1, 1])
        .cluster([2, 1, 1])
        .shared(64);
    let clustered = clustered.map(map).map(TensorMap { rank: 1, ..map });
    say("clustered", launch(&clustered));
    say(
        "five maps",
        launch(&clustered.clone().map(map).map(map).map(map)),
    );
    say(
        "a bad map",
        launch(&Launch::new(Module::Permute, "k4m1", &9u32).map(TensorMap { rank: 6, ..map })),
    );
    say(
        "a missing kernel",
        launch(&Launch::new(Module::Permute, "k4missing", &9u32)),
    );
    say(
        "a refused launch",
        launch(&Launch::new(Module::Permute, "k4refused", &9u32)),
    );
    // SAFETY: as above; the context is current.
    say("raw", unsafe {
        launch_raw(RawStream(0x77 as *mut _), &plain)
    });
    std::thread::scope(|scope| {
        scope.spawn(|| say("another thread", launch(&plain)));
    });
}

#[test]
fn a_launch_hands_over_what_its_plan_says() {
    let text = run("scenario_launch", mock(), &[("MOCK_CUDA_SM", "90")]);
    let arguments = "arguments 08070605040302010000000000000000ffffffffffffffff\n";
    assert_says(
        &text,
        &[
            &format!(
                "cuLaunchKernel k24 grid 7 2 1 block 128 1 1 shared 0 stream 5001 {arguments}plain: fine"
            ),
            &format!("shared 1000 stream 5001 {arguments}plain again: fine"),
            "cuFuncSetAttribute k24 8 100000\n",
            &format!("shared 100000 stream 5001 {arguments}much shared memory: fine"),
            "cuFuncSetAttribute k24 8 120000\n",
            "more: fine",
            "less: fine",
            "too much: shared memory: expected at most 166912 bytes for k24, got 200000",
            "\nnothing to do: fine",
            "cuTensorMapEncodeTiled dtype 9 at abc0 dim 64 box 64 step 1 dim 32 box 16 step 1 dim 5 box 1 step 1 stride 128 stride 4096 swizzle 3",
            "cuLaunchKernelEx k4m2 grid 4 1 1 block 32 1 1 shared 64 attribute 4: 2 1 1 stream 5001 arguments 09000000 map abc1 aligned 1 map abc1 aligned 1",
            "clustered: fine",
            "five maps: tensor maps: expected at most 4, got more",
            "a bad map: tensor map rank: expected 1 to 5, got 6",
            "a missing kernel: cuda: cuModuleGetFunction failed with MOCK_ERROR: as the test wished for kernel k4missing (CUresult 500)",
            "a refused launch: cuda: k4refused failed with MOCK_ERROR: as the test wished at grid [1, 1, 1]",
            &format!(
                "cuLaunchKernel k24 grid 7 2 1 block 128 1 1 shared 0 stream 77 {arguments}raw: fine"
            ),
            "another thread: fine",
        ],
    );
    // Loaded once, looked up once, allowed more shared memory only when it needs more.
    assert_eq!(text.matches("cuModuleLoadData").count(), 2, "{text}");
    assert_eq!(
        text.matches("cuModuleGetFunction k24\n").count(),
        1,
        "{text}"
    );
    assert_eq!(text.matches("cuFuncSetAttribute").count(), 2, "{text}");
}

#[test]
#[ignore = "a scenario, run by other tests"]
fn scenario_layer() {
    use moe_kernels::cuda::combine::DeviceRows;
    use moe_kernels::cuda::moe::{
        CudaMoeLayer, ExpertPointers, MoePointers, RoutingPointers, WeightPointers,
    };
    use moe_kernels::cuda::raw::moe_raw;
    use moe_kernels::grouped_gemm::Activation;
    use moe_kernels::routing::RouterConfig;
    let cuda = Cuda::new(0).unwrap();
    let (h, i, e) = (64, 32, 8);
    let layer = CudaMoeLayer::new(
        RouterConfig::mixtral(e, 2),
        h,
        i,
        Activation::SWIGLU,
        DType::BF16,
    )
    .unwrap();
    let rows = |at, stride, dtype| DeviceRows {
        ptr: DevicePtr(at),
        stride,
        dtype,
    };
    let gate_up = WeightPointers::contiguous(DevicePtr(0x1000_0000), DType::BF16, 2 * i, h);
    let down = WeightPointers::contiguous(DevicePtr(0x2000_0000), DType::BF16, h, i);
    let pointers = MoePointers::new(
        rows(0x3000_0000, h, DType::BF16),
        RoutingPointers::Logits(rows(0x4000_0000, e, DType::F32)),
        ExpertPointers::fused(gate_up, i, down),
        rows(0x5000_0000, h, DType::BF16),
        DevicePtr(0x6000_0000),
    );
    let call = |what, tokens| {
        println!("begin {what}");
        // SAFETY: a mock that follows no pointer.
        say(what, unsafe {
            moe_raw(RawStream(0x77 as *mut _), &layer, tokens, &pointers)
        });
    };
    call("first call", 300);
    call("second call", 300);
    call("no tokens", 0);
    let bad = MoePointers {
        workspace: DevicePtr::NULL,
        ..pointers
    };
    // SAFETY: as above.
    say("no workspace", unsafe {
        moe_raw(RawStream(0x77 as *mut _), &layer, 300, &bad)
    });
    drop(cuda);
}

/// No allocation, no copy, no wait: after the first call a call is its launches and nothing else.
#[test]
fn a_layers_call_only_launches() {
    for sm in ["80", "90"] {
        let text = run("scenario_layer", mock(), &[("MOCK_CUDA_SM", sm)]);
        let part = |from: &str, to: &str| -> String {
            text.split_once(from)
                .unwrap()
                .1
                .split_once(to)
                .unwrap()
                .0
                .into()
        };
        let second = part("begin second call\n", "second call: fine");
        let calls: Vec<&str> = second.lines().collect();
        assert!(
            calls
                .iter()
                .all(|line| line.starts_with("mock: cuLaunchKernel")
                    || line.starts_with("mock: cuTensorMapEncodeTiled")),
            "{text}"
        );
        let launches = calls.iter().filter(|line| line.contains("cuLaunchKernel"));
        let stems = [
            "moe_routing_",
            "moe_permute_",
            "moe_grouped_gemm_",
            "moe_grouped_gemm_",
            "moe_combine_",
        ];
        assert_eq!(launches.clone().count(), stems.len(), "{text}");
        assert!(
            launches.zip(stems).all(|(line, stem)| line.contains(stem)),
            "{text}"
        );
        assert_eq!(part("begin no tokens\n", "no tokens: fine"), "", "{text}");
        assert_says(
            &text,
            &["no workspace: workspace: expected device memory, got no pointer"],
        );
    }
}

#[test]
fn every_text_is_for_the_target_that_its_gpus_take() {
    for module in Module::ALL {
        let hopper = module == Module::GroupedGemmSm90;
        for cc in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)] {
            match ptx(module, cc) {
                Ok(text) => {
                    let target = if hopper {
                        ".target sm_90a"
                    } else {
                        ".target sm_80"
                    };
                    assert!(
                        text.contains(target) && text.contains(".address_size 64"),
                        "{module} for {cc:?}"
                    );
                }
                Err(e) => assert!(hopper && cc != (9, 0), "{module} for {cc:?}: {e}"),
            }
        }
        assert!(ptx(module, (7, 5)).is_err());
    }
}
