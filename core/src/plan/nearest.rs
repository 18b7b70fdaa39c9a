//! What would fit where a set never does: the same elsewhere, in part, or a smaller variant of a model.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use super::place::PlanError;
use crate::catalog::{Catalogue, Component, Model};
use crate::ids::{ModelName, Tier};
use crate::units::Bytes;

/// A set that would fit in the place of one that does not.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Nearest {
    /// The same in another tier.
    Elsewhere(Tier),
    /// The same, divided: as many blocks as fit on the GPU, the others streamed from RAM.
    Split {
        /// The GPU's tier.
        tier: Tier,
        /// What would be in RAM.
        in_ram: Bytes,
    },
    /// The same model in another dtype or quantisation.
    Variant {
        /// Which.
        model: ModelName,
        /// What it would replace.
        instead_of: ModelName,
        /// How large it is.
        bytes: Bytes,
    },
}

impl fmt::Display for Nearest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Elsewhere(tier) => write!(f, "it fits in {tier}"),
            Self::Split { tier, in_ram } => write!(
                f,
                "it fits where it may be split: the most of it in {tier}, {in_ram} streamed from RAM"
            ),
            Self::Variant {
                model,
                instead_of,
                bytes,
            } => write!(f, "{model} ({bytes}) would fit instead of {instead_of}"),
        }
    }
}

/// The words of a name that say how its numbers are stored.
fn is_storage(word: &str) -> bool {
    const WORDS: [&str; 27] = [
        "fp32",
        "fp16",
        "bf16",
        "fp8",
        "fp4",
        "float32",
        "float16",
        "bfloat16",
        "f32",
        "f16",
        "f8",
        "e4m3",
        "e4m3fn",
        "e5m2",
        "scaled",
        "nf4",
        "nvfp4",
        "mxfp4",
        "int8",
        "int4",
        "8bit",
        "4bit",
        "awq",
        "gptq",
        "gguf",
        "bnb",
        "safetensors",
    ];
    // Of GGUF: q4, q4_k_m, iq3_xxs.
    let ggml = |word: &str| {
        let digits = word.strip_prefix("iq").or(word.strip_prefix('q'));
        digits.is_some_and(|rest| rest.bytes().next().is_some_and(|b| b.is_ascii_digit()))
    };
    WORDS.contains(&word)
        || ggml(word)
        || matches!(word, "k" | "m" | "s" | "l" | "xs" | "xxs" | "0" | "1")
}

/// What a name says beside how its numbers are stored.
fn words(name: &str) -> BTreeSet<String> {
    name.to_lowercase()
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty() && !is_storage(word))
        .map(str::to_owned)
        .collect()
}

fn is_variant(model: &Model, of: &Model) -> bool {
    model.name != of.name
        && model.is_loadable()
        && model.kind == of.kind
        && model.architecture == of.architecture
        && model.bytes < of.bytes
        && words(model.name.as_str()) == words(of.name.as_str())
}

/// Adds to a refusal the largest variant of one of the set's models with which it would fit.
pub fn suggest_variant(error: &mut PlanError, catalogue: &Catalogue, set: &[Arc<Component>]) {
    let PlanError::NeverFits { shortages, nearest } = error else {
        return;
    };
    let missing = shortages
        .iter()
        .filter(|shortage| shortage.out_of_service.is_none())
        .map(|shortage| shortage.needed.saturating_sub(shortage.budget))
        .min();
    let Some(missing) = missing else { return };
    let names: BTreeSet<&ModelName> = set.iter().map(|component| &component.id.model).collect();
    let mine = names
        .into_iter()
        .filter_map(|name| catalogue.find(name.as_str()).ok());
    let pairs = mine.flat_map(|of| {
        let variants = catalogue
            .models()
            .filter(move |model| is_variant(model, of));
        variants.map(move |model| (model, of))
    });
    let best = pairs
        .filter(|(model, of)| of.bytes.saturating_sub(model.bytes) >= missing)
        .max_by_key(|(model, of)| (model.bytes, std::cmp::Reverse((&model.name, &of.name))));
    nearest.extend(best.map(|(model, of)| Nearest::Variant {
        model: model.name.clone(),
        instead_of: of.name.clone(),
        bytes: model.bytes,
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Kind;
    use crate::plan::test_utils;

    #[test]
    fn storage_is_not_part_of_a_name() {
        assert_eq!(words("flux1-dev-fp8_e4m3fn"), words("flux1-dev"));
        assert_eq!(words("Llama-3-8B-Q4_K_M.gguf"), words("llama-3-8b"));
        assert_ne!(words("flux1-dev"), words("flux1-schnell"));
        assert_ne!(words("qwen-3"), words("qwen-2"));
    }

    #[test]
    fn the_largest_variant_that_fits_is_named() {
        let model = |name: &str, kib, number| {
            let part = test_utils::component(name, "weights", Kind::Transformer, number, kib);
            test_utils::model(name, Kind::Transformer, Some("flux"), vec![part])
        };
        let catalogue = test_utils::catalogue([
            model("flux-dev-bf16", 1000, 1),
            model("flux-dev-fp8", 500, 2),
            model("flux-dev-nf4", 250, 3),
            model("flux-schnell-fp8", 450, 4),
        ]);
        let set = catalogue.find("flux-dev-bf16").unwrap().components.clone();
        let named = |budget| {
            let shortage = super::super::Shortage {
                tier: Tier::Ram,
                needed: Bytes::kib(1000),
                budget: Bytes::kib(budget),
                parts: Vec::new(),
                out_of_service: None,
            };
            let mut error = PlanError::never(vec![shortage]);
            suggest_variant(&mut error, &catalogue, &set);
            error.to_string()
        };
        assert!(named(600).contains("flux-dev-fp8 ("), "{}", named(600));
        assert!(named(300).contains("flux-dev-nf4 ("), "{}", named(300));
        assert!(!named(100).contains("instead of"), "{}", named(100));
    }
}
