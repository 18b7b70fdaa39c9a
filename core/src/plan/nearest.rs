//! What would fit where a set never does: the same elsewhere, in part, or a smaller variant of a model.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use super::graph::DependencyGraph;
use super::place::Planner;
use super::refusal::PlanError;
use super::set::Target;
use crate::catalog::{Catalogue, Component, Model};
use crate::ids::{ModelName, Tier};
use crate::memory::TierView;
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
    /// The same without some of its models, and what is of use only with them.
    Without {
        /// Which.
        models: Vec<ModelName>,
        /// Where the others fit.
        tier: Tier,
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
            Self::Without { models, tier } => {
                let models: Vec<&str> = models.iter().map(ModelName::as_str).collect();
                write!(
                    f,
                    "without {} the rest fits in {tier}",
                    models.join(" and ")
                )
            }
            Self::Variant {
                model,
                instead_of,
                bytes,
            } => write!(f, "{model} ({bytes}) would fit instead of {instead_of}"),
        }
    }
}

impl Planner<'_> {
    /// Adds to a refusal what would fit instead. `may_split`: whether it could be split, which was not tried.
    pub(super) fn with_nearest(
        &self,
        mut error: PlanError,
        set: &DependencyGraph,
        target: Target,
        may_split: bool,
    ) -> PlanError {
        let (PlanError::NeverFits { nearest, .. }, Ok(considered)) =
            (&mut error, self.considered(target))
        else {
            return error;
        };
        let order = set.order();
        let fits = |view: &&TierView, order: &[Arc<Component>]| {
            view.out_of_service.is_none() && self.whole(view, order) <= view.budget
        };
        let others = self
            .tiers
            .iter()
            .filter(|view| !considered.iter().any(|c| c.tier == view.tier));
        let others = others.filter(|view| fits(view, &order));
        nearest.extend(others.map(|view| Nearest::Elsewhere(view.tier)));
        let largest = considered
            .iter()
            .filter(|view| view.tier != Tier::Ram && view.out_of_service.is_none())
            .max_by_key(|view| (view.budget, std::cmp::Reverse(view.tier)));
        if let (Some(view), Some(ram)) = (largest, self.view(Tier::Ram)) {
            let in_ram = self.whole(view, &order).saturating_sub(view.budget);
            let split = may_split && in_ram <= ram.budget && !view.budget.is_zero();
            nearest.extend(split.then_some(Nearest::Split {
                tier: view.tier,
                in_ram,
            }));
        }
        let place = |order: &[Arc<Component>]| {
            let tier = considered.iter().find(|view| fits(view, order));
            tier.map(|view| view.tier)
        };
        nearest.extend(without(set, place));
        error
    }
}

/// What could be left out of a set: the smallest model that helps, or the largest ones together where none does alone.
fn without(
    set: &DependencyGraph,
    place: impl Fn(&[Arc<Component>]) -> Option<Tier>,
) -> Option<Nearest> {
    let sum = |order: &[Arc<Component>]| -> Bytes { order.iter().map(|c| c.bytes).sum() };
    let tried = |gone: BTreeSet<usize>| {
        let rest = set.without(&gone);
        let tier = if rest.is_empty() { None } else { place(&rest) };
        (sum(&rest), gone, tier)
    };
    let mut alone: Vec<_> = (0..set.models().len())
        .map(|model| tried(set.bound_to(model)))
        .collect();
    // What leaves most comes first.
    alone.sort_by_key(|(rest, ..)| std::cmp::Reverse(*rest));
    let found = alone
        .iter()
        .find_map(|(_, gone, tier)| Some((gone.clone(), (*tier)?)));
    let (gone, tier) = found.or_else(|| {
        let mut all = BTreeSet::new();
        alone.iter().rev().find_map(|(_, gone, _)| {
            all.extend(gone);
            let (_, gone, tier) = tried(all.clone());
            Some((gone, tier?))
        })
    })?;
    let models = gone.iter().filter_map(|model| set.models().get(*model));
    Some(Nearest::Without {
        models: models.cloned().collect(),
        tier,
    })
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
            let shortage = crate::plan::Shortage {
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
