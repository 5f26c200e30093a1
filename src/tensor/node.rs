//! The way into candle's graph: an op computes its output first, whatever the device, and a custom op
//! then only ties it to the arguments.

use std::sync::{Mutex, PoisonError};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Shape, Storage, Tensor,
};

use super::Buffer;
use crate::error::Result;
use crate::memory::Element;

/// `output` as a function of `args`, three at most. From it and its upstream gradient, `backward`
/// makes the gradients of the arguments, in their order; `None` for those that take none.
pub(crate) fn node<T: Element>(
    name: &'static str,
    args: &[&Tensor],
    output: Buffer<T>,
    shape: impl Into<Shape>,
    backward: impl Fn(&Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
) -> Result<Tensor> {
    if !args.iter().any(|arg| arg.track_op()) {
        return Ok(output.into_tensor(shape));
    }
    let output = Mutex::new(Some(output.into_storage()));
    let node = Node { name, output, shape: shape.into(), backward: Box::new(backward) };
    Ok(match args {
        [a] => a.apply_op1(node),
        [a, b] => a.apply_op2(b, node),
        [a, b, c] => a.apply_op3(b, c, node),
        _ => Err(candle_core::Error::Msg(format!("{name}: a node has three arguments at most"))),
    }?)
}

struct Node {
    name: &'static str,
    /// Until the forward pass has handed it over.
    output: Mutex<Option<Storage>>,
    shape: Shape,
    backward: Box<Backward>,
}

type Backward = dyn Fn(&Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync;

impl Node {
    fn output(&self) -> Option<Storage> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn cpu(&self) -> candle_core::Result<(CpuStorage, Shape)> {
        match self.output() {
            Some(Storage::Cpu(output)) => Ok((output, self.shape.clone())),
            _ => candle_core::bail!("{}: the output is not on the CPU", self.name),
        }
    }

    fn cuda(&self) -> candle_core::Result<(CudaStorage, Shape)> {
        match self.output() {
            Some(Storage::Cuda(output)) => Ok((output, self.shape.clone())),
            _ => candle_core::bail!("{}: the output is not on a CUDA device", self.name),
        }
    }

    fn backward<const N: usize>(
        &self,
        output: &Tensor,
        upstream: &Tensor,
    ) -> candle_core::Result<[Option<Tensor>; N]> {
        let upstream = upstream.detach().contiguous()?;
        let gradients = (self.backward)(&output.detach(), &upstream)?;
        gradients.try_into().or_else(|gradients: Vec<_>| {
            candle_core::bail!("{}: {} gradients of {N} arguments", self.name, gradients.len())
        })
    }
}

type Cpu<'a> = &'a CpuStorage;
type Cuda<'a> = &'a CudaStorage;

impl CustomOp1 for Node {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: Cpu, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(&self, _: Cuda, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(&self, _: &Tensor, out: &Tensor, up: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let [a] = self.backward(out, up)?;
        Ok(a)
    }
}

impl CustomOp2 for Node {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: Cpu,
        _: &Layout,
        _: Cpu,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: Cuda,
        _: &Layout,
        _: Cuda,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        out: &Tensor,
        up: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let [a, b] = self.backward(out, up)?;
        Ok((a, b))
    }
}

impl CustomOp3 for Node {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: Cpu,
        _: &Layout,
        _: Cpu,
        _: &Layout,
        _: Cpu,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: Cuda,
        _: &Layout,
        _: Cuda,
        _: &Layout,
        _: Cuda,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        out: &Tensor,
        up: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = self.backward(out, up)?;
        Ok((a, b, c))
    }
}
