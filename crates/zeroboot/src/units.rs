//! Times and sizes as people write them.

use std::time::Duration;

/// `2s`, `500ms`, `1.5m`, `1h`; a bare number is seconds. Above zero.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text);
    let factor = match unit {
        "" | "s" => 1.0,
        "ms" => 1e-3,
        "us" | "µs" => 1e-6,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("unknown unit {unit:?}; use ms, s, m or h")),
    };
    let number: f64 = number.parse().map_err(|_| "this is not a time; write it like 500ms, 2s or 1.5m".to_owned())?;
    let seconds = number * factor;
    if seconds.is_nan() || seconds <= 0.0 {
        return Err("the time must be above zero".into());
    }
    if seconds > 86_400.0 * 365.0 {
        return Err("the time must be at most a year".into());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// `512M`, `2g`, `65536K`, `512MiB`; a bare number is bytes. Above zero.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let lower = unit.to_ascii_lowercase();
    let factor: u64 = match lower.trim_end_matches("ib").trim_end_matches('b') {
        "" => 1,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        _ => return Err(format!("unknown unit {unit:?}; use K, M or G")),
    };
    let number: u64 = number.parse().map_err(|_| "this is not a size; write it like 512M or 2G".to_owned())?;
    match number.checked_mul(factor) {
        None | Some(0) => Err("the size must be above zero and below 16 EiB".into()),
        Some(bytes) => Ok(bytes),
    }
}

/// Memory of a sandbox: as [`size`], and enough for a language runtime.
pub(crate) fn memory(text: &str) -> Result<u64, String> {
    match size(text)? {
        bytes if bytes >= LEAST_MEMORY => Ok(bytes),
        bytes if split(text).1.is_empty() => Err(format!("{bytes} bytes is too little; did you mean {bytes}M?")),
        _ => Err(format!("this is too little for a language runtime; give at least {}M", LEAST_MEMORY >> 20)),
    }
}

/// Least memory of a sandbox: what a bare interpreter takes.
const LEAST_MEMORY: u64 = 16 << 20;

/// `KEY=VALUE` of an environment.
pub(crate) fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err("write KEY=VALUE".into()),
    }
}

fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    let at = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    (number, unit.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units_and_are_above_zero() {
        assert_eq!(duration("2"), Ok(Duration::from_secs(2)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        for bad in ["0", "-1", "0s", "", "s", "2 weeks", "nan", "inf", "1e400", "99999999999h"] {
            assert!(duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn memory_without_a_unit_is_asked_about() {
        assert_eq!(memory("512M"), Ok(512 << 20));
        assert_eq!(memory("512").unwrap_err(), "512 bytes is too little; did you mean 512M?");
        assert!(memory("1M").unwrap_err().contains("at least 16M"));
    }

    #[test]
    fn sizes_have_units_and_are_above_zero() {
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("2GiB"), Ok(2 << 30));
        assert_eq!(size("64kB"), Ok(64 << 10));
        assert_eq!((size("2g"), size("1mib")), (Ok(2 << 30), Ok(1 << 20)));
        for bad in ["0", "-1", "", "M", "1.5G", "12Q", "99999999999999999999", "17179869184G"] {
            assert!(size(bad).is_err(), "{bad:?}");
        }
    }
}
