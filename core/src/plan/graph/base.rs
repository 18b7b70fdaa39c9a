//! Which model an adapter, a ControlNet or a draft is used with.

use std::sync::Arc;

use super::ResolveError;
use crate::catalog::{BaseModel, Catalogue, Kind, Model};

/// Whether an adapter of this kind works on a component of that kind: what it cannot do without.
pub(super) const fn works_on(adapter: Kind, component: Kind) -> bool {
    match component {
        Kind::Unet | Kind::Transformer => {
            !matches!(adapter, Kind::TextualInversion | Kind::DraftModel)
        }
        Kind::TextEncoder => matches!(adapter, Kind::Lora | Kind::TextualInversion),
        Kind::ImageEncoder => matches!(adapter, Kind::IpAdapter),
        Kind::LanguageModel
        | Kind::VisionLanguageModel
        | Kind::EmbeddingModel
        | Kind::Checkpoint
        | Kind::Unknown => true,
        _ => false,
    }
}

/// Whether a model could be the base of an adapter, by what both are for.
fn may_carry(adapter: &Model, model: &Model) -> bool {
    let diffusion = matches!(
        model.kind,
        Kind::Pipeline | Kind::Checkpoint | Kind::Unet | Kind::Transformer
    );
    let language = model.kind.is_language_model() || model.kind == Kind::EmbeddingModel;
    let architecture = adapter.base.as_ref().and_then(|b| b.architecture.as_ref());
    model.error.is_none()
        && match adapter.kind {
            Kind::DraftModel => model.kind.is_language_model(),
            // What tells its architecture is for images: adapters for text look alike whatever they are for.
            Kind::Lora if architecture.is_none() => diffusion || language,
            _ => diffusion,
        }
}

/// Whether a model is what an adapter was made for. `None`: it cannot be told.
pub(super) fn suits(adapter: &Model, model: &Model) -> Option<bool> {
    if adapter.kind == Kind::DraftModel {
        return speaks_as(adapter, model);
    }
    let made_for = adapter.base.as_ref()?.architecture.as_ref()?;
    Some(made_for == model.architecture.as_ref()?)
}

/// Whether two language models may have the same tokens. `None`: it cannot be told.
pub(super) fn speaks_as(draft: &Model, target: &Model) -> Option<bool> {
    let (draft, target) = (draft.facts.tokenizer?, target.facts.tokenizer?);
    Some(draft.is_of_family(&target))
}

/// What an adapter needs, in words. `None`: it does not say.
fn wanted(adapter: &Model) -> Option<String> {
    let base = adapter.base.as_ref();
    let name = base.and_then(|base| base.name.as_deref());
    let kin = match adapter.kind {
        Kind::DraftModel => adapter.facts.tokenizer.map(|t| t.to_string()),
        _ => base
            .and_then(|base| base.architecture.as_deref())
            .map(str::to_owned),
    };
    match (name, kin) {
        (Some(name), Some(kin)) => Some(format!("{name}, {kin}")),
        (Some(one), None) => Some(one.to_owned()),
        (None, kin) => kin,
    }
}

/// A base with what it is, as far as it matters for the adapter.
fn described(adapter: &Model, model: &Model) -> String {
    let kin = match adapter.kind {
        Kind::DraftModel => model.facts.tokenizer.map(|t| t.to_string()),
        _ => model.architecture.as_deref().map(str::to_owned),
    };
    match kin {
        Some(kin) => format!("{} ({kin})", model.name),
        None => model.name.to_string(),
    }
}

/// The model whose name or repository an adapter's metadata state.
fn named<'c>(catalogue: &'c Catalogue, base: &BaseModel) -> Option<&'c Arc<Model>> {
    let name = base.name.as_deref()?;
    let last = name.rsplit('/').next().unwrap_or(name);
    catalogue.find(name).or_else(|_| catalogue.find(last)).ok()
}

/// The model that an adapter needs: one of the set, else the one in the catalogue. `None` where the adapter does not
/// say what it needs.
pub(super) fn base_of(
    catalogue: &Catalogue,
    adapter: &Model,
    set: &[Arc<Model>],
) -> Result<Option<Arc<Model>>, ResolveError> {
    let Some(base) = wanted(adapter) else {
        return Ok(None);
    };
    let by_name = adapter
        .base
        .as_ref()
        .and_then(|base| named(catalogue, base))
        .filter(|model| may_carry(adapter, model) && suits(adapter, model) != Some(false));
    let fitting = || {
        catalogue
            .models()
            .filter(|model| may_carry(adapter, model) && suits(adapter, model) == Some(true))
    };
    let in_set: Vec<&Arc<Model>> = set.iter().filter(|m| may_carry(adapter, m)).collect();
    if !in_set.is_empty() {
        let is_named = |model: &&Arc<Model>| by_name.is_some_and(|named| named.name == model.name);
        let suiting = |wanted| in_set.iter().find(|m| suits(adapter, m) == wanted);
        let found = in_set.iter().find(|model| is_named(model));
        // An adapter for an unknown architecture cannot be judged against what the set has.
        return match found.or(suiting(Some(true))).or(suiting(None)) {
            Some(found) => Ok(Some((**found).clone())),
            None => Err(ResolveError::BaseIncompatible {
                adapter: adapter.name.clone(),
                base,
                found: in_set.iter().map(|m| described(adapter, m)).collect(),
                fitting: fitting().map(|model| model.name.clone()).collect(),
            }),
        };
    }
    if let Some(found) = by_name {
        return Ok(Some(found.clone()));
    }
    let candidates: Vec<&Arc<Model>> = fitting().collect();
    match candidates.as_slice() {
        [] => Err(ResolveError::BaseMissing {
            adapter: adapter.name.clone(),
            base,
            there: catalogue
                .models()
                .filter(|model| may_carry(adapter, model))
                .map(|model| described(adapter, model))
                .collect(),
        }),
        [one] => Ok(Some((*one).clone())),
        several => Err(ResolveError::BaseAmbiguous {
            adapter: adapter.name.clone(),
            base,
            candidates: several.iter().map(|model| model.name.clone()).collect(),
        }),
    }
}

/// The model of a declared set for which a small language model of it guesses. `None`: the set has no other.
pub(super) fn target_of(
    draft: &Model,
    set: &[Arc<Model>],
) -> Result<Option<Arc<Model>>, ResolveError> {
    let others = || {
        set.iter()
            .filter(|m| m.kind.is_language_model() && m.name != draft.name)
    };
    let speaking = |wanted| others().find(|model| speaks_as(draft, model) == wanted);
    match speaking(Some(true)).or(speaking(None)) {
        Some(target) => Ok(Some(target.clone())),
        None if others().next().is_none() => Ok(None),
        None => {
            let tokenizer = draft.facts.tokenizer.map(|t| t.to_string());
            let as_draft = |model: &Arc<Model>| {
                let tokenizer = model.facts.tokenizer.map(|t| t.to_string());
                format!("{} ({})", model.name, tokenizer.unwrap_or_default())
            };
            Err(ResolveError::BaseIncompatible {
                adapter: draft.name.clone(),
                base: format!("a tokenizer of {}", tokenizer.unwrap_or_default()),
                found: others().map(as_draft).collect(),
                fitting: Vec::new(),
            })
        }
    }
}
