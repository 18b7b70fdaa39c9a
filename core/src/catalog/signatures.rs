//! What is known of model files, as data: read from TOML, compiled into patterns.
//!
//! hotset's own knowledge is `core/signatures/builtin.toml`; users add files of the same form, whose signatures come
//! before the built-in ones of the same id.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use serde::Deserialize;

use super::model::Kind;

const BUILTIN: &str = include_str!("../../signatures/builtin.toml");

/// The longest signature file that is read.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// A signature file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SignatureError {
    /// It cannot be read.
    #[error("signature file {} cannot be read: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// It is too long.
    #[error("signature file {} is longer than {MAX_FILE_BYTES} bytes", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// It is not what a signature file is.
    #[error("signature file {} is wrong: {message}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What and where.
        message: String,
    },
}

/// All signatures, ready to match.
#[derive(Debug, Default)]
pub struct Signatures {
    pub(super) rules: Vec<Rule>,
    pub(super) components: Vec<ComponentRule>,
    pub(super) ranks: Vec<RankRule>,
    /// The names of all metadata that a rule looks at.
    pub(super) metadata_keys: BTreeSet<String>,
}

/// One signature.
#[derive(Debug)]
pub(super) struct Rule {
    pub(super) id: Arc<str>,
    pub(super) reason: Arc<str>,
    /// Kind, architecture and so on, in words.
    pub(super) says: Arc<str>,
    pub(super) score: u8,
    pub(super) kind: Option<Kind>,
    pub(super) architecture: Option<Arc<str>>,
    pub(super) variant: Option<Arc<str>>,
    pub(super) quantization: Option<Arc<str>>,
    pub(super) dialect: Option<Arc<str>>,
    pub(super) max_tensors: Option<usize>,
    /// What stands before the keys; one of these.
    pub(super) under: Vec<String>,
    pub(super) all: Vec<Vec<Pattern>>,
    pub(super) none: Vec<Pattern>,
    pub(super) shapes: Vec<(Pattern, Dims)>,
    pub(super) any_shape: Vec<(Pattern, Dims)>,
    pub(super) not_shapes: Vec<(Pattern, Dims)>,
    pub(super) dtypes: Vec<String>,
    pub(super) metadata: Vec<(String, Vec<Pattern>)>,
    pub(super) metadata_any: Vec<(String, Vec<Pattern>)>,
    pub(super) config: Vec<(String, Vec<Pattern>)>,
}

/// Dimensions; `None` stands for any.
pub(super) type Dims = Vec<Option<u64>>;

/// A component inside a single-file checkpoint.
#[derive(Debug)]
pub(super) struct ComponentRule {
    pub(super) name: Arc<str>,
    pub(super) kind: Kind,
    pub(super) prefixes: Vec<Arc<str>>,
}

/// Where a LoRA's rank is read.
#[derive(Debug)]
pub(super) struct RankRule {
    pub(super) key: Pattern,
    pub(super) dimension: usize,
}

/// A text with `*` for anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Pattern {
    Exact(String),
    /// The parts between the stars; the first and last are anchored.
    Glob(Vec<String>),
}

impl Pattern {
    fn new(text: &str) -> Self {
        if text.contains('*') {
            Self::Glob(text.split('*').map(str::to_owned).collect())
        } else {
            Self::Exact(text.to_owned())
        }
    }

    /// What every text that matches begins with.
    pub(super) fn start(&self) -> &str {
        match self {
            Self::Exact(text) => text,
            Self::Glob(parts) => parts.first().map_or("", String::as_str),
        }
    }

    /// The longest text that everything that matches has in it; `None` where a look-up is as quick as a search.
    pub(super) fn longest_part(&self) -> Option<&str> {
        match self {
            Self::Exact(_) => None,
            Self::Glob(parts) => parts.iter().map(String::as_str).max_by_key(|p| p.len()),
        }
    }

    pub(super) fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => exact == text,
            Self::Glob(parts) => {
                let [first, middle @ .., last] = parts.as_slice() else {
                    return false;
                };
                let Some(mut rest) = text.strip_prefix(first.as_str()) else {
                    return false;
                };
                for part in middle {
                    match rest.find(part.as_str()) {
                        Some(at) => rest = &rest[at + part.len()..],
                        None => return false,
                    }
                }
                rest.ends_with(last.as_str())
            }
        }
    }
}

/// Replaces each number that stands alone between dots, underscores and the like by `#`, so that a key stands for its
/// likes in all blocks. Digits in a word, as in `attn2`, tell parts of one block apart and stay.
pub(super) fn normalise(key: &str, into: &mut String) {
    into.clear();
    let bytes = key.as_bytes();
    let mut copied = 0;
    let mut at = 0;
    while at < bytes.len() {
        let start = at;
        while at < bytes.len() && bytes[at].is_ascii_alphanumeric() {
            at += 1;
        }
        if at > start && bytes[start..at].iter().all(u8::is_ascii_digit) {
            into.push_str(&key[copied..start]);
            into.push('#');
            copied = at;
        }
        at += 1;
    }
    into.push_str(&key[copied..]);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    under: BTreeMap<String, Vec<String>>,
    #[serde(default)]
    signature: Vec<RawRule>,
    #[serde(default)]
    component: Vec<RawComponent>,
    #[serde(default)]
    rank: Vec<RawRank>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRule {
    id: String,
    reason: String,
    score: u8,
    kind: Option<Kind>,
    architecture: Option<String>,
    variant: Option<String>,
    quantization: Option<String>,
    dialect: Option<String>,
    max_tensors: Option<usize>,
    under: Option<String>,
    #[serde(default)]
    all: Vec<String>,
    #[serde(default)]
    none: Vec<String>,
    #[serde(default)]
    shapes: BTreeMap<String, Vec<RawDim>>,
    #[serde(default)]
    any_shape: BTreeMap<String, Vec<RawDim>>,
    #[serde(default)]
    not_shapes: BTreeMap<String, Vec<Vec<RawDim>>>,
    #[serde(default)]
    dtypes: Vec<String>,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    #[serde(default)]
    metadata_any: BTreeMap<String, String>,
    #[serde(default)]
    config: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawDim {
    Number(u64),
    Any(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawComponent {
    name: String,
    kind: Kind,
    prefixes: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRank {
    key: String,
    /// Negative: the rank is not read there, though such files are LoRAs.
    dimension: i32,
}

impl Signatures {
    /// hotset's own knowledge.
    #[must_use]
    pub fn builtin() -> Arc<Self> {
        static BUILTIN_SIGNATURES: LazyLock<Arc<Signatures>> = LazyLock::new(|| {
            let mut signatures = Signatures::default();
            if let Err(message) = signatures.add(BUILTIN) {
                // A test reads the file, so this says something of the build alone.
                tracing::error!(%message, "the built-in signatures are wrong; nothing is identified");
            }
            Arc::new(signatures)
        });
        BUILTIN_SIGNATURES.clone()
    }

    /// The built-in knowledge and what these files add to it. A signature replaces another of the same id.
    ///
    /// # Errors
    /// The first file that cannot be read or is wrong.
    pub fn with_files(files: &[PathBuf]) -> Result<Arc<Self>, SignatureError> {
        if files.is_empty() {
            return Ok(Self::builtin());
        }
        let mut signatures = Self::default();
        let invalid = |path: &Path, message| SignatureError::Invalid {
            path: path.to_path_buf(),
            message,
        };
        signatures
            .add(BUILTIN)
            .map_err(|message| invalid(Path::new("builtin.toml"), message))?;
        for path in files {
            let io = |source| SignatureError::Io {
                path: path.clone(),
                source,
            };
            if std::fs::metadata(path).map_err(io)?.len() > MAX_FILE_BYTES {
                return Err(SignatureError::TooLong { path: path.clone() });
            }
            let text = std::fs::read_to_string(path).map_err(io)?;
            signatures
                .add(&text)
                .map_err(|message| invalid(path, message))?;
        }
        Ok(Arc::new(signatures))
    }

    fn add(&mut self, text: &str) -> Result<(), String> {
        let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
        for raw in file.signature {
            let rule = compile(raw, &file.under)?;
            let looked_at = rule.metadata.iter().chain(&rule.metadata_any);
            self.metadata_keys
                .extend(looked_at.map(|(key, _)| key.clone()));
            // A `$key` in a rule is answered by what the metadata say under that key.
            let answered = [
                &rule.architecture,
                &rule.variant,
                &rule.quantization,
                &rule.dialect,
            ];
            let keys = answered
                .into_iter()
                .flatten()
                .filter_map(|text| text.strip_prefix('$'));
            self.metadata_keys.extend(keys.map(str::to_owned));
            match self.rules.iter_mut().find(|known| known.id == rule.id) {
                Some(known) => *known = rule,
                None => self.rules.push(rule),
            }
        }
        for raw in file.component {
            self.components.push(ComponentRule {
                name: raw.name.into(),
                kind: raw.kind,
                prefixes: raw.prefixes.into_iter().map(Arc::from).collect(),
            });
        }
        for raw in file.rank {
            if let Ok(dimension) = usize::try_from(raw.dimension) {
                self.ranks.push(RankRule {
                    key: key_pattern(&raw.key),
                    dimension,
                });
            }
        }
        Ok(())
    }
}

fn key_pattern(text: &str) -> Pattern {
    let mut normal = String::new();
    normalise(text, &mut normal);
    Pattern::new(&normal)
}

fn key_patterns(text: &str) -> Vec<Pattern> {
    text.split('|').map(key_pattern).collect()
}

fn compile(raw: RawRule, under: &BTreeMap<String, Vec<String>>) -> Result<Rule, String> {
    let id = raw.id;
    let dims = |dims: Vec<RawDim>| -> Result<Dims, String> {
        dims.into_iter()
            .map(|dim| match dim {
                RawDim::Number(n) => Ok(Some(n)),
                RawDim::Any(any) if any == "*" => Ok(None),
                RawDim::Any(other) => Err(format!(
                    "signature `{id}`: a dimension is a number or \"*\", not `{other}`"
                )),
            })
            .collect()
    };
    let shapes = |shapes: BTreeMap<String, Vec<RawDim>>| -> Result<Vec<(Pattern, Dims)>, String> {
        shapes
            .into_iter()
            .map(|(key, of)| Ok((key_pattern(&key), dims(of)?)))
            .collect()
    };
    let mut not_shapes = Vec::new();
    for (key, all) in raw.not_shapes {
        for of in all {
            not_shapes.push((key_pattern(&key), dims(of)?));
        }
    }
    let prefixes = match &raw.under {
        None => vec![String::new()],
        Some(name) => under
            .get(name)
            .ok_or_else(|| format!("signature `{id}`: there is no [under] `{name}` in this file"))?
            .iter()
            .map(|prefix| {
                let mut normal = String::new();
                normalise(prefix, &mut normal);
                normal
            })
            .collect(),
    };
    let values = |fields: BTreeMap<String, String>| -> Vec<(String, Vec<Pattern>)> {
        fields
            .into_iter()
            .map(|(key, text)| (key, text.split('|').map(Pattern::new).collect()))
            .collect()
    };
    let said: Vec<&str> = [
        raw.kind.map(Kind::as_str),
        raw.architecture.as_deref(),
        raw.variant.as_deref(),
        raw.dialect.as_deref(),
        raw.quantization.as_deref(),
    ]
    .into_iter()
    .flatten()
    .collect();
    let rule = Rule {
        says: said.join(" ").into(),
        shapes: shapes(raw.shapes)?,
        any_shape: shapes(raw.any_shape)?,
        not_shapes,
        under: prefixes,
        reason: raw.reason.into(),
        score: raw.score.min(100),
        kind: raw.kind,
        architecture: raw.architecture.map(Arc::from),
        variant: raw.variant.map(Arc::from),
        quantization: raw.quantization.map(Arc::from),
        dialect: raw.dialect.map(Arc::from),
        max_tensors: raw.max_tensors,
        all: raw.all.iter().map(|text| key_patterns(text)).collect(),
        none: raw
            .none
            .iter()
            .flat_map(|text| key_patterns(text))
            .collect(),
        dtypes: raw.dtypes,
        metadata: values(raw.metadata),
        metadata_any: values(raw.metadata_any),
        config: values(raw.config),
        id: id.as_str().into(),
    };
    let says_something = rule.all.len()
        + rule.shapes.len()
        + rule.any_shape.len()
        + rule.dtypes.len()
        + rule.metadata.len()
        + rule.metadata_any.len()
        + rule.config.len();
    if says_something == 0 {
        return Err(format!(
            "signature `{id}` has no condition, so it would match everything"
        ));
    }
    Ok(rule)
}
