//! Moments as a tensor.

use candle_core::{Device, Tensor};

use super::Moments;
use crate::error::Result;
use crate::tensor::Buffer;

/// [`Moments`] where they were computed, so that nobody has to wait for them.
#[derive(Debug, Clone)]
pub struct MomentsTensor(Tensor);

impl MomentsTensor {
    /// Wraps moments that an op has written.
    pub(crate) fn from_buffer(buffer: Buffer<Moments>) -> Self {
        Self(buffer.into_tensor(3))
    }

    /// Moments of the host's, those of all shards for instance, for tensors on `device`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn new(moments: &Moments, device: &Device) -> Result<Self> {
        Ok(Self(Tensor::new(bytemuck::cast_ref::<_, [f64; 3]>(moments), device)?))
    }

    /// f64 `[3]`: count, mean, and the sum of squared deviations.
    pub fn tensor(&self) -> &Tensor {
        &self.0
    }

    /// Brings them to the host, which waits for the device.
    ///
    /// # Errors
    /// If the device fails.
    pub fn to_host(&self) -> Result<Moments> {
        Ok(bytemuck::cast_slice(&self.0.to_vec1::<f64>()?)[0])
    }
}
