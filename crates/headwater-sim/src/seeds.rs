//! Running a test for many seeds.

use std::ops::Range;

/// Runs `test` for `default` seeds, or as the environment says:
/// - `HEADWATER_SEED=n` replays one seed, as printed by a failure;
/// - `HEADWATER_SEEDS=n` runs the first `n` seeds, `HEADWATER_SEEDS=a..b` those from `a` up to `b`: the soak.
///
/// # Panics
/// As the test does, after printing the seed.
pub fn for_seeds(default: u64, mut test: impl FnMut(u64)) {
    let seeds = choose(default, |name| std::env::var(name).ok());
    for seed in seeds {
        let _printer = Printer(seed);
        test(seed);
    }
}

fn choose(default: u64, env: impl Fn(&str) -> Option<String>) -> Range<u64> {
    let number = |text: &str| text.trim().parse().unwrap_or_else(|_| panic!("{text:?} is not a seed"));
    if let Some(seed) = env("HEADWATER_SEED") {
        let seed = number(&seed);
        return seed..seed + 1;
    }
    match env("HEADWATER_SEEDS") {
        None => 0..default,
        Some(seeds) => match seeds.split_once("..") {
            Some((from, to)) => number(from)..number(to),
            None => 0..number(&seeds),
        },
    }
}

/// Says how to replay when the test panics.
struct Printer(u64);

impl Drop for Printer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {0} fails; replay with HEADWATER_SEED={0}", self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::choose;

    #[test]
    fn the_environment_chooses_the_seeds() {
        let with = |name: &'static str, value: &'static str| {
            choose(3, move |asked| (asked == name).then(|| value.to_string()))
        };
        assert_eq!(choose(3, |_| None), 0..3);
        assert_eq!(with("HEADWATER_SEED", "17"), 17..18);
        assert_eq!(with("HEADWATER_SEEDS", "5"), 0..5);
        assert_eq!(with("HEADWATER_SEEDS", "5..9"), 5..9);
    }
}
