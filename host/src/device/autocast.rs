//! Mixed precision: libtorch's autocast to bf16, in a region.

use jepa_plugin_api::tch::Device;

use super::DeviceError;
use super::native::{clear_autocast_cache, set_autocast};

/// bf16 as c10 numbers its scalar types.
const BF16: i32 = 15;

/// Runs `forward` with autocast to bf16 for operations on `device`, when `enabled`. Plugins called inside are under
/// it too: the state belongs to the thread.
///
/// # Errors
/// Whatever libtorch reports. What `forward` returns comes back inside.
pub fn autocast_bf16<T>(
    enabled: bool,
    device: Device,
    forward: impl FnOnce() -> T,
) -> Result<T, DeviceError> {
    if !enabled {
        return Ok(forward());
    }
    let region = Region { cuda: device.is_cuda(), before: set_autocast(device.is_cuda(), (true, BF16))? };
    let result = forward();
    drop(region);
    clear_autocast_cache()?;
    Ok(result)
}

/// Restores the state before on every way out.
struct Region {
    cuda: bool,
    before: (bool, i32),
}

impl Drop for Region {
    fn drop(&mut self) {
        if let Err(error) = set_autocast(self.cuda, self.before) {
            tracing::error!("autocast could not be restored: {error}");
        }
    }
}
