//! The library through which a warm Python interpreter is forked into jails. The runner loads it with ctypes.

use std::ffi::c_int;

use zeroboot_sys::arena::Arena;

/// The allocator of this library. It keeps what a fork allocates out of the image.
#[global_allocator]
static ARENA: Arena = Arena;

/// Serves the control channel `control`. Returns 0 in each forked runner, and never in the zygote.
#[unsafe(no_mangle)]
pub extern "C" fn zb_serve(control: c_int) -> c_int {
    zeroboot_process::serve_python(control);
    0
}
