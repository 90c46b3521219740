//! How much memory this process has, and how much it may take.

use std::path::Path;

/// What a process comes to need beyond what it has when a model is loaded: stacks, queues, what allocators keep.
const HEADROOM: u64 = 24 << 20;

/// Memory that the process needs besides what a model takes.
pub(crate) fn process_bytes() -> u64 {
    resident_bytes() + HEADROOM
}

/// Memory that this process has now, as the operating system counts it.
pub(crate) fn resident_bytes() -> u64 {
    const FALLBACK: u64 = 64 << 20;
    let Ok(text) = std::fs::read_to_string("/proc/self/status") else { return FALLBACK };
    let resident = text.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    resident.map_or(FALLBACK, |kilobytes| kilobytes * 1024)
}

/// Memory that models may use when the user says nothing: three quarters of what is free now.
pub(crate) fn default_memory() -> u64 {
    available_bytes() / 4 * 3
}

/// Memory beyond which the process makes no more connections: close to all that it could have.
pub(crate) fn network_memory() -> u64 {
    resident_bytes() + available_bytes() / 16 * 15
}

fn available_bytes() -> u64 {
    const FALLBACK: u64 = 5 << 30;
    let Ok(text) = std::fs::read_to_string(Path::new("/proc/meminfo")) else { return FALLBACK };
    let available = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    available.map_or(FALLBACK, |kilobytes| kilobytes * 1024)
}
