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
    let number: f64 = number.parse().map_err(|_| "not a time; write it like 500ms, 2s or 1.5m".to_owned())?;
    let seconds = number * factor;
    if seconds.is_nan() || seconds <= 0.0 {
        return Err("the time must be above zero".into());
    }
    if seconds > 86_400.0 * 365.0 {
        return Err("the time must be at most a year".into());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// `512M`, `2G`, `65536K`, `512MiB`; a bare number is bytes. Above zero.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let factor: u64 = match unit.trim_end_matches("iB").trim_end_matches('B') {
        "" => 1,
        "k" | "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return Err(format!("unknown unit {unit:?}; use K, M or G")),
    };
    let number: u64 = number.parse().map_err(|_| "not a size; write it like 512M or 2G".to_owned())?;
    match number.checked_mul(factor) {
        None | Some(0) => Err("the size must be above zero and below 16 EiB".into()),
        Some(bytes) => Ok(bytes),
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
    fn sizes_have_units_and_are_above_zero() {
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("2GiB"), Ok(2 << 30));
        assert_eq!(size("64kB"), Ok(64 << 10));
        for bad in ["0", "-1", "", "M", "1.5G", "12Q", "99999999999999999999", "17179869184G"] {
            assert!(size(bad).is_err(), "{bad:?}");
        }
    }
}
