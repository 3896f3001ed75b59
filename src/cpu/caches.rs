//! The sizes of the data caches that the first core sees, which the blocking of the grouped product follows. They decide speed only, never a bit.

use std::sync::OnceLock;

/// Bytes of the data caches: a core's own, and the last level, which it shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caches {
    pub(crate) l2: usize,
    pub(crate) l3: usize,
}

/// The caches of this machine: found once, from what Linux says of CPU 0; elsewhere common ones.
pub(crate) fn caches() -> Caches {
    static FOUND: OnceLock<Caches> = OnceLock::new();
    *FOUND.get_or_init(|| Caches {
        l2: linux_cache(2).unwrap_or(512 << 10).max(256 << 10),
        l3: linux_cache(3).unwrap_or(16 << 20),
    })
}

/// `/sys/devices/system/cpu/cpu0/cache/indexN` describes one cache each: its level, its type, its size as `48K`.
fn linux_cache(level: usize) -> Option<usize> {
    (0..8).find_map(|index| {
        let read = |what: &str| {
            std::fs::read_to_string(format!(
                "/sys/devices/system/cpu/cpu0/cache/index{index}/{what}"
            ))
            .ok()
        };
        let found: usize = read("level")?.trim().parse().ok()?;
        let instructions = read("type")?.trim() == "Instruction";
        (found == level && !instructions).then(|| parse_size(read("size")?.trim()))?
    })
}

fn parse_size(text: &str) -> Option<usize> {
    let (digits, unit) = match text.strip_suffix('K') {
        Some(digits) => (digits, 1 << 10),
        None => match text.strip_suffix('M') {
            Some(digits) => (digits, 1 << 20),
            None => (text, 1),
        },
    };
    // A hypervisor may say 0; nobody has a gigabyte.
    digits
        .parse::<usize>()
        .ok()
        .map(|n| n.saturating_mul(unit))
        .filter(|n| (4 << 10..1 << 30).contains(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_nonsense_is_not() {
        assert_eq!(parse_size("48K"), Some(48 << 10));
        assert_eq!(parse_size("1M"), Some(1 << 20));
        assert_eq!(parse_size("32768"), Some(32768));
        for bad in ["", "K", "0K", "12Q", "-1K", "99999999999M"] {
            assert_eq!(parse_size(bad), None, "{bad:?}");
        }
        assert!(caches().l2 >= 256 << 10 && caches().l3 > 0);
    }
}
