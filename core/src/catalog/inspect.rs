//! Reading what a unit's files say: headers and configurations, once each. The result is a catalogue entry, whatever
//! the files hold: what cannot be used becomes an entry with its error.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::config_json::{self, MAX_CONFIG_BYTES};
use super::identify::{self, Clues, Identity};
use super::layout::{self, Part, PipelinePart, Shape, Unit};
use super::model::{
    Component, Facts, FileIdentity, FileRange, Format, Kind, Model, Presence, Selection, SourceFile,
};
use super::safetensors::{self, Header, HeaderTensor};
use super::walk::identity_of;
use super::weights::Container;
use crate::ids::{ComponentId, ContentId, ModelName};
use crate::units::Bytes;

/// Why an entry cannot be loaded. Only its text is kept.
type Reason = String;

/// Makes the catalogue entry of a unit.
pub(super) fn inspect(unit: &Unit, name: ModelName) -> Model {
    let mut model = Model {
        name,
        path: unit.path.clone(),
        format: format_of(unit),
        kind: Kind::Unknown,
        architecture: None,
        bytes: Bytes::ZERO,
        components: Vec::new(),
        base: None,
        error: None,
        facts: Facts::default(),
        inputs: unit.inputs().into_iter().cloned().collect(),
        presence: Presence::Present,
    };
    let filled = match &unit.shape {
        Shape::Weights(part) => weights(&mut model, part, None),
        Shape::Folder { config, part, .. } => folder(&mut model, config, part),
        Shape::Pipeline {
            class,
            parts,
            error,
            ..
        } => match error {
            Some(error) => Err(error.clone()),
            None => pipeline(&mut model, class.as_deref(), parts),
        },
    };
    if let Err(reason) = filled {
        model.components.clear();
        model.error = Some(reason.into());
    }
    if model.bytes.is_zero() {
        model.bytes = match model.components.is_empty() {
            true => model.inputs.iter().map(|file| file.identity.size).sum(),
            false => model.components.iter().map(|c| c.bytes).sum(),
        };
    }
    model
}

fn format_of(unit: &Unit) -> Format {
    match &unit.shape {
        Shape::Pipeline { .. } => Format::Diffusers,
        Shape::Folder { adapter: true, .. } => Format::Peft,
        Shape::Folder { .. } => Format::Transformers,
        Shape::Weights(part) => match part.container {
            Container::Safetensors if part.is_sharded() => Format::SafetensorsSharded,
            Container::Safetensors => Format::Safetensors,
            Container::Gguf => Format::Gguf,
            Container::Pickle => Format::Pickle,
            Container::Onnx => Format::Onnx,
        },
    }
}

fn folder(model: &mut Model, config: &SourceFile, part: &Part) -> Result<(), Reason> {
    let config = config_json::read(&config.path, MAX_CONFIG_BYTES).map_err(|e| e.to_string())?;
    weights(model, part, Some(&config))
}

/// An entry with one set of weights.
fn weights(model: &mut Model, part: &Part, config: Option<&Value>) -> Result<(), Reason> {
    if let Some(config) = config {
        // What the configuration tells stands even where the weights cannot be used.
        let told = identify::identify(&Clues {
            config: Some(config),
            ..Clues::default()
        });
        model.kind = told.kind;
        model.architecture = told.architecture;
        model.base = told.base;
    }
    let read = read_part(part, &mut model.inputs)?;
    let identity = identify::identify(&Clues {
        config,
        class: None,
        metadata: Some(&read.metadata),
        tensors: &read.tensors,
    });
    let component = match identity.kind {
        Kind::Unknown => "weights",
        kind => kind.as_str(),
    };
    model.kind = identity.kind;
    model.architecture = identity.architecture.clone();
    model.base = identity.base.clone();
    model.facts = read.facts();
    let component = read.component(&model.name, component, &identity);
    model.bytes = component.bytes;
    model.components.push(Arc::new(component));
    Ok(())
}

fn pipeline(model: &mut Model, class: Option<&str>, parts: &[PipelinePart]) -> Result<(), Reason> {
    model.kind = Kind::Pipeline;
    model.architecture = class.and_then(identify::architecture_named).map(Arc::from);
    let mut facts = Facts::default();
    for part in parts {
        let Some(weights) = &part.part else {
            return Err(format!(
                "component `{}` ({}) has no weights in {}; fetch the model again",
                part.name,
                part.class,
                model.path.join(&*part.name).display()
            ));
        };
        let config = match &part.config {
            Some(file) => {
                Some(config_json::read(&file.path, MAX_CONFIG_BYTES).map_err(|e| e.to_string())?)
            }
            None => None,
        };
        let read = read_part(weights, &mut model.inputs)
            .map_err(|reason| format!("component `{}`: {reason}", part.name))?;
        let mut identity = identify::identify(&Clues {
            config: config.as_ref(),
            class: Some(&part.class),
            metadata: Some(&read.metadata),
            tensors: &read.tensors,
        });
        if identity.kind == Kind::LanguageModel && part.name.starts_with("text_encoder") {
            identity.kind = Kind::TextEncoder;
        }
        let of_part = read.facts();
        facts.parameters = facts
            .parameters
            .unwrap_or(0)
            .checked_add(of_part.parameters.unwrap_or(0));
        merge_dtypes(&mut facts.dtypes, &of_part.dtypes);
        let component = read.component(&model.name, &part.name, &identity);
        model.components.push(Arc::new(component));
    }
    if model.components.is_empty() {
        return Err(format!(
            "none of the components that {} names has weights; fetch the model again",
            model.path.join("model_index.json").display()
        ));
    }
    model.facts = facts;
    Ok(())
}

fn merge_dtypes(into: &mut Vec<(Arc<str>, Bytes)>, more: &[(Arc<str>, Bytes)]) {
    for (dtype, bytes) in more {
        match into.iter_mut().find(|(known, _)| known == dtype) {
            Some((_, sum)) => *sum = sum.saturating_add(*bytes),
            None => into.push((dtype.clone(), *bytes)),
        }
    }
    into.sort_by(|a, b| (b.1, &a.0).cmp(&(a.1, &b.0)));
}

/// What the files of one set of weights hold.
struct ReadPart {
    files: Vec<SourceFile>,
    tensors: Vec<HeaderTensor>,
    /// For each tensor its file and where its bytes lie in it.
    places: Vec<FileRange>,
    metadata: BTreeMap<String, String>,
    dtypes: Vec<(Arc<str>, Bytes)>,
    bytes: Bytes,
    parameters: u64,
}

impl ReadPart {
    fn facts(&self) -> Facts {
        Facts {
            parameters: Some(self.parameters),
            dtypes: self.dtypes.clone(),
            ..Facts::default()
        }
    }

    /// All of it as one component.
    fn component(&self, model: &ModelName, name: &str, identity: &Identity) -> Component {
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
}

/// The digest over the identities of files, and over the ranges of them that count: equal for links to one file.
pub(super) fn content_id(files: &[SourceFile], selection: Option<&Selection>) -> ContentId {
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
fn read_part(part: &Part, inputs: &mut Vec<SourceFile>) -> Result<ReadPart, Reason> {
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
        Container::Gguf => return Err("GGUF files cannot be read yet".to_owned()),
        Container::Safetensors => {}
    }
    let files = part_files(part, inputs)?;
    let mut read = ReadPart {
        files: Vec::with_capacity(files.len()),
        tensors: Vec::new(),
        places: Vec::new(),
        metadata: BTreeMap::new(),
        dtypes: Vec::new(),
        bytes: Bytes::ZERO,
        parameters: 0,
    };
    let mut dtypes: BTreeMap<&'static str, u64> = BTreeMap::new();
    for source in files {
        let (source, header) = read_file(&source)?;
        let index = u32::try_from(read.files.len()).unwrap_or(u32::MAX);
        let Header {
            tensors,
            metadata,
            data_start,
        } = header;
        for tensor in &tensors {
            *dtypes.entry(dtype_name(tensor.dtype)).or_default() += tensor.bytes();
            read.bytes = read.bytes.saturating_add(Bytes(tensor.bytes()));
            let elements = tensor
                .shape
                .iter()
                .fold(1_u64, |n, &d| n.saturating_mul(d as u64));
            read.parameters = read.parameters.saturating_add(elements);
            read.places.push(FileRange {
                file: index,
                start: data_start + tensor.start,
                end: data_start + tensor.end,
            });
        }
        read.tensors.extend(tensors);
        for (key, value) in metadata {
            read.metadata.entry(key).or_insert(value);
        }
        if let Some(input) = inputs.iter_mut().find(|input| input.path == source.path) {
            input.identity = source.identity;
        }
        read.files.push(source);
    }
    let mut sorted: Vec<(Arc<str>, Bytes)> = dtypes
        .into_iter()
        .map(|(dtype, bytes)| (dtype.into(), Bytes(bytes)))
        .collect();
    sorted.sort_by(|a, b| (b.1, &a.0).cmp(&(a.1, &b.0)));
    read.dtypes = sorted;
    if part.is_sharded() {
        duplicate_across_shards(&read.tensors)?;
    }
    Ok(read)
}

fn duplicate_across_shards(tensors: &[HeaderTensor]) -> Result<(), Reason> {
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

/// Opens a weight file and reads its header. The identity is that of the file that was read, should it have changed
/// since it was listed.
fn read_file(source: &SourceFile) -> Result<(SourceFile, Header), Reason> {
    let (file, identity) = open(&source.path)?;
    let header = safetensors::read_header(&file, identity.size.get())
        .map_err(|error| located(&source.path, &error))?;
    let source = SourceFile {
        path: source.path.clone(),
        identity,
    };
    Ok((source, header))
}

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
