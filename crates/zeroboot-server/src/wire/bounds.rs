//! Values of a request, held against the server's bounds.

use std::time::Duration;

use zeroboot_engine::MIN_OPEN_FILES;

use crate::error::ApiError;

/// Seconds above zero. A time that is too short for the clock becomes its shortest time, not zero.
pub(crate) fn positive(seconds: f64) -> Option<Duration> {
    let time = Duration::try_from_secs_f64(seconds).ok()?;
    (seconds > 0.0).then(|| time.max(Duration::from_nanos(1)))
}

pub(crate) fn within(name: &str, given: Option<u64>, default: u64, most: u64, unit: u64) -> Result<u64, ApiError> {
    match given {
        None => Ok(default),
        Some(value) if value > 0 && value <= most => Ok(value),
        Some(_) => Err(ApiError::new("invalid_limits", format!("{name} must be above 0 and at most {}", most / unit))),
    }
}

/// A limit of open descriptors.
pub(crate) fn descriptors(name: &str, given: Option<u64>, default: u32, most: u32) -> Result<u32, ApiError> {
    let Some(given) = given else { return Ok(default) };
    u32::try_from(given).ok().filter(|count| (MIN_OPEN_FILES..=most).contains(count)).ok_or_else(|| {
        ApiError::new("invalid_limits", format!("{name} must be at least {MIN_OPEN_FILES} and at most {most}"))
    })
}
