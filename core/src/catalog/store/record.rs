//! A catalogue entry as the bytes of a database record.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::RECORD_VERSION;
use crate::catalog::model::{
    BaseModel, Component, Evidence, Facts, FileIdentity, FileRange, Format, Kind, Model, Presence,
    Selection, SourceFile, Tokenizer,
};
use crate::ids::{ComponentId, ContentId, ModelName};
use crate::units::Bytes;

/// Texts that many entries share, held once.
#[derive(Debug, Default)]
pub(super) struct Interner(HashSet<Arc<str>>);

impl Interner {
    fn get(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.0.get(text) {
            return known.clone();
        }
        let text: Arc<str> = text.into();
        self.0.insert(text.clone());
        text
    }

    fn maybe(&mut self, text: Option<&str>) -> Option<Arc<str>> {
        text.map(|text| self.get(text))
    }
}

#[derive(Serialize, Deserialize)]
struct Record<'a> {
    version: i64,
    #[serde(borrow)]
    name: &'a str,
    path: &'a [u8],
    format: Format,
    kind: Kind,
    architecture: Option<&'a str>,
    bytes: u64,
    components: Vec<ComponentRecord<'a>>,
    base: Option<(Option<&'a str>, Option<&'a str>)>,
    error: Option<&'a str>,
    presence: Presence,
    facts: FactsRecord<'a>,
    inputs: Vec<FileRecord<'a>>,
}

#[derive(Serialize, Deserialize)]
struct FileRecord<'a> {
    #[serde(borrow)]
    path: &'a [u8],
    identity: [u64; 4],
}

/// Prefixes, and ranges as file, start and end.
type SelectionRecord<'a> = (Vec<&'a str>, Vec<(u32, u64, u64)>);

#[derive(Serialize, Deserialize)]
struct ComponentRecord<'a> {
    #[serde(borrow)]
    name: &'a str,
    kind: Kind,
    architecture: Option<&'a str>,
    dtype: Option<&'a str>,
    bytes: u64,
    tensors: u32,
    content: (u8, [u8; 32]),
    files: Vec<FileRecord<'a>>,
    selection: Option<SelectionRecord<'a>>,
}

#[derive(Serialize, Deserialize)]
struct FactsRecord<'a> {
    #[serde(borrow)]
    texts: [Option<&'a str>; 5],
    parameters: Option<u64>,
    rank: Option<u32>,
    tokenizer: Option<(u32, Option<u32>)>,
    dtypes: Vec<(&'a str, u64)>,
    evidence: Vec<(&'a str, &'a str, u8, &'a str)>,
}

/// The bytes of a record; `None` where there is no memory for them.
pub(super) fn encode(model: &Model) -> Option<Vec<u8>> {
    let facts = &model.facts;
    let record = Record {
        version: RECORD_VERSION,
        name: model.name.as_str(),
        path: model.path.as_os_str().as_bytes(),
        format: model.format,
        kind: model.kind,
        architecture: model.architecture.as_deref(),
        bytes: model.bytes.get(),
        components: model
            .components
            .iter()
            .map(|c| component_record(c))
            .collect(),
        base: model
            .base
            .as_ref()
            .map(|base| (base.architecture.as_deref(), base.name.as_deref())),
        error: model.error.as_deref(),
        presence: model.presence,
        facts: FactsRecord {
            texts: [
                facts.variant.as_deref(),
                facts.quantization.as_deref(),
                facts.dialect.as_deref(),
                facts.repo.as_deref(),
                facts.revision.as_deref(),
            ],
            parameters: facts.parameters,
            rank: facts.rank,
            tokenizer: facts.tokenizer.map(|t| (t.tokens, t.begin)),
            dtypes: facts.dtypes.iter().map(|(d, b)| (&**d, b.get())).collect(),
            evidence: facts
                .evidence
                .iter()
                .map(|e| (&*e.source, &*e.says, e.score, &*e.reason))
                .collect(),
        },
        inputs: model.inputs.iter().map(file_record).collect(),
    };
    postcard::to_allocvec(&record).ok()
}

fn file_record(file: &SourceFile) -> FileRecord<'_> {
    let identity = &file.identity;
    FileRecord {
        path: file.path.as_os_str().as_bytes(),
        identity: [
            identity.device,
            identity.inode,
            identity.size.get(),
            identity.mtime_ns.cast_unsigned(),
        ],
    }
}

fn component_record(component: &Component) -> ComponentRecord<'_> {
    ComponentRecord {
        name: &component.id.component,
        kind: component.kind,
        architecture: component.architecture.as_deref(),
        dtype: component.dtype.as_deref(),
        bytes: component.bytes.get(),
        tensors: component.tensors,
        content: match component.content_id {
            ContentId::Blake3(digest) => (0, digest),
            ContentId::Sha256(digest) => (1, digest),
            ContentId::File(digest) => (2, digest),
        },
        files: component.files.iter().map(file_record).collect(),
        selection: component.selection.as_ref().map(|selection| {
            (
                selection.prefixes.iter().map(|p| &**p).collect(),
                selection
                    .ranges
                    .iter()
                    .map(|r| (r.file, r.start, r.end))
                    .collect(),
            )
        }),
    }
}

/// The entry of a record; `None` where the bytes are damaged or of another version.
pub(super) fn decode(bytes: &[u8], interner: &mut Interner) -> Option<Model> {
    let (version, _) = postcard::take_from_bytes::<i64>(bytes).ok()?;
    if version != RECORD_VERSION {
        return None;
    }
    let record: Record<'_> = postcard::from_bytes(bytes).ok()?;
    let name = ModelName::from(record.name);
    let inputs: Vec<SourceFile> = record.inputs.iter().map(|f| file(f, &[])).collect();
    // Most entries are one file, whose path is said three times.
    let path = match inputs.iter().find(|f| bytes_of(&f.path) == record.path) {
        Some(file) => file.path.clone(),
        None => path(record.path),
    };
    let components = record
        .components
        .into_iter()
        .map(|c| component(c, &name, &inputs, interner).map(Arc::new))
        .collect::<Option<Vec<_>>>()?;
    let [variant, quantization, dialect, repo, revision] =
        record.facts.texts.map(|text| interner.maybe(text));
    Some(Model {
        path,
        format: record.format,
        kind: record.kind,
        architecture: interner.maybe(record.architecture),
        bytes: Bytes(record.bytes),
        components,
        base: record.base.map(|(architecture, name)| BaseModel {
            architecture: interner.maybe(architecture),
            name: interner.maybe(name),
        }),
        error: interner.maybe(record.error),
        facts: Facts {
            variant,
            quantization,
            dialect,
            repo,
            revision,
            parameters: record.facts.parameters,
            rank: record.facts.rank,
            tokenizer: record
                .facts
                .tokenizer
                .map(|(tokens, begin)| Tokenizer { tokens, begin }),
            dtypes: record
                .facts
                .dtypes
                .iter()
                .map(|(dtype, bytes)| (interner.get(dtype), Bytes(*bytes)))
                .collect(),
            evidence: record
                .facts
                .evidence
                .iter()
                .map(|(source, says, score, reason)| Evidence {
                    source: interner.get(source),
                    says: interner.get(says),
                    score: *score,
                    reason: interner.get(reason),
                })
                .collect(),
        },
        inputs,
        presence: record.presence,
        name,
    })
}

fn bytes_of(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

fn path(bytes: &[u8]) -> Arc<Path> {
    Path::new(OsStr::from_bytes(bytes)).into()
}

/// A file; its path is shared with the known one of the same path.
fn file(record: &FileRecord<'_>, known: &[SourceFile]) -> SourceFile {
    let [device, inode, size, mtime] = record.identity;
    let shared = known.iter().find(|f| bytes_of(&f.path) == record.path);
    SourceFile {
        path: shared.map_or_else(|| path(record.path), |f| f.path.clone()),
        identity: FileIdentity {
            device,
            inode,
            size: Bytes(size),
            mtime_ns: mtime.cast_signed(),
        },
    }
}

fn component(
    record: ComponentRecord<'_>,
    model: &ModelName,
    inputs: &[SourceFile],
    interner: &mut Interner,
) -> Option<Component> {
    let (scheme, digest) = record.content;
    let content_id = match scheme {
        0 => ContentId::Blake3(digest),
        1 => ContentId::Sha256(digest),
        2 => ContentId::File(digest),
        _ => return None,
    };
    let selection = record.selection.map(|(prefixes, ranges)| {
        Arc::new(Selection {
            prefixes: prefixes.iter().map(|p| interner.get(p)).collect(),
            ranges: ranges
                .iter()
                .map(|&(file, start, end)| FileRange { file, start, end })
                .collect(),
        })
    });
    Some(Component {
        id: ComponentId {
            model: model.clone(),
            component: interner.get(record.name),
        },
        kind: record.kind,
        architecture: interner.maybe(record.architecture),
        dtype: interner.maybe(record.dtype),
        bytes: Bytes(record.bytes),
        tensors: record.tensors,
        content_id,
        files: record.files.iter().map(|f| file(f, inputs)).collect(),
        selection,
        part: None,
    })
}
