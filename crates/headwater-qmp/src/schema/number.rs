//! Booleans, integers and sizes as they are written in options.

/// `on`, `yes`, `true`, `y`, and their opposites.
pub(crate) fn bool_from_text(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// An integer as C reads it: white space before it, a sign, hexadecimal after `0x`, octal after `0`.
pub(super) fn int_from_text(text: &str) -> Option<i64> {
    let (negative, magnitude) = magnitude(text)?;
    let signed = i128::from(magnitude) * if negative { -1 } else { 1 };
    signed.try_into().ok()
}

/// As [`int_from_text`]. A negative number is taken modulo 2^64, as C does.
pub(crate) fn uint_from_text(text: &str) -> Option<u64> {
    let (negative, magnitude) = magnitude(text)?;
    Some(if negative { magnitude.wrapping_neg() } else { magnitude })
}

fn magnitude(text: &str) -> Option<(bool, u64)> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (digits, radix) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hexadecimal) => (hexadecimal, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (digits, 8),
        None => (digits, 10),
    };
    // Rust would take a second sign.
    if digits.starts_with(['+', '-']) {
        return None;
    }
    Some((negative, u64::from_str_radix(digits, radix).ok()?))
}

/// A number of bytes: an integer, or a decimal fraction with a suffix from `k` to `E`, in powers of 1024.
///
/// Hexadecimal numbers take no suffix, and octal ones don't exist.
pub(crate) fn size_from_text(text: &str) -> Option<u64> {
    if text.starts_with("0x") || text.starts_with("0X") {
        return uint_from_text(text);
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
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().ok()?;
    let bytes = u128::from(whole) << shift;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let part = if fraction.bytes().all(|b| b == b'0') {
        0
    } else if shift == 0 {
        return None;
    } else {
        // Below one unit of at most 2^60 bytes; a double is as exact as QEMU is here.
        let unit = (1_u64 << shift) as f64;
        (format!("0.{fraction}").parse::<f64>().ok()? * unit + 0.5) as u128
    };
    u64::try_from(bytes + part).ok()
}
