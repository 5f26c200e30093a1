//! The CUDA driver's side of a stream: finds the driver, loads the images that build.rs made, and
//! launches.

use std::any::Any;
use std::collections::HashMap;
use std::ffi::{c_void, CString};
use std::panic::{self, catch_unwind, UnwindSafe};
use std::sync::{LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::DriverError;

use super::{Device, Kernel, Launch};
use crate::error::{Error, Result};

/// A compiled file of kernels. The driver reads its header as words.
#[repr(C, align(16))]
struct Image<Bytes: ?Sized>(Bytes);

/// The image of every op.
static IMAGES: &[(&str, &Image<[u8]>)] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Contexts, and the modules loaded in them, by the context's number, which the driver never
/// uses again for another. Handles are kept as integers; they are the driver's to look into, and go with
/// their context.
#[derive(Default)]
struct Loaded {
    devices: HashMap<u64, Device>,
    modules: HashMap<(u64, &'static str), usize>,
    functions: HashMap<(u64, Kernel), usize>,
}

fn loaded() -> MutexGuard<'static, Loaded> {
    static LOADED: LazyLock<Mutex<Loaded>> = LazyLock::new(Mutex::default);
    // A panic elsewhere leaves the tables as they were before or after an insertion.
    LOADED.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Stream {
    stream: sys::CUstream,
    context: sys::CUcontext,
    context_id: u64,
}

impl Stream {
    /// # Safety
    /// The handle is of a stream that lives.
    pub(super) unsafe fn new(stream: sys::CUstream) -> Result<(Self, Device)> {
        find_driver()?;
        // cudarc panics where the driver lacks a function.
        let found = catch_unwind(|| {
            let mut context_id = 0;
            // SAFETY: the caller's handle; the driver writes what the pointers lead to.
            unsafe {
                let context = context_of(stream)?;
                sys::cuCtxGetId(context, &mut context_id).result()?;
                let known = loaded().devices.get(&context_id).copied();
                let device = match known {
                    Some(device) => device,
                    None => {
                        let device = device_of(context)?;
                        loaded().devices.insert(context_id, device);
                        device
                    }
                };
                Ok((Self { stream, context, context_id }, device))
            }
        });
        match found {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(error)) => Err(device_error(error)),
            Err(panic) => Err(Error::CudaDriver { reason: message(&*panic) }),
        }
    }

    pub(super) fn launch(
        &self,
        kernel: &Kernel,
        launch: Launch,
        device: Device,
        args: *const c_void,
    ) -> Result<()> {
        let failed = |error: DriverError| launch_error(kernel, device, error);
        // SAFETY: the stream, and with it its context, lives as long as this does.
        let _current = unsafe { Current::set(self.context) }.map_err(failed)?;
        let function = self.function(kernel).map_err(failed)?;

        let mut parameters = [args.cast_mut()];
        // SAFETY: the function is of this context, and `args` leads to the struct it takes.
        let launched = unsafe {
            sys::cuLaunchKernel(
                function,
                launch.blocks,
                1,
                1,
                launch.threads,
                1,
                1,
                launch.shared_bytes,
                self.stream,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        launched.result().map_err(failed)
    }

    /// The kernel in this stream's context, which is current.
    fn function(&self, kernel: &Kernel) -> std::result::Result<sys::CUfunction, DriverError> {
        let mut loaded = loaded();
        if let Some(&function) = loaded.functions.get(&(self.context_id, *kernel)) {
            return Ok(function as sys::CUfunction);
        }
        let module = match loaded.modules.get(&(self.context_id, kernel.op)) {
            Some(&module) => module as sys::CUmodule,
            None => {
                let image = IMAGES.iter().find(|(op, _)| *op == kernel.op).map(|(_, image)| image);
                // An image is empty if it was built for the documentation only.
                let image = image
                    .filter(|image| !image.0.is_empty())
                    .ok_or(DriverError(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU))?;
                let mut module = std::ptr::null_mut();
                // SAFETY: the image is what nvcc wrote.
                unsafe { sys::cuModuleLoadData(&mut module, image.0.as_ptr().cast()).result()? };
                loaded.modules.insert((self.context_id, kernel.op), module as usize);
                module
            }
        };
        let name = CString::new(kernel.symbol()).expect("names are letters and digits");
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is of the current context.
        unsafe { sys::cuModuleGetFunction(&mut function, module, name.as_ptr()).result()? };
        // As much shared memory as a block can have. Once, as another thread may launch it meanwhile; and
        // if that fails, so does a launch that needs it.
        if let Some(device) = loaded.devices.get(&self.context_id) {
            let of = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
            let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let mut own = 0;
            // SAFETY: the function is of the current context; the driver writes what the pointer leads to.
            unsafe {
                sys::cuFuncGetAttribute(&mut own, of, function).result()?;
                let _ = sys::cuFuncSetAttribute(function, most, device.shared_bytes as i32 - own);
            }
        }
        loaded.functions.insert((self.context_id, *kernel), function as usize);
        Ok(function)
    }
}

/// The device of a context.
///
/// # Safety
/// The context lives.
unsafe fn device_of(context: sys::CUcontext) -> std::result::Result<Device, DriverError> {
    let (mut device, mut numbers) = (0, [0; 5]);
    let attributes = [
        sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X,
        sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
    ];
    // SAFETY: the caller's; the driver writes what the pointers lead to.
    unsafe {
        let _current = Current::set(context)?;
        sys::cuCtxGetDevice(&mut device).result()?;
        for (number, attribute) in numbers.iter_mut().zip(attributes) {
            sys::cuDeviceGetAttribute(number, attribute, device).result()?;
        }
    }
    let [major, minor, max_blocks, multiprocessors, shared_bytes] = numbers.map(i32::unsigned_abs);
    Ok(Device { compute_capability: (major, minor), max_blocks, multiprocessors, shared_bytes })
}

/// The context that a stream launches in.
///
/// # Safety
/// The driver has started, and the handle is of a stream that lives.
unsafe fn context_of(stream: sys::CUstream) -> std::result::Result<sys::CUcontext, DriverError> {
    let mut context = std::ptr::null_mut();
    // The handles of the default stream, null, CU_STREAM_LEGACY and CU_STREAM_PER_THREAD, belong to
    // no context but the thread's current one. A thread that has made no CUDA call has none, and
    // PyTorch's backward thread of the first device is one: there the CUDA runtime would take the
    // first device's primary context.
    if stream as usize <= 2 {
        // SAFETY: the driver writes what the pointer leads to.
        unsafe { sys::cuCtxGetCurrent(&mut context) }.result()?;
        return if context.is_null() { primary_context() } else { Ok(context) };
    }
    // SAFETY: the caller's handle; the driver writes what the pointer leads to.
    unsafe { sys::cuStreamGetCtx(stream, &mut context) }.result()?;
    Ok(context)
}

/// The first device's primary context, which the CUDA runtime and so PyTorch work in. It is retained
/// once a process and never released: streams that are copied around would outlive a release.
fn primary_context() -> std::result::Result<sys::CUcontext, DriverError> {
    // As an integer, like the tables above. An error is not kept: memory may be free the next time.
    static RETAINED: Mutex<Option<usize>> = Mutex::new(None);
    let mut retained = RETAINED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(context) = *retained {
        return Ok(context as sys::CUcontext);
    }
    let (mut device, mut context) = (0, std::ptr::null_mut());
    // SAFETY: the driver has started, and writes what the pointers lead to.
    unsafe {
        sys::cuDeviceGet(&mut device, 0).result()?;
        sys::cuDevicePrimaryCtxRetain(&mut context, device).result()?;
    }
    *retained = Some(context as usize);
    Ok(context)
}

/// Makes a context the thread's, and gives the thread back what it had.
struct Current;

impl Current {
    /// # Safety
    /// The context lives.
    unsafe fn set(context: sys::CUcontext) -> std::result::Result<Self, DriverError> {
        // SAFETY: the caller's.
        unsafe { sys::cuCtxPushCurrent_v2(context) }.result()?;
        Ok(Current)
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        let mut context = std::ptr::null_mut();
        // SAFETY: what `set` pushed. There is nothing to do about an error here.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut context) };
    }
}

/// `Ok` when there is a driver and it has started; looked for once a process.
fn find_driver() -> Result<()> {
    static FOUND: OnceLock<std::result::Result<std::result::Result<(), DriverError>, String>> =
        OnceLock::new();
    // cudarc panics where there is no driver.
    // SAFETY: may be called any number of times.
    let start = || quietly(|| unsafe { sys::cuInit(0) }.result());
    match FOUND.get_or_init(|| start().map_err(|panic| message(&*panic))) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) if error.0 == CUresult::CUDA_ERROR_NO_DEVICE => Err(device_error(*error)),
        Ok(Err(error)) => Err(Error::CudaDriver { reason: describe(*error) }),
        Err(reason) => Err(Error::CudaDriver { reason: reason.clone() }),
    }
}

pub(super) fn device_count() -> Result<usize> {
    find_driver()?;
    let mut count = 0;
    // SAFETY: the driver has started, and writes what the pointer leads to.
    unsafe { sys::cuDeviceGetCount(&mut count) }.result().map_err(device_error)?;
    Ok(usize::try_from(count).unwrap_or_default())
}

/// The error of a call to the driver that is about no kernel.
pub(crate) fn device_error(error: DriverError) -> Error {
    Error::CudaDevice { reason: describe(error) }
}

/// The error of an allocation for an op.
#[cfg(feature = "candle")]
pub(crate) fn allocation_error(op: &'static str, error: DriverError) -> Error {
    match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::CudaMemory { op },
        _ => device_error(error),
    }
}

/// [`catch_unwind`] without what a panic prints: the error says it shorter. Between the two hooks a
/// panic of another thread is not printed either; that is once a process.
fn quietly<T>(body: impl FnOnce() -> T + UnwindSafe) -> std::thread::Result<T> {
    // Who panics already cannot change the hook.
    if std::thread::panicking() {
        return catch_unwind(body);
    }
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let result = catch_unwind(body);
    panic::set_hook(hook);
    result
}

fn launch_error(kernel: &Kernel, device: Device, error: DriverError) -> Error {
    let (op, reason) = (kernel.op, describe(error));
    match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::CudaMemory { op },
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
        | CUresult::CUDA_ERROR_INVALID_IMAGE
        | CUresult::CUDA_ERROR_INVALID_PTX
        | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
            Error::CudaImage { op, compute_capability: device.compute_capability, reason }
        }
        _ => Error::CudaLaunch { op, kernel: kernel.symbol(), reason },
    }
}

/// The driver's words for its error.
fn describe(error: DriverError) -> String {
    let text = error.error_string().ok().and_then(|text| text.to_str().ok());
    text.map_or_else(|| format!("{:?}", error.0), str::to_string)
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    // Behind this comes the list of every name that was tried.
    let text = text.and_then(|text| text.split(" - searched").next());
    text.unwrap_or("its library cannot be loaded").to_string()
}
