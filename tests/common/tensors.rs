//! Candle tensors and devices.

use candle_core::{DType, Device, Tensor};

/// The devices on which every case runs. With the feature `cuda` a machine without a GPU fails: what
/// was asked for is not skipped.
pub fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    if cfg!(feature = "cuda") {
        devices.push(Device::new_cuda(0).expect("the feature `cuda` is tested on a GPU"));
    }
    devices
}

/// The devices on which candle has tensors without elements: it cannot launch a kernel for none.
pub fn devices_with_empty_tensors() -> Vec<Device> {
    devices().into_iter().filter(Device::is_cpu).collect()
}

/// A tensor's elements, whatever its dtype and layout, in row-major order as f64.
pub fn to_vec(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    flat.to_vec1().unwrap()
}

/// The same values behind strides that are not contiguous and an offset that is not zero.
pub fn strided(tensor: &Tensor) -> Tensor {
    let last = tensor.rank() - 1;
    let pad = tensor.zeros_like().unwrap();
    let wide = Tensor::cat(&[&pad, tensor], last).unwrap();
    let n = tensor.dim(last).unwrap();
    let view = wide.narrow(last, n, n).unwrap();
    assert_eq!(view.dims(), tensor.dims());
    view
}
