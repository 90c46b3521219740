//! The probe set that ships with Confrere, and those that users bring.

use std::path::Path;

use base::failure::{Failure, Kind, io_failure};
use protocol::profile::ProbeSet;

/// Longest file of a domain's probes, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 20;

const SHIPPED: [(&str, &str); 9] = [
    ("chinese_poetry", include_str!("../probes/chinese_poetry.txt")),
    ("code", include_str!("../probes/code.txt")),
    ("dialogue", include_str!("../probes/dialogue.txt")),
    ("law", include_str!("../probes/law.txt")),
    ("manuals", include_str!("../probes/manuals.txt")),
    ("maths", include_str!("../probes/maths.txt")),
    ("poetry", include_str!("../probes/poetry.txt")),
    ("prose", include_str!("../probes/prose.txt")),
    ("stories", include_str!("../probes/stories.txt")),
];

/// The probe set that ships with Confrere.
pub fn shipped() -> ProbeSet {
    ProbeSet::from_texts(SHIPPED).expect("a test reads it")
}

/// The probe set of a directory: a file DOMAIN.txt for each domain, with probes between lines of `%%`.
pub fn read(dir: &Path) -> Result<ProbeSet, Failure> {
    let mut texts = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|error| io_failure("list", dir, &error))? {
        let path = entry.map_err(|error| io_failure("list", dir, &error))?.path();
        if path.extension().is_none_or(|extension| extension != "txt") {
            continue;
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let bytes = store::disk::read_file(&path, FILE_BYTES_MAX).map_err(|error| io_failure("read", &path, &error))?.unwrap_or_default();
        let text = String::from_utf8(bytes).map_err(|_| Failure::new(Kind::Usage, format!("{} is not UTF-8", path.display())))?;
        texts.push((name, text));
    }
    let set = ProbeSet::from_texts(texts.iter().map(|(name, text)| (name.as_str(), text.as_str())));
    set.map_err(|error| Failure::new(Kind::Usage, format!("{}: {error}", dir.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_set_has_domains_enough_and_a_hundred_probes_of_each() {
        let set = shipped();
        assert!(set.domains().len() >= 8);
        for (domain, probes) in set.domains() {
            assert_eq!(probes.len(), 100, "{domain}");
            assert!(probes.iter().all(|probe| probe.len() < 1024), "{domain}");
        }
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("probes");
        assert_eq!(read(&dir).expect("it is a set").hash(), set.hash());
    }
}
