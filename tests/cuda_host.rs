//! The host side of the GPU backend: what happens without a driver, with an old one, and how launches are made.
#![cfg(feature = "cuda")]

#[path = "common/gpu.rs"]
mod gpu;

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
