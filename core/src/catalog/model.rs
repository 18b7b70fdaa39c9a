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
    pub path: Arc<Path>,
    /// The state in which its header was read.
    pub identity: FileIdentity,
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
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Safetensors => "safetensors",
            Self::SafetensorsSharded => "safetensors-sharded",
            Self::Diffusers => "diffusers",
            Self::Transformers => "transformers",
        })
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
        )
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
}

/// Image alignment: every file of a component begins in its image at a multiple of this, so that direct reads need
/// no bounce copy. The page size of the x86-64 and the common AArch64 kernels.
pub const IMAGE_ALIGN: u64 = 4096;

/// Alignment of a tensor in device memory, in bytes: what `cudaMalloc` guarantees and vectorised kernels expect.
pub const DEVICE_TENSOR_ALIGN: u64 = 256;

impl Component {
    /// The host memory that the component takes: the images of its files, each on a page border.
    #[must_use]
    pub fn ram_bytes(&self) -> Bytes {
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
}

impl Model {
    /// The component of this name.
    #[must_use]
    pub fn component(&self, name: &str) -> Option<&Arc<Component>> {
        self.components.iter().find(|c| &*c.id.component == name)
    }
}
