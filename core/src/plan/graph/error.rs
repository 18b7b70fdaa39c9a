//! Why names do not make a set.

use std::sync::Arc;

use crate::catalog::FindError;
use crate::ids::{ComponentId, ModelName};

/// Why a set cannot be made out of the names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResolveError {
    /// No names.
    #[error("the component set is empty; name at least one model")]
    Empty,
    /// Something is wrong with a name that a declared set stands for.
    #[error("in the set {}: {error}", path.join(" -> "))]
    InSet {
        /// The sets, from the one that was named to the one that has the name.
        path: Vec<String>,
        /// What is wrong.
        error: Box<Self>,
    },
    /// Declared sets contain each other.
    #[error(
        "declared sets contain each other: {}; take one of these out of the `models` of the set before it",
        path.join(" -> ")
    )]
    SetCycle {
        /// The names, from one set back to itself.
        path: Vec<String>,
    },
    /// Components would each have to come before the other.
    #[error(
        "no component can be first: {}; take one of these out of the `order` of the set",
        path.iter().map(ToString::to_string).collect::<Vec<_>>().join(" before ")
    )]
    OrderCycle {
        /// The components, from one back to itself.
        path: Vec<ComponentId>,
    },
    /// A name that is not in the catalogue, or is several.
    #[error(transparent)]
    Find(#[from] FindError),
    /// The model has no such component.
    #[error("{model} has no component `{component}`; it has {}", available.join(", "))]
    NoComponent {
        /// The model.
        model: ModelName,
        /// What was asked for.
        component: String,
        /// What there is.
        available: Vec<String>,
    },
    /// The catalogue knows why it cannot be loaded.
    #[error("{model} cannot be loaded: {reason}")]
    NotLoadable {
        /// The model.
        model: ModelName,
        /// Why, with what to do.
        reason: Arc<str>,
    },
    /// The base of an adapter is nowhere.
    #[error(
        "{adapter} needs a base model ({base}), and the catalogue has none{}; add one to a scanned folder, or name the base in the set",
        others(there)
    )]
    BaseMissing {
        /// The adapter.
        adapter: ModelName,
        /// What it needs.
        base: String,
        /// Bases that there are, each with what it is; none of them is known to fit.
        there: Vec<String>,
    },
    /// Several models could be the base of an adapter.
    #[error(
        "{adapter} needs a base model ({base}), and several fit: {}; name the one that you mean in the set",
        list(candidates)
    )]
    BaseAmbiguous {
        /// The adapter.
        adapter: ModelName,
        /// What it needs.
        base: String,
        /// What would do.
        candidates: Vec<ModelName>,
    },
    /// The set has a base, but of another architecture.
    #[error(
        "{adapter} is made for {base}, but the set has {}; {}",
        found.join(", "),
        instead(fitting)
    )]
    BaseIncompatible {
        /// The adapter.
        adapter: ModelName,
        /// What it needs.
        base: String,
        /// The bases in the set, each with what it is.
        found: Vec<String>,
        /// Models of the catalogue that would do.
        fitting: Vec<ModelName>,
    },
}

impl ResolveError {
    /// The same, in these sets.
    pub(super) fn within(self, path: &[String]) -> Self {
        match self {
            // A path of their own tells more.
            Self::SetCycle { .. } | Self::OrderCycle { .. } | Self::InSet { .. } => self,
            error if path.is_empty() => error,
            error => Self::InSet {
                path: path.to_vec(),
                error: Box::new(error),
            },
        }
    }

    /// What is wrong, whichever sets it is in.
    #[must_use]
    pub fn cause(&self) -> &Self {
        match self {
            Self::InSet { error, .. } => error.cause(),
            error => error,
        }
    }
}

/// Candidates in a message at most.
const SHOWN: usize = 6;

fn list(names: &[ModelName]) -> String {
    let shown = names.iter().take(SHOWN).map(ModelName::as_str);
    let mut text = shown.collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}

fn others(there: &[String]) -> String {
    match there.len() {
        0 => String::new(),
        n if n > SHOWN => format!(
            " (it has {} and {} more)",
            there
                .iter()
                .take(SHOWN)
                .cloned()
                .collect::<Vec<_>>()
                .join(", "),
            n - SHOWN
        ),
        _ => format!(" (it has {})", there.join(", ")),
    }
}

fn instead(fitting: &[ModelName]) -> String {
    if fitting.is_empty() {
        "leave one of them out, or choose two that belong together".into()
    } else {
        format!("name {} instead, or leave the adapter out", list(fitting))
    }
}
