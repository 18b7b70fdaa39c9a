//! Checking the bytes of a slab against the digest of their content, while they arrive.

use sha2::{Digest, Sha256};

use super::ReadError;
use crate::catalog::{Component, IMAGE_ALIGN};
use crate::ids::{ComponentId, ContentId};
use crate::memory::Slab;

/// Follows a slab's watermark and digests what is below it.
#[derive(Debug)]
pub struct Verifier {
    component: ComponentId,
    expected: ContentId,
    hasher: Hasher,
    /// Where each file begins and ends in the image; those that are done are gone from the end, which is the front.
    files: Vec<(usize, usize)>,
    /// Everything before this is digested.
    at: usize,
}

#[derive(Debug)]
enum Hasher {
    Blake3(Box<blake3::Hasher>),
    Sha256(Sha256),
}

impl Hasher {
    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Blake3(hasher) => {
                hasher.update(bytes);
            }
            Self::Sha256(hasher) => hasher.update(bytes),
        }
    }
}

impl Verifier {
    /// A verifier for the component. `None` where its digest is not known, or is not one over whole files.
    #[must_use]
    pub fn new(component: &Component) -> Option<Self> {
        let hasher = match component.content_id {
            ContentId::Blake3(_) => Hasher::Blake3(Box::default()),
            ContentId::Sha256(_) if component.files.len() == 1 => Hasher::Sha256(Sha256::new()),
            ContentId::Sha256(_) | ContentId::File(_) => return None,
        };
        if component.selection.is_some() {
            return None;
        }
        let mut start = 0_usize;
        let mut files = Vec::with_capacity(component.files.len());
        for source in &component.files {
            let size = usize::try_from(source.identity.size.get()).ok()?;
            files.push((start, start.checked_add(size)?));
            start = (start + size).checked_next_multiple_of(IMAGE_ALIGN as usize)?;
        }
        files.reverse();
        Some(Self {
            component: component.id.clone(),
            expected: component.content_id,
            hasher,
            files,
            at: 0,
        })
    }

    /// Digests what has come since the last time. Takes as long as that is.
    pub fn follow(&mut self, slab: &Slab) {
        self.take(slab.filled());
    }

    /// The same for an image of which this much is there.
    pub(super) fn take(&mut self, filled: &[u8]) {
        while let Some((start, end)) = self.files.last().copied() {
            if self.at <= start {
                // Not before its first byte is there, so that this is done once.
                if filled.len() < end.min(start + 1) {
                    return;
                }
                self.at = start;
                // A digest of several files has their lengths, so that none runs into the next.
                if let Hasher::Blake3(hasher) = &mut self.hasher {
                    hasher.update(&((end - start) as u64).to_le_bytes());
                }
            }
            let there = end.min(filled.len());
            if let Some(bytes) = filled.get(self.at..there) {
                self.hasher.update(bytes);
                self.at = there;
            }
            if there < end {
                return;
            }
            self.files.pop();
        }
    }

    /// Whether all that was digested is what the catalogue has.
    ///
    /// # Errors
    /// [`ReadError::WrongBytes`] where it is not.
    pub fn finish(self) -> Result<(), ReadError> {
        let found = match self.hasher {
            Hasher::Blake3(hasher) => ContentId::Blake3(*hasher.finalize().as_bytes()),
            Hasher::Sha256(hasher) => ContentId::Sha256(hasher.finalize().into()),
        };
        if found == self.expected && self.files.is_empty() {
            Ok(())
        } else {
            Err(ReadError::WrongBytes {
                component: self.component.to_string(),
                expected: self.expected,
                found,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::content::{Unhurried, digest};
    use crate::catalog::test_utils::{put, safetensors};
    use crate::catalog::{ScanOptions, scan};
    use crate::memory::Slab;
    use crate::units::Bytes;

    fn verified(component: &Component, step: usize, spoil: Option<usize>) -> Result<(), ReadError> {
        let mut verifier = Verifier::new(component).unwrap();
        let mut image = Vec::new();
        for source in &component.files {
            image.extend(std::fs::read(&source.path).unwrap());
            image.resize(image.len().next_multiple_of(4096), 0);
        }
        if let Some(at) = spoil {
            image[at] ^= 1;
        }
        let mut writer = Slab::create("test", Bytes(image.len() as u64)).unwrap();
        for bytes in image.chunks(step) {
            writer.spare()[..bytes.len()].copy_from_slice(bytes);
            writer.advance(bytes.len());
            verifier.follow(writer.slab());
        }
        verifier.finish()
    }

    #[test]
    fn bytes_are_those_of_the_digest_or_refused() {
        let folder = tempfile::tempdir().unwrap();
        for shard in 1..=2 {
            let name = format!("m/model-0000{shard}-of-00002.safetensors");
            put(
                folder.path(),
                &name,
                safetensors(&[(&format!("t{shard}"), &[5000])], &[]),
            );
        }
        let map = serde_json::json!({"weight_map": {
            "t1": "model-00001-of-00002.safetensors",
            "t2": "model-00002-of-00002.safetensors",
        }});
        put(
            folder.path(),
            "m/model.safetensors.index.json",
            map.to_string(),
        );
        put(folder.path(), "m/config.json", r#"{"model_type": "llama"}"#);
        let report = scan(
            &ScanOptions::new(vec![folder.path().to_owned()]),
            None,
            &|_| {},
        );
        let model = report.catalogue.models().next().cloned().unwrap();
        let mut component = (*model.components[0]).clone();
        assert!(Verifier::new(&component).is_none(), "no digest yet");
        component.content_id = digest(&component, &mut Unhurried).unwrap();
        for step in [1, 1000, 4096, 1 << 20] {
            assert!(verified(&component, step, None).is_ok());
            let error = verified(&component, step, Some(9000)).unwrap_err();
            assert!(matches!(error, ReadError::WrongBytes { .. }), "{error}");
        }
    }
}
