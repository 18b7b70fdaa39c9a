//! File names of weights: shards, variants, and which of a folder's files to take.
//!
//! A folder often holds the same weights several times: as safetensors and as pickle, in full and as `fp16`, whole and in
//! shards. Exactly one set counts.

use std::os::unix::ffi::OsStrExt;

use super::walk::{Folder, FoundFile};

/// Stems that the libraries give to a model's weights, in the order in which they are preferred.
const CANONICAL_STEMS: [&str; 6] = [
    "diffusion_pytorch_model",
    "model",
    "adapter_model",
    "pytorch_model",
    "pytorch_lora_weights",
    "open_clip_model",
];

/// The container that a suffix promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Container {
    Safetensors,
    Gguf,
    Pickle,
    Onnx,
}

/// A weight file's name in its parts: `stem.variant-00001-of-00003.safetensors`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct WeightName {
    /// All before the shard number and the suffix; a variant is still in it.
    pub(super) stem: String,
    /// Number of the shard, from 1, and how many there are.
    pub(super) shard: Option<(u32, u32)>,
    pub(super) container: Container,
}

impl WeightName {
    /// Takes a file's name apart; `None` where the suffix is not one of weights.
    pub(super) fn parse(name: &std::ffi::OsStr) -> Option<Self> {
        let text = String::from_utf8_lossy(name.as_bytes());
        let (stem, suffix) = text.rsplit_once('.')?;
        let container = match suffix.to_ascii_lowercase().as_str() {
            "safetensors" | "sft" => Container::Safetensors,
            "gguf" => Container::Gguf,
            "onnx" => Container::Onnx,
            "ckpt" | "pt" | "pth" | "bin" | "pkl" => Container::Pickle,
            _ => return None,
        };
        if container == Container::Pickle && is_training_state(stem) {
            return None;
        }
        let (stem, shard) = split_shard(stem);
        Some(Self {
            stem,
            shard,
            container,
        })
    }

    /// The stem before the first dot, and what follows it: `fp16` of `model.fp16`.
    fn variant(&self) -> (&str, Option<&str>) {
        match self.stem.split_once('.') {
            Some((stem, variant)) => (stem, Some(variant)),
            None => (&self.stem, None),
        }
    }

    fn canonical_rank(&self) -> Option<usize> {
        let (stem, _) = self.variant();
        CANONICAL_STEMS.iter().position(|known| *known == stem)
    }
}

/// What trainers leave beside the weights.
fn is_training_state(stem: &str) -> bool {
    matches!(stem, "training_args" | "optimizer" | "scheduler" | "scaler")
        || stem.starts_with("rng_state")
        || stem.starts_with("random_states")
}

/// Splits `x-00001-of-00003` and `x-00001-of-00003.fp16`; the latter gives `x.fp16`.
fn split_shard(stem: &str) -> (String, Option<(u32, u32)>) {
    let find = |text: &str| {
        let (head, total) = text.rsplit_once("-of-")?;
        let (head, number) = head.rsplit_once('-')?;
        let digits = |s: &str| {
            let plain = (2..=6).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_digit());
            plain.then(|| s.parse::<u32>().ok()).flatten()
        };
        let (number, total) = (digits(number)?, digits(total)?);
        (1..=total)
            .contains(&number)
            .then(|| (head.to_owned(), (number, total)))
    };
    if let Some((head, shard)) = find(stem) {
        return (head, Some(shard));
    }
    if let Some((front, variant)) = stem.rsplit_once('.')
        && let Some((head, shard)) = find(front)
    {
        return (format!("{head}.{variant}"), Some(shard));
    }
    (stem.to_owned(), None)
}

/// The stem that a shard index is for: `model.safetensors.index.json` and `model.safetensors.index.fp16.json` give
/// `model` and `model.fp16`.
pub(super) fn index_stem(name: &std::ffi::OsStr) -> Option<String> {
    let text = String::from_utf8_lossy(name.as_bytes());
    let front = text.strip_suffix(".json")?;
    let (stem, rest) = front.split_once(".safetensors.index")?;
    match rest.strip_prefix('.') {
        Some(variant) => Some(format!("{stem}.{variant}")),
        None => rest.is_empty().then(|| stem.to_owned()),
    }
}

/// Files that together are one component's weights.
#[derive(Clone, Debug)]
pub(super) struct WeightSet {
    /// Name of the set: its stem with the variant.
    pub(super) stem: String,
    pub(super) container: Container,
    /// The shard index, where there is one.
    pub(super) index: Option<FoundFile>,
    /// The files, in the order of their numbers.
    pub(super) files: Vec<FoundFile>,
    /// How many there should be by their own names; 0 where they have no numbers.
    pub(super) expected: u32,
}

impl WeightSet {
    pub(super) fn is_sharded(&self) -> bool {
        self.index.is_some() || self.expected > 0
    }
}

/// Whether a file holds external data of the ONNX graph of this name: `x.onnx_data`, `x.onnx_data_1`, `x.onnx.data`.
fn is_onnx_data(name: &std::ffi::OsStr, graph: &std::ffi::OsStr) -> bool {
    name.as_bytes()
        .strip_prefix(graph.as_bytes())
        .is_some_and(|rest| rest.starts_with(b"_data") || rest == b".data")
}

/// All sets of weights in a folder: shards with their index, single files alone. Sorted by name.
pub(super) fn sets(folder: &Folder) -> Vec<WeightSet> {
    let mut sets: Vec<WeightSet> = Vec::new();
    let mut shards: std::collections::BTreeMap<(String, u32, Container), Vec<(u32, FoundFile)>> =
        std::collections::BTreeMap::new();
    let mut indexes: std::collections::BTreeMap<String, FoundFile> =
        std::collections::BTreeMap::new();
    for file in &folder.files {
        if let Some(stem) = index_stem(&file.name) {
            indexes.insert(stem, file.clone());
            continue;
        }
        let Some(name) = WeightName::parse(&file.name) else {
            continue;
        };
        match name.shard {
            Some((number, total)) => shards
                .entry((name.stem, total, name.container))
                .or_default()
                .push((number, file.clone())),
            None => sets.push(WeightSet {
                stem: name.stem,
                container: name.container,
                index: None,
                files: vec![file.clone()],
                expected: 0,
            }),
        }
    }
    for set in sets
        .iter_mut()
        .filter(|set| set.container == Container::Onnx)
    {
        // The graph says where its data lie; every exporter puts them beside it under its own name.
        let graph = set.files[0].name.clone();
        let data = folder
            .files
            .iter()
            .filter(|file| is_onnx_data(&file.name, &graph));
        set.files.extend(data.cloned());
    }
    for ((stem, total, container), mut files) in shards {
        files.sort_by_key(|(number, _)| *number);
        let index = match container {
            Container::Safetensors => indexes.remove(&stem),
            _ => None,
        };
        sets.push(WeightSet {
            stem,
            container,
            index,
            files: files.into_iter().map(|(_, file)| file).collect(),
            expected: total,
        });
    }
    // What is left names its shards in a way of its own, or has none of them.
    for (stem, index) in indexes {
        sets.push(WeightSet {
            stem,
            container: Container::Safetensors,
            index: Some(index),
            files: Vec::new(),
            expected: 0,
        });
    }
    sets.sort_by(|a, b| (&a.stem, a.container).cmp(&(&b.stem, b.container)));
    sets
}

/// Splits a model folder's sets into the one that is loaded and those that stand for themselves. Other variants and
/// formats of the chosen weights are neither: they are the same model once more.
///
/// `any_stem`: whether weights of any name will do, as in the component folders of a pipeline.
pub(super) fn choose(sets: Vec<WeightSet>, any_stem: bool) -> (Option<WeightSet>, Vec<WeightSet>) {
    let rank = |set: &WeightSet| -> Option<(usize, Container, usize, bool, String)> {
        let name = WeightName {
            stem: set.stem.clone(),
            shard: None,
            container: set.container,
        };
        let canonical = name.canonical_rank();
        if canonical.is_none() && !any_stem {
            return None;
        }
        let (_, variant) = name.variant();
        // The full set before variants, fp16 before what is rarer; a whole file before the same in shards.
        let variant = match variant {
            None => 0,
            Some("fp16") => 1,
            Some("bf16") => 2,
            Some(_) => 3,
        };
        // A container that loads before one that does not, then the customary name.
        let loads = usize::from(!matches!(
            set.container,
            Container::Safetensors | Container::Gguf
        ));
        Some((
            loads * 100 + canonical.unwrap_or(CANONICAL_STEMS.len()),
            set.container,
            variant,
            set.is_sharded(),
            set.stem.clone(),
        ))
    };
    let chosen = sets
        .iter()
        .enumerate()
        .filter(|(_, set)| matches!(set.container, Container::Safetensors | Container::Pickle))
        .filter_map(|(i, set)| rank(set).map(|rank| (rank, i)))
        .min()
        .map(|(_, i)| i);
    let mut picked = None;
    let mut rest = Vec::new();
    for (i, set) in sets.into_iter().enumerate() {
        if Some(i) == chosen {
            picked = Some(set);
        } else if chosen.is_none() || rank(&set).is_none() {
            rest.push(set);
        }
    }
    (picked, rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::FileIdentity;
    use crate::units::Bytes;
    use std::path::Path;

    fn folder(names: &[&str]) -> Folder {
        let mut names = names.to_vec();
        names.sort_unstable();
        Folder {
            path: Path::new("/m").into(),
            root: 0,
            files: names
                .into_iter()
                .map(|name| FoundFile {
                    name: name.into(),
                    identity: FileIdentity {
                        device: 1,
                        inode: 1,
                        size: Bytes(1),
                        mtime_ns: 0,
                    },
                })
                .collect(),
        }
    }

    fn chosen(names: &[&str]) -> Option<String> {
        choose(sets(&folder(names)), false).0.map(|set| set.stem)
    }

    #[test]
    fn one_set_of_a_folder_counts() {
        assert_eq!(
            chosen(&[
                "model.fp16.safetensors",
                "model.safetensors",
                "pytorch_model.bin"
            ]),
            Some("model".into())
        );
        assert_eq!(
            chosen(&["model.fp16.safetensors", "pytorch_model.bin"]),
            Some("model.fp16".into())
        );
        assert_eq!(
            chosen(&["diffusion_pytorch_model.fp16-00001-of-00002.safetensors"]),
            Some("diffusion_pytorch_model.fp16".into())
        );
        assert_eq!(chosen(&["my_lora.safetensors"]), None);
        assert_eq!(chosen(&["pytorch_model.bin"]), Some("pytorch_model".into()));
    }

    #[test]
    fn onnx_graphs_have_their_data_with_them() {
        let names = [
            "a.onnx",
            "a.onnx_data",
            "a.onnx_data_1",
            "b.onnx",
            "b.onnx.data",
        ];
        let sets = sets(&folder(&names));
        let files: Vec<usize> = sets.iter().map(|set| set.files.len()).collect();
        assert_eq!(files, [3, 2]);
        assert!(
            names
                .iter()
                .all(|name| crate::catalog::walk::is_relevant(name.as_bytes()))
        );
    }

    #[test]
    fn shards_find_their_index() {
        let sets = sets(&folder(&[
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "model-00001-of-00002.fp16.safetensors",
            "model.safetensors.index.fp16.json",
            "other.safetensors",
        ]));
        let seen: Vec<(&str, usize, u32, bool)> = sets
            .iter()
            .map(|s| {
                (
                    s.stem.as_str(),
                    s.files.len(),
                    s.expected,
                    s.index.is_some(),
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                ("model", 2, 2, true),
                ("model.fp16", 1, 2, true),
                ("other", 1, 0, false)
            ]
        );
    }
}
