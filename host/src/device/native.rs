//! Bindings to libjepa_native.so, our thin C++ over libtorch for what tch does not bind (`host/native/native.h`).
//!
//! The library is opened at run time from the folder of the torch bridge, so that a build needs no libtorch.

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use jepa_plugin_api::tch::Tensor;
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::DeviceError;
use super::libtorch::mapped;
use crate::linker;

const API: i32 = 1;

type Handle = *mut c_void;
type ErrorOut = *mut *mut c_char;

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
    #[allow(clippy::type_complexity)]
    comm_open:
        unsafe extern "C" fn(*const c_char, u16, bool, *const c_char, i64, *mut Handle, ErrorOut) -> bool,
    comm_close: unsafe extern "C" fn(Handle),
    comm_set: unsafe extern "C" fn(Handle, *const c_char, *const c_char, ErrorOut) -> bool,
    comm_get: unsafe extern "C" fn(Handle, *const c_char, i64, *mut *mut c_char, ErrorOut) -> bool,
    comm_join: unsafe extern "C" fn(Handle, *const c_char, i32, i32, *const c_char, ErrorOut) -> bool,
    comm_all_reduce: unsafe extern "C" fn(Handle, Handle, i32, ErrorOut) -> bool,
    comm_broadcast: unsafe extern "C" fn(Handle, Handle, i32, ErrorOut) -> bool,
}

static NATIVE: OnceLock<Native> = OnceLock::new();

/// The library, opened on first use.
pub(super) fn library() -> Result<&'static Native, DeviceError> {
    if let Some(native) = NATIVE.get() {
        return Ok(native);
    }
    let bridge = mapped(&format!("lib{}.so", jepa_plugin_api::abi::BRIDGE));
    let folder = bridge.and_then(|path| path.parent().map(PathBuf::from)).unwrap_or_default();
    let path = folder.join("libjepa_native.so");
    let native = open(&path).map_err(|reason| DeviceError::Library {
        path,
        reason,
        advice: "run `make setup`, which builds it beside the torch bridge",
    })?;
    Ok(NATIVE.get_or_init(|| native))
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
            zero_grads: *library.get(b"jepa_zero_grads").map_err(words)?,
            fused_sgd: *library.get(b"jepa_fused_sgd").map_err(words)?,
            lars_scale: *library.get(b"jepa_lars_scale").map_err(words)?,
            comm_open: *library.get(b"jepa_comm_open").map_err(words)?,
            comm_close: *library.get(b"jepa_comm_close").map_err(words)?,
            comm_set: *library.get(b"jepa_comm_set").map_err(words)?,
            comm_get: *library.get(b"jepa_comm_get").map_err(words)?,
            comm_join: *library.get(b"jepa_comm_join").map_err(words)?,
            comm_all_reduce: *library.get(b"jepa_comm_all_reduce").map_err(words)?,
            comm_broadcast: *library.get(b"jepa_comm_broadcast").map_err(words)?,
        }
    };
    std::mem::forget(library);
    Ok(native)
}

impl Native {
    /// Runs `call` with a place for its error, and turns false into that error.
    fn checked(&self, call: impl FnOnce(&Self, ErrorOut) -> bool) -> Result<(), DeviceError> {
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
    unsafe fn take(&self, text: *mut c_char) -> String {
        // SAFETY: as the caller promises.
        unsafe {
            let taken = CStr::from_ptr(text).to_string_lossy().into_owned();
            (self.free_string)(text);
            taken
        }
    }
}

/// A connection to the other ranks: see native.h, and [`dist`](crate::dist) for what is made of it.
#[derive(Debug)]
pub struct Ranks(Handle);

// SAFETY: c10d's objects belong to no thread, and one thread at a time has a `Ranks`: it is not shared, but moved.
unsafe impl Send for Ranks {}

impl Ranks {
    /// Connects to the store at `host:port`, and is that store with `serve`.
    ///
    /// # Errors
    /// Whatever libtorch reports, when it does not answer within `timeout` for one.
    pub fn open(
        host: &str,
        port: u16,
        serve: bool,
        prefix: &str,
        timeout: Duration,
    ) -> Result<Self, DeviceError> {
        let (host, prefix, mut handle) = (c_string(host)?, c_string(prefix)?, std::ptr::null_mut());
        // SAFETY: the strings live through the call, and the handle that goes out is ours.
        library()?.checked(|native, error| unsafe {
            let timeout = milliseconds(timeout);
            (native.comm_open)(host.as_ptr(), port, serve, prefix.as_ptr(), timeout, &mut handle, error)
        })?;
        Ok(Ranks(handle))
    }

    /// Sets a key of the store.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), DeviceError> {
        let (key, value) = (c_string(key)?, c_string(value)?);
        // SAFETY: the handle is ours, and the strings live through the call.
        library()?.checked(|native, error| unsafe {
            (native.comm_set)(self.0, key.as_ptr(), value.as_ptr(), error)
        })
    }

    /// The value of a key, or `None` when nobody has set it within `timeout`.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn get(&mut self, key: &str, timeout: Duration) -> Result<Option<String>, DeviceError> {
        let (key, mut value) = (c_string(key)?, std::ptr::null_mut());
        let native = library()?;
        // SAFETY: the handle is ours, and key and value live through the call.
        native.checked(|native, error| unsafe {
            (native.comm_get)(self.0, key.as_ptr(), milliseconds(timeout), &mut value, error)
        })?;
        // SAFETY: a string that goes out is ours.
        Ok((!value.is_null()).then(|| unsafe { native.take(value) }))
    }

    /// Joins all ranks in a process group, which meets under a name of its own.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn join(
        &mut self,
        name: &str,
        rank: u32,
        size: u32,
        address: Option<&str>,
    ) -> Result<(), DeviceError> {
        let name = c_string(name)?;
        let address = address.map(c_string).transpose()?;
        let address = address.as_ref().map_or(std::ptr::null(), |address| address.as_ptr());
        // SAFETY: the handle is ours; the name lives through the call, and an address does or is null.
        library()?.checked(|native, error| unsafe {
            (native.comm_join)(self.0, name.as_ptr(), rank as i32, size as i32, address, error)
        })
    }

    /// Replaces a tensor by the sum over all ranks, or by the maximum.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn all_reduce(&mut self, tensor: &mut Tensor, max: bool) -> Result<(), DeviceError> {
        let tensor = tensor.as_mut_ptr().cast();
        // SAFETY: both handles are valid.
        library()?.checked(|native, error| unsafe {
            (native.comm_all_reduce)(self.0, tensor, i32::from(max), error)
        })
    }

    /// Replaces a tensor by that of rank `from`.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn broadcast(&mut self, tensor: &mut Tensor, from: u32) -> Result<(), DeviceError> {
        let tensor = tensor.as_mut_ptr().cast();
        // SAFETY: both handles are valid.
        library()?
            .checked(|native, error| unsafe { (native.comm_broadcast)(self.0, tensor, from as i32, error) })
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        if let Ok(native) = library() {
            // SAFETY: the handle is ours, and used no more.
            unsafe { (native.comm_close)(self.0) };
        }
    }
}

fn c_string(text: &str) -> Result<CString, DeviceError> {
    CString::new(text).map_err(|error| DeviceError::Torch(error.to_string()))
}

fn milliseconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

/// Handles for a call; they stay the tensors'.
fn handles<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Vec<Handle> {
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
