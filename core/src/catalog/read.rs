//! Reading the headers of a set of weights: what its files hold, file by file.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use super::hub;
use super::identify::Identity;
use super::inspect::Reason;
use super::layout::{self, Part};
use super::model::{Component, Facts, FileIdentity, FileRange, Kind, Selection, SourceFile};
use super::outline::Outline;
use super::signatures::Signatures;
use super::walk::identity_of;
use super::weights::Container;
use super::{gguf, safetensors};
use crate::ids::{ComponentId, ContentId, ModelName};
use crate::units::Bytes;

/// What the files of one set of weights hold.
#[derive(Default)]
pub(super) struct ReadPart {
    files: Vec<SourceFile>,
    tensors: Vec<Place>,
    pub(super) outline: Outline,
    pub(super) metadata: BTreeMap<String, String>,
    dtypes: Vec<(Arc<str>, Bytes)>,
    bytes: Bytes,
    parameters: u64,
    /// The GGUF type that most bytes have, in lower case.
    quantization: Option<Arc<str>>,
}

/// A tensor's name, dtype and bytes.
struct Place {
    name: Arc<str>,
    dtype: &'static str,
    range: FileRange,
}

impl ReadPart {
    /// Adds what was read to an entry's facts.
    pub(super) fn facts(&self, facts: &mut Facts) {
        let before = facts.parameters.unwrap_or(0);
        facts.parameters = before.checked_add(self.parameters);
        for (dtype, bytes) in &self.dtypes {
            match facts.dtypes.iter_mut().find(|(known, _)| known == dtype) {
                Some((_, sum)) => *sum = sum.saturating_add(*bytes),
                None => facts.dtypes.push((dtype.clone(), *bytes)),
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
            dtype: self.dtypes.first().map(|(dtype, _)| dtype.clone()),
            bytes: self.bytes,
            tensors: u32::try_from(self.tensors.len()).unwrap_or(u32::MAX),
            content_id: content_id(&self.files, None),
            files: self.files.clone(),
            selection: None,
        }
    }

    /// The components inside a single-file checkpoint, in the order of first use. What belongs to none of them, such as
    /// a copy of averaged weights, is left out.
    pub(super) fn split(
        &self,
        model: &ModelName,
        identity: &Identity,
        signatures: &Signatures,
    ) -> Vec<Component> {
        let is_unet = self
            .tensors
            .iter()
            .any(|t| t.name.contains(".input_blocks."));
        let diffusion = if is_unet {
            Kind::Unet
        } else {
            Kind::Transformer
        };
        let mut components = Vec::new();
        for rule in &signatures.components {
            let held: Vec<&Place> = self
                .tensors
                .iter()
                .filter(|t| rule.prefixes.iter().any(|p| t.name.starts_with(&**p)))
                .collect();
            if held.is_empty() {
                continue;
            }
            let prefixes = rule
                .prefixes
                .iter()
                .filter(|p| held.iter().any(|t| t.name.starts_with(&***p)))
                .cloned()
                .collect();
            let selection = Selection {
                prefixes,
                ranges: joined(held.iter().map(|t| t.range).collect()),
            };
            let is_diffusion = rule.kind == Kind::Unknown;
            let kind = if is_diffusion { diffusion } else { rule.kind };
            let name = if is_diffusion {
                kind.as_str().into()
            } else {
                rule.name.clone()
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
                dtype: most_bytes(&held),
                bytes: held
                    .iter()
                    .map(|t| Bytes(t.range.end - t.range.start))
                    .sum(),
                tensors: u32::try_from(held.len()).unwrap_or(u32::MAX),
                content_id: content_id(&self.files, Some(&selection)),
                files: self.files.clone(),
                selection: Some(Arc::new(selection)),
            });
        }
        components
    }

    fn add(&mut self, name: Arc<str>, dtype: &'static str, shape: &[u64], range: FileRange) {
        self.bytes = self.bytes.saturating_add(Bytes(range.end - range.start));
        let elements = shape.iter().fold(1_u64, |n, &d| n.saturating_mul(d));
        self.parameters = self.parameters.saturating_add(elements);
        self.outline.add(&name, shape.iter().copied(), dtype);
        self.tensors.push(Place { name, dtype, range });
    }
}

/// The dtype that most of these bytes have.
fn most_bytes(tensors: &[&Place]) -> Option<Arc<str>> {
    let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
    for tensor in tensors {
        let sum = sums.entry(tensor.dtype).or_default();
        *sum = sum.saturating_add(tensor.range.end - tensor.range.start);
    }
    sums.into_iter()
        .max_by_key(|(_, bytes)| *bytes)
        .map(|(dtype, _)| dtype.into())
}

/// Sorts ranges and joins neighbours.
fn joined(mut ranges: Vec<FileRange>) -> Vec<FileRange> {
    ranges.sort_unstable_by_key(|r| (r.file, r.start));
    let mut out: Vec<FileRange> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if last.file == range.file && last.end >= range.start => {
                last.end = last.end.max(range.end);
            }
            _ => out.push(range),
        }
    }
    out
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
pub(super) fn read_part(part: &Part, inputs: &mut Vec<SourceFile>) -> Result<ReadPart, Reason> {
    match part.container {
        Container::Pickle => {
            return Err(
                "this is a pickle file, which can run code when it is opened; hotset never opens it: \
                 convert it to safetensors in a place that you trust"
                    .to_owned(),
            );
        }
        Container::Onnx => {
            return Err(
                "ONNX files are listed only: their weights cannot be loaded apart from their graph; \
                 use the model's safetensors files"
                    .to_owned(),
            );
        }
        Container::Gguf | Container::Safetensors => {}
    }
    let files = part_files(part, inputs)?;
    let mut read = ReadPart::default();
    for source in files {
        let (file, identity) = open(&source.path)?;
        let source = SourceFile {
            path: source.path,
            identity,
        };
        match part.container {
            Container::Gguf => read_gguf(&mut read, &file, &source)?,
            _ => read_safetensors(&mut read, &file, &source)?,
        }
        if let Some(input) = inputs.iter_mut().find(|input| input.path == source.path) {
            input.identity = source.identity;
        }
        read.files.push(source);
    }
    let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
    for tensor in &read.tensors {
        let sum = sums.entry(tensor.dtype).or_default();
        *sum = sum.saturating_add(tensor.range.end - tensor.range.start);
    }
    let mut dtypes: Vec<(Arc<str>, Bytes)> = sums
        .into_iter()
        .map(|(dtype, bytes)| (dtype.into(), Bytes(bytes)))
        .collect();
    dtypes.sort_by(|a, b| (b.1, &a.0).cmp(&(a.1, &b.0)));
    if part.container == Container::Gguf {
        let plain = ["F32", "F16", "BF16", "F64"];
        read.quantization = dtypes
            .first()
            .filter(|(dtype, _)| !plain.contains(&&**dtype))
            .map(|(dtype, _)| dtype.to_lowercase().into());
    }
    read.dtypes = dtypes;
    if part.is_sharded() {
        duplicate_across_shards(&read.tensors)?;
    }
    Ok(read)
}

fn read_safetensors(read: &mut ReadPart, file: &File, source: &SourceFile) -> Result<(), Reason> {
    let header = safetensors::read_header(file, source.identity.size.get())
        .map_err(|error| located(&source.path, &error))?;
    let index = u32::try_from(read.files.len()).unwrap_or(u32::MAX);
    let mut shape = Vec::new();
    for tensor in header.tensors {
        shape.clear();
        shape.extend(tensor.shape.iter().map(|&dim| dim as u64));
        let range = FileRange {
            file: index,
            start: header.data_start + tensor.start,
            end: header.data_start + tensor.end,
        };
        read.add(tensor.name, dtype_name(tensor.dtype), &shape, range);
    }
    for (key, value) in header.metadata {
        read.metadata.entry(key).or_insert(value);
    }
    Ok(())
}

fn read_gguf(read: &mut ReadPart, file: &File, source: &SourceFile) -> Result<(), Reason> {
    let header = gguf::read_header(file, source.identity.size.get())
        .map_err(|error| located(&source.path, &error))?;
    let index = u32::try_from(read.files.len()).unwrap_or(u32::MAX);
    for tensor in header.tensors {
        let range = FileRange {
            file: index,
            start: header.data_start + tensor.start,
            end: header.data_start + tensor.end,
        };
        read.add(tensor.name, tensor.dtype, &tensor.shape, range);
    }
    for (key, value) in header.metadata {
        read.metadata.entry(key).or_insert(value);
    }
    Ok(())
}

fn duplicate_across_shards(tensors: &[Place]) -> Result<(), Reason> {
    let mut names = std::collections::HashSet::with_capacity(tensors.len());
    match tensors.iter().find(|t| !names.insert(&*t.name)) {
        Some(twice) => Err(format!(
            "tensor `{}` is in two shards, so it is unclear which one counts; fetch the model again",
            twice.name
        )),
        None => Ok(()),
    }
}

/// The files of a set, in order: what the index names, else what their numbers promise.
fn part_files(part: &Part, inputs: &mut Vec<SourceFile>) -> Result<Vec<SourceFile>, Reason> {
    let Some(index) = &part.index else {
        let expected = part.expected as usize;
        if expected > part.files.len() {
            return Err(format!(
                "{} of {expected} shards of `{}` are there; fetch the missing ones",
                part.files.len(),
                part.stem
            ));
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
            format!(
                "{} names the shard {}, which cannot be found ({error}); fetch it again",
                index.path.display(),
                path.display()
            )
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
        .map_err(|error| located(path, &format!("cannot be opened: {error}")))?;
    let metadata = file
        .metadata()
        .map_err(|error| located(path, &format!("cannot be examined: {error}")))?;
    if !metadata.is_file() {
        return Err(located(path, &"is no longer a file"));
    }
    Ok((file, identity_of(&metadata)))
}

fn located(path: &Path, error: &dyn std::fmt::Display) -> Reason {
    let name = path.file_name().unwrap_or(path.as_os_str());
    format!("{}: {error}", Path::new(name).display())
}

/// The name of a dtype in a header.
pub(super) fn dtype_name(dtype: crate::tensor::Dtype) -> &'static str {
    use crate::tensor::Dtype;
    match dtype {
        Dtype::BOOL => "BOOL",
        Dtype::F4 => "F4",
        Dtype::F6_E2M3 => "F6_E2M3",
        Dtype::F6_E3M2 => "F6_E3M2",
        Dtype::U8 => "U8",
        Dtype::I8 => "I8",
        Dtype::F8_E5M2 => "F8_E5M2",
        Dtype::F8_E4M3 => "F8_E4M3",
        Dtype::F8_E8M0 => "F8_E8M0",
        Dtype::F8_E4M3FNUZ => "F8_E4M3FNUZ",
        Dtype::F8_E5M2FNUZ => "F8_E5M2FNUZ",
        Dtype::I16 => "I16",
        Dtype::U16 => "U16",
        Dtype::F16 => "F16",
        Dtype::BF16 => "BF16",
        Dtype::I32 => "I32",
        Dtype::U32 => "U32",
        Dtype::F32 => "F32",
        Dtype::C64 => "C64",
        Dtype::F64 => "F64",
        Dtype::I64 => "I64",
        Dtype::U64 => "U64",
        _ => "other",
    }
}
