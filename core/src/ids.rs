//! Names of things. Each kind of name has a type of its own, so that none is taken for another.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The name of a catalogue entry: what users type. Unique within a catalogue.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ModelName(pub Arc<str>);

impl ModelName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for ModelName {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}

impl From<String> for ModelName {
    fn from(name: String) -> Self {
        Self(name.into())
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// A component's place in the catalogue: the model and the component's name inside it. Written `model/component`
/// with the last `/` as the border, since component names have none.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ComponentId {
    /// The catalogue entry.
    pub model: ModelName,
    /// The component's name inside the model, such as `unet` or `text_encoder_2`.
    pub component: Arc<str>,
}

impl fmt::Display for ComponentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.model, self.component)
    }
}

/// The identity of a component's bytes. Two components with the same content id share one residency.
///
/// A digest of the bytes where it is known; until then a digest over the identity of the files (device, inode,
/// size, modification time) and the byte ranges, which also holds for links to the same file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ContentId {
    /// BLAKE3 of the component's bytes.
    Blake3([u8; 32]),
    /// SHA-256 of the file, as the Hugging Face hub names its blobs.
    Sha256([u8; 32]),
    /// Digest over the identities of the files and the byte ranges: the same file, not merely equal bytes.
    File([u8; 32]),
}

impl ContentId {
    const fn scheme_and_digest(&self) -> (&'static str, &[u8; 32]) {
        match self {
            Self::Blake3(digest) => ("blake3", digest),
            Self::Sha256(digest) => ("sha256", digest),
            Self::File(digest) => ("file", digest),
        }
    }

    /// The first twelve hexadecimal digits, for tables.
    #[must_use]
    pub fn short(&self) -> String {
        let (_, digest) = self.scheme_and_digest();
        digest[..6].iter().map(|b| format!("{b:02x}")).collect()
    }
}

impl fmt::Display for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let (scheme, digest) = self.scheme_and_digest();
        f.write_str(scheme)?;
        f.write_str(":")?;
        // In one piece: each lease's answer has one of these, and a formatter's call for each byte is most of what it costs.
        let mut hex = [0; 64];
        for (pair, byte) in hex.chunks_exact_mut(2).zip(digest) {
            pair[0] = DIGITS[usize::from(byte >> 4)];
            pair[1] = DIGITS[usize::from(byte & 15)];
        }
        f.write_str(std::str::from_utf8(&hex).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, _) = self.scheme_and_digest();
        write!(f, "{scheme}:{}", self.short())
    }
}

/// A content id that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a content id: expected blake3:, sha256: or file: and 64 hexadecimal digits"
)]
pub struct ParseContentIdError {
    /// What was written.
    pub text: String,
}

impl FromStr for ContentId {
    type Err = ParseContentIdError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseContentIdError {
            text: text.to_owned(),
        };
        let (scheme, hex) = text.split_once(':').ok_or_else(error)?;
        if hex.len() != 64 || !hex.is_ascii() {
            return Err(error());
        }
        let mut digest = [0; 32];
        for (i, byte) in digest.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).map_err(|_| error())?;
        }
        match scheme {
            "blake3" => Ok(Self::Blake3(digest)),
            "sha256" => Ok(Self::Sha256(digest)),
            "file" => Ok(Self::File(digest)),
            _ => Err(error()),
        }
    }
}

impl Serialize for ContentId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ContentId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// The index of a GPU, as hotset counts them.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default,
)]
#[serde(transparent)]
pub struct GpuIndex(pub u32);

impl fmt::Display for GpuIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where a component's bytes can be used from. Disk is a tier too, but nothing is reserved there.
///
/// The order is the one global order in which reservations are taken: GPUs by index, then RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// The memory of one GPU, written `vram:N`.
    Vram(GpuIndex),
    /// Host memory, written `ram`.
    Ram,
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vram(gpu) => f.pad(&format!("vram:{gpu}")),
            Self::Ram => f.pad("ram"),
        }
    }
}

/// A tier that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a tier: write ram, vram or vram:N with the index of a GPU")]
pub struct ParseTierError {
    /// What was written.
    pub text: String,
}

impl FromStr for Tier {
    type Err = ParseTierError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "ram" => Ok(Self::Ram),
            None if text == "vram" => Ok(Self::Vram(GpuIndex(0))),
            Some(("vram", index)) => index
                .parse()
                .map(|n| Self::Vram(GpuIndex(n)))
                .map_err(|_| ParseTierError { text: text.into() }),
            _ => Err(ParseTierError { text: text.into() }),
        }
    }
}

impl Serialize for Tier {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Tier {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&format!(concat!($prefix, "{}"), self.0))
            }
        }
    };
}

number_id!(
    /// One client's connection, unique for the life of the system.
    SessionId, "s"
);
number_id!(
    /// One load request of a session, unique for the life of the system.
    RequestId, "r"
);
number_id!(
    /// One lease, unique for the life of the system.
    LeaseId, "l"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_being_written_and_read() {
        let id = ContentId::File([0xab; 32]);
        assert_eq!(id.to_string().parse(), Ok(id));
        for tier in [Tier::Ram, Tier::Vram(GpuIndex(3))] {
            assert_eq!(tier.to_string().parse(), Ok(tier));
        }
        assert!("vram:x".parse::<Tier>().is_err());
        assert!("file:12".parse::<ContentId>().is_err());
        assert!(
            format!("file:{}", "é".repeat(32))
                .parse::<ContentId>()
                .is_err()
        );
    }

    #[test]
    fn reservations_are_ordered_gpus_first() {
        let mut tiers = [Tier::Ram, Tier::Vram(GpuIndex(1)), Tier::Vram(GpuIndex(0))];
        tiers.sort();
        assert_eq!(
            tiers,
            [Tier::Vram(GpuIndex(0)), Tier::Vram(GpuIndex(1)), Tier::Ram]
        );
    }
}
