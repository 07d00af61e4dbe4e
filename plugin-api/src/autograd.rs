//! Functions with a gradient of their own: a forward pass computed in any way, and the backward pass that belongs to it.
//!
//! libtorch derives gradients of what is made of its own operations. Where those are slow, or keep more than is needed,
//! compute the result by hand and say what its gradient is.
//!
//! ```
//! use jepa_plugin_api::tch::{Kind, Tensor, no_grad};
//! use jepa_plugin_api::autograd;
//!
//! /// x · sigmoid(x), which keeps x alone for the backward pass.
//! fn silu(x: &Tensor) -> Tensor {
//!     let y = no_grad(|| x * x.sigmoid());
//!     let kept = x.detach();
//!     autograd::record("Silu", &[x], y, move |grad| {
//!         let gate = kept.sigmoid();
//!         vec![Some(grad * (&gate + &kept * &gate * (1.0 - &gate)))]
//!     })
//! }
//!
//! let x = Tensor::from_slice(&[-1.0f32, 0.0, 2.0]).set_requires_grad(true);
//! silu(&x).sum(Kind::Float).backward();
//! let (own, grad) = (x.grad(), x.detach().set_requires_grad(true));
//! (&grad * grad.sigmoid()).sum(Kind::Float).backward();
//! assert!(own.allclose(&grad.grad(), 1e-6, 1e-6, false));
//! ```

use std::any::Any;
use std::ffi::{CStr, CString, c_char, c_void};
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use tch::{Device, Kind, Tensor};

type BackwardCallback =
    extern "C" fn(*mut c_void, *const *mut c_void, *mut *mut c_void, *mut *mut c_char) -> bool;

// host/bridge/autograd.cpp
unsafe extern "C" {
    fn jepa_autograd_record(
        name: *const c_char,
        input_count: usize,
        inputs: *const *mut c_void,
        output_count: usize,
        outputs: *const *mut c_void,
        backward: BackwardCallback,
        data: *mut c_void,
        drop: extern "C" fn(*mut c_void),
        error: *mut *mut c_char,
    ) -> bool;
    fn jepa_autocast_dtype(device_type: i32) -> i32;
    fn free(memory: *mut c_void);
    fn strdup(text: *const c_char) -> *mut c_char;
}

struct Function<F> {
    inputs: usize,
    backward: F,
}

/// Makes `output`, computed from `inputs` without a graph, the result of a function with this gradient: `backward` takes
/// that of the output, and gives one for each input, or None where it has none.
///
/// `backward` runs without a graph, perhaps on another thread, and again if the graph is kept; what it has captured is
/// freed after the last time, or at once if no input needs a gradient. Of the tensors that it captures, take
/// [`detach`](Tensor::detach): a result that is captured as it is would hold itself for ever. What it captures must not
/// be changed in place before it has run; nothing checks that. The gradient that it is given may have any strides: take
/// [`contiguous`](Tensor::contiguous) for a kernel. Those that it gives have the shapes of the inputs. A second derivative
/// is an error. `name` is what libtorch's messages call it. Since 1.1.
///
/// # Panics
/// When `name` has a NUL byte, or `output` is part of a graph already. A panic in `backward`, or another number of gradients
/// than inputs, is an error of the backward pass.
pub fn record<F>(name: &str, inputs: &[&Tensor], output: Tensor, backward: F) -> Tensor
where
    F: Fn(&Tensor) -> Vec<Option<Tensor>> + Send + 'static,
{
    assert!(
        !output.requires_grad(),
        "the output of {name} was computed with a graph: compute it under no_grad"
    );
    let name = CString::new(name).expect("the name of a function has no NUL byte");
    let handles: Vec<*mut c_void> = inputs.iter().map(|input| input.as_ptr().cast_mut().cast()).collect();
    let result = [output.as_ptr().cast_mut().cast()];
    let data = Box::into_raw(Box::new(Function { inputs: inputs.len(), backward }));
    let mut error = ptr::null_mut();
    // SAFETY: the handles outlive the call; `data` is what the two callbacks of this type take, and theirs from here on.
    let recorded = unsafe {
        jepa_autograd_record(
            name.as_ptr(),
            handles.len(),
            handles.as_ptr(),
            1,
            result.as_ptr(),
            run::<F>,
            data.cast(),
            free_data::<F>,
            &mut error,
        )
    };
    if !recorded {
        // SAFETY: a false result comes with a message from malloc, which is ours to free.
        let message = unsafe {
            let message = CStr::from_ptr(error).to_string_lossy().into_owned();
            free(error.cast());
            message
        };
        panic!("{message}");
    }
    output
}

/// Whether a graph is recorded for what is computed from `x`: if not, nothing needs to be kept for a backward pass.
pub fn is_recorded(x: &Tensor) -> bool {
    x.requires_grad() && crate::abi::records_graph()
}

/// The dtype that autocast gives `x` for a matrix product: its own, unless the host trains in mixed precision. Since 1.1.
pub fn autocast_kind(x: &Tensor) -> Kind {
    let device = if x.device() == Device::Cpu { 0 } else { 1 };
    if !matches!(x.kind(), Kind::Float | Kind::Half | Kind::BFloat16) {
        return x.kind();
    }
    // SAFETY: it takes and gives a number.
    match unsafe { jepa_autocast_dtype(device) } {
        5 => Kind::Half,
        15 => Kind::BFloat16,
        _ => x.kind(),
    }
}

/// `x` in the dtype of [`autocast_kind`]. Recorded like any cast. Since 1.1.
pub fn autocast(x: &Tensor) -> Tensor {
    x.to_kind(autocast_kind(x))
}

extern "C" fn free_data<F>(data: *mut c_void) {
    // SAFETY: `data` came out of a Box of this type, and this is called once.
    let data = unsafe { Box::from_raw(data.cast::<Function<F>>()) };
    // Nothing is lost with what a captured value's own drop has to say, and nothing may unwind into C++.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(data)));
}

extern "C" fn run<F>(
    data: *mut c_void,
    grads: *const *mut c_void,
    out: *mut *mut c_void,
    error: *mut *mut c_char,
) -> bool
where
    F: Fn(&Tensor) -> Vec<Option<Tensor>> + Send + 'static,
{
    // SAFETY: `data` is a Function<F> that lives until free_data.
    let function = unsafe { &*data.cast::<Function<F>>() };
    // SAFETY: there is one output, hence one gradient; it stays the caller's.
    let grad = unsafe {
        (*grads).as_mut().map(|grad| ManuallyDrop::new(Tensor::from_ptr(ptr::from_mut(grad).cast())))
    };
    let gradients = catch_unwind(AssertUnwindSafe(|| match &grad {
        Some(grad) => (function.backward)(grad),
        // No gradient came for the output: none goes on.
        None => (0..function.inputs).map(|_| None).collect(),
    }));
    let message = match gradients {
        Ok(gradients) if gradients.len() == function.inputs => {
            for (i, gradient) in gradients.into_iter().enumerate() {
                let handle = gradient.map_or(ptr::null_mut(), |gradient| {
                    ManuallyDrop::new(gradient).as_mut_ptr().cast::<c_void>()
                });
                // SAFETY: `out` has room for as many handles as there are inputs, and takes them over.
                unsafe { out.add(i).write(handle) };
            }
            return true;
        }
        Ok(gradients) => format!("it made {} gradients for {} inputs", gradients.len(), function.inputs),
        Err(payload) => message_of(payload.as_ref()),
    };
    let message = CString::new(message.replace('\0', " ")).expect("the NUL bytes are gone");
    // SAFETY: the caller reads and frees the copy.
    unsafe { error.write(strdup(message.as_ptr())) };
    false
}

fn message_of(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_owned()
}
