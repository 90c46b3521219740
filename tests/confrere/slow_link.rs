//! A link of limited rate to a node that serves: it can be cut, and counts what comes through.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::binary::Serving;

/// The link.
pub(crate) struct SlowLink {
    pub(crate) address: String,
    cut: Arc<AtomicBool>,
    passed: Arc<AtomicU64>,
}

impl SlowLink {
    /// Forwards what `serving` sends at about `bytes_per_second`.
    pub(crate) fn to(serving: &Serving, bytes_per_second: u64) -> Self {
        let (target, peer) = serving.socket();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let (cut, passed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let link = Self { address: format!("/ip4/127.0.0.1/tcp/{port}/p2p/{peer}"), cut: Arc::clone(&cut), passed: Arc::clone(&passed) };
        std::thread::spawn(move || {
            for inward in listener.incoming().flatten() {
                if cut.load(Ordering::Relaxed) {
                    continue;
                }
                let Ok(outward) = TcpStream::connect(&target) else { continue };
                let both = |stream: &TcpStream| stream.try_clone().expect("sockets can be cloned");
                let (cut, passed) = (Arc::clone(&cut), Arc::clone(&passed));
                let (a, b, stop) = (both(&inward), both(&outward), Arc::clone(&cut));
                std::thread::spawn(move || forward(a, b, u64::MAX, &stop, &AtomicU64::new(0)));
                std::thread::spawn(move || forward(outward, inward, bytes_per_second, &cut, &passed));
            }
        });
        link
    }

    /// Breaks all connections and makes no more.
    pub(crate) fn cut(&self) {
        self.cut.store(true, Ordering::Relaxed);
    }

    /// Bytes that have come through.
    pub(crate) fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }

    /// Waits until `bytes` have passed.
    pub(crate) fn wait_for(&self, bytes: u64) {
        Self::wait_for_all(&[self], bytes);
    }

    /// Waits until `bytes` have passed over several links together.
    pub(crate) fn wait_for_all(links: &[&Self], bytes: u64) {
        for _ in 0..10_000 {
            if links.iter().map(|link| link.passed()).sum::<u64>() >= bytes {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("nothing comes through the slow link");
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, bytes_per_second: u64, cut: &AtomicBool, passed: &AtomicU64) {
    let mut buffer = [0; 4096];
    let _ = from.set_read_timeout(Some(Duration::from_millis(50)));
    while !cut.load(Ordering::Relaxed) {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                if to.write_all(&buffer[..n]).is_err() {
                    break;
                }
                passed.fetch_add(n as u64, Ordering::Relaxed);
                std::thread::sleep(Duration::from_secs_f64(n as f64 / bytes_per_second as f64));
            }
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
