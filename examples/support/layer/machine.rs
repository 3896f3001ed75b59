//! How much memory there is.

use std::fs::read_to_string;

/// Bytes that can be had without swapping: what the kernel says, or what is left to this process's control group if that is less. `None` where
/// neither is known.
pub fn available_memory() -> Option<u64> {
    let system = read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text
            .lines()
            .find(|line| line.starts_with("MemAvailable:"))?;
        line.split_whitespace()
            .nth(1)?
            .parse::<u64>()
            .ok()?
            .checked_mul(1024)
    });
    let number = |file| read_to_string(file).ok()?.trim().parse::<u64>().ok();
    let group = number("/sys/fs/cgroup/memory.max")
        .zip(number("/sys/fs/cgroup/memory.current"))
        .map(|(most, used)| most.saturating_sub(used));
    [system, group].into_iter().flatten().min()
}
