//! Headers of GGUF files: key/value pairs, then a description of each tensor. Versions 1 to 3, little-endian.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::tensor::{Dtype, HeaderTensor};

/// The longest header that is read. Vocabularies make them long; the longest in use have some tens of megabytes.
pub const MAX_HEADER_BYTES: u64 = 256 << 20;

/// How much is read at first.
const FIRST_READ: u64 = 64 << 10;

/// The most that is read at once after that.
const MOST_READ: u64 = 1 << 20;

/// The most dimensions of a tensor; the format's writers stop at four.
const MAX_DIMENSIONS: u32 = 8;

/// Texts longer than this are not kept (chat templates and the like).
const MAX_KEPT_TEXT: usize = 4096;

/// Arrays inside arrays are followed no deeper.
const MAX_DEPTH: u32 = 4;

/// A header that has been checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Version of the format.
    pub version: u32,
    /// Scalar values and short texts, as text. Arrays are stepped over.
    pub metadata: BTreeMap<String, String>,
    /// The tensors, in the order of the file.
    pub tensors: Vec<HeaderTensor>,
    /// Where the tensors' bytes begin in the file.
    pub data_start: u64,
}

/// What is wrong with a GGUF file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// It does not begin as GGUF files do.
    #[error("the file does not begin with `GGUF`; it is no GGUF file")]
    Magic,
    /// A version that is not known, or the other byte order.
    #[error(
        "version {version} of GGUF is not known (1 to 3 are); it needs a newer hotset or is big-endian"
    )]
    Version {
        /// What the file says.
        version: u32,
    },
    /// The header goes on where the file ends.
    #[error(
        "the header goes on past byte {offset}, where the file ends: it was cut off or is still being written; fetch it again"
    )]
    Truncated {
        /// Where reading stopped.
        offset: u64,
    },
    /// The header is longer than any that is read.
    #[error("the header is longer than {limit} bytes; the file is damaged")]
    TooLong {
        /// The limit.
        limit: u64,
    },
    /// A value that cannot be.
    #[error("byte {offset} of the header: {what}; the file is damaged")]
    Invalid {
        /// Where.
        offset: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// Two tensors or keys of one name.
    #[error("`{name}` occurs twice in the header; write the file again")]
    DuplicateKey {
        /// The name.
        name: String,
    },
    /// A tensor type that is not known.
    #[error("tensor `{name}` has the unknown type {number}: it needs a newer hotset or is damaged")]
    UnknownType {
        /// The tensor.
        name: String,
        /// The type's number.
        number: u32,
    },
    /// A shape past 64 bits, or not in whole blocks, or an offset off its alignment.
    #[error("tensor `{name}` has an impossible shape or offset; write the file again")]
    BadExtent {
        /// The tensor.
        name: String,
    },
    /// Two tensors share bytes.
    #[error("tensors `{name}` and `{other}` share bytes; write the file again")]
    Overlap {
        /// One of them.
        name: String,
        /// The other one.
        other: String,
    },
    /// The tensors need more bytes than the file has.
    #[error(
        "the tensors need {need_bytes} bytes and the file has {file_bytes}: it was cut off or is still being written; fetch it again"
    )]
    BeyondFile {
        /// The length that the file should have at least.
        need_bytes: u64,
        /// The length that it has.
        file_bytes: u64,
    },
    /// The file could not be read.
    #[error("the header cannot be read: {source}")]
    Io {
        /// What the system said.
        #[from]
        source: io::Error,
    },
}

impl GgufError {
    /// Whether the file may only be too short: cut off, or still being written.
    #[must_use]
    pub const fn is_incomplete(&self) -> bool {
        matches!(self, Self::Truncated { .. } | Self::BeyondFile { .. })
    }
}

/// Reads and checks the header of an open file of `file_len` bytes. Blocks.
///
/// # Errors
/// What is wrong with the file, or that it cannot be read.
pub fn read_header(file: &File, file_len: u64) -> Result<Header, GgufError> {
    let mut buffer = Vec::new();
    let pairs = read_pairs(file, file_len, &mut buffer)?;
    let tensors = pairs.tensors(&buffer, file_len)?;
    Ok(pairs.with(tensors))
}

/// Checks the header of a file of `file_len` bytes, given the file's first bytes. [`GgufError::Truncated`] where these are
/// too few.
///
/// # Errors
/// What is wrong with the file.
pub fn parse(bytes: &[u8], file_len: u64) -> Result<Header, GgufError> {
    let mut pairs = Pairs::default();
    pairs.advance(bytes)?;
    let tensors = pairs.tensors(bytes, file_len)?;
    Ok(pairs.with(tensors))
}

/// Reads the header's bytes up to where its tensors' descriptions end, and takes its pairs apart. The buffer only grows, so
/// that one can serve many files.
pub(crate) fn read_pairs(
    file: &File,
    file_len: u64,
    buffer: &mut Vec<u8>,
) -> Result<Pairs, GgufError> {
    let mut pairs = Pairs::default();
    let mut have = 0;
    let mut want = FIRST_READ.min(file_len);
    loop {
        // Bounded by MAX_HEADER_BYTES, so it fits.
        if buffer.len() < want as usize {
            buffer.resize(want as usize, 0);
        }
        file.read_exact_at(&mut buffer[have as usize..want as usize], have)?;
        match pairs.advance(&buffer[..want as usize]) {
            Err(GgufError::Truncated { .. }) if want < file_len => {
                if want >= MAX_HEADER_BYTES {
                    return Err(GgufError::TooLong {
                        limit: MAX_HEADER_BYTES,
                    });
                }
                have = want;
                let more = want.clamp(FIRST_READ * 4, MOST_READ);
                want = (want + more).min(file_len).min(MAX_HEADER_BYTES);
            }
            Err(error) => return Err(error),
            Ok(()) => return Ok(pairs),
        }
    }
}

/// The first part of a header: its pairs, and where its tensors' descriptions lie. Goes on where it stopped when more bytes
/// are there, because a vocabulary can be long.
#[derive(Debug, Default)]
pub(crate) struct Pairs {
    /// Scalar values and short texts, as text.
    pub(crate) metadata: BTreeMap<String, String>,
    version: u32,
    tensor_count: u64,
    pairs_left: u64,
    /// Texts of an array that have not been stepped over yet.
    texts_left: u64,
    tensors_left: u64,
    alignment: u64,
    keys: HashSet<String>,
    /// Where the descriptions begin.
    described_from: Option<usize>,
    at: usize,
}

impl Pairs {
    /// Takes apart what has come so far. `bytes` begin with those of the call before.
    fn advance(&mut self, bytes: &[u8]) -> Result<(), GgufError> {
        let mut cursor = Cursor {
            bytes,
            at: self.at,
            short: self.version == 1,
        };
        if self.version == 0 {
            if cursor.take(4)? != b"GGUF" {
                return Err(GgufError::Magic);
            }
            let version = cursor.u32()?;
            if !(1..=3).contains(&version) {
                return Err(GgufError::Version { version });
            }
            cursor.short = version == 1;
            self.tensor_count = cursor.length()?;
            self.pairs_left = cursor.length()?;
            self.tensors_left = self.tensor_count;
            self.version = version;
            self.at = cursor.at;
        }
        loop {
            while self.texts_left > 0 {
                cursor.skip_text()?;
                self.texts_left -= 1;
                self.at = cursor.at;
            }
            if self.pairs_left == 0 {
                break;
            }
            self.pair(&mut cursor)?;
            self.pairs_left -= 1;
            self.at = cursor.at;
        }
        if self.described_from.is_none() {
            self.alignment = match self.metadata.get("general.alignment") {
                None => 32,
                Some(text) => text
                    .parse::<u64>()
                    .ok()
                    .filter(|n| n.is_power_of_two() && (8..=1 << 20).contains(n))
                    .ok_or_else(|| {
                        cursor.invalid("general.alignment is no sensible power of two")
                    })?,
            };
            self.described_from = Some(cursor.at);
        }
        while self.tensors_left > 0 {
            cursor.skip_text()?;
            let dimensions = cursor.dimensions()?;
            let width = if cursor.short { 4 } else { 8 };
            cursor.take(u64::from(dimensions) * width + 12)?;
            self.tensors_left -= 1;
            self.at = cursor.at;
        }
        Ok(())
    }

    fn pair(&mut self, cursor: &mut Cursor<'_>) -> Result<(), GgufError> {
        let key = cursor.text()?;
        let of = cursor.u32()?;
        let mut texts = 0;
        let value = cursor.value(of, &mut texts)?;
        if !self.keys.insert(key.to_owned()) {
            return Err(GgufError::DuplicateKey {
                name: key.to_owned(),
            });
        }
        if let Some(value) = value {
            self.metadata.insert(key.to_owned(), value);
        }
        self.texts_left = texts;
        Ok(())
    }

    /// Where the tensors' bytes begin in the file.
    pub(crate) fn data_start(&self) -> u64 {
        (self.at as u64).next_multiple_of(self.alignment.max(1))
    }

    /// The bytes that describe the tensors, in the header that these pairs are from.
    pub(crate) fn described<'b>(&self, header: &'b [u8]) -> &'b [u8] {
        let from = self.described_from.unwrap_or(self.at);
        header.get(from..self.at).unwrap_or_default()
    }

    /// What these bytes mean: the version's widths, and the alignment.
    pub(crate) fn reading(&self) -> (bool, u64) {
        (self.version == 1, self.alignment)
    }

    /// The tensors, checked against each other and the length of the file.
    pub(crate) fn tensors(
        &self,
        header: &[u8],
        file_len: u64,
    ) -> Result<Vec<HeaderTensor>, GgufError> {
        let mut cursor = Cursor {
            bytes: header,
            at: self.described_from.unwrap_or(self.at),
            short: self.version == 1,
        };
        // Each was stepped over, so the count is no longer than the header.
        let mut tensors = Vec::new();
        for _ in 0..self.tensor_count {
            tensors.push(tensor(&mut cursor, self.alignment)?);
        }
        check(&tensors, self.data_start(), file_len)?;
        Ok(tensors)
    }

    fn with(self, tensors: Vec<HeaderTensor>) -> Header {
        Header {
            version: self.version,
            data_start: self.data_start(),
            metadata: self.metadata,
            tensors,
        }
    }
}

fn tensor(cursor: &mut Cursor<'_>, alignment: u64) -> Result<HeaderTensor, GgufError> {
    let name: Arc<str> = cursor.text()?.into();
    let dimensions = cursor.dimensions()?;
    let mut shape = Vec::with_capacity(dimensions as usize);
    for _ in 0..dimensions {
        let dimension = usize::try_from(cursor.length()?);
        shape.push(dimension.map_err(|_| cursor.invalid("a dimension past all memory"))?);
    }
    let number = cursor.u32()?;
    let start = cursor.u64()?;
    let dtype = Dtype::from_ggml(number).ok_or_else(|| GgufError::UnknownType {
        name: name.to_string(),
        number,
    })?;
    let extent = || {
        let elements = shape
            .iter()
            .try_fold(1_u64, |n, &d| n.checked_mul(d as u64))?;
        // Blocks run along the innermost dimension, which the file has first.
        let row = shape.first().map_or(1, |&row| row as u64);
        if !row.is_multiple_of(dtype.block().0) || !start.is_multiple_of(alignment) {
            return None;
        }
        start.checked_add(dtype.bytes_of(elements)?)
    };
    let end = extent().ok_or_else(|| GgufError::BadExtent {
        name: name.to_string(),
    })?;
    shape.reverse();
    Ok(HeaderTensor {
        name,
        dtype,
        shape,
        start,
        end,
    })
}

fn check(tensors: &[HeaderTensor], data_start: u64, file_len: u64) -> Result<(), GgufError> {
    let mut names = HashSet::with_capacity(tensors.len());
    if let Some(twice) = tensors.iter().find(|t| !names.insert(&*t.name)) {
        return Err(GgufError::DuplicateKey {
            name: twice.name.to_string(),
        });
    }
    let mut by_place: Vec<&HeaderTensor> = tensors.iter().collect();
    by_place.sort_by_key(|t| (t.start, t.end));
    if let Some(pair) = by_place.windows(2).find(|p| p[0].end > p[1].start) {
        return Err(GgufError::Overlap {
            name: pair[0].name.to_string(),
            other: pair[1].name.to_string(),
        });
    }
    let end = by_place.last().map_or(0, |t| t.end);
    let need_bytes = data_start.saturating_add(end);
    if !tensors.is_empty() && need_bytes > file_len {
        return Err(GgufError::BeyondFile {
            need_bytes,
            file_bytes: file_len,
        });
    }
    Ok(())
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Version 1 writes lengths in 32 bits.
    short: bool,
}

impl<'a> Cursor<'a> {
    fn invalid(&self, what: &'static str) -> GgufError {
        GgufError::Invalid {
            offset: self.at as u64,
            what,
        }
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8], GgufError> {
        let Some(end) = usize::try_from(count)
            .ok()
            .and_then(|count| self.at.checked_add(count))
        else {
            return Err(self.invalid("a length past all memory"));
        };
        match self.bytes.get(self.at..end) {
            Some(taken) => {
                self.at = end;
                Ok(taken)
            }
            // Refused at once, before anybody reads on to see whether so much comes.
            None if count > MAX_HEADER_BYTES => Err(self.invalid("a length past any header")),
            None => Err(GgufError::Truncated {
                offset: self.bytes.len() as u64,
            }),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn length(&mut self) -> Result<u64, GgufError> {
        if self.short {
            self.u32().map(u64::from)
        } else {
            self.u64()
        }
    }

    fn text(&mut self) -> Result<&'a str, GgufError> {
        let length = self.length()?;
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes).map_err(|_| self.invalid("a name is not UTF-8"))
    }

    fn skip_text(&mut self) -> Result<(), GgufError> {
        let length = self.length()?;
        self.take(length).map(drop)
    }

    fn dimensions(&mut self) -> Result<u32, GgufError> {
        let dimensions = self.u32()?;
        if dimensions > MAX_DIMENSIONS {
            return Err(self.invalid("a tensor has too many dimensions"));
        }
        Ok(dimensions)
    }

    /// One value of a pair; `None` where it is not kept. Of an array of texts only the start is read, and `texts` says how
    /// many are to be stepped over.
    fn value(&mut self, of: u32, texts: &mut u64) -> Result<Option<String>, GgufError> {
        Ok(Some(match of {
            0 => u8::from_le_bytes(self.array()?).to_string(),
            1 => i8::from_le_bytes(self.array()?).to_string(),
            2 => u16::from_le_bytes(self.array()?).to_string(),
            3 => i16::from_le_bytes(self.array()?).to_string(),
            4 => self.u32()?.to_string(),
            5 => i32::from_le_bytes(self.array()?).to_string(),
            6 => f32::from_le_bytes(self.array()?).to_string(),
            7 => (self.take(1)? != [0]).to_string(),
            8 => {
                let length = self.length()?;
                let bytes = self.take(length)?;
                if bytes.len() > MAX_KEPT_TEXT {
                    return Ok(None);
                }
                String::from_utf8_lossy(bytes).into_owned()
            }
            9 => {
                *texts = self.skip_array(0)?;
                return Ok(None);
            }
            10 => self.u64()?.to_string(),
            11 => i64::from_le_bytes(self.array()?).to_string(),
            12 => f64::from_le_bytes(self.array()?).to_string(),
            _ => return Err(self.invalid("a value of an unknown type")),
        }))
    }

    /// Steps over an array; an outermost one of texts is left for the caller, who is told how many there are.
    fn skip_array(&mut self, depth: u32) -> Result<u64, GgufError> {
        let of = self.u32()?;
        let count = self.length()?;
        let size = match of {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 if depth == 0 => return Ok(count),
            8 => {
                for _ in 0..count {
                    self.skip_text()?;
                }
                return Ok(0);
            }
            9 if depth < MAX_DEPTH => {
                for _ in 0..count {
                    let texts = self.skip_array(depth + 1)?;
                    debug_assert_eq!(texts, 0);
                }
                return Ok(0);
            }
            _ => return Err(self.invalid("an array of an unknown type")),
        };
        let bytes = count
            .checked_mul(size)
            .ok_or_else(|| self.invalid("an array past 64 bits"))?;
        self.take(bytes)?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests;
