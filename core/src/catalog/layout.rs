//! Which files make one entry: layouts of folders, as far as names and indexes tell.

use std::collections::{HashMap, HashSet};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component as PathPart, Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use serde_json::Value;

use super::config_json;
use super::hub;
use super::model::SourceFile;
use super::walk::Folder;
use super::weights::{self, Container, WeightSet};

/// Files that make one entry, before any of them has been read.
#[derive(Debug)]
pub(super) struct Unit {
    /// The file or folder that the entry is for.
    pub(super) path: Arc<Path>,
    /// Index of the root.
    pub(super) root: usize,
    pub(super) shape: Shape,
}

#[derive(Debug)]
pub(super) enum Shape {
    /// Weights that stand alone: one file, or a sharded set.
    Weights(Part),
    /// A folder with a `config.json` or `adapter_config.json` beside its weights.
    Folder {
        config: SourceFile,
        part: Part,
        adapter: bool,
    },
    /// A folder with a `model_index.json`.
    Pipeline {
        index: SourceFile,
        /// Its `_class_name`.
        class: Option<Arc<str>>,
        parts: Vec<PipelinePart>,
        /// Why the index cannot be used.
        error: Option<String>,
    },
}

/// A component of a pipeline, as its index names it.
#[derive(Debug)]
pub(super) struct PipelinePart {
    pub(super) name: Arc<str>,
    /// Its class, such as `CLIPTextModel`.
    pub(super) class: Arc<str>,
    pub(super) config: Option<SourceFile>,
    /// `None`: its folder holds no weights, though the class has some.
    pub(super) part: Option<Part>,
}

/// Weights that make one component.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// The folder that they lie in.
    pub(super) folder: Arc<Path>,
    pub(super) stem: String,
    pub(super) container: Container,
    pub(super) index: Option<SourceFile>,
    pub(super) files: Vec<SourceFile>,
    /// How many shards there should be by their names; 0 where they are not numbered.
    pub(super) expected: u32,
}

impl Part {
    fn new(folder: &Folder, set: WeightSet) -> Self {
        Self {
            folder: folder.path.clone(),
            container: set.container,
            index: set.index.as_ref().map(|file| folder.source(file)),
            files: set.files.iter().map(|file| folder.source(file)).collect(),
            expected: set.expected,
            stem: set.stem,
        }
    }

    pub(super) fn is_sharded(&self) -> bool {
        self.index.is_some() || self.expected > 0
    }

    fn inputs<'a>(&'a self, into: &mut Vec<&'a SourceFile>) {
        into.extend(&self.index);
        into.extend(&self.files);
    }
}

impl Unit {
    /// The files that the entry depends on, as far as names tell.
    pub(super) fn inputs(&self) -> Vec<&SourceFile> {
        let mut inputs = Vec::new();
        match &self.shape {
            Shape::Weights(part) => part.inputs(&mut inputs),
            Shape::Folder { config, part, .. } => {
                inputs.push(config);
                part.inputs(&mut inputs);
            }
            Shape::Pipeline { index, parts, .. } => {
                inputs.push(index);
                for part in parts {
                    inputs.extend(&part.config);
                    if let Some(part) = &part.part {
                        part.inputs(&mut inputs);
                    }
                }
            }
        }
        inputs
    }
}

/// Sees which files of these folders make one entry. Reads the indexes of pipelines and nothing else.
pub(super) fn units(folders: &[Folder]) -> Vec<Unit> {
    let by_path: HashMap<&Path, &Folder> = folders.iter().map(|f| (&*f.path, f)).collect();
    let mut units = Vec::new();
    let mut claimed: HashSet<&Path> = HashSet::new();
    // Parents come before what lies in them, so a pipeline claims its sub-folders in time.
    for folder in folders {
        if claimed.contains(&*folder.path) {
            continue;
        }
        let Some(index) = folder.file("model_index.json") else {
            continue;
        };
        let index = folder.source(index);
        let (class, members, error) = match pipeline_members(&index.path) {
            Ok((class, members)) => (class, members, None),
            Err(error) => (None, Vec::new(), Some(error)),
        };
        let mut parts = Vec::new();
        for (name, class) in members {
            let inner = by_path.get(&*folder.path.join(&*name)).copied();
            if let Some(inner) = inner {
                claimed.insert(&*inner.path);
            }
            let part = inner.and_then(|inner| {
                let (chosen, _) = weights::choose(weights::sets(inner), true);
                chosen.map(|set| Part::new(inner, set))
            });
            if part.is_none() && !has_weights(&class) {
                continue;
            }
            let config = inner.and_then(|f| f.file("config.json").map(|c| f.source(c)));
            parts.push(PipelinePart {
                name,
                class,
                config,
                part,
            });
        }
        units.push(Unit {
            path: folder.path.clone(),
            root: folder.root,
            shape: Shape::Pipeline {
                index,
                class,
                parts,
                error,
            },
        });
    }
    let others = folders
        .par_iter()
        .filter(|folder| !claimed.contains(&*folder.path))
        .flat_map_iter(|folder| {
            let mut found = Vec::new();
            folder_units(folder, &mut found);
            found
        });
    units.par_extend(others);
    units
}

fn folder_units(folder: &Folder, units: &mut Vec<Unit>) {
    let sets = weights::sets(folder);
    if sets.is_empty() {
        return;
    }
    let adapter = folder.file("adapter_config.json");
    let config = adapter.or_else(|| folder.file("config.json"));
    let (chosen, rest) = match config {
        Some(_) => weights::choose(sets, false),
        None => (None, sets),
    };
    if let (Some(config), Some(set)) = (config, chosen) {
        units.push(Unit {
            path: folder.path.clone(),
            root: folder.root,
            shape: Shape::Folder {
                config: folder.source(config),
                part: Part::new(folder, set),
                adapter: adapter.is_some(),
            },
        });
    }
    for set in rest {
        let part = Part::new(folder, set);
        let path = match (&part.index, part.files.first()) {
            (Some(index), _) => index.path.clone(),
            (None, Some(first)) => first.path.clone(),
            (None, None) => continue,
        };
        units.push(Unit {
            path,
            root: folder.root,
            shape: Shape::Weights(part),
        });
    }
}

/// A pipeline's class and its members as (name, class), in the order of first use.
type Members = (Option<Arc<str>>, Vec<(Arc<str>, Arc<str>)>);

fn pipeline_members(index: &Path) -> Result<Members, String> {
    let value = config_json::read(index, config_json::MAX_CONFIG_BYTES)
        .map_err(|error| error.to_string())?;
    let Value::Object(fields) = value else {
        return Err(format!(
            "{} holds no JSON object; fetch it again",
            index.display()
        ));
    };
    let class = fields
        .get("_class_name")
        .and_then(Value::as_str)
        .map(Arc::from);
    let mut members: Vec<(Arc<str>, Arc<str>)> = Vec::new();
    for (name, value) in &fields {
        let Some([_, Value::String(class)]) = value.as_array().map(Vec::as_slice) else {
            continue;
        };
        if !is_plain_name(name) {
            return Err(format!(
                "{} names the component `{name}`, which is no name of a folder beside it; do not trust this model",
                index.display()
            ));
        }
        members.push((name.as_str().into(), class.as_str().into()));
    }
    members.sort_by(|a, b| (order_of_use(&a.0), &a.0).cmp(&(order_of_use(&b.0), &b.0)));
    Ok((class, members))
}

/// Prompts are encoded first, then come the steps of diffusion, then decoding.
fn order_of_use(component: &str) -> u8 {
    let starts = |prefix: &str| component.starts_with(prefix);
    if starts("text_encoder") || starts("prompt") {
        0
    } else if starts("image_encoder") || starts("feature") || starts("vision") {
        1
    } else if starts("prior") {
        2
    } else if starts("controlnet") || starts("adapter") || starts("motion") {
        3
    } else if starts("unet") || starts("transformer") || starts("decoder") {
        4
    } else if starts("vae") || starts("vq") || starts("movq") {
        5
    } else {
        6
    }
}

/// Whether a class of this name has weights of its own. Schedulers, tokenizers and processors have none.
fn has_weights(class: &str) -> bool {
    let without = [
        "Scheduler",
        "Tokenizer",
        "TokenizerFast",
        "Processor",
        "FeatureExtractor",
        "ImageProcessor",
        "Guider",
    ];
    !without.iter().any(|end| class.ends_with(end)) && class.contains("Model")
}

/// Whether a name from an index is that of a file or folder directly beside it.
pub(super) fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!(
        (parts.next(), parts.next()),
        (Some(PathPart::Normal(only)), None) if only == name
    ) && !name.contains('\0')
}

/// The shards that an index names, in the order of their names, as paths below `folder`. Each must stay inside it.
pub(super) fn indexed_shards(index: &Path, folder: &Path) -> Result<Vec<PathBuf>, String> {
    let value = config_json::read(index, config_json::MAX_INDEX_BYTES)
        .map_err(|error| error.to_string())?;
    let map = value
        .get("weight_map")
        .and_then(Value::as_object)
        .filter(|map| !map.is_empty())
        .ok_or_else(|| {
            format!(
                "{} has no `weight_map`, so its shards are unknown; fetch it again",
                index.display()
            )
        })?;
    let mut names: Vec<&str> = Vec::new();
    for (tensor, shard) in map {
        let Some(shard) = shard.as_str() else {
            return Err(format!(
                "{} names no file for tensor `{tensor}`; fetch it again",
                index.display()
            ));
        };
        names.push(shard);
    }
    names.sort_unstable();
    names.dedup();
    if let Some(name) = names.iter().find(|name| !stays_inside(name)) {
        return Err(format!(
            "{} names the shard `{name}`, which lies outside the model's folder; do not trust this model",
            index.display()
        ));
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

fn stays_inside(name: &str) -> bool {
    let mut parts = Path::new(name).components().peekable();
    parts.peek().is_some()
        && parts.all(|part| matches!(part, PathPart::Normal(_)))
        && !name.as_bytes().contains(&0)
}

/// The path of an entry below its root, without the suffixes that its format adds.
pub(super) fn natural_name(unit: &Unit, root: &Path) -> String {
    let below = unit.path.strip_prefix(root).unwrap_or(&unit.path);
    if let Some(location) = hub::locate(&unit.path) {
        return in_repository(unit, &location);
    }
    let below = match &unit.shape {
        // A root may itself be a model.
        _ if below.as_os_str().is_empty() => Path::new(root.file_name().unwrap_or_default()),
        _ => below,
    };
    match &unit.shape {
        Shape::Weights(part) => {
            let folder = below.parent().unwrap_or(Path::new(""));
            lossy(&folder.join(stem_of(part)))
        }
        Shape::Folder { .. } | Shape::Pipeline { .. } => lossy(below),
    }
}

/// The name of an entry in a hub cache: that of the repository, and what follows inside its snapshot.
fn in_repository(unit: &Unit, location: &hub::Location) -> String {
    let mut name = PathBuf::from(&location.repo);
    match &unit.shape {
        Shape::Weights(part) => {
            name.extend(location.rest.parent());
            name.push(stem_of(part));
        }
        Shape::Folder { .. } | Shape::Pipeline { .. } => name.extend(&location.rest),
    }
    lossy(&name)
}

/// The last name of a weight set: the raw bytes of the file's name where it is a single file.
fn stem_of(part: &Part) -> PathBuf {
    match (part.is_sharded(), part.files.first()) {
        (false, Some(file)) => PathBuf::from(file.path.file_stem().unwrap_or_default()),
        _ => PathBuf::from(&part.stem),
    }
}

/// The path as text. What is not UTF-8 is replaced, and a digest of the raw bytes keeps the name unique and stable.
fn lossy(path: &Path) -> String {
    match path.to_str() {
        Some(text) => text.to_owned(),
        None => {
            let digest = blake3::hash(path.as_os_str().as_bytes()).to_hex();
            format!("{}~{}", path.to_string_lossy(), &digest[..8])
        }
    }
}
