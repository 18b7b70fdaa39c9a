//! Taking weights for what they are: from their tensors' names and shapes, their metadata and their configurations, never
//! from file names.
//!
//! The knowledge is in [`signatures`](super::signatures); here it is weighed. The best signature decides each field
//! by itself. Where equally good ones contradict each other the field stays open and the reasons are kept as guesses:
//! a wrong label is worse than none.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use super::model::{BaseModel, Evidence, Kind, Tokenizer};
use super::outline::Outline;
use super::signatures::{Pattern, Rule, Signatures};

/// A signature below this is a guess, not a label.
const LABEL_SCORE: u8 = 50;

/// How many reasons are kept.
const MAX_EVIDENCE: usize = 6;

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
    pub(super) outline: Option<&'a Outline>,
}

/// What a set of weights is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) kind: Kind,
    pub(super) architecture: Option<Arc<str>>,
    pub(super) variant: Option<Arc<str>>,
    pub(super) quantization: Option<Arc<str>>,
    pub(super) dialect: Option<Arc<str>>,
    pub(super) rank: Option<u32>,
    pub(super) base: Option<BaseModel>,
    pub(super) evidence: Arc<[Evidence]>,
}

/// Identifies one set of weights.
pub(super) fn identify(signatures: &Signatures, clues: &Clues<'_>) -> Identity {
    let mut scratch = String::new();
    let matched: Vec<&Rule> = signatures
        .rules
        .iter()
        .filter(|rule| matches(rule, clues, &mut scratch))
        .collect();
    let kind = decide(&matched, |rule| rule.kind).unwrap_or_default();
    // A checkpoint has the architecture of the diffusion model in it.
    let concerns = |rule: &&&Rule| match rule.kind {
        None => true,
        Some(of) => {
            of == kind || (kind == Kind::Checkpoint && matches!(of, Kind::Unet | Kind::Transformer))
        }
    };
    let relevant: Vec<&Rule> = matched.iter().filter(concerns).copied().collect();
    let value = |text: Option<Arc<str>>| text.and_then(|text| resolve(&text, clues));
    let mut identity = Identity {
        kind,
        architecture: value(decide(&relevant, |rule| rule.architecture.clone())),
        variant: value(decide(&relevant, |rule| rule.variant.clone())),
        quantization: value(decide(&relevant, |rule| rule.quantization.clone())),
        dialect: value(decide(&relevant, |rule| rule.dialect.clone())),
        rank: None,
        base: None,
        evidence: evidence(&matched),
    };
    if kind == Kind::Lora {
        identity.rank = clues.outline.and_then(|outline| rank(signatures, outline));
    }
    if kind.is_adapter() {
        identity.base = base(clues, identity.architecture.clone());
    }
    identity
}

/// The same identity for other metadata that say the same to every signature: only the base's name differs.
pub(super) fn rebased(identity: &Identity, clues: &Clues<'_>) -> Identity {
    Identity {
        base: match identity.kind.is_adapter() {
            true => base(clues, identity.architecture.clone()),
            false => None,
        },
        ..identity.clone()
    }
}

fn matches(rule: &Rule, clues: &Clues<'_>, scratch: &mut String) -> bool {
    let text_matches = |patterns: &[Pattern], text: &str| patterns.iter().any(|p| p.matches(text));
    let metadata = |(key, patterns): &(String, Vec<Pattern>)| {
        clues
            .metadata
            .and_then(|metadata| metadata.get(key))
            .is_some_and(|text| text_matches(patterns, text))
    };
    if !rule.metadata.iter().all(metadata)
        || (!rule.metadata_any.is_empty() && !rule.metadata_any.iter().any(metadata))
    {
        return false;
    }
    let config = |(key, patterns): &(String, Vec<Pattern>)| {
        let from_index = clues
            .class
            .filter(|_| key == "_class_name" || key == "architectures");
        config_texts(clues.config, key)
            .chain(from_index)
            .any(|text| text_matches(patterns, text))
    };
    if !rule.config.iter().all(config) {
        return false;
    }
    let about_keys = !rule.all.is_empty()
        || !rule.none.is_empty()
        || !rule.shapes.is_empty()
        || !rule.any_shape.is_empty()
        || !rule.not_shapes.is_empty()
        || !rule.dtypes.is_empty()
        || rule.max_tensors.is_some();
    if !about_keys {
        return true;
    }
    let Some(outline) = clues.outline else {
        return false;
    };
    if rule.max_tensors.is_some_and(|max| outline.tensors > max)
        || (!rule.dtypes.is_empty() && !outline.has_dtype(&rule.dtypes))
    {
        return false;
    }
    rule.under
        .iter()
        .any(|prefix| keys_match(rule, outline, prefix, scratch))
}

fn keys_match(rule: &Rule, outline: &Outline, prefix: &str, scratch: &mut String) -> bool {
    let has = |pattern: &Pattern, scratch: &mut String| outline.has(prefix, pattern, scratch);
    let shaped = |(pattern, dims): &(Pattern, super::signatures::Dims), scratch: &mut String| {
        outline.has_shape(prefix, pattern, dims, scratch)
    };
    rule.shapes.iter().all(|shape| shaped(shape, scratch))
        && rule
            .all
            .iter()
            .all(|either| either.iter().any(|pattern| has(pattern, scratch)))
        && (rule.any_shape.is_empty() || rule.any_shape.iter().any(|shape| shaped(shape, scratch)))
        && !rule.none.iter().any(|pattern| has(pattern, scratch))
        && !rule.not_shapes.iter().any(|shape| shaped(shape, scratch))
}

/// The texts at a dotted place in a configuration: one, or those of a list.
fn config_texts<'a>(config: Option<&'a Value>, key: &str) -> impl Iterator<Item = &'a str> {
    let value = config.and_then(|config| {
        key.split('.')
            .try_fold(config, |value, part| value.get(part))
    });
    let list = value
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default();
    list.iter()
        .filter_map(Value::as_str)
        .chain(value.and_then(Value::as_str))
}

/// The value of the best rules that have one; `None` where equally good ones differ.
fn decide<T: PartialEq>(rules: &[&Rule], field: impl Fn(&Rule) -> Option<T>) -> Option<T> {
    let best = rules
        .iter()
        .filter(|rule| field(rule).is_some())
        .map(|rule| rule.score)
        .max()
        .filter(|score| *score >= LABEL_SCORE)?;
    let mut values = rules
        .iter()
        .filter(|rule| rule.score == best)
        .filter_map(|rule| field(rule));
    let first = values.next()?;
    values.all(|other| other == first).then_some(first)
}

/// A `$name` in a signature stands for what the file says under that name.
fn resolve(text: &Arc<str>, clues: &Clues<'_>) -> Option<Arc<str>> {
    let Some(key) = text.strip_prefix('$') else {
        return Some(text.clone());
    };
    let stated = clues.metadata.and_then(|metadata| metadata.get(key));
    stated
        .map(String::as_str)
        .or_else(|| config_texts(clues.config, key).next())
        .map(Arc::from)
}

fn evidence(matched: &[&Rule]) -> Arc<[Evidence]> {
    let mut best = matched.to_vec();
    best.sort_by_key(|rule| std::cmp::Reverse(rule.score));
    best.into_iter()
        .take(MAX_EVIDENCE)
        .map(|rule| Evidence {
            source: rule.id.clone(),
            says: rule.says.clone(),
            score: rule.score,
            reason: rule.reason.clone(),
        })
        .collect()
}

/// The rank that most outlined keys have.
fn rank(signatures: &Signatures, outline: &Outline) -> Option<u32> {
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    for (key, shape) in outline.iter() {
        for rule in &signatures.ranks {
            if rule.key.matches(key)
                && let Some(rank) = shape.get(rule.dimension)
                && let Ok(rank) = u32::try_from(*rank)
            {
                *counts.entry(rank).or_default() += 1;
            }
        }
    }
    counts
        .into_iter()
        .max_by_key(|(_, count)| *count)
        .map(|(rank, _)| rank)
}

/// The base that an adapter states or its shapes tell.
fn base(clues: &Clues<'_>, architecture: Option<Arc<str>>) -> Option<BaseModel> {
    let stated = [
        "ss_sd_model_name",
        "ss_base_model",
        "general.base_model.0.name",
    ]
    .iter()
    .filter_map(|key| clues.metadata?.get(*key).map(String::as_str))
    .find(|name| !name.is_empty() && *name != "None");
    let in_config = [
        "base_model_name_or_path",
        "speculators_config.verifier.name_or_path",
    ];
    let in_config = || {
        in_config
            .iter()
            .find_map(|key| config_texts(clues.config, key).next())
    };
    let stated = stated.or_else(in_config);
    if architecture.is_none() && stated.is_none() {
        return None;
    }
    Some(BaseModel {
        architecture,
        name: stated.map(Arc::from),
    })
}

/// What is told of the tokens that a language model or its draft speaks: by the configuration, the pairs of GGUF, or the
/// token embedding itself.
pub(super) fn tokenizer(kind: Kind, clues: &Clues<'_>) -> Option<Tokenizer> {
    if !kind.is_language_model() && kind != Kind::DraftModel {
        return None;
    }
    // Models with several towers have one part for text, and speculators one for the layers that guess.
    let parts = ["text_config", "llm_config", "transformer_layer_config"];
    let number = |key: &str| {
        let config = clues.config?;
        let within = parts.iter().filter_map(|part| config.get(*part));
        std::iter::once(config).chain(within).find_map(|part| {
            let value = part.get(key)?;
            value
                .as_u64()
                .or_else(|| value.as_array()?.first()?.as_u64())
        })
    };
    let stated = |key: &str| clues.metadata?.get(key)?.parse::<u64>().ok();
    let embedding = || {
        const KEYS: [&str; 6] = [
            "model.embed_tokens.weight",
            "embed_tokens.weight",
            "token_embd.weight",
            "language_model.model.embed_tokens.weight",
            "model.language_model.embed_tokens.weight",
            "transformer.wte.weight",
        ];
        let mut keys = clues.outline?.iter();
        // There are always more tokens than numbers for each of them.
        let (_, shape) = keys.find(|(key, _)| KEYS.contains(key))?;
        shape.iter().max().copied()
    };
    let tokens = number("vocab_size").or_else(embedding)?;
    let begin = number("bos_token_id").or_else(|| stated("tokenizer.ggml.bos_token_id"));
    Some(Tokenizer {
        tokens: u32::try_from(tokens).ok()?,
        begin: begin.and_then(|begin| u32::try_from(begin).ok()),
    })
}

/// The architecture that a pipeline's class means.
pub(super) fn architecture_of_pipeline(class: &str) -> Option<&'static str> {
    // Longer beginnings come first where one begins another.
    const KNOWN: [(&str, &str); 21] = [
        ("StableDiffusionXL", "sdxl"),
        ("StableDiffusion3", "sd-3"),
        ("Flux2", "flux2"),
        ("Flux", "flux"),
        ("QwenImage", "qwen-image"),
        ("ZImage", "z-image"),
        ("Wan", "wan"),
        ("HunyuanVideo", "hunyuan-video"),
        ("LTX", "ltx-video"),
        ("CogView4", "cogview4"),
        ("Chroma", "chroma"),
        ("Krea2", "krea-2"),
        ("Anima", "anima"),
        ("Lumina2", "lumina-2"),
        ("PixArt", "pixart"),
        ("Kandinsky", "kandinsky"),
        ("AuraFlow", "auraflow"),
        ("Sana", "sana"),
        ("CogVideoX", "cogvideox"),
        ("HiDream", "hidream"),
        ("Mochi", "mochi"),
    ];
    KNOWN
        .iter()
        .find(|(start, _)| class.starts_with(start))
        .map(|(_, architecture)| *architecture)
}

#[cfg(test)]
mod tests;
