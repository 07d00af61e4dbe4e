//! Bindings to libjepa_native.so, our thin C++ over libtorch for what tch does not bind (`host/native/native.h`).
//!
//! The library is opened at run time from the folder of the torch bridge, so that a build needs no libtorch.

use std::ffi::{CStr, c_char, c_void};
use std::path::PathBuf;
use std::sync::OnceLock;

use jepa_plugin_api::tch::{Device, Kind, Tensor};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::DeviceError;
use super::libtorch::mapped;
use crate::linker;

const API: i32 = 2;

/// What needs libtorch_cuda itself (`host/native/cuda`), beside the bridge after `make setup CUDA=1`.
pub(super) const CUDA: &str = "libjepa_cuda.so";

pub(super) type Handle = *mut c_void;
pub(super) type ErrorOut = *mut *mut c_char;

/// The functions, with the signatures of native.h.
pub(super) struct Native {
    free_string: unsafe extern "C" fn(*mut c_char),
    cpu_capability: unsafe extern "C" fn() -> *const c_char,
    cuda_loaded: unsafe extern "C" fn() -> bool,
    has_cuda: unsafe extern "C" fn() -> bool,
    autocast_set: unsafe extern "C" fn(i32, bool, i32, *mut bool, *mut i32, ErrorOut) -> bool,
    autocast_cache_clear: unsafe extern "C" fn(ErrorOut) -> bool,
    #[allow(clippy::type_complexity)]
    fused_adamw: unsafe extern "C" fn(
        usize,
        *const Handle,
        *const Handle,
        *const Handle,
        *const Handle,
        *const Handle,
        f64,
        f64,
        f64,
        f64,
        f64,
        ErrorOut,
    ) -> bool,
    ema: unsafe extern "C" fn(usize, *const Handle, *const Handle, f64, ErrorOut) -> bool,
    total_norm: unsafe extern "C" fn(usize, *const Handle, *mut Handle, ErrorOut) -> bool,
    clip: unsafe extern "C" fn(usize, *const Handle, Handle, f64, ErrorOut) -> bool,
    grads: unsafe extern "C" fn(usize, *const Handle, *mut Handle, ErrorOut) -> bool,
    set_grads: unsafe extern "C" fn(usize, *const Handle, *const Handle, ErrorOut) -> bool,
    zero_grads: unsafe extern "C" fn(usize, *const Handle, ErrorOut) -> bool,
    #[allow(clippy::type_complexity)]
    fused_sgd: unsafe extern "C" fn(
        usize,
        *const Handle,
        *const Handle,
        *const Handle,
        f64,
        f64,
        f64,
        bool,
        ErrorOut,
    ) -> bool,
    lars_scale: unsafe extern "C" fn(usize, *const Handle, *const Handle, f64, f64, f64, ErrorOut) -> bool,
    copy: unsafe extern "C" fn(usize, *const Handle, *const Handle, ErrorOut) -> bool,
    #[allow(clippy::type_complexity)]
    tensor_over: unsafe extern "C" fn(
        usize,
        *const i64,
        i32,
        *mut c_void,
        *mut c_void,
        unsafe extern "C" fn(*mut c_void),
        *mut Handle,
        ErrorOut,
    ) -> bool,
    pinned: unsafe extern "C" fn(usize, *const i64, i32, *mut Handle, ErrorOut) -> bool,
    to_gpu: unsafe extern "C" fn(usize, *const Handle, i32, *mut Handle, ErrorOut) -> bool,
    own_stream: unsafe extern "C" fn(i32, ErrorOut) -> bool,
    gpu_peak_bytes: unsafe extern "C" fn(i32, *mut u64, ErrorOut) -> bool,
    #[allow(clippy::type_complexity)]
    pub(super) comm_open:
        unsafe extern "C" fn(*const c_char, u16, bool, *const c_char, i64, *mut Handle, ErrorOut) -> bool,
    pub(super) comm_close: unsafe extern "C" fn(Handle),
    pub(super) comm_set: unsafe extern "C" fn(Handle, *const c_char, *const c_char, ErrorOut) -> bool,
    pub(super) comm_get: unsafe extern "C" fn(Handle, *const c_char, i64, *mut *mut c_char, ErrorOut) -> bool,
    pub(super) comm_join:
        unsafe extern "C" fn(Handle, *const c_char, i32, i32, *const c_char, ErrorOut) -> bool,
    pub(super) comm_all_reduce: unsafe extern "C" fn(Handle, Handle, i32, ErrorOut) -> bool,
    pub(super) comm_broadcast: unsafe extern "C" fn(Handle, Handle, i32, ErrorOut) -> bool,
    pub(super) comm_sum: unsafe extern "C" fn(Handle, Handle, ErrorOut) -> bool,
    pub(super) comm_join_nccl: unsafe extern "C" fn(Handle, *const c_char, *const c_char, ErrorOut) -> bool,
    pub(super) comm_leave: unsafe extern "C" fn(Handle),
    pub(super) comm_traffic: unsafe extern "C" fn(Handle, *mut u64),
    pub(super) comm_lost: unsafe extern "C" fn(Handle) -> bool,
    pub(super) comm_all_gather: unsafe extern "C" fn(Handle, Handle, Handle, ErrorOut) -> bool,
    pub(super) exchange_open:
        unsafe extern "C" fn(Handle, usize, *const Handle, i64, *mut Handle, ErrorOut) -> bool,
    pub(super) exchange_close: unsafe extern "C" fn(Handle),
    pub(super) exchange_begin: unsafe extern "C" fn(Handle, Handle, ErrorOut) -> bool,
    pub(super) exchange_finish: unsafe extern "C" fn(Handle, ErrorOut) -> bool,
}

static NATIVE: OnceLock<Native> = OnceLock::new();

/// The library, opened on first use.
pub(super) fn library() -> Result<&'static Native, DeviceError> {
    if let Some(native) = NATIVE.get() {
        return Ok(native);
    }
    let path = beside_bridge("libjepa_native.so");
    let native = open(&path).map_err(|reason| DeviceError::Library {
        path,
        reason,
        advice: "run `make setup`, which builds it beside the torch bridge",
    })?;
    Ok(NATIVE.get_or_init(|| native))
}

/// Where a library of ours is.
pub(super) fn beside_bridge(name: &str) -> PathBuf {
    let bridge = mapped(&format!("lib{}.so", jepa_plugin_api::abi::BRIDGE));
    let folder = bridge.and_then(|path| path.parent().map(PathBuf::from)).unwrap_or_default();
    folder.join(name)
}

/// Whether the library is there that NCCL and CUDA graphs need.
pub fn has_cuda_library() -> bool {
    beside_bridge(CUDA).exists()
}

fn open(path: &std::path::Path) -> Result<Native, String> {
    let words = |error| linker::words(&error);
    // SAFETY: the library is ours; its initialisers do nothing.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(words)?;
    // SAFETY: native.h declares each function with the type of the field that takes it, and the version of that
    // interface is compared before any other function is called.
    let native = unsafe {
        let api = library.get::<unsafe extern "C" fn() -> i32>(b"jepa_native_api").map_err(words)?();
        if api != API {
            return Err(format!("it has interface {api}, this host needs {API}"));
        }
        Native {
            free_string: *library.get(b"jepa_native_free_string").map_err(words)?,
            cpu_capability: *library.get(b"jepa_native_cpu_capability").map_err(words)?,
            cuda_loaded: *library.get(b"jepa_native_cuda_loaded").map_err(words)?,
            has_cuda: *library.get(b"jepa_native_has_cuda").map_err(words)?,
            autocast_set: *library.get(b"jepa_autocast_set").map_err(words)?,
            autocast_cache_clear: *library.get(b"jepa_autocast_cache_clear").map_err(words)?,
            fused_adamw: *library.get(b"jepa_fused_adamw").map_err(words)?,
            ema: *library.get(b"jepa_ema").map_err(words)?,
            total_norm: *library.get(b"jepa_total_norm").map_err(words)?,
            clip: *library.get(b"jepa_clip").map_err(words)?,
            grads: *library.get(b"jepa_grads").map_err(words)?,
            set_grads: *library.get(b"jepa_set_grads").map_err(words)?,
            zero_grads: *library.get(b"jepa_zero_grads").map_err(words)?,
            fused_sgd: *library.get(b"jepa_fused_sgd").map_err(words)?,
            lars_scale: *library.get(b"jepa_lars_scale").map_err(words)?,
            copy: *library.get(b"jepa_copy").map_err(words)?,
            tensor_over: *library.get(b"jepa_tensor_over").map_err(words)?,
            pinned: *library.get(b"jepa_pinned").map_err(words)?,
            to_gpu: *library.get(b"jepa_to_gpu").map_err(words)?,
            own_stream: *library.get(b"jepa_own_stream").map_err(words)?,
            gpu_peak_bytes: *library.get(b"jepa_gpu_peak_bytes").map_err(words)?,
            comm_open: *library.get(b"jepa_comm_open").map_err(words)?,
            comm_close: *library.get(b"jepa_comm_close").map_err(words)?,
            comm_set: *library.get(b"jepa_comm_set").map_err(words)?,
            comm_get: *library.get(b"jepa_comm_get").map_err(words)?,
            comm_join: *library.get(b"jepa_comm_join").map_err(words)?,
            comm_all_reduce: *library.get(b"jepa_comm_all_reduce").map_err(words)?,
            comm_broadcast: *library.get(b"jepa_comm_broadcast").map_err(words)?,
            comm_sum: *library.get(b"jepa_comm_sum").map_err(words)?,
            comm_join_nccl: *library.get(b"jepa_comm_join_nccl").map_err(words)?,
            comm_leave: *library.get(b"jepa_comm_leave").map_err(words)?,
            comm_traffic: *library.get(b"jepa_comm_traffic").map_err(words)?,
            comm_lost: *library.get(b"jepa_comm_lost").map_err(words)?,
            comm_all_gather: *library.get(b"jepa_comm_all_gather").map_err(words)?,
            exchange_open: *library.get(b"jepa_exchange_open").map_err(words)?,
            exchange_close: *library.get(b"jepa_exchange_close").map_err(words)?,
            exchange_begin: *library.get(b"jepa_exchange_begin").map_err(words)?,
            exchange_finish: *library.get(b"jepa_exchange_finish").map_err(words)?,
        }
    };
    std::mem::forget(library);
    Ok(native)
}

impl Native {
    /// Runs `call` with a place for its error, and turns false into that error.
    pub(super) fn checked(&self, call: impl FnOnce(&Self, ErrorOut) -> bool) -> Result<(), DeviceError> {
        let mut error: *mut c_char = std::ptr::null_mut();
        if call(self, &mut error) {
            return Ok(());
        }
        if error.is_null() {
            return Err(DeviceError::Torch("no message".to_owned()));
        }
        // SAFETY: a message of the library, which is used no more.
        let message = unsafe { self.take(error) };
        Err(DeviceError::Torch(message.lines().next().unwrap_or_default().to_owned()))
    }

    /// A string of the library's as ours.
    ///
    /// # Safety
    /// `text` comes from this library, and is used no more.
    pub(super) unsafe fn take(&self, text: *mut c_char) -> String {
        // SAFETY: as the caller promises.
        unsafe {
            let taken = CStr::from_ptr(text).to_string_lossy().into_owned();
            (self.free_string)(text);
            taken
        }
    }
}

/// Handles for a call; they stay the tensors'.
pub(super) fn handles<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Vec<Handle> {
    tensors.into_iter().map(|tensor| tensor.as_ptr().cast_mut().cast()).collect()
}

/// The vector instructions that libtorch's kernels use.
pub fn cpu_capability() -> Result<String, DeviceError> {
    let native = library()?;
    // SAFETY: a static string.
    Ok(unsafe { CStr::from_ptr((native.cpu_capability)()) }.to_string_lossy().into_owned())
}

pub(super) fn cuda_loaded() -> bool {
    // SAFETY: no arguments; safe at any time.
    library().is_ok_and(|native| unsafe { (native.cuda_loaded)() })
}

pub(super) fn has_cuda() -> bool {
    // SAFETY: as above.
    library().is_ok_and(|native| unsafe { (native.has_cuda)() })
}

/// Sets autocast of the calling thread and returns the state before, for a later call that restores it.
pub(super) fn set_autocast(cuda: bool, (enabled, dtype): (bool, i32)) -> Result<(bool, i32), DeviceError> {
    let mut before = (false, 0);
    // SAFETY: both out parameters live through the call.
    library()?.checked(|native, error| unsafe {
        (native.autocast_set)(i32::from(cuda), enabled, dtype, &mut before.0, &mut before.1, error)
    })?;
    Ok(before)
}

/// Drops the casts of parameters that autocast kept.
pub(super) fn clear_autocast_cache() -> Result<(), DeviceError> {
    // SAFETY: no tensors involved.
    library()?.checked(|native, error| unsafe { (native.autocast_cache_clear)(error) })
}

/// target ← source, pair by pair: lists of one dtype and device in one go. A GPU is not waited for.
///
/// # Errors
/// Whatever libtorch reports.
pub fn copy_all(targets: &[Tensor], sources: &[Tensor]) -> Result<(), DeviceError> {
    assert_eq!(targets.len(), sources.len(), "copies");
    let (targets, sources) = (handles(targets), handles(sources));
    // SAFETY: both lists have `count` valid handles.
    library()?.checked(|native, error| unsafe {
        (native.copy)(targets.len(), targets.as_ptr(), sources.as_ptr(), error)
    })
}

/// A contiguous tensor in memory of the CPU that `owner` owns, which is dropped when nothing refers to that memory any more, in
/// whatever thread, and also when this fails. Of u8, i16, i32 or f32.
///
/// # Errors
/// Whatever libtorch reports.
///
/// # Safety
/// From `start` on lie as many elements as the sizes say, aligned as `kind` needs it. They stay there, and are nobody else's
/// to read or write, until `owner` is dropped, which does not panic.
pub unsafe fn tensor_over<O: Send + 'static>(
    size: &[i64],
    kind: Kind,
    start: *mut u8,
    owner: O,
) -> Result<Tensor, DeviceError> {
    unsafe extern "C" fn release<O>(owner: *mut c_void) {
        // SAFETY: the box that was given away below, once.
        drop(unsafe { Box::from_raw(owner.cast::<O>()) });
    }
    let (native, dtype) = (library()?, scalar_type(kind)?);
    let owner = Box::into_raw(Box::new(owner)).cast();
    let mut out = std::ptr::null_mut();
    // SAFETY: the sizes live through the call, the memory as the caller promises; the tensor that goes out is ours.
    unsafe {
        native.checked(|native, error| {
            let start = start.cast();
            (native.tensor_over)(
                size.len(),
                size.as_ptr(),
                dtype,
                start,
                owner,
                release::<O>,
                &mut out,
                error,
            )
        })?;
        Ok(Tensor::from_ptr(out.cast()))
    }
}

/// A contiguous tensor of any values in memory of the CPU that a GPU reads by itself. What is freed serves the next one, once no
/// copy reads it any more. Of u8, i16, i32 or f32; needs a GPU.
///
/// # Errors
/// Whatever libtorch reports.
pub fn pinned(size: &[i64], kind: Kind) -> Result<Tensor, DeviceError> {
    let dtype = scalar_type(kind)?;
    let mut out = std::ptr::null_mut();
    // SAFETY: the sizes live through the call; the tensor that goes out is ours.
    unsafe {
        library()?
            .checked(|native, error| (native.pinned)(size.len(), size.as_ptr(), dtype, &mut out, error))?;
        Ok(Tensor::from_ptr(out.cast()))
    }
}

/// As c10 numbers its scalar types.
fn scalar_type(kind: Kind) -> Result<i32, DeviceError> {
    match kind {
        Kind::Uint8 => Ok(0),
        Kind::Int16 => Ok(2),
        Kind::Int => Ok(3),
        Kind::Float => Ok(6),
        kind => Err(DeviceError::Torch(format!("no memory for {kind:?}"))),
    }
}

/// Copies of these on a device. To a GPU they go beside what it computes, and nobody waits for [`pinned`] ones.
///
/// # Errors
/// Whatever libtorch reports.
pub fn to_device(tensors: &[&Tensor], device: Device) -> Result<Vec<Tensor>, DeviceError> {
    let Device::Cuda(number) = device else {
        let moved = tensors.iter().map(|tensor| tensor.f_to_device(device));
        return moved.collect::<Result<_, _>>().map_err(|error| DeviceError::Torch(error.to_string()));
    };
    let inputs = handles(tensors.iter().copied());
    let mut out: Vec<Handle> = vec![std::ptr::null_mut(); inputs.len()];
    // SAFETY: both lists have `count` places.
    library()?.checked(|native, error| unsafe {
        (native.to_gpu)(inputs.len(), inputs.as_ptr(), number as i32, out.as_mut_ptr(), error)
    })?;
    // SAFETY: handles that go out are ours.
    Ok(out.into_iter().map(|handle| unsafe { Tensor::from_ptr(handle.cast()) }).collect())
}

/// Lets this thread compute on a stream of its own on a GPU, which [`Graph`](super::Graph) needs.
///
/// # Errors
/// Whatever libtorch reports.
pub fn own_stream(device_number: usize) -> Result<(), DeviceError> {
    // SAFETY: no pointers but that of the error.
    library()?.checked(|native, error| unsafe { (native.own_stream)(device_number as i32, error) })
}

/// The most memory that tensors have had on a GPU at any moment so far, in bytes; `None` for the CPU.
///
/// # Errors
/// Whatever libtorch reports.
pub fn peak_gpu_bytes(device: Device) -> Result<Option<u64>, DeviceError> {
    let Device::Cuda(number) = device else { return Ok(None) };
    let mut bytes = 0;
    let native = library()?;
    // SAFETY: the number lives through the call.
    native.checked(|native, error| unsafe { (native.gpu_peak_bytes)(number as i32, &mut bytes, error) })?;
    Ok(Some(bytes))
}

/// The gradient of each parameter, `None` where there is none.
///
/// # Errors
/// Whatever libtorch reports.
pub fn gradients(params: &[Tensor]) -> Result<Vec<Option<Tensor>>, DeviceError> {
    let inputs = handles(params);
    let mut out: Vec<Handle> = vec![std::ptr::null_mut(); inputs.len()];
    // SAFETY: both lists have `count` places.
    library()?.checked(|native, error| unsafe {
        (native.grads)(inputs.len(), inputs.as_ptr(), out.as_mut_ptr(), error)
    })?;
    // SAFETY: a handle that goes out is ours.
    let own = |handle: Handle| (!handle.is_null()).then(|| unsafe { Tensor::from_ptr(handle.cast()) });
    Ok(out.into_iter().map(own).collect())
}

/// Gives each parameter this gradient, of its size, kind and device, or none.
///
/// # Errors
/// Whatever libtorch reports.
pub fn set_gradients(params: &[Tensor], gradients: &[Option<Tensor>]) -> Result<(), DeviceError> {
    assert_eq!(params.len(), gradients.len(), "gradients");
    let params = handles(params);
    let or_null = |gradient: &Option<Tensor>| {
        gradient.as_ref().map_or(std::ptr::null_mut(), |gradient| gradient.as_ptr().cast_mut().cast())
    };
    let gradients: Vec<Handle> = gradients.iter().map(or_null).collect();
    // SAFETY: both lists have `count` places; a gradient's may be null.
    library()?.checked(|native, error| unsafe {
        (native.set_grads)(params.len(), params.as_ptr(), gradients.as_ptr(), error)
    })
}

/// Drops the gradients of `params`.
///
/// # Errors
/// Whatever libtorch reports.
pub fn zero_gradients(params: &[Tensor]) -> Result<(), DeviceError> {
    let inputs = handles(params);
    // SAFETY: the list has `count` valid handles.
    library()?.checked(|native, error| unsafe { (native.zero_grads)(inputs.len(), inputs.as_ptr(), error) })
}

/// The L2 norm of all tensors together, a scalar on their device.
///
/// # Errors
/// Whatever libtorch reports.
pub fn total_norm(tensors: &[Tensor]) -> Result<Tensor, DeviceError> {
    let (inputs, mut norm) = (handles(tensors), std::ptr::null_mut());
    // SAFETY: the list has `count` valid handles; the norm that goes out is ours.
    unsafe {
        library()?
            .checked(|native, error| (native.total_norm)(inputs.len(), inputs.as_ptr(), &mut norm, error))?;
        Ok(Tensor::from_ptr(norm.cast()))
    }
}

/// Scales `gradients` in place so that their [`total_norm`], which is `norm`, does not exceed `max_norm`.
///
/// # Errors
/// Whatever libtorch reports.
pub fn clip_gradients(gradients: &[Tensor], norm: &Tensor, max_norm: f64) -> Result<(), DeviceError> {
    let inputs = handles(gradients);
    let norm = norm.as_ptr().cast_mut().cast();
    // SAFETY: all handles are valid.
    library()?.checked(|native, error| unsafe {
        (native.clip)(inputs.len(), inputs.as_ptr(), norm, max_norm, error)
    })
}

/// target ← momentum · target + (1 − momentum) · online, pair by pair, in place.
///
/// # Errors
/// Whatever libtorch reports, for lists of unequal shapes for one.
pub fn ema_update(targets: &[Tensor], onlines: &[Tensor], momentum: f64) -> Result<(), DeviceError> {
    assert_eq!(targets.len(), onlines.len(), "EMA pairs");
    let (targets, onlines) = (handles(targets), handles(onlines));
    // SAFETY: both lists have `count` valid handles.
    library()?.checked(|native, error| unsafe {
        (native.ema)(targets.len(), targets.as_ptr(), onlines.as_ptr(), momentum, error)
    })
}

/// What one AdamW step works on: lists of equal length, tensors of equal shape at equal places.
pub struct AdamW<'a> {
    /// Parameters, changed in place.
    pub params: &'a [Tensor],
    /// Their gradients.
    pub grads: &'a [Tensor],
    /// First moments, changed in place.
    pub exp_avgs: &'a [Tensor],
    /// Second moments, changed in place.
    pub exp_avg_sqs: &'a [Tensor],
    /// Steps taken, f32 scalars, counted up in place.
    pub steps: &'a [Tensor],
}

/// One step of AdamW, equal to `torch.optim.AdamW(fused=True)`.
///
/// # Errors
/// Whatever libtorch reports.
pub fn adamw_step(
    lists: &AdamW<'_>,
    lr: f64,
    betas: [f64; 2],
    weight_decay: f64,
    eps: f64,
) -> Result<(), DeviceError> {
    let all = [lists.params, lists.grads, lists.exp_avgs, lists.exp_avg_sqs, lists.steps].map(handles);
    let count = all[0].len();
    assert!(all.iter().all(|list| list.len() == count), "AdamW lists");
    let [params, grads, exp_avgs, exp_avg_sqs, steps] = all.each_ref().map(|list| list.as_ptr());
    // SAFETY: all lists have `count` valid handles.
    library()?.checked(|native, error| unsafe {
        (native.fused_adamw)(
            count,
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            steps,
            lr,
            betas[0],
            betas[1],
            weight_decay,
            eps,
            error,
        )
    })
}

/// What one SGD step works on: lists of equal length, tensors of equal shape at equal places.
pub struct Sgd<'a> {
    /// Parameters, changed in place.
    pub params: &'a [Tensor],
    /// Their gradients.
    pub grads: &'a [Tensor],
    /// Running sums of gradients, changed in place; zeros before the first step.
    pub momentum_buffers: &'a [Tensor],
}

/// One step of SGD, equal to `torch.optim.SGD(fused=True)`: the gradient becomes grad + weight_decay · param.
///
/// # Errors
/// Whatever libtorch reports.
pub fn sgd_step(
    lists: &Sgd<'_>,
    lr: f64,
    momentum: f64,
    weight_decay: f64,
    nesterov: bool,
) -> Result<(), DeviceError> {
    let all = [lists.params, lists.grads, lists.momentum_buffers].map(handles);
    let count = all[0].len();
    assert!(all.iter().all(|list| list.len() == count), "SGD lists");
    let [params, grads, buffers] = all.each_ref().map(|list| list.as_ptr());
    // SAFETY: all lists have `count` valid handles.
    library()?.checked(|native, error| unsafe {
        (native.fused_sgd)(count, params, grads, buffers, lr, momentum, weight_decay, nesterov, error)
    })
}

/// Turns gradients into what LARS (You et al., arXiv 1708.03888, equation 6) hands to SGD, in place and tensor by
/// tensor: grad ← trust_coefficient · |param| / (|grad| + weight_decay · |param| + eps) · (grad + weight_decay · param).
/// A gradient of zeros stays as it is, and for a parameter of zeros the factor is 1.
///
/// # Errors
/// Whatever libtorch reports.
pub fn lars_scale(
    params: &[Tensor],
    grads: &[Tensor],
    weight_decay: f64,
    trust_coefficient: f64,
    eps: f64,
) -> Result<(), DeviceError> {
    assert_eq!(params.len(), grads.len(), "LARS lists");
    let (params, grads) = (handles(params), handles(grads));
    // SAFETY: both lists have `count` valid handles.
    library()?.checked(|native, error| unsafe {
        (native.lars_scale)(
            params.len(),
            params.as_ptr(),
            grads.as_ptr(),
            weight_decay,
            trust_coefficient,
            eps,
            error,
        )
    })
}
