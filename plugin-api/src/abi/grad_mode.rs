//! Whether libtorch records a graph in this thread. tch can only change that around a closure, and a panic that unwinds
//! through one leaves it changed.

use std::ffi::c_int;

unsafe extern "C" {
    /// tch's own C layer, which this crate links: sets the mode of this thread and returns the one before.
    fn at_grad_set_enabled(enabled: c_int) -> c_int;
}

/// The mode of this thread at some moment.
pub(super) struct GradMode(c_int);

impl GradMode {
    /// That of now.
    pub fn now() -> Self {
        let mode = set(1);
        set(mode);
        GradMode(mode)
    }

    /// Makes it the mode of this thread again.
    pub fn restore(self) {
        set(self.0);
    }
}

/// Whether libtorch records a graph in this thread.
pub(crate) fn records_graph() -> bool {
    GradMode::now().0 == 1
}

fn set(mode: c_int) -> c_int {
    // SAFETY: it takes and gives a number, and touches nothing but a variable of this thread.
    unsafe { at_grad_set_enabled(mode) }
}
