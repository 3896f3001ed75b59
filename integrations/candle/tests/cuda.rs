#![cfg(feature = "cuda")]
use candle_core::{DType, Device, Tensor};
#[test]
fn opens() {
    let device = Device::new_cuda(0).unwrap();
    let x = Tensor::new(&[1f32, 2.0], &device).unwrap();
    println!("{:?}", x.to_vec1::<f32>().unwrap());
    assert_eq!(x.dtype(), DType::F32);
}
