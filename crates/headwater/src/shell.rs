//! Command lines as people can paste them.

/// `words` as one line that a shell takes apart again.
pub fn line<S: AsRef<str>>(words: impl IntoIterator<Item = S>) -> String {
    words.into_iter().map(|word| quoted(word.as_ref())).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._/:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_shell_would_touch_is_quoted() {
        let words = ["headwater", "stream", "nbd+unix:///x?socket=s", "it's", "", "--rate=1M"];
        let expected = r"headwater stream 'nbd+unix:///x?socket=s' 'it'\''s' '' --rate=1M";
        assert_eq!(line(words), expected);
    }
}
