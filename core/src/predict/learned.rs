//! What a policy has learned, in a file, from one start to the next.
//!
//! A few MB: a mark, when it was written, a digest of the rest, the rest. Nothing of it is trusted: where the digest or the
//! contents are not right, the policy learns anew.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const MARK: &[u8; 8] = b"hotset\x01L";
const HEAD: usize = MARK.len() + 8 + 32;
/// A larger file is none of ours.
const MAX_BYTES: u64 = 256 << 20;

/// What was learned, and how long ago.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Learned {
    /// When, by the wall clock, since 1970.
    pub at: Duration,
    /// What, in the policy's own form.
    pub bytes: Vec<u8>,
}

impl Learned {
    /// Learned until now.
    #[must_use]
    pub fn now(bytes: Vec<u8>) -> Self {
        Self { at: wall(), bytes }
    }

    /// How long ago that was; zero where the wall clock was set back.
    #[must_use]
    pub fn ago(&self) -> Duration {
        wall().saturating_sub(self.at)
    }

    /// Reads it; `None` where there is none.
    ///
    /// # Errors
    /// [`io::Error`]; of kind `InvalidData` where the file is damaged or something else.
    pub fn read(path: &Path) -> io::Result<Option<Self>> {
        let damaged = || {
            io::Error::new(
                io::ErrorKind::InvalidData,
                "it is damaged or of another kind",
            )
        };
        let size = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?.len(),
        };
        if size > MAX_BYTES {
            return Err(damaged());
        }
        let all = fs::read(path)?;
        let (Some(mark), Some(at), Some(digest), Some(bytes)) = (
            all.get(..8),
            all.get(8..16).and_then(|at| <[u8; 8]>::try_from(at).ok()),
            all.get(16..HEAD),
            all.get(HEAD..),
        ) else {
            return Err(damaged());
        };
        if mark != MARK || blake3::hash(bytes).as_bytes() != digest {
            return Err(damaged());
        }
        Ok(Some(Self {
            at: Duration::from_secs(u64::from_le_bytes(at)),
            bytes: bytes.to_vec(),
        }))
    }

    /// Writes it in the place of what is there, whole or not at all.
    ///
    /// # Errors
    /// [`io::Error`]; what was there before is left.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let new = path.with_extension("new");
        let mut file = fs::File::create(&new)?;
        file.write_all(MARK)?;
        file.write_all(&self.at.as_secs().to_le_bytes())?;
        file.write_all(blake3::hash(&self.bytes).as_bytes())?;
        file.write_all(&self.bytes)?;
        file.sync_data()?;
        fs::rename(new, path)
    }
}

fn wall() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_back_and_no_damage_is_believed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/ram.learned");
        assert_eq!(Learned::read(&path).unwrap(), None);
        let learned = Learned {
            at: Duration::from_secs(1_700_000_000),
            bytes: vec![1, 2, 3],
        };
        learned.write(&path).unwrap();
        assert_eq!(Learned::read(&path).unwrap(), Some(learned.clone()));
        assert!(learned.ago() > Duration::from_secs(1));
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            assert!(Learned::read(&path).is_err(), "{cut}");
        }
        for at in (0..8).chain(16..whole.len()) {
            let mut spoilt = whole.clone();
            spoilt[at] ^= 1;
            fs::write(&path, &spoilt).unwrap();
            assert!(Learned::read(&path).is_err(), "{at}");
        }
    }
}
