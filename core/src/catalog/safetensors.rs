//! Headers of safetensors files: eight bytes of length, a JSON object, then the tensors' bytes.
//!
//! Nothing of a header is handed out before all of it has been checked: names are unique, every tensor's length is what
//! its dtype and shape say, and the tensors fill the rest of the file without holes or overlaps.

mod json;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use smallvec::SmallVec;

use self::json::Cursor;
use crate::tensor::{Dtype, HeaderTensor};

/// The longest header that is read, as the reference implementation has it.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The header's length stands in this many bytes before it.
const LENGTH_BYTES: u64 = 8;

/// The most dimensions that a tensor may have. Real tensors have at most six or so.
const MAX_DIMENSIONS: usize = 64;

/// How much is read at once in the hope that it holds the whole header.
const FIRST_READ: usize = 16 << 10;

/// A header that has been checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The tensors, by their place in the file.
    pub tensors: Vec<HeaderTensor>,
    /// The `__metadata__` of the file.
    pub metadata: BTreeMap<String, String>,
    /// Where the tensors' bytes begin in the file: 8 + the header's length.
    pub data_start: u64,
}

/// What is wrong with a safetensors file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Too short for the length of a header.
    #[error(
        "the file has {file_bytes} bytes, too few for a safetensors file: it is empty or was cut off; fetch it again"
    )]
    TooShort {
        /// Length of the file.
        file_bytes: u64,
    },
    /// The header claims more bytes than the file has, or than any header may have.
    #[error(
        "the header claims {header_bytes} bytes where at most {limit} can be: the file was cut off or is no safetensors file; fetch it again"
    )]
    HeaderTooLong {
        /// What the file claims.
        header_bytes: u64,
        /// What can be.
        limit: u64,
    },
    /// Not the JSON that a header is.
    #[error(
        "the header is not valid JSON at byte {offset}: expected {expected}; the file is damaged or no safetensors file"
    )]
    Json {
        /// Where, counted from the start of the header.
        offset: u64,
        /// What should have been there.
        expected: &'static str,
    },
    /// Two tensors, or two metadata entries, of one name.
    #[error(
        "`{name}` occurs twice in the header, so it is unclear which one counts; write the file again"
    )]
    DuplicateKey {
        /// The name.
        name: String,
    },
    /// A field of a tensor is missing or occurs twice.
    #[error("tensor `{name}` does not have exactly one `{field}`; write the file again")]
    Field {
        /// The tensor.
        name: String,
        /// The field.
        field: &'static str,
    },
    /// A dtype that no version of the format has.
    #[error(
        "tensor `{name}` has the unknown dtype `{dtype}`: it needs a newer hotset or is damaged"
    )]
    UnknownDtype {
        /// The tensor.
        name: String,
        /// The dtype as written.
        dtype: String,
    },
    /// The tensor's bytes are not as many as its dtype and shape need.
    #[error(
        "tensor `{name}` has {have} bytes but its dtype and shape need {need}; write the file again"
    )]
    SizeMismatch {
        /// The tensor.
        name: String,
        /// What its offsets span.
        have: u64,
        /// What dtype and shape need.
        need: u64,
    },
    /// Offsets that run backwards, or a shape beyond 64 bits or in parts of a byte.
    #[error("tensor `{name}` has an impossible shape or offsets; write the file again")]
    BadExtent {
        /// The tensor.
        name: String,
    },
    /// Two tensors claim the same bytes.
    #[error(
        "tensor `{name}` begins at byte {start} where `{other}` still runs to {end}; write the file again"
    )]
    Overlap {
        /// The tensor that begins too early.
        name: String,
        /// Where it begins.
        start: u64,
        /// The tensor before it.
        other: String,
        /// Where that one ends.
        end: u64,
    },
    /// Bytes that belong to no tensor.
    #[error("{bytes} bytes before offset {offset} belong to no tensor; write the file again")]
    Hole {
        /// Where the hole ends, counted from the start of the data.
        offset: u64,
        /// How long it is.
        bytes: u64,
    },
    /// The tensors need more bytes than the file has.
    #[error(
        "the tensors need {need_bytes} bytes and the file has {file_bytes}: it was cut off or is still being written; fetch it again"
    )]
    BeyondFile {
        /// The length that the file should have.
        need_bytes: u64,
        /// The length that it has.
        file_bytes: u64,
    },
    /// The file goes on after its last tensor.
    #[error(
        "the file has {file_bytes} bytes where header and tensors need {need_bytes}: something was appended; fetch it again"
    )]
    TrailingBytes {
        /// The length that the file should have.
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

impl HeaderError {
    /// Whether the file may only be too short: cut off, or still being written.
    #[must_use]
    pub const fn is_incomplete(&self) -> bool {
        match self {
            Self::TooShort { .. } | Self::BeyondFile { .. } => true,
            // Longer than the file, and not longer than any header.
            Self::HeaderTooLong { header_bytes, .. } => *header_bytes <= MAX_HEADER_BYTES,
            _ => false,
        }
    }
}

/// One tensor while the header is being read: nothing is copied.
struct RawTensor<'a> {
    name: Cow<'a, str>,
    dtype: Dtype,
    shape: Shape,
    start: u64,
    end: u64,
}

/// Dimensions; real tensors have at most this many or few more.
type Shape = SmallVec<[usize; 6]>;

/// Reads and checks the header of an open file of `file_len` bytes. Blocks.
///
/// # Errors
/// What is wrong with the file, or that it cannot be read.
pub fn read_header(file: &File, file_len: u64) -> Result<Header, HeaderError> {
    let mut buffer = Vec::new();
    let header = read_header_bytes(file, file_len, &mut buffer)?;
    parse(header, file_len)
}

/// Reads the bytes of the header, without their length. The buffer only grows, so that one can serve many files.
pub(crate) fn read_header_bytes<'b>(
    file: &File,
    file_len: u64,
    buffer: &'b mut Vec<u8>,
) -> Result<&'b [u8], HeaderError> {
    if file_len < LENGTH_BYTES {
        return Err(HeaderError::TooShort {
            file_bytes: file_len,
        });
    }
    let grow = |buffer: &mut Vec<u8>, to: usize| {
        if buffer.len() < to {
            buffer.resize(to, 0);
        }
    };
    let first = FIRST_READ.min(file_len.try_into().unwrap_or(FIRST_READ));
    grow(buffer, first);
    file.read_exact_at(&mut buffer[..first], 0)?;
    let mut length = [0; LENGTH_BYTES as usize];
    length.copy_from_slice(&buffer[..LENGTH_BYTES as usize]);
    let header_bytes = u64::from_le_bytes(length);
    let limit = MAX_HEADER_BYTES.min(file_len - LENGTH_BYTES);
    if header_bytes > limit {
        return Err(HeaderError::HeaderTooLong {
            header_bytes,
            limit,
        });
    }
    // Bounded by MAX_HEADER_BYTES, so it fits.
    let whole = (LENGTH_BYTES + header_bytes) as usize;
    if whole > first {
        grow(buffer, whole);
        file.read_exact_at(&mut buffer[first..whole], first as u64)?;
    }
    Ok(&buffer[LENGTH_BYTES as usize..whole])
}

/// Checks a header, given without the eight bytes of its length, of a file of `file_len` bytes.
///
/// # Errors
/// What is wrong with the file.
pub fn parse(header_json: &[u8], file_len: u64) -> Result<Header, HeaderError> {
    let mut metadata = BTreeMap::new();
    let tensors = checked(header_json, file_len, &mut metadata)?
        .into_iter()
        .map(|raw| HeaderTensor {
            name: raw.name.into(),
            dtype: raw.dtype,
            shape: raw.shape.into_vec(),
            start: raw.start,
            end: raw.end,
        })
        .collect();
    Ok(Header {
        tensors,
        metadata,
        data_start: LENGTH_BYTES + header_json.len() as u64,
    })
}

/// As [`parse`], for those who need no copy: hands out name, dtype, shape, start and end of each tensor once all have been
/// checked.
pub(crate) fn visit(
    header_json: &[u8],
    file_len: u64,
    metadata: &mut BTreeMap<String, String>,
    mut tensor: impl FnMut(&str, Dtype, &[usize], u64, u64),
) -> Result<(), HeaderError> {
    for raw in checked(header_json, file_len, metadata)? {
        tensor(&raw.name, raw.dtype, &raw.shape, raw.start, raw.end);
    }
    Ok(())
}

/// Where the tensors begin in a header whose metadata come first, as all writers put them. The metadata are read into
/// `metadata`. `None` where they do not come first, are wrong, or nothing follows them.
pub(crate) fn after_metadata<'a>(
    header_json: &'a [u8],
    metadata: &mut BTreeMap<String, String>,
) -> Option<&'a [u8]> {
    const START: &[u8] = b"{\"__metadata__\":";
    let rest = header_json.strip_prefix(START)?;
    let mut cursor = Cursor::new(rest);
    read_metadata(&mut cursor, metadata).ok()?;
    let rest = &rest[cursor.offset()..];
    rest.starts_with(b",").then_some(rest)
}

/// Reads all and checks it; the tensors are sorted by their place.
fn checked<'a>(
    header_json: &'a [u8],
    file_len: u64,
    metadata: &mut BTreeMap<String, String>,
) -> Result<Vec<RawTensor<'a>>, HeaderError> {
    let data_start = LENGTH_BYTES + header_json.len() as u64;
    if data_start > file_len {
        return Err(HeaderError::HeaderTooLong {
            header_bytes: header_json.len() as u64,
            limit: file_len.saturating_sub(LENGTH_BYTES),
        });
    }
    let mut tensors: Vec<RawTensor<'_>> = Vec::new();
    read_members(header_json, metadata, &mut tensors)?;
    check_names(&tensors)?;
    tensors.sort_by_key(|t| (t.start, t.end));
    check_places(&tensors, data_start, file_len)?;
    Ok(tensors)
}

fn read_members<'a>(
    header_json: &'a [u8],
    metadata: &mut BTreeMap<String, String>,
    tensors: &mut Vec<RawTensor<'a>>,
) -> Result<(), HeaderError> {
    let mut cursor = Cursor::new(header_json);
    // A bound on the allocation that the input cannot inflate: no tensor is described in fewer bytes.
    tensors.reserve((header_json.len() / 128).min(4096));
    cursor.expect(b'{', "`{`")?;
    if !cursor.take(b'}') {
        let mut seen_metadata = false;
        loop {
            let name = cursor.string()?;
            cursor.expect(b':', "`:`")?;
            if name == "__metadata__" {
                if std::mem::replace(&mut seen_metadata, true) {
                    return Err(HeaderError::DuplicateKey {
                        name: name.into_owned(),
                    });
                }
                read_metadata(&mut cursor, metadata)?;
            } else {
                tensors.push(read_tensor(&mut cursor, name)?);
            }
            if !cursor.another(b'}')? {
                break;
            }
        }
    }
    cursor.end()
}

fn read_metadata(
    cursor: &mut Cursor<'_>,
    metadata: &mut BTreeMap<String, String>,
) -> Result<(), HeaderError> {
    if cursor.next_token() == Some(b'n') {
        return cursor.literal("null");
    }
    cursor.expect(b'{', "an object of texts")?;
    if cursor.take(b'}') {
        return Ok(());
    }
    loop {
        let key = cursor.string()?;
        cursor.expect(b':', "`:`")?;
        let value = cursor.string()?;
        if metadata.contains_key(&*key) {
            return Err(HeaderError::DuplicateKey {
                name: key.into_owned(),
            });
        }
        metadata.insert(key.into_owned(), value.into_owned());
        if !cursor.another(b'}')? {
            return Ok(());
        }
    }
}

fn read_tensor<'a>(
    cursor: &mut Cursor<'_>,
    name: Cow<'a, str>,
) -> Result<RawTensor<'a>, HeaderError> {
    let mut dtype: Option<Dtype> = None;
    let mut shape: Option<Shape> = None;
    let mut offsets: Option<(u64, u64)> = None;
    let once = |taken: bool, field| {
        if taken {
            return Err(HeaderError::Field {
                name: name.to_string(),
                field,
            });
        }
        Ok(())
    };
    cursor.expect(b'{', "the description of a tensor")?;
    if !cursor.take(b'}') {
        loop {
            let field = cursor.string()?;
            cursor.expect(b':', "`:`")?;
            match &*field {
                "dtype" => {
                    once(dtype.is_some(), "dtype")?;
                    let text = cursor.string()?;
                    // Types in blocks are GGUF's alone.
                    let plain = Dtype::from_name(&text).filter(|dtype| dtype.block().0 == 1);
                    dtype = Some(plain.ok_or_else(|| HeaderError::UnknownDtype {
                        name: name.to_string(),
                        dtype: text.to_string(),
                    })?);
                }
                "shape" => {
                    once(shape.is_some(), "shape")?;
                    shape = Some(read_shape(cursor, &name)?);
                }
                "data_offsets" => {
                    once(offsets.is_some(), "data_offsets")?;
                    cursor.expect(b'[', "two offsets")?;
                    let start = cursor.number()?;
                    cursor.expect(b',', "two offsets")?;
                    let end = cursor.number()?;
                    cursor.expect(b']', "two offsets")?;
                    offsets = Some((start, end));
                }
                _ => cursor.skip_value(0)?,
            }
            if !cursor.another(b'}')? {
                break;
            }
        }
    }
    let missing = |field| HeaderError::Field {
        name: name.to_string(),
        field,
    };
    let dtype = dtype.ok_or_else(|| missing("dtype"))?;
    let shape = shape.ok_or_else(|| missing("shape"))?;
    let (start, end) = offsets.ok_or_else(|| missing("data_offsets"))?;
    let bad_extent = || HeaderError::BadExtent {
        name: name.to_string(),
    };
    let have = end.checked_sub(start).ok_or_else(bad_extent)?;
    let need = bytes_needed(dtype, &shape).ok_or_else(bad_extent)?;
    if have != need {
        return Err(HeaderError::SizeMismatch {
            name: name.to_string(),
            have,
            need,
        });
    }
    Ok(RawTensor {
        name,
        dtype,
        shape,
        start,
        end,
    })
}

fn read_shape(cursor: &mut Cursor<'_>, name: &str) -> Result<Shape, HeaderError> {
    let mut shape = Shape::new();
    cursor.expect(b'[', "a list of dimensions")?;
    if cursor.take(b']') {
        return Ok(shape);
    }
    loop {
        let dimension = usize::try_from(cursor.number()?).ok();
        match dimension {
            Some(dimension) if shape.len() < MAX_DIMENSIONS => shape.push(dimension),
            _ => {
                return Err(HeaderError::BadExtent {
                    name: name.to_owned(),
                });
            }
        }
        if !cursor.another(b']')? {
            return Ok(shape);
        }
    }
}

/// The bytes that a tensor takes; `None` past 64 bits or where it ends inside a byte.
fn bytes_needed(dtype: Dtype, shape: &[usize]) -> Option<u64> {
    let elements = shape
        .iter()
        .try_fold(1_u64, |n, &dim| n.checked_mul(dim as u64))?;
    dtype.bytes_of(elements)
}

fn check_names(tensors: &[RawTensor<'_>]) -> Result<(), HeaderError> {
    let mut names: HashSet<&str, foldhash::fast::RandomState> =
        HashSet::with_capacity_and_hasher(tensors.len(), foldhash::fast::RandomState::default());
    match tensors.iter().find(|t| !names.insert(&*t.name)) {
        Some(twice) => Err(HeaderError::DuplicateKey {
            name: twice.name.to_string(),
        }),
        None => Ok(()),
    }
}

/// Checks that the tensors, sorted by their place, fill the file from `data_start` to its end.
fn check_places(
    tensors: &[RawTensor<'_>],
    data_start: u64,
    file_len: u64,
) -> Result<(), HeaderError> {
    let mut end = 0;
    let mut before: Option<&RawTensor<'_>> = None;
    for tensor in tensors {
        if tensor.start < end {
            return Err(HeaderError::Overlap {
                name: tensor.name.to_string(),
                start: tensor.start,
                other: before.map(|t| t.name.to_string()).unwrap_or_default(),
                end,
            });
        }
        if tensor.start > end {
            return Err(HeaderError::Hole {
                offset: tensor.start,
                bytes: tensor.start - end,
            });
        }
        end = tensor.end;
        before = Some(tensor);
    }
    let need_bytes = data_start.saturating_add(end);
    match need_bytes.cmp(&file_len) {
        std::cmp::Ordering::Greater => Err(HeaderError::BeyondFile {
            need_bytes,
            file_bytes: file_len,
        }),
        std::cmp::Ordering::Less => Err(HeaderError::TrailingBytes {
            need_bytes,
            file_bytes: file_len,
        }),
        std::cmp::Ordering::Equal => Ok(()),
    }
}
