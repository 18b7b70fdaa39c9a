//! What the catalogue says of a model: plain values, shared by `Arc`, never changed after they are published.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ids::{ComponentId, ContentId, ModelName};
use crate::units::Bytes;

/// Which file this is and in which state, as the file system tells it. Two equal identities mean unchanged bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileIdentity {
    /// Device number of the file system.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Length of the file.
    pub size: Bytes,
    /// Time of the last change of the content, in nanoseconds since 1970.
    pub mtime_ns: i64,
}

/// A file that holds weights, as it was when it was scanned.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct SourceFile {
    /// Absolute path.
    #[serde(serialize_with = "lossy_path")]
    pub path: Arc<Path>,
    /// The state in which its header was read.
    pub identity: FileIdentity,
}

/// Paths go out as text for people and JSON; what is not UTF-8 is replaced, since an entry must never fail to be shown.
fn lossy_path<S: serde::Serializer>(path: &Arc<Path>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// How a model lies on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Format {
    /// One `.safetensors` file.
    Safetensors,
    /// Several `.safetensors` files with a `*.safetensors.index.json`.
    SafetensorsSharded,
    /// A folder with a `model_index.json` and a sub-folder for each component.
    Diffusers,
    /// A folder with a `config.json` beside its weights.
    Transformers,
    /// A folder with an `adapter_config.json` beside an adapter's weights.
    Peft,
    /// One GGUF file, or all the parts of a split one.
    Gguf,
    /// An ONNX graph, with its external data where it has any. Listed, not loadable.
    Onnx,
    /// A pickle of any suffix. Listed, never opened, not loadable.
    Pickle,
}

impl Format {
    /// The name as it is written everywhere.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::SafetensorsSharded => "safetensors-sharded",
            Self::Diffusers => "diffusers",
            Self::Transformers => "transformers",
            Self::Peft => "peft",
            Self::Gguf => "gguf",
            Self::Onnx => "onnx",
            Self::Pickle => "pickle",
        }
    }
}

impl Format {
    /// Whether the entry is a folder rather than a file.
    #[must_use]
    pub const fn is_folder(self) -> bool {
        matches!(self, Self::Diffusers | Self::Transformers | Self::Peft)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What a model or a component is for.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Kind {
    /// A whole pipeline in a single file.
    Checkpoint,
    /// A whole pipeline as a folder of components.
    Pipeline,
    /// A diffusion transformer.
    Transformer,
    /// A diffusion UNet.
    Unet,
    /// An image or video autoencoder.
    Vae,
    /// A text encoder.
    TextEncoder,
    /// An image encoder.
    ImageEncoder,
    /// A low-rank adapter, of any dialect.
    Lora,
    /// A ControlNet stored as low-rank differences.
    ControlLora,
    /// A ControlNet.
    Controlnet,
    /// A T2I adapter.
    T2iAdapter,
    /// An IP-Adapter.
    IpAdapter,
    /// Learned token embeddings.
    TextualInversion,
    /// An image upscaler.
    Upscaler,
    /// A generative language model.
    LanguageModel,
    /// A text or image embedding model.
    EmbeddingModel,
    /// A language model that also reads images.
    VisionLanguageModel,
    /// Layers that guess the next tokens of a language model ahead of it (EAGLE, Medusa and kin).
    DraftModel,
    /// A speech or music model.
    Audio,
    /// Cannot be told.
    #[default]
    Unknown,
}

impl Kind {
    /// The name as it is written everywhere.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Checkpoint => "checkpoint",
            Self::Pipeline => "pipeline",
            Self::Transformer => "transformer",
            Self::Unet => "unet",
            Self::Vae => "vae",
            Self::TextEncoder => "text-encoder",
            Self::ImageEncoder => "image-encoder",
            Self::Lora => "lora",
            Self::ControlLora => "control-lora",
            Self::Controlnet => "controlnet",
            Self::T2iAdapter => "t2i-adapter",
            Self::IpAdapter => "ip-adapter",
            Self::TextualInversion => "textual-inversion",
            Self::Upscaler => "upscaler",
            Self::LanguageModel => "language-model",
            Self::EmbeddingModel => "embedding-model",
            Self::VisionLanguageModel => "vision-language-model",
            Self::DraftModel => "draft-model",
            Self::Audio => "audio",
            Self::Unknown => "unknown",
        }
    }

    /// Whether it is of use only together with a base model.
    #[must_use]
    pub const fn is_adapter(self) -> bool {
        matches!(
            self,
            Self::Lora
                | Self::ControlLora
                | Self::Controlnet
                | Self::T2iAdapter
                | Self::IpAdapter
                | Self::TextualInversion
                | Self::DraftModel
        )
    }

    /// Whether it generates text, token by token.
    #[must_use]
    pub const fn is_language_model(self) -> bool {
        matches!(self, Self::LanguageModel | Self::VisionLanguageModel)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The unit of residency: a part of a model with weights of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Component {
    /// The model that it was found in, and its name there.
    pub id: ComponentId,
    /// What it is for.
    pub kind: Kind,
    /// Architecture, such as `sdxl` or `llama`, where it is known.
    pub architecture: Option<Arc<str>>,
    /// The dtype that most of its bytes have, in safetensors notation (`F16`, `BF16`), where there are tensors.
    pub dtype: Option<Arc<str>>,
    /// Bytes of its tensors, without headers and padding.
    pub bytes: Bytes,
    /// How many tensors it has.
    pub tensors: u32,
    /// Which bytes these are.
    pub content_id: ContentId,
    /// The weight files, in the order of their shards.
    pub files: Vec<SourceFile>,
    /// Which part of the files belongs to it; `None`: all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selection: Option<Arc<Selection>>,
    /// Which blocks of a larger component these are; `None`: a component of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub part: Option<Arc<Part>>,
}

fn as_text<S: serde::Serializer>(id: &ComponentId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(id)
}

/// Some blocks of a component that is too large for one tier: to everybody but its client a component of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// The whole.
    #[serde(serialize_with = "as_text")]
    pub of: ComponentId,
    /// The bytes of the whole.
    pub content: ContentId,
    /// What the names of each block's tensors begin with, in the order in which blocks are used.
    pub blocks: Vec<Arc<str>>,
    /// The place of the first of them among all blocks.
    pub first: usize,
    /// How many blocks the whole has.
    pub of_blocks: usize,
    /// Whether the tensors that belong to no block are here.
    pub shared: bool,
}

/// The part of its files that a component takes, where it shares them with others: the UNet inside a single-file
/// checkpoint, say. Its tensors are exactly those whose names begin with one of the prefixes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Selection {
    /// What the names of its tensors begin with.
    pub prefixes: Vec<Arc<str>>,
    /// Where their bytes lie, sorted by file and start, neighbours joined.
    pub ranges: Vec<FileRange>,
}

impl Selection {
    /// Whether the tensor of this name belongs to the component.
    #[must_use]
    pub fn holds(&self, tensor: &str) -> bool {
        self.prefixes
            .iter()
            .any(|prefix| tensor.starts_with(&**prefix))
    }
}

/// Bytes of one of a component's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileRange {
    /// Index into [`Component::files`].
    pub file: u32,
    /// First byte, counted from the start of the file.
    pub start: u64,
    /// End, counted from the start of the file.
    pub end: u64,
}

/// Image alignment: every file of a component begins in its image at a multiple of this, so that direct reads need
/// no bounce copy. The page size of the x86-64 and the common AArch64 kernels.
pub const IMAGE_ALIGN: u64 = 4096;

/// Alignment of a tensor in device memory, in bytes: what `cudaMalloc` guarantees and vectorised kernels expect.
pub const DEVICE_TENSOR_ALIGN: u64 = 256;

impl Component {
    /// The host memory that the component takes: the images of its files, each on a page border.
    ///
    /// A component with a selection is counted by its ranges, each widened to page borders.
    #[must_use]
    pub fn ram_bytes(&self) -> Bytes {
        if let Some(selection) = &self.selection {
            return selection
                .ranges
                .iter()
                .map(|range| {
                    let start = range.start / IMAGE_ALIGN * IMAGE_ALIGN;
                    Bytes(range.end.saturating_sub(start)).round_up(IMAGE_ALIGN)
                })
                .sum();
        }
        self.files
            .iter()
            .map(|file| file.identity.size.round_up(IMAGE_ALIGN))
            .sum()
    }

    /// The most device memory that the component takes before the device's own granularity: its tensors, each on
    /// its alignment.
    #[must_use]
    pub fn device_bytes(&self) -> Bytes {
        Bytes(
            self.bytes
                .get()
                .saturating_add(u64::from(self.tensors).saturating_mul(DEVICE_TENSOR_ALIGN)),
        )
    }
}

/// The model that an adapter needs, as far as its file or folder tells.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BaseModel {
    /// Architecture of the base, such as `sdxl`.
    pub architecture: Option<Arc<str>>,
    /// The base's name or repository, as the adapter's metadata state it.
    pub name: Option<Arc<str>>,
}

/// A catalogue entry: a file, or a folder with an index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Model {
    /// Unique in the catalogue: the path below its root, without the file's suffix.
    pub name: ModelName,
    /// Absolute path of the file or folder.
    #[serde(serialize_with = "lossy_path")]
    pub path: Arc<Path>,
    /// How it lies on disk.
    pub format: Format,
    /// What it is for.
    pub kind: Kind,
    /// Architecture, where it is known.
    pub architecture: Option<Arc<str>>,
    /// Bytes of all its components' tensors.
    pub bytes: Bytes,
    /// Its components, in the order of first use where the format tells one. Empty where `error` is set.
    pub components: Vec<Arc<Component>>,
    /// For adapters: what they adapt.
    pub base: Option<BaseModel>,
    /// Why it cannot be loaded, with what to do about it.
    pub error: Option<Arc<str>>,
    /// What else is known of it.
    pub facts: Facts,
    /// Every file that the entry was made from, indexes and configurations included: while none of them changes, the
    /// entry is as it was.
    #[serde(skip)]
    pub inputs: Vec<SourceFile>,
    /// Whether its files are still there.
    pub presence: Presence,
}

/// What is known of a model beside its kind and architecture.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// Variant of the architecture, such as `inpaint` or `v-prediction`.
    pub variant: Option<Arc<str>>,
    /// How many numbers its tensors hold.
    pub parameters: Option<u64>,
    /// Scheme of its quantisation, such as `fp8-scaled`, `nf4` or `q4_k`.
    pub quantization: Option<Arc<str>>,
    /// For LoRAs: the conventions that its keys follow, such as `kohya`.
    pub dialect: Option<Arc<str>>,
    /// For LoRAs: the rank that most of its pairs have.
    pub rank: Option<u32>,
    /// For language models and their drafts: the tokens that they speak.
    pub tokenizer: Option<Tokenizer>,
    /// In a cache of the Hugging Face hub: the repository.
    pub repo: Option<Arc<str>>,
    /// In a cache of the Hugging Face hub: the commit.
    pub revision: Option<Arc<str>>,
    /// Bytes for each dtype, most first.
    pub dtypes: Vec<(Arc<str>, Bytes)>,
    /// Why it was taken for what it is, best reason first.
    pub evidence: Arc<[Evidence]>,
}

/// What is known of a language model's tokenizer without reading it: enough to see that two models cannot share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tokenizer {
    /// Rows of the token embedding.
    pub tokens: u32,
    /// The number of the token that texts begin with.
    pub begin: Option<u32>,
}

impl Tokenizer {
    /// Embeddings of one tokenizer differ by no more than their padding: Qwen2.5 has 151,936 rows in the small models and
    /// 152,064 in the large ones. llama.cpp draws the same line for its drafts.
    const PADDING: u32 = 128;

    /// Whether both may be the same tokenizer: as many tokens but for padding, and the same beginning where both tell it.
    #[must_use]
    pub fn is_of_family(&self, other: &Self) -> bool {
        let begins = match (self.begin, other.begin) {
            (Some(mine), Some(others)) => mine == others,
            _ => true,
        };
        begins && self.tokens.abs_diff(other.tokens) <= Self::PADDING
    }
}

impl fmt::Display for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tokens", self.tokens)?;
        match self.begin {
            Some(begin) => write!(f, ", beginning with {begin}"),
            None => Ok(()),
        }
    }
}

/// A reason to take a model for what it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// Name of the signature, or the file and key, that says so.
    pub source: Arc<str>,
    /// What it says: kind, then architecture where it tells one.
    pub says: Arc<str>,
    /// How sure it is, 0 to 100.
    pub score: u8,
    /// In words.
    pub reason: Arc<str>,
}

/// Whether a model's files are there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Presence {
    /// They are there, whole.
    #[default]
    Present,
    /// They are still being written; nothing can be loaded yet.
    Incomplete,
    /// They were removed; what is leased stays valid.
    Gone,
    /// The system had nothing left to read them with: descriptors, memory. They are read again.
    Unread,
}

impl Model {
    /// The component of this name.
    #[must_use]
    pub fn component(&self, name: &str) -> Option<&Arc<Component>> {
        self.components.iter().find(|c| &*c.id.component == name)
    }

    /// Whether its components can be loaded.
    #[must_use]
    pub fn is_loadable(&self) -> bool {
        self.error.is_none() && self.presence == Presence::Present && !self.components.is_empty()
    }
}
