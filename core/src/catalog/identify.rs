//! Taking weights for what they are: from their tensors' names and shapes, their metadata and their configurations, never
//! from file names.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use super::model::{BaseModel, Kind};
use super::safetensors::HeaderTensor;

/// What is known of a set of weights before it is identified.
#[derive(Clone, Copy, Default)]
pub(super) struct Clues<'a> {
    /// The configuration beside the weights.
    pub(super) config: Option<&'a Value>,
    /// The class that a pipeline's index names.
    pub(super) class: Option<&'a str>,
    /// The metadata in the file.
    pub(super) metadata: Option<&'a BTreeMap<String, String>>,
    /// The tensors.
    pub(super) tensors: &'a [HeaderTensor],
}

/// What a set of weights is.
#[derive(Clone, Debug, Default)]
pub(super) struct Identity {
    pub(super) kind: Kind,
    pub(super) architecture: Option<Arc<str>>,
    pub(super) base: Option<BaseModel>,
}

/// Identifies one set of weights.
pub(super) fn identify(clues: &Clues<'_>) -> Identity {
    let mut identity = Identity::default();
    from_config(clues, &mut identity);
    if identity.kind == Kind::Unknown {
        identity.kind = from_tensors(clues.tensors);
    }
    if let Some(metadata) = clues.metadata {
        from_metadata(metadata, &mut identity);
    }
    if identity.kind.is_adapter() && identity.base.is_none() {
        identity.base = identity.architecture.clone().map(|architecture| BaseModel {
            architecture: Some(architecture),
            name: None,
        });
    }
    identity
}

/// What a class of diffusers or transformers is for.
pub(super) fn kind_of_class(class: &str) -> Kind {
    let has = |part: &str| class.contains(part);
    if has("ControlNet") {
        Kind::Controlnet
    } else if has("T2IAdapter") || has("MultiAdapter") {
        Kind::T2iAdapter
    } else if has("UNet") {
        Kind::Unet
    } else if has("Autoencoder") || has("VQModel") || has("Vae") {
        Kind::Vae
    } else if has("Pipeline") {
        Kind::Pipeline
    } else if has("Transformer") && has("Model") && !has("For") {
        Kind::Transformer
    } else if has("CLIPTextModel") || has("T5EncoderModel") || has("TextModel") {
        Kind::TextEncoder
    } else if has("CLIPVision") || has("VisionModel") {
        Kind::ImageEncoder
    } else if has("ForConditionalGeneration") && (has("VL") || has("Llava") || has("Gemma3")) {
        Kind::VisionLanguageModel
    } else if has("ForCausalLM") || has("LMHeadModel") {
        Kind::LanguageModel
    } else if has("Whisper") || has("Wav2Vec") || has("MusicGen") || has("Musicgen") {
        Kind::Audio
    } else {
        Kind::Unknown
    }
}

fn from_config(clues: &Clues<'_>, identity: &mut Identity) {
    if let Some(class) = clues.class {
        identity.kind = kind_of_class(class);
    }
    let Some(config) = clues.config else { return };
    let text = |key: &str| config.get(key).and_then(Value::as_str);
    if let Some(peft) = text("peft_type") {
        identity.kind = if peft == "LORA" || peft == "LOKR" || peft == "LOHA" {
            Kind::Lora
        } else {
            Kind::Unknown
        };
        identity.base = Some(BaseModel {
            architecture: None,
            name: text("base_model_name_or_path").map(Arc::from),
        });
        return;
    }
    if identity.kind == Kind::Unknown
        && let Some(class) = text("_class_name")
    {
        identity.kind = kind_of_class(class);
    }
    let architectures = config
        .get("architectures")
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default();
    if identity.kind == Kind::Unknown {
        identity.kind = architectures
            .iter()
            .filter_map(Value::as_str)
            .map(kind_of_class)
            .find(|kind| *kind != Kind::Unknown)
            .unwrap_or_default();
    }
    if identity.kind == Kind::Unknown && !architectures.is_empty() {
        let bare_encoder = architectures
            .iter()
            .filter_map(Value::as_str)
            .any(|class| class.ends_with("Model") && !class.contains("For"));
        if bare_encoder {
            identity.kind = Kind::EmbeddingModel;
        }
    }
    if let Some(model_type) = text("model_type") {
        identity.architecture = Some(model_type.into());
    }
}

fn from_tensors(tensors: &[HeaderTensor]) -> Kind {
    let any = |test: &dyn Fn(&str) -> bool| tensors.iter().any(|t| test(&t.name));
    let is_lora = |name: &str| {
        [
            ".lora_down.weight",
            ".lora_up.weight",
            ".lora_A.",
            ".lora_B.",
            ".lora.down.",
            ".lokr_w",
            ".hada_w",
        ]
        .iter()
        .any(|part| name.contains(part))
    };
    if any(&is_lora) {
        return Kind::Lora;
    }
    if any(&|n| n.starts_with("model.diffusion_model.")) {
        let whole = any(&|n| {
            n.starts_with("first_stage_model.")
                || n.starts_with("cond_stage_model.")
                || n.starts_with("conditioner.")
        });
        return if whole { Kind::Checkpoint } else { Kind::Unet };
    }
    if any(&|n| n.starts_with("control_model.") || n.contains("controlnet_")) {
        return Kind::Controlnet;
    }
    if any(&|n| n.starts_with("decoder.conv_in.")) && any(&|n| n.starts_with("encoder.conv_in.")) {
        return Kind::Vae;
    }
    if any(&|n| n.contains("text_model.embeddings.token_embedding")) {
        return Kind::TextEncoder;
    }
    if any(&|n| n == "lm_head.weight") || any(&|n| n.contains("model.layers.0.self_attn.")) {
        return Kind::LanguageModel;
    }
    Kind::Unknown
}

fn from_metadata(metadata: &BTreeMap<String, String>, identity: &mut Identity) {
    let get = |key: &str| metadata.get(key).map(String::as_str);
    let stated = get("modelspec.architecture").or_else(|| get("ss_base_model_version"));
    if let Some(stated) = stated
        && identity.architecture.is_none()
    {
        identity.architecture = architecture_named(stated).map(Arc::from);
    }
    if identity.kind == Kind::Unknown
        && get("modelspec.architecture").is_some_and(|a| a.ends_with("/lora"))
    {
        identity.kind = Kind::Lora;
    }
    if identity.kind.is_adapter() {
        let name = get("ss_sd_model_name").filter(|name| *name != "None");
        if identity.architecture.is_some() || name.is_some() {
            identity.base = Some(BaseModel {
                architecture: identity.architecture.clone(),
                name: name.map(Arc::from),
            });
        }
    }
}

/// The architecture that a `modelspec.architecture` or `ss_base_model_version` means.
pub(super) fn architecture_named(stated: &str) -> Option<&'static str> {
    let stated = stated.to_ascii_lowercase();
    let has = |part: &str| stated.contains(part);
    Some(if has("xl") && has("refiner") {
        "sdxl-refiner"
    } else if has("sdxl") || has("xl-v1") || has("stable-diffusion-xl") {
        "sdxl"
    } else if has("stable-diffusion-v1") || has("sd_v1") {
        "sd-1"
    } else if has("stable-diffusion-v2") || has("sd_v2") {
        "sd-2"
    } else if has("stable-diffusion-3") || has("sd3") {
        "sd-3"
    } else if has("flux-2") || has("flux2") {
        "flux2"
    } else if has("flux") {
        "flux"
    } else {
        return None;
    })
}
