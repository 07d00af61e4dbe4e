//! CUDA graphs: what a GPU is given to do, captured once and then queued as a whole. Bindings to `host/native/cuda/graph.cpp`.

use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::DeviceError;
use super::native::{CUDA, ErrorOut, Handle, beside_bridge, library, own_stream};
use crate::linker;

/// The functions, with the signatures of graph.cpp.
struct Functions {
    begin: unsafe extern "C" fn(i32, *mut Handle, ErrorOut) -> bool,
    end: unsafe extern "C" fn(i32, Handle, ErrorOut) -> bool,
    replay: unsafe extern "C" fn(Handle, ErrorOut) -> bool,
    free: unsafe extern "C" fn(Handle),
}

static FUNCTIONS: OnceLock<Functions> = OnceLock::new();

/// Work of a GPU, captured. Tensors that were made in it lie in memory that is its own: each replay writes them anew.
#[derive(Debug)]
pub struct Graph(Handle);

impl Graph {
    /// Gets the calling thread ready to capture on a GPU that libtorch has opened: from here on it computes there on a stream of
    /// its own.
    ///
    /// # Errors
    /// When the library that captures is missing.
    pub fn prepare(gpu: usize) -> Result<(), DeviceError> {
        functions()?;
        own_stream(gpu)
    }

    /// Captures what `work` queues on a GPU, which does nothing of it yet. Whoever looks at a number there, and so waits for it,
    /// gets an error; libraries have to be past what they do in their first call.
    ///
    /// # Errors
    /// Whatever libtorch reports, and that of `work`.
    pub fn capture<T, E: From<DeviceError>>(
        gpu: usize,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<(Graph, T), E> {
        let (functions, native, device) = (functions()?, library()?, gpu as i32);
        let mut handle = std::ptr::null_mut();
        // SAFETY: the place for a handle lives through the call.
        native.checked(|_, error| unsafe { (functions.begin)(device, &mut handle, error) })?;
        let graph = Graph(handle);
        let worked = work();
        // SAFETY: the handle is that of a capture that has begun.
        let ended = native.checked(|_, error| unsafe { (functions.end)(device, graph.0, error) });
        // What went wrong within says more than that the capture is no good.
        match worked.and_then(|made| Ok(ended.map(|()| made)?)) {
            Ok(made) => Ok((graph, made)),
            Err(error) => {
                // libtorch's allocators may still ask it whether they are within.
                std::mem::forget(graph);
                Err(error)
            }
        }
    }

    /// Queues all of it again.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn replay(&self) -> Result<(), DeviceError> {
        let functions = functions()?;
        // SAFETY: the handle is that of a complete capture.
        library()?.checked(|_, error| unsafe { (functions.replay)(self.0, error) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Ok(functions) = functions() {
            // SAFETY: the handle is ours, and is used no more.
            unsafe { (functions.free)(self.0) }
        }
    }
}

/// The library, opened on first use, which is after libtorch_cuda has been.
fn functions() -> Result<&'static Functions, DeviceError> {
    if let Some(functions) = FUNCTIONS.get() {
        return Ok(functions);
    }
    let path = beside_bridge(CUDA);
    let functions = open(&path).map_err(|reason| DeviceError::Library {
        path,
        reason,
        advice: "run `make setup CUDA=1`, which builds it beside the torch bridge",
    })?;
    Ok(FUNCTIONS.get_or_init(|| functions))
}

fn open(path: &std::path::Path) -> Result<Functions, String> {
    let words = |error| linker::words(&error);
    // SAFETY: the library is ours; its initialisers do nothing.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(words)?;
    // SAFETY: graph.cpp defines each function with the type of the field that takes it.
    let functions = unsafe {
        Functions {
            begin: *library.get(b"jepa_graph_begin").map_err(words)?,
            end: *library.get(b"jepa_graph_end").map_err(words)?,
            replay: *library.get(b"jepa_graph_replay").map_err(words)?,
            free: *library.get(b"jepa_graph_free").map_err(words)?,
        }
    };
    std::mem::forget(library);
    Ok(functions)
}
