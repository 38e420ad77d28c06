//! Sizes as people write them, with the suffixes that qemu-img takes: `64K`, `1.5G`, `10T`, `512b`.

/// What a suffix multiplies by. Suffixes are powers of 1024 and may be written in either case.
const SUFFIXES: [(char, u64); 7] = [
    ('b', 1),
    ('k', 1 << 10),
    ('m', 1 << 20),
    ('g', 1 << 30),
    ('t', 1 << 40),
    ('p', 1 << 50),
    ('e', 1 << 60),
];

/// How many digits after the point are looked at; more could not change a byte below 2^63 by more than rounding.
const FRACTION_DIGITS: usize = 18;

/// The bytes that `text` means: a number, which may have a fraction if a suffix of K and above follows, or `0x` and hexadecimal digits.
///
/// # Errors
/// Says what is wrong with `text` and what a size looks like.
pub fn parse_size(text: &str) -> Result<u64, String> {
    parse(text).ok_or_else(|| {
        format!(
            "'{text}' is no size: write bytes, or a number with b, K, M, G, T, P or E (64K, 1.5G), below 8E"
        )
    })
}

fn parse(text: &str) -> Option<u64> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        let plain = digits.bytes().all(|b| b.is_ascii_hexdigit());
        return u64::from_str_radix(digits, 16).ok().filter(|n| plain && in_range(*n));
    }
    let suffix = text.chars().next_back()?.to_ascii_lowercase();
    let (number, unit) = match SUFFIXES.iter().find(|(letter, _)| *letter == suffix) {
        Some((_, unit)) => (&text[..text.len() - 1], *unit),
        None => (text, 1),
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((_, "")) => return None,
        Some((whole, fraction)) if unit > 1 => (whole, fraction),
        Some(_) => return None,
        None => (number, ""),
    };
    let digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) {
        return None;
    }
    let whole = whole.parse::<u64>().ok()?.checked_mul(unit)?;
    let fraction = &fraction[..fraction.len().min(FRACTION_DIGITS)];
    let numerator: u128 = if fraction.is_empty() { 0 } else { fraction.parse().ok()? };
    let part = numerator * u128::from(unit) / 10u128.pow(fraction.len() as u32);
    whole.checked_add(u64::try_from(part).ok()?).filter(|n| in_range(*n))
}

/// Offsets are signed 64-bit numbers in the system's calls.
fn in_range(bytes: u64) -> bool {
    i64::try_from(bytes).is_ok()
}

/// `bytes` for people: three significant digits and a binary unit.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    // A trailing .0 says nothing.
    let digits = match value {
        v if unit == 0 || v >= 100.0 || (v - v.round()).abs() < 0.005 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        let good = [
            ("0", 0),
            ("512", 512),
            ("512b", 512),
            ("64k", 64 << 10),
            ("64K", 64 << 10),
            ("1.5G", 3 << 29),
            ("0.5M", 512 << 10),
            ("10T", 10 << 40),
            ("2p", 2 << 50),
            ("7E", 7 << 60),
            ("0x10", 16),
            ("1.0000000000000000000000001K", 1024),
        ];
        for (text, bytes) in good {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        let bad = [
            "",
            "K",
            "-1",
            "+1",
            "1.5",
            "1.5b",
            "1.K",
            ".5K",
            "1 K",
            "10X",
            "1.2.3G",
            "0x",
            "0x1K",
            "8E",
            "9999999999999T",
            "99999999999999999999999",
            "1e3",
            "10KB",
            "日",
        ];
        for text in bad {
            let message = parse_size(text).expect_err(text);
            assert!(message.contains(text), "{message}");
        }
    }

    #[test]
    fn sizes_for_people_are_short() {
        let all = [
            (0, "0 B"),
            (999, "999 B"),
            (1024, "1 KiB"),
            (1536, "1.50 KiB"),
            (1 << 20, "1 MiB"),
            (10 << 30, "10 GiB"),
            (u64::MAX, "16 EiB"),
            (123_456_789, "118 MiB"),
        ];
        for (bytes, text) in all {
            assert_eq!(human(bytes), text);
        }
    }
}
