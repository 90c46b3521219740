//! How much memory this process has, and how much it may take.

use std::path::Path;

/// What a process comes to need beyond what it has when a model is loaded: stacks, queues, what allocators keep.
pub(crate) const HEADROOM: u64 = 24 << 20;

/// Memory that the process needs besides what a model takes.
pub fn process_bytes() -> u64 {
    resident_bytes() + HEADROOM
}

/// Memory that this process has now, as the operating system counts it.
pub fn resident_bytes() -> u64 {
    const FALLBACK: u64 = 64 << 20;
    let Ok(text) = std::fs::read_to_string("/proc/self/status") else { return FALLBACK };
    let resident = text.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    resident.map_or(FALLBACK, |kilobytes| kilobytes * 1024)
}

/// Memory that models may use when the user says nothing: three quarters of what is free now.
pub fn default_memory() -> u64 {
    available_bytes() / 4 * 3
}

/// Memory beyond which the process makes no more connections: close to all that it could have.
pub fn network_memory() -> u64 {
    resident_bytes() + available_bytes() / 16 * 15
}

/// What is free on this machine, or in the control group that a service manager or a container has put this process into.
fn available_bytes() -> u64 {
    const FALLBACK: u64 = 5 << 30;
    let free = || {
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let kilobytes =
            text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok())?;
        Some(kilobytes * 1024)
    };
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = groups.lines().filter_map(|group| left_in(Path::new("/sys/fs/cgroup"), group));
    limits.chain([free().unwrap_or(FALLBACK)]).min().unwrap_or(FALLBACK)
}

/// What a line of /proc/self/cgroup leaves, where the group has a limit. Groups within groups have the least of all their limits.
fn left_in(root: &Path, group: &str) -> Option<u64> {
    let mut fields = group.splitn(3, ':').skip(1);
    let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
    let (root, max, current) = if controllers.is_empty() {
        (root.to_owned(), "memory.max", "memory.current")
    } else if controllers.split(',').any(|one| one == "memory") {
        (root.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")
    } else {
        return None;
    };
    let number = |path: &Path| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let left = |dir: &Path| Some(number(&dir.join(max))?.saturating_sub(number(&dir.join(current))?));
    root.join(path).ancestors().take_while(|dir| dir.starts_with(&root)).filter_map(left).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_leaves_the_least_of_its_own_limit_and_of_those_above() {
        let root = std::env::temp_dir().join(format!("confrere-groups-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            std::fs::write(path, text).expect("written");
        };
        for (path, text) in [
            ("a/b/memory.max", "max\n"),
            ("a/b/memory.current", "100\n"),
            ("a/memory.max", "1000\n"),
            ("a/memory.current", "300\n"),
            ("memory/c/memory.limit_in_bytes", "500"),
            ("memory/c/memory.usage_in_bytes", "600"),
        ] {
            write(path, text);
        }
        assert_eq!(left_in(&root, "0::/a/b"), Some(700));
        assert_eq!(left_in(&root, "4:cpu,memory:/c"), Some(0));
        assert_eq!((left_in(&root, "3:cpu:/c"), left_in(&root, "0::/nowhere"), left_in(&root, "nonsense")), (None, None, None));
        std::fs::remove_dir_all(&root).expect("removed");
    }
}
