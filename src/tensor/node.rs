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
    Ok(tie(args, node)?)
}

fn tie(args: &[&Tensor], node: Node) -> candle_core::Result<Tensor> {
    match args {
        [a] => a.apply_op1(node),
        [a, b] => a.apply_op2(b, node),
        [a, b, c] => a.apply_op3(b, c, node),
        _ => candle_core::bail!("{}: a node has three arguments at most", node.name),
    }
}

thread_local! {
    /// Whether candle leaves gradients in the graph, for gradients of gradients; as it asks itself, once a
    /// thread.
    static GRADIENTS_STAY_IN_THE_GRAPH: bool =
        std::env::var("CANDLE_GRAD_DO_NOT_DETACH").is_ok_and(|set| !set.is_empty() && set != "0");
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
        args: [&Tensor; N],
        output: &Tensor,
        upstream: &Tensor,
    ) -> candle_core::Result<[Option<Tensor>; N]> {
        let upstream = upstream.detach().contiguous()?;
        let mut gradients = (self.backward)(&output.detach(), &upstream)?;
        if GRADIENTS_STAY_IN_THE_GRAPH.with(|stay| *stay) {
            for gradient in gradients.iter_mut().flatten() {
                *gradient = self.once(&args, gradient)?;
            }
        }
        gradients.try_into().or_else(|gradients: Vec<_>| {
            candle_core::bail!("{}: {} gradients of {N} arguments", self.name, gradients.len())
        })
    }

    /// A gradient that says that it has none itself when it is asked for it.
    fn once(&self, args: &[&Tensor], gradient: &Tensor) -> candle_core::Result<Tensor> {
        let name = self.name;
        let (storage, layout) = gradient.storage_and_layout();
        let node = Node {
            name,
            output: Mutex::new(Some(storage.try_clone(layout)?)),
            shape: gradient.shape().clone(),
            backward: Box::new(move |_, _| {
                let message = format!("{name}: gradients of gradients are not supported");
                Err(candle_core::Error::Msg(message).into())
            }),
        };
        tie(args, node)
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

    fn bwd(&self, a: &Tensor, out: &Tensor, up: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let [a] = self.backward([a], out, up)?;
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
        a: &Tensor,
        b: &Tensor,
        out: &Tensor,
        up: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let [a, b] = self.backward([a, b], out, up)?;
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
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        out: &Tensor,
        up: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = self.backward([a, b, c], out, up)?;
        Ok((a, b, c))
    }
}
