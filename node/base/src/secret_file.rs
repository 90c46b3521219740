//! Files that their owner alone may read: keys and tokens.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use crate::failure::{Failure, Kind, io_failure};

/// Refuses a file that others may read.
pub fn check(path: &Path) -> Result<(), Failure> {
    let mode = fs::metadata(path).map_err(|error| io_failure("read", path, &error))?.permissions().mode();
    if mode & 0o077 != 0 {
        let path = path.display();
        return Err(Failure::new(Kind::Refused, format!("{path} may be read by others; run: chmod 600 {path}")));
    }
    Ok(())
}

/// Writes a file that is not there yet.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}
