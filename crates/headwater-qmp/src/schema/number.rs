//! Booleans, integers and sizes as they are written in options.

/// Why a text is no number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NumberError {
    /// It isn't written like one.
    Syntax,
    /// It is one that doesn't fit.
    Range,
}

/// `on`, `yes`, `true`, `y`, and their opposites.
pub(crate) fn bool_from_text(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// An integer as C reads it: white space before it, a sign, hexadecimal after `0x`, octal after `0`.
pub(super) fn int_from_text(text: &str) -> Result<i64, NumberError> {
    let (negative, digits) = sign(text);
    let signed = i128::from(magnitude(digits)?) * if negative { -1 } else { 1 };
    signed.try_into().map_err(|_| NumberError::Range)
}

/// As [`int_from_text`]. A negative number is taken modulo 2^64, as C does.
pub(crate) fn uint_from_text(text: &str) -> Result<u64, NumberError> {
    let (negative, digits) = sign(text);
    let magnitude = magnitude(digits)?;
    Ok(if negative { magnitude.wrapping_neg() } else { magnitude })
}

/// Whether `text` has a minus sign, and what follows its sign.
fn sign(text: &str) -> (bool, &str) {
    let text = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    }
}

fn magnitude(digits: &str) -> Result<u64, NumberError> {
    let (digits, radix) = match hexadecimal(digits) {
        Some(digits) => (digits, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (digits, 8),
        None => (digits, 10),
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return Err(NumberError::Syntax);
    }
    u64::from_str_radix(digits, radix).map_err(|_| NumberError::Range)
}

fn hexadecimal(digits: &str) -> Option<&str> {
    digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X"))
}

/// A number of bytes: an integer, or a decimal fraction with a suffix from `k` to `E`, in powers of 1024.
///
/// Hexadecimal numbers take no suffix, and octal ones don't exist.
pub(crate) fn size_from_text(text: &str) -> Result<u64, NumberError> {
    let (negative, text) = sign(text);
    if negative {
        let integer = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        return Err(if integer { NumberError::Range } else { NumberError::Syntax });
    }
    if hexadecimal(text).is_some() {
        return magnitude(text);
    }
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(NumberError::Syntax),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return Err(NumberError::Syntax);
    }
    let part = if fraction.bytes().all(|b| b == b'0') {
        0
    } else if shift == 0 {
        return Err(NumberError::Syntax);
    } else {
        // Less than one unit, which is at most 2^60 bytes; QEMU counts in doubles here as well.
        let fraction: f64 = format!("0.{fraction}").parse().map_err(|_| NumberError::Syntax)?;
        (fraction * (1_u64 << shift) as f64 + 0.5) as u128
    };
    let whole: u64 = match whole {
        "" => 0,
        digits => digits.parse().map_err(|_| NumberError::Range)?,
    };
    u64::try_from((u128::from(whole) << shift) + part).map_err(|_| NumberError::Range)
}
