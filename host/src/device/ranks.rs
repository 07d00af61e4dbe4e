//! Bindings to the part of libjepa_native.so that is about ranks: host/native/comm.cpp and exchange.cpp.

use std::cell::Cell;
use std::ffi::CString;
use std::ops::Sub;
use std::sync::Arc;
use std::time::Duration;

use jepa_plugin_api::tch::Tensor;

use super::DeviceError;
use super::native::{CUDA, ErrorOut, Handle, beside_bridge, handles, library};

/// A connection to the other ranks: see native.h, and [`dist`](crate::dist) for what is made of it. One thread has it.
#[derive(Debug)]
pub struct ProcessGroup {
    store: Store,
    /// Whether plugins compute with it.
    installed: Cell<bool>,
}

/// The key-value store of a [`ProcessGroup`], for any thread.
#[derive(Clone, Debug)]
pub struct Store(Arc<Connection>);

/// What jepa_comm_open has made.
#[derive(Debug)]
struct Connection(Handle);

// SAFETY: c10d's objects belong to no thread. Several threads use a connection by way of `Store` alone, which native.h allows for
// what it calls; everything else belongs to `ProcessGroup`, which is moved, but not shared.
unsafe impl Send for Connection {}
// SAFETY: as above.
unsafe impl Sync for Connection {}

impl ProcessGroup {
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
        Ok(ProcessGroup { store: Store(Arc::new(Connection(handle))), installed: Cell::new(false) })
    }

    /// Where all ranks see what each has set.
    pub fn store(&self) -> &Store {
        &self.store
    }

    fn handle(&self) -> Handle {
        self.store.0.0
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
            (native.comm_join)(self.handle(), name.as_ptr(), rank as i32, size as i32, address, error)
        })
    }

    /// Lets ranks with a GPU each talk over NCCL about what lies there, in a group of this name.
    ///
    /// # Errors
    /// Whatever libtorch and NCCL report.
    pub fn join_gpus(&self, name: &str) -> Result<(), DeviceError> {
        let (name, path) = (c_string(name)?, c_string(&beside_bridge(CUDA).to_string_lossy())?);
        // SAFETY: the handle is ours, and the strings live through the call.
        library()?.checked(|native, error| unsafe {
            (native.comm_join_nccl)(self.handle(), name.as_ptr(), path.as_ptr(), error)
        })
    }

    /// Leaves the process group, for good: whoever waits for this rank there sees that it does not come. The store stays.
    pub fn leave(&self) {
        self.uninstall();
        if let Ok(native) = library() {
            // SAFETY: the handle is ours.
            unsafe { (native.comm_leave)(self.handle()) };
        }
    }

    /// Replaces a tensor by the sum over all ranks, or by the maximum.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn all_reduce(&self, tensor: &mut Tensor, max: bool) -> Result<(), DeviceError> {
        let tensor = tensor.as_mut_ptr().cast();
        // SAFETY: both handles are valid.
        library()?.checked(|native, error| unsafe {
            (native.comm_all_reduce)(self.handle(), tensor, i32::from(max), error)
        })
    }

    /// Replaces a tensor by that of rank `from`.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn broadcast(&self, tensor: &mut Tensor, from: u32) -> Result<(), DeviceError> {
        let tensor = tensor.as_mut_ptr().cast();
        // SAFETY: both handles are valid.
        library()?.checked(|native, error| unsafe {
            (native.comm_broadcast)(self.handle(), tensor, from as i32, error)
        })
    }

    /// The rows of all ranks' tensors of equal shape, in their order.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn all_gather(&self, tensor: &Tensor, size: u32) -> Result<Tensor, DeviceError> {
        let tensor = tensor.contiguous();
        let mut shape = tensor.size();
        shape[0] *= i64::from(size);
        let mut all = Tensor::empty(shape, (tensor.kind(), tensor.device()));
        let (from, to) = (tensor.as_ptr().cast_mut().cast(), all.as_mut_ptr().cast());
        let group = self.handle();
        // SAFETY: all handles are valid, and `all` has room for all.
        library()?.checked(|native, error| unsafe { (native.comm_all_gather)(group, from, to, error) })?;
        Ok(all)
    }

    /// What this rank has handed over to the others since it joined them.
    pub fn traffic(&self) -> Traffic {
        let mut counts = [0; 4];
        if let Ok(native) = library() {
            // SAFETY: the handle is ours, and there is room for four numbers.
            unsafe { (native.comm_traffic)(self.handle(), counts.as_mut_ptr()) };
        }
        let [times, bytes, parts_of_gradients, bytes_of_gradients] = counts;
        Traffic { times, bytes, parts_of_gradients, bytes_of_gradients }
    }

    /// Whether something that all do together has failed, in a plugin's hands for one.
    pub fn is_lost(&self) -> bool {
        // SAFETY: the handle is ours.
        library().is_ok_and(|native| unsafe { (native.comm_lost)(self.handle()) })
    }

    /// What plugins compute from here on, they compute with the other ranks.
    ///
    /// # Errors
    /// Without the library.
    pub fn install(&self, rank: u32, size: u32) -> Result<(), DeviceError> {
        let native = library()?;
        let (rank, size) = (rank as i32, size as i32);
        let (all_reduce, all_gather) = (native.comm_sum, native.comm_all_gather);
        let installed = Installed { rank, size, data: self.handle(), all_reduce, all_gather };
        // SAFETY: the bridge copies what it is given; `data` lives until `uninstall`, which dropping calls at the latest.
        unsafe { jepa_ranks_install(&installed) };
        self.installed.set(true);
        Ok(())
    }

    /// What plugins compute from here on, this process computes alone.
    pub fn uninstall(&self) {
        // Of several in a process, as in tests, one at most is installed.
        if self.installed.replace(false) {
            // SAFETY: NULL is allowed.
            unsafe { jepa_ranks_install(std::ptr::null()) };
        }
    }
}

impl Store {
    /// Sets a key.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn set(&self, key: &str, value: &str) -> Result<(), DeviceError> {
        let (key, value) = (c_string(key)?, c_string(value)?);
        // SAFETY: the handle is ours, and the strings live through the call.
        library()?.checked(|native, error| unsafe {
            (native.comm_set)(self.0.0, key.as_ptr(), value.as_ptr(), error)
        })
    }

    /// The value of a key, or `None` when nobody has set it within `timeout`.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn get(&self, key: &str, timeout: Duration) -> Result<Option<String>, DeviceError> {
        let (key, mut value) = (c_string(key)?, std::ptr::null_mut());
        let native = library()?;
        // SAFETY: the handle is ours, and key and value live through the call.
        native.checked(|native, error| unsafe {
            (native.comm_get)(self.0.0, key.as_ptr(), milliseconds(timeout), &mut value, error)
        })?;
        // SAFETY: a string that goes out is ours.
        Ok((!value.is_null()).then(|| unsafe { native.take(value) }))
    }
}

/// What a rank has handed over to the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// How often all have waited for a sum, or for rows of all.
    pub times: u64,
    /// How many bytes those had on each rank.
    pub bytes: u64,
    /// In how many parts gradients went, and the figures with them.
    pub parts_of_gradients: u64,
    /// How many bytes those had.
    pub bytes_of_gradients: u64,
}

impl Sub for Traffic {
    type Output = Traffic;

    fn sub(self, before: Traffic) -> Traffic {
        Traffic {
            times: self.times - before.times,
            bytes: self.bytes - before.bytes,
            parts_of_gradients: self.parts_of_gradients - before.parts_of_gradients,
            bytes_of_gradients: self.bytes_of_gradients - before.bytes_of_gradients,
        }
    }
}

/// What the bridge is told of the ranks: host/bridge/ranks.cpp.
#[repr(C)]
struct Installed {
    rank: i32,
    size: i32,
    data: Handle,
    all_reduce: unsafe extern "C" fn(Handle, Handle, ErrorOut) -> bool,
    all_gather: unsafe extern "C" fn(Handle, Handle, Handle, ErrorOut) -> bool,
}

unsafe extern "C" {
    fn jepa_ranks_install(ranks: *const Installed);
}

/// Makes the mean of gradients over all ranks while the backward pass goes on: see native.h.
#[derive(Debug)]
pub struct Exchange(Handle);

// SAFETY: one thread at a time has it, as with `ProcessGroup`.
unsafe impl Send for Exchange {}

impl Exchange {
    /// Of the gradients of `params`, which travel together in parts of `bucket_bytes`.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn open(group: &ProcessGroup, params: &[Tensor], bucket_bytes: u64) -> Result<Self, DeviceError> {
        let (inputs, mut handle) = (handles(params), std::ptr::null_mut());
        let bytes = i64::try_from(bucket_bytes).unwrap_or(i64::MAX);
        // SAFETY: the list has `count` valid handles; the one that goes out is ours.
        library()?.checked(|native, error| unsafe {
            (native.exchange_open)(group.handle(), inputs.len(), inputs.as_ptr(), bytes, &mut handle, error)
        })?;
        Ok(Exchange(handle))
    }

    /// The backward pass that follows is the step's last. `figures` become their mean over all ranks too: nobody reads or
    /// changes them before [`finish`](Self::finish).
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn begin(&mut self, figures: &Tensor) -> Result<(), DeviceError> {
        let figures = figures.as_ptr().cast_mut().cast();
        // SAFETY: both handles are valid.
        library()?.checked(|native, error| unsafe { (native.exchange_begin)(self.0, figures, error) })
    }

    /// Waits until every parameter has the mean of its gradients.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn finish(&mut self) -> Result<(), DeviceError> {
        // SAFETY: the handle is ours.
        library()?.checked(|native, error| unsafe { (native.exchange_finish)(self.0, error) })
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if let Ok(native) = library() {
            // SAFETY: the handle is ours, and used no more.
            unsafe { (native.exchange_close)(self.0) };
        }
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        self.uninstall();
    }
}

impl Drop for Connection {
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
