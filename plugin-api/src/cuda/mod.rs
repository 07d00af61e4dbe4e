//! Kernels of your own on a GPU, in CUDA C++, with nothing to install and nothing to build.
//!
//! The source is part of the plugin as text. NVRTC, which comes with the CUDA libtorch, compiles it for the GPU at hand when
//! a kernel is first needed, in about a second; where there is no GPU, it is never looked at. Kernels run on the stream that
//! libtorch computes on, in the order of the calls.
//!
//! ```no_run
//! use jepa_plugin_api::cuda::{Arg, Program};
//! use jepa_plugin_api::tch::{Device, Kind, Tensor};
//!
//! static TWICE: Program = Program::new("twice", r#"
//!     extern "C" __global__ void twice(float* x, int count) {
//!         const int i = blockIdx.x * blockDim.x + threadIdx.x;
//!         if (i < count) x[i] *= 2;
//!     }
//! "#);
//!
//! let x = Tensor::ones([1000], (Kind::Float, Device::Cuda(0)));
//! // SAFETY: `twice` takes a vector of f32 and its length.
//! unsafe { TWICE.launch("twice", &x, [4, 1], [256, 1], &[Arg::from(&x), Arg::Int(1000)]) };
//! ```

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr;
use std::sync::{Mutex, OnceLock, PoisonError};

use tch::{Device, Kind, Tensor};

// host/bridge/cuda.cpp
unsafe extern "C" {
    fn jepa_cuda_compiles(
        source: *const c_char,
        architecture: *const c_char,
        error: *mut *mut c_char,
    ) -> bool;
    fn jepa_cuda_kernel(
        source: *const c_char,
        name: *const c_char,
        device: i32,
        kernel: *mut *mut c_void,
        error: *mut *mut c_char,
    ) -> bool;
    fn jepa_cuda_launch(
        kernel: *mut c_void,
        device: i32,
        grid: *const u32,
        block: *const u32,
        arguments: *mut *mut c_void,
        error: *mut *mut c_char,
    ) -> bool;
    fn free(memory: *mut c_void);
}

/// What stands before every program: `u8`, `u16`, `u32`, `i64`; `bf16`, with `widen` and `narrow<T>` to f32 and back; and `read`
/// and `write`, of 16 bytes of numbers at once.
pub const PRELUDE: &str = include_str!("prelude.cuh");

/// Kernels in one source. Since 1.1.
pub struct Program {
    name: &'static str,
    source: &'static str,
    /// With the prelude.
    whole: OnceLock<CString>,
    kernels: Mutex<BTreeMap<(&'static str, usize), Kernel>>,
    /// Why there are none.
    failure: OnceLock<String>,
}

#[derive(Clone, Copy)]
struct Kernel(*mut c_void);

// SAFETY: a CUfunction, which any thread may launch.
unsafe impl Send for Kernel {}

/// What a kernel is given. Since 1.1.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'a> {
    /// A pointer to the first number of this one, which is on the device; a null pointer for `None`.
    Tensor(Option<&'a Tensor>),
    /// An `int`.
    Int(i32),
    /// A `float`.
    Float(f32),
}

impl Arg<'_> {
    /// What the kernel finds, in the first of these bytes.
    #[doc(hidden)]
    pub fn to_bits(self) -> u64 {
        match self {
            Arg::Tensor(tensor) => tensor.map_or(0, |tensor| tensor.data_ptr() as u64),
            Arg::Int(number) => u64::from(number.cast_unsigned()),
            Arg::Float(number) => u64::from(number.to_bits()),
        }
    }
}

impl<'a> From<&'a Tensor> for Arg<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Arg::Tensor(Some(tensor))
    }
}

impl Program {
    /// Kernels that are `extern "C"`, behind [`PRELUDE`]; `name` is what messages call them. Nothing is compiled yet.
    pub const fn new(name: &'static str, source: &'static str) -> Self {
        Program {
            name,
            source,
            whole: OnceLock::new(),
            kernels: Mutex::new(BTreeMap::new()),
            failure: OnceLock::new(),
        }
    }

    /// Whether `kernel` can run where `x` is: on a GPU, if it compiles there. If it does not, a warning says so, once.
    pub fn runs(&self, kernel: &'static str, x: &Tensor) -> bool {
        let Device::Cuda(device) = x.device() else { return false };
        if self.failure.get().is_some() {
            return false;
        }
        match self.kernel(kernel, device) {
            Ok(_) => true,
            Err(reason) => {
                self.failure.get_or_init(|| {
                    tracing::warn!(
                        "{} goes without its kernels on this GPU, and is slower: {reason}",
                        self.name
                    );
                    reason
                });
                false
            }
        }
    }

    /// Queues `kernel` on the device of `on`, in `grid` blocks of `block` threads, x and y of each.
    ///
    /// # Safety
    /// The kernel takes arguments of these types, and reads and writes nothing but the numbers of these tensors, which have
    /// room for them. What it writes to is no other argument's memory: programs are compiled with `--restrict`.
    ///
    /// # Panics
    /// When the program does not compile or the kernel does not start: ask [`runs`](Self::runs) before.
    pub unsafe fn launch(
        &self,
        kernel: &'static str,
        on: &Tensor,
        grid: [usize; 2],
        block: [usize; 2],
        args: &[Arg],
    ) {
        let Device::Cuda(device) = on.device() else { panic!("{kernel} is a kernel for GPUs") };
        let function = self.kernel(kernel, device).unwrap_or_else(|reason| panic!("{kernel}: {reason}"));
        if grid.contains(&0) {
            return;
        }
        let size = |side: usize| u32::try_from(side).expect("a grid of at most 2³² blocks a side");
        // Each in eight bytes, of which a number takes the first four.
        let mut values: Vec<u64> = args.iter().map(|arg| arg.to_bits()).collect();
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| ptr::from_mut(value).cast()).collect();
        let (grid, block) = (grid.map(size), block.map(size));
        // SAFETY: the arrays live through the call, which reads them; the rest is the caller's promise.
        let queued = checked(|error| unsafe {
            jepa_cuda_launch(
                function.0,
                device as i32,
                grid.as_ptr(),
                block.as_ptr(),
                pointers.as_mut_ptr(),
                error,
            )
        });
        queued.unwrap_or_else(|reason| panic!("{kernel}: {reason}"));
    }

    /// Compiles the program for an architecture such as `sm_90`, and keeps nothing of it: a test for machines without a GPU,
    /// as long as NVRTC is there.
    ///
    /// # Errors
    /// The compiler's words.
    pub fn compile_for(&self, architecture: &str) -> Result<(), String> {
        let architecture = CString::new(architecture).map_err(|error| error.to_string())?;
        // SAFETY: two strings, for the length of the call.
        checked(|error| unsafe { jepa_cuda_compiles(self.whole().as_ptr(), architecture.as_ptr(), error) })
    }

    fn kernel(&self, name: &'static str, device: usize) -> Result<Kernel, String> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(&(name, device)) {
            return Ok(*kernel);
        }
        let symbol = CString::new(name).map_err(|error| error.to_string())?;
        let mut kernel = Kernel(ptr::null_mut());
        // SAFETY: two strings and a place for a pointer, for the length of the call.
        checked(|error| unsafe {
            jepa_cuda_kernel(self.whole().as_ptr(), symbol.as_ptr(), device as i32, &mut kernel.0, error)
        })?;
        kernels.insert((name, device), kernel);
        Ok(kernel)
    }

    fn whole(&self) -> &CStr {
        self.whole.get_or_init(|| {
            CString::new(format!("{PRELUDE}\n{}", self.source)).expect("a program has no NUL byte")
        })
    }
}

/// `x`, contiguous, where kernels may read 16 bytes at once: a copy, if it is not so already. Since 1.1.
///
/// ```
/// use jepa_plugin_api::{cuda, tch::{Device, Kind, Tensor}};
/// let odd = Tensor::arange(9, (Kind::Float, Device::Cpu)).narrow(0, 1, 8);
/// let even = cuda::aligned(&odd);
/// assert_eq!((even.data_ptr() as usize % 16, &even), (0, &odd));
/// ```
pub fn aligned(x: &Tensor) -> Tensor {
    let x = x.contiguous();
    if (x.data_ptr() as usize).is_multiple_of(16) { x } else { x.copy() }
}

/// The name of a kernel that exists for both: `name_f32`, `name_bf16`.
///
/// ```
/// use jepa_plugin_api::{cuda, tch::Kind};
/// assert_eq!(cuda::of_kind(Kind::BFloat16, ["pick_f32", "pick_bf16"]), Some("pick_bf16"));
/// assert_eq!(cuda::of_kind(Kind::Double, ["pick_f32", "pick_bf16"]), None);
/// ```
pub fn of_kind(kind: Kind, names: [&'static str; 2]) -> Option<&'static str> {
    match kind {
        Kind::Float => Some(names[0]),
        Kind::BFloat16 => Some(names[1]),
        _ => None,
    }
}

fn checked(call: impl FnOnce(*mut *mut c_char) -> bool) -> Result<(), String> {
    let mut error = ptr::null_mut();
    if call(&mut error) {
        return Ok(());
    }
    // SAFETY: a false result comes with a message from malloc, which is ours to free.
    unsafe {
        let message = CStr::from_ptr(error).to_string_lossy().into_owned();
        free(error.cast());
        Err(message)
    }
}
