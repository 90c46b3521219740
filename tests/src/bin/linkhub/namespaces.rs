//! The network namespaces of one prefix, and the TUN devices in them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::options::Options;
use crate::system::{TUN_NAME, attach_tun, enter_namespace, send_signal};
use crate::{Failure, log};

const NAMESPACES_DIR: &str = "/var/run/netns";
const MTU_BYTES: &str = "1500";
const TUN_QUEUE_PACKETS: &str = "5000"; // ten times the kernel's, so that our queues, which count, are the ones that drop

/// Keeps a second linkhub from removing our namespaces as left-overs. An abstract socket leaves nothing behind.
pub(crate) fn lock_prefix(prefix: &str) -> Result<UnixListener, Failure> {
    let failed = |error| Failure::io(format!("cannot lock the prefix {prefix}, which another linkhub may have"), error);
    let address = SocketAddr::from_abstract_name(format!("linkhub-{prefix}")).map_err(failed)?;
    UnixListener::bind_addr(&address).map_err(failed)
}

/// The namespaces of one prefix; they go when this goes.
pub(crate) struct Namespaces {
    prefix: String,
    nodes: usize,
}

impl Namespaces {
    /// Makes them, in place of what an earlier run left.
    pub(crate) fn make(options: &Options) -> Result<Self, Failure> {
        remove_namespaces(&options.prefix)?;
        let namespaces = Self { prefix: options.prefix.clone(), nodes: options.nodes }; // from here on, a failure removes them
        for name in namespaces.names() {
            ip(&["netns", "add", &name])?;
            ip(&["-n", &name, "link", "set", "lo", "up"])?;
        }
        Ok(namespaces)
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = String> {
        (0..self.nodes).map(|node| format!("{}{node}", self.prefix))
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        if let Err(failure) = remove_namespaces(&self.prefix) {
            log(&failure);
        }
    }
}

/// Removes all namespaces of a prefix with the processes in them, which would keep them alive without a name.
fn remove_namespaces(prefix: &str) -> Result<(), Failure> {
    let names = namespaces_of(prefix).map_err(|error| Failure::io(format!("cannot list {NAMESPACES_DIR}"), error))?;
    for name in names {
        let processes = processes_in(&name).map_err(|error| Failure::io(format!("cannot list the processes in {name}"), error))?;
        processes.into_iter().for_each(|process| send_signal(process, libc::SIGKILL));
        ip(&["netns", "delete", &name])?;
    }
    Ok(())
}

fn namespaces_of(prefix: &str) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(NAMESPACES_DIR) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()), // until the first is made
        entries => entries?,
    };
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<io::Result<Vec<_>>>()?;
    Ok(names.into_iter().filter(|name| is_of_prefix(name, prefix)).collect())
}

fn is_of_prefix(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

fn processes_in(name: &str) -> io::Result<Vec<libc::pid_t>> {
    let namespace = identity(&Path::new(NAMESPACES_DIR).join(name))?;
    if namespace == identity(Path::new("/proc/self/ns/net"))? {
        return Ok(Vec::new()); // somebody gave our own a name: not ours to empty
    }
    let entries = fs::read_dir("/proc")?.collect::<io::Result<Vec<_>>>()?;
    let processes = entries.iter().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    // One that has ended since is not in it any more.
    Ok(processes.filter(|process| identity(Path::new(&format!("/proc/{process}/ns/net"))).is_ok_and(|of| of == namespace)).collect())
}

/// Returns device and inode, which tell namespaces apart.
fn identity(namespace: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(namespace).map(|found| (found.dev(), found.ino()))
}

/// Opens the device of a namespace. A thread enters a namespace alone, so this one ends there.
pub(crate) fn open_tun(namespace: &str) -> Result<File, Failure> {
    let open = || {
        enter_namespace(&File::open(Path::new(NAMESPACES_DIR).join(namespace))?)?;
        let tun = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        attach_tun(&tun)?;
        Ok(tun)
    };
    let opened = std::thread::scope(|scope| scope.spawn(open).join()).expect("opening a device does not panic");
    opened.map_err(|error| Failure::io(format!("cannot open {TUN_NAME} in namespace {namespace}"), error))
}

pub(crate) fn configure_tun(namespace: &str, node: usize) -> Result<(), Failure> {
    ip(&["-n", namespace, "address", "add", &format!("10.88.0.{}/24", node + 1), "dev", TUN_NAME])?;
    ip(&["-n", namespace, "link", "set", TUN_NAME, "mtu", MTU_BYTES, "txqueuelen", TUN_QUEUE_PACKETS, "up"])
}

fn ip(arguments: &[&str]) -> Result<(), Failure> {
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|error| Failure::io("cannot run ip (iproute2)", error))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Failure::Ip { arguments: arguments.join(" "), said: String::from_utf8_lossy(&output.stderr).trim().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owns_only_numbered_names() {
        assert!(is_of_prefix("m0", "m") && is_of_prefix("m253", "m"));
        assert!(["m", "mx1", "m1a", "n1", "am1", ""].iter().all(|name| !is_of_prefix(name, "m")));
    }
}
