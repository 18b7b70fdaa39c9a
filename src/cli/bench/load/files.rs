//! The files that are loaded: safetensors with true headers and bytes that no disk or file system can shrink.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use hotset::Bytes;
use serde::Serialize;
use serde_json::json;

use crate::cli::CliError;

/// What is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Shape {
    /// One file
    One,
    /// 40 shards of one model
    Shards,
    /// 300 LoRAs
    Loras,
    /// One file that nobody asked for
    #[value(skip)]
    Prefetch,
    /// A file of the user's
    #[value(skip)]
    Given,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::One => "one file",
            Self::Shards => "40 shards",
            Self::Loras => "300 LoRAs",
            Self::Prefetch => "what is prefetched",
            Self::Given => "the given file",
        })
    }
}

const SHARDS: u64 = 40;
const LORAS: u64 = 300;
/// Bytes of one made-up tensor at most.
const TENSOR: u64 = 64 << 20;

/// Files and how the catalogue names them; made-up ones are removed when this is dropped.
#[derive(Debug)]
pub(super) struct Library {
    pub(super) shape: Shape,
    pub(super) root: PathBuf,
    pub(super) files: Vec<PathBuf>,
    pub(super) names: Vec<String>,
    pub(super) bytes: Bytes,
    _folder: Option<tempfile::TempDir>,
}

impl Library {
    /// Makes the files of a shape, `size` bytes in all, or takes the given one.
    pub(super) fn make(
        shape: Shape,
        size: Bytes,
        within: &Path,
        given: Option<&Path>,
    ) -> Result<Self, CliError> {
        if let Some(path) = given {
            return take(path);
        }
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| CliError::File { path, source }
        };
        let folder = tempfile::Builder::new()
            .prefix("hotset-bench-")
            .tempdir_in(within)
            .map_err(failed(within))?;
        let root = folder.path().to_owned();
        let (mut files, mut names) = (Vec::new(), Vec::new());
        match shape {
            Shape::One | Shape::Given => {
                files.push(root.join("one.safetensors"));
                names.push("one".to_owned());
            }
            Shape::Prefetch => {
                files.push(root.join("guess.safetensors"));
                names.push("guess".to_owned());
            }
            Shape::Shards => {
                let model = root.join("sharded");
                std::fs::create_dir(&model).map_err(failed(&model))?;
                files.extend(
                    (1..=SHARDS)
                        .map(|i| model.join(format!("model-{i:05}-of-{SHARDS:05}.safetensors"))),
                );
                names.push("sharded".to_owned());
            }
            Shape::Loras => {
                names.extend((0..LORAS).map(|i| format!("lora-{i:03}")));
                files.extend(
                    names
                        .iter()
                        .map(|name| root.join(format!("{name}.safetensors"))),
                );
            }
        }
        let each = size.get() / files.len() as u64;
        let mut weight_map = serde_json::Map::new();
        let mut noise = Noise::new();
        for (i, path) in files.iter().enumerate() {
            let tensors = write(path, i, each, shape, &mut noise).map_err(failed(path))?;
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            weight_map.extend(tensors.into_iter().map(|name| (name, json!(file))));
        }
        if shape == Shape::Shards {
            let index = root.join("sharded/model.safetensors.index.json");
            let text = json!({"metadata": {}, "weight_map": weight_map}).to_string();
            std::fs::write(&index, text).map_err(failed(&index))?;
            let config = root.join("sharded/config.json");
            std::fs::write(&config, r#"{"model_type": "llama"}"#).map_err(failed(&config))?;
        }
        let bytes = lengths(&files)?;
        Ok(Self {
            shape,
            root,
            files,
            names,
            bytes,
            _folder: Some(folder),
        })
    }
}

/// The user's file, as the only one of its folder that counts.
fn take(path: &Path) -> Result<Library, CliError> {
    let failed = |source| CliError::File {
        path: path.to_owned(),
        source,
    };
    let path = path.canonicalize().map_err(failed)?;
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let files = vec![path.clone()];
    Ok(Library {
        shape: Shape::Given,
        root: path.parent().unwrap_or(Path::new("/")).to_owned(),
        bytes: lengths(&files)?,
        names: vec![stem.into_owned()],
        files,
        _folder: None,
    })
}

fn lengths(files: &[PathBuf]) -> Result<Bytes, CliError> {
    let mut bytes = Bytes::ZERO;
    for path in files {
        let metadata = path.metadata().map_err(|source| CliError::File {
            path: path.clone(),
            source,
        })?;
        bytes += Bytes(metadata.len());
    }
    Ok(bytes)
}

/// Writes a safetensors file of about `bytes` bytes; gives the names of its tensors.
fn write(
    path: &Path,
    number: usize,
    bytes: u64,
    shape: Shape,
    noise: &mut Noise,
) -> io::Result<Vec<String>> {
    let count = bytes.div_ceil(TENSOR).max(2);
    let each = (bytes / count) & !63;
    let mut header = serde_json::Map::new();
    let mut names = Vec::new();
    for i in 0..count {
        let name = match shape {
            Shape::Loras => {
                let part = if i % 2 == 0 { "lora_down" } else { "lora_up" };
                format!(
                    "lora_unet_block_{number}_{}_attn1_to_q.{part}.weight",
                    i / 2
                )
            }
            _ => format!("model.layers.{number}.mlp.{i}.weight"),
        };
        header.insert(
            name.clone(),
            json!({"dtype": "F16", "shape": [each / 64, 32], "data_offsets": [i * each, (i + 1) * each]}),
        );
        names.push(name);
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = File::create(path)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut left = count * each;
    while left > 0 {
        let block = noise.next();
        let now = left.min(block.len() as u64) as usize;
        file.write_all(block.get(..now).unwrap_or_default())?;
        left -= now as u64;
    }
    // On the disk before it is read from there, and out of the way.
    hotset::core::io::drop_from_cache(&file)?;
    Ok(names)
}

/// Blocks of random bytes, made once: each use changes its start, so that no two are equal.
struct Noise {
    block: Vec<u8>,
    used: u64,
}

impl Noise {
    fn new() -> Self {
        const BLOCK: usize = 8 << 20;
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut block = Vec::with_capacity(BLOCK);
        while block.len() < BLOCK {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            block.extend(state.to_le_bytes());
        }
        Self { block, used: 0 }
    }

    fn next(&mut self) -> &[u8] {
        self.used += 1;
        let used = self.used.to_le_bytes();
        // In each page, so that nothing that joins equal pages finds any.
        for page in self.block.chunks_mut(4096) {
            if let Some(start) = page.get_mut(..8) {
                start.copy_from_slice(&used);
            }
        }
        &self.block
    }
}
