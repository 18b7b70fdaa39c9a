//! Reading the headers of a set of weights: what its files hold, file by file.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use super::contents::{Contents, Known, Mark};
use super::hub;
use super::identify::Identity;
use super::inspect::Reason;
use super::layout::{self, Part};
use super::model::{Component, Facts, FileIdentity, FileRange, Kind, Selection, SourceFile};
use super::walk::{identity_of, passes};
use super::weights::Container;
use super::{gguf, safetensors};
use crate::ids::{ComponentId, ContentId, ModelName};
use crate::tensor::Dtype;
use crate::units::Bytes;

/// A thread keeps its buffer for headers up to this size.
const KEPT_BUFFER: usize = 8 << 20;

thread_local! {
    /// Headers are read into memory that is there already: making it anew for each costs more than the read.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// What the files of one set of weights hold.
#[derive(Default)]
pub(super) struct ReadPart {
    files: Vec<SourceFile>,
    /// Where each file's data begin.
    data_starts: Vec<u64>,
    pub(super) contents: Arc<Contents>,
    pub(super) metadata: BTreeMap<String, String>,
    /// The GGUF type that most bytes have, in lower case.
    quantization: Option<Arc<str>>,
}

impl ReadPart {
    /// Adds what was read to an entry's facts.
    pub(super) fn facts(&self, facts: &mut Facts) {
        let before = facts.parameters.unwrap_or(0);
        facts.parameters = before.checked_add(self.contents.parameters);
        for (dtype, bytes) in &self.contents.dtypes {
            match facts
                .dtypes
                .iter_mut()
                .find(|(known, _)| **known == **dtype)
            {
                Some((_, sum)) => *sum = sum.saturating_add(Bytes(*bytes)),
                None => facts.dtypes.push(((*dtype).into(), Bytes(*bytes))),
            }
        }
        facts.dtypes.sort_by(|a, b| (b.1, &a.0).cmp(&(a.1, &b.0)));
        facts.quantization = facts.quantization.take().or(self.quantization.clone());
    }

    /// All of it as one component.
    pub(super) fn whole(&self, model: &ModelName, name: &str, identity: &Identity) -> Component {
        Component {
            id: ComponentId {
                model: model.clone(),
                component: name.into(),
            },
            kind: identity.kind,
            architecture: identity.architecture.clone(),
            dtype: self
                .contents
                .dtypes
                .first()
                .map(|(dtype, _)| (*dtype).into()),
            bytes: Bytes(self.contents.bytes),
            tensors: u32::try_from(self.contents.outline.tensors).unwrap_or(u32::MAX),
            content_id: content_id(&self.files, None),
            files: self.files.clone(),
            selection: None,
            part: None,
        }
    }

    /// The components inside a single-file checkpoint, in the order of first use. What belongs to none of them, such as
    /// a copy of averaged weights, is left out.
    pub(super) fn split(
        &self,
        model: &ModelName,
        identity: &Identity,
        known: &Known<'_>,
    ) -> Vec<Component> {
        let mut keys = self.contents.outline.iter();
        let diffusion = match keys.any(|(key, _)| key.contains(".input_blocks.")) {
            true => Kind::Unet,
            false => Kind::Transformer,
        };
        let mut components = Vec::new();
        for part in &self.contents.parts {
            let Some(rule) = known.signatures.components.get(part.rule) else {
                continue;
            };
            let placed = |range: &FileRange| {
                let start = self.data_starts.get(range.file as usize).copied();
                let start = start.unwrap_or_default();
                FileRange {
                    file: range.file,
                    start: start.saturating_add(range.start),
                    end: start.saturating_add(range.end),
                }
            };
            let prefixes = part.prefixes.iter().filter_map(|i| rule.prefixes.get(*i));
            let selection = Selection {
                prefixes: prefixes.cloned().collect(),
                ranges: part.ranges.iter().map(placed).collect(),
            };
            let is_diffusion = rule.kind == Kind::Unknown;
            let kind = if is_diffusion { diffusion } else { rule.kind };
            let name = match is_diffusion {
                true => kind.as_str().into(),
                false => rule.name.clone(),
            };
            components.push(Component {
                id: ComponentId {
                    model: model.clone(),
                    component: name,
                },
                kind,
                architecture: is_diffusion
                    .then(|| identity.architecture.clone())
                    .flatten(),
                dtype: part.dtypes.first().map(|(dtype, _)| (*dtype).into()),
                bytes: Bytes(part.bytes),
                tensors: part.tensors,
                content_id: content_id(&self.files, Some(&selection)),
                files: self.files.clone(),
                selection: Some(Arc::new(selection)),
                part: None,
            });
        }
        components
    }
}

/// The digest over the identities of files, and over the ranges of them that count: equal for links to one file.
pub(super) fn content_id(files: &[SourceFile], selection: Option<&Selection>) -> ContentId {
    if selection.is_none()
        && let [only] = files
        && let Some(digest) = hub::blob_id(&only.path)
    {
        return ContentId::Sha256(digest);
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"hotset files 1");
    for SourceFile { identity, .. } in files {
        let FileIdentity {
            device,
            inode,
            size,
            mtime_ns,
        } = identity;
        for number in [*device, *inode, size.get(), mtime_ns.cast_unsigned()] {
            hasher.update(&number.to_le_bytes());
        }
    }
    for range in selection.iter().flat_map(|s| &s.ranges) {
        for number in [u64::from(range.file), range.start, range.end] {
            hasher.update(&number.to_le_bytes());
        }
    }
    ContentId::File(*hasher.finalize().as_bytes())
}

/// Reads the headers of a set of weights. Files that only the index names are added to `inputs`.
pub(super) fn read_part(
    part: &Part,
    inputs: &mut Vec<SourceFile>,
    known: &Known<'_>,
) -> Result<ReadPart, Reason> {
    match part.container {
        Container::Pickle => {
            return Err(
                "this is a pickle file, which can run code when it is opened; hotset never opens it: \
                 convert it to safetensors in a place that you trust"
                    .into(),
            );
        }
        Container::Onnx => {
            return Err(
                "ONNX files are listed only: their weights cannot be loaded apart from their graph; \
                 use the model's safetensors files"
                    .into(),
            );
        }
        Container::Gguf | Container::Safetensors => {}
    }
    let files = part_files(part, inputs)?;
    let mut reading = Reading {
        known,
        read: ReadPart::default(),
        own: Contents::default(),
        names: (files.len() > 1).then(HashSet::new),
    };
    let alone = files.len() == 1;
    for source in files {
        let (file, identity) = open(&source.path)?;
        let source = SourceFile {
            path: source.path,
            identity,
        };
        BUFFER.with_borrow_mut(|buffer| {
            let done = match part.container {
                Container::Gguf => reading.gguf(&file, &source, alone, buffer),
                _ => reading.safetensors(&file, &source, alone, buffer),
            };
            if buffer.len() > KEPT_BUFFER {
                *buffer = Vec::new();
            }
            done
        })?;
        if let Some(input) = inputs.iter_mut().find(|input| input.path == source.path) {
            input.identity = source.identity;
        }
        reading.read.files.push(source);
    }
    let Reading {
        mut read, mut own, ..
    } = reading;
    if own.outline.tensors > 0 {
        own.finish();
        read.contents = Arc::new(own);
    }
    if part.container == Container::Gguf {
        let plain = ["F32", "F16", "BF16", "F64"];
        let most = read.contents.dtypes.first();
        read.quantization = most
            .filter(|(dtype, _)| !plain.contains(dtype))
            .map(|(dtype, _)| dtype.to_lowercase().into());
    }
    Ok(read)
}

/// A set of weights while its files are being read.
struct Reading<'k, 's> {
    known: &'k Known<'s>,
    read: ReadPart,
    /// What was read, unless it was known before.
    own: Contents,
    /// The names so far, where there are several files.
    names: Option<HashSet<Box<str>>>,
}

impl Reading<'_, '_> {
    fn file_index(&self) -> u32 {
        u32::try_from(self.read.files.len()).unwrap_or(u32::MAX)
    }

    fn add(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: impl Iterator<Item = u64> + Clone,
        start: u64,
        end: u64,
    ) -> Result<(), Reason> {
        let range = FileRange {
            file: self.file_index(),
            start,
            end,
        };
        self.own
            .add(self.known.signatures, name, dtype.name(), shape, range);
        let again = match &mut self.names {
            Some(names) => !names.insert(name.into()),
            None => false,
        };
        if again {
            return Err(format!(
                "tensor `{name}` is in two shards, so it is unclear which one counts; fetch the model again"
            )
            .into());
        }
        Ok(())
    }

    fn state(&mut self, metadata: BTreeMap<String, String>) {
        for (key, value) in metadata {
            self.read.metadata.entry(key).or_insert(value);
        }
    }

    /// Reads a safetensors header. `alone`: the file is all there is, so what is known of its header is known of the set.
    fn safetensors(
        &mut self,
        file: &File,
        source: &SourceFile,
        alone: bool,
        buffer: &mut Vec<u8>,
    ) -> Result<(), Reason> {
        let file_len = source.identity.size.get();
        let wrong = |error: safetensors::HeaderError| Reason {
            incomplete: error.is_incomplete(),
            passes: matches!(&error, safetensors::HeaderError::Io { source } if passes(source)),
            ..located(&source.path, &error)
        };
        let header = safetensors::read_header_bytes(file, file_len, buffer).map_err(wrong)?;
        let data_start = 8 + header.len() as u64;
        self.read.data_starts.push(data_start);
        let mut metadata = BTreeMap::new();
        let tensors = match alone {
            true => safetensors::after_metadata(header, &mut metadata),
            false => None,
        };
        let mark = tensors.map(|tensors| {
            let data_len = file_len.saturating_sub(data_start);
            Mark::Safetensors(self.known.mark(tensors, data_len))
        });
        if let Some(contents) = mark.as_ref().and_then(|mark| self.known.get(mark)) {
            self.state(metadata);
            self.read.contents = contents;
            return Ok(());
        }
        metadata.clear();
        let mut twice = Ok(());
        safetensors::visit(
            header,
            file_len,
            &mut metadata,
            |name, dtype, shape, start, end| {
                let shape = shape.iter().map(|&dimension| dimension as u64);
                if let Err(reason) = self.add(name, dtype, shape, start, end) {
                    twice = Err(reason);
                }
            },
        )
        .map_err(wrong)?;
        twice?;
        self.state(metadata);
        if let Some(mark) = mark {
            self.remember(mark);
        }
        Ok(())
    }

    /// Reads a GGUF header.
    fn gguf(
        &mut self,
        file: &File,
        source: &SourceFile,
        alone: bool,
        buffer: &mut Vec<u8>,
    ) -> Result<(), Reason> {
        let file_len = source.identity.size.get();
        let wrong = |error: gguf::GgufError| Reason {
            incomplete: error.is_incomplete(),
            passes: matches!(&error, gguf::GgufError::Io { source } if passes(source)),
            ..located(&source.path, &error)
        };
        let pairs = gguf::read_pairs(file, file_len, buffer).map_err(wrong)?;
        self.read.data_starts.push(pairs.data_start());
        let mark = alone.then(|| {
            let data_len = file_len.saturating_sub(pairs.data_start());
            let mark = self.known.mark(pairs.described(buffer), data_len);
            Mark::Gguf(mark, pairs.reading())
        });
        if let Some(contents) = mark.as_ref().and_then(|mark| self.known.get(mark)) {
            self.state(pairs.metadata);
            self.read.contents = contents;
            return Ok(());
        }
        for tensor in pairs.tensors(buffer, file_len).map_err(wrong)? {
            let shape = tensor.shape.iter().map(|&dimension| dimension as u64);
            self.add(&tensor.name, tensor.dtype, shape, tensor.start, tensor.end)?;
        }
        if let Some(mark) = mark {
            self.remember(mark);
        }
        self.state(pairs.metadata);
        Ok(())
    }

    fn remember(&mut self, mark: Mark) {
        let mut own = std::mem::take(&mut self.own);
        own.finish();
        self.read.contents = self.known.remember(mark, own);
    }
}

/// The files of a set, in order: what the index names, else what their numbers promise.
fn part_files(part: &Part, inputs: &mut Vec<SourceFile>) -> Result<Vec<SourceFile>, Reason> {
    let Some(index) = &part.index else {
        let expected = part.expected as usize;
        if expected > part.files.len() {
            return Err(Reason::missing(format!(
                "{} of {expected} shards of `{}` are there; fetch the missing ones",
                part.files.len(),
                part.stem
            )));
        }
        return Ok(part.files.clone());
    };
    let mut files = Vec::new();
    for path in layout::indexed_shards(&index.path, &part.folder)? {
        if let Some(known) = part.files.iter().find(|file| *file.path == *path) {
            files.push(known.clone());
            continue;
        }
        let metadata = std::fs::metadata(&path).map_err(|error| {
            Reason::missing(format!(
                "{} names the shard {}, which cannot be found ({error}); fetch it again",
                index.path.display(),
                path.display()
            ))
        })?;
        let source = SourceFile {
            path: path.into(),
            identity: identity_of(&metadata),
        };
        inputs.push(source.clone());
        files.push(source);
    }
    Ok(files)
}

/// Opens a weight file. The identity is that of the file that is read, should it have changed since it was listed.
fn open(path: &Path) -> Result<(File, FileIdentity), Reason> {
    // Non-blocking, so that a pipe put in the file's place cannot hold up the scan.
    let file = File::options()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32)
        .open(path)
        .map_err(|error| Reason {
            passes: passes(&error),
            ..located(path, &format!("cannot be opened: {error}"))
        })?;
    let metadata = file
        .metadata()
        .map_err(|error| located(path, &format!("cannot be examined: {error}")))?;
    if !metadata.is_file() {
        return Err(located(path, &"is no longer a file"));
    }
    // Weights follow the header, and reading ahead would drag them into the page cache: for a library that is more bytes
    // than its headers are, and pushes out what others have there. Where the advice is refused, the reads are right too.
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random);
    Ok((file, identity_of(&metadata)))
}

fn located(path: &Path, error: &dyn std::fmt::Display) -> Reason {
    let name = path.file_name().unwrap_or(path.as_os_str());
    format!("{}: {error}", Path::new(name).display()).into()
}
