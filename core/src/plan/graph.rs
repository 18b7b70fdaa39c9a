//! The dependency graph of a set: which components it consists of, and which of them is used before which.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use petgraph::graph::{DiGraph, NodeIndex};

use crate::catalog::{Catalogue, Component, FindError, Kind, Model, Presence};
use crate::config::SetConfig;
use crate::ids::{ComponentId, ContentId, ModelName};

/// Why one component comes before another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    /// The pipeline uses it first: text encoders, then the denoiser, then the VAE.
    UsedBefore,
    /// An adapter is of use only on its base.
    Adapts,
    /// The configuration says so (`order` of a `[[set]]`).
    Declared,
}

impl std::fmt::Display for Edge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::UsedBefore => "used before",
            Self::Adapts => "adapts",
            Self::Declared => "declared to come before",
        })
    }
}

/// Why a set cannot be made out of the names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResolveError {
    /// No names.
    #[error("the component set is empty; name at least one model")]
    Empty,
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
        "{adapter} needs a base model ({base}), and the catalogue has none; add one to a scanned folder, or name the base in the set"
    )]
    BaseMissing {
        /// The adapter.
        adapter: ModelName,
        /// What it needs.
        base: String,
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
        "{adapter} is made for {base}, but the set has {} ({found}); choose an adapter or a base of the same architecture",
        list(models)
    )]
    BaseIncompatible {
        /// The adapter.
        adapter: ModelName,
        /// What it needs.
        base: String,
        /// The bases in the set.
        models: Vec<ModelName>,
        /// Their architectures.
        found: String,
    },
}

fn list(names: &[ModelName]) -> String {
    names
        .iter()
        .map(ModelName::as_str)
        .collect::<Vec<_>>()
        .join(", ")
}

/// The components of a set, each content once, and what comes before what.
#[derive(Debug, Clone)]
pub struct DependencyGraph {
    graph: DiGraph<Arc<Component>, Edge>,
}

impl DependencyGraph {
    /// The components in loading order: what is used first comes first, and where nothing is said, what was named
    /// first.
    #[must_use]
    pub fn order(&self) -> Vec<Arc<Component>> {
        use petgraph::Direction::{Incoming, Outgoing};
        let mut waiting: HashMap<NodeIndex, usize> = self
            .graph
            .node_indices()
            .map(|node| (node, self.graph.neighbors_directed(node, Incoming).count()))
            .collect();
        let mut ready: std::collections::BTreeSet<NodeIndex> = waiting
            .iter()
            .filter(|(_, before)| **before == 0)
            .map(|(node, _)| *node)
            .collect();
        let mut order = Vec::with_capacity(waiting.len());
        while let Some(node) = ready.pop_first() {
            order.push(self.graph[node].clone());
            for after in self.graph.neighbors_directed(node, Outgoing) {
                if let Some(before) = waiting.get_mut(&after) {
                    *before -= 1;
                    if *before == 0 {
                        ready.insert(after);
                    }
                }
            }
        }
        // Without cycles, see `build`, so none is left out.
        debug_assert_eq!(order.len(), self.graph.node_count());
        order
    }

    /// Each edge: what comes first, what comes after, and why.
    pub fn edges(&self) -> impl Iterator<Item = (&Arc<Component>, &Arc<Component>, Edge)> {
        self.graph.edge_indices().filter_map(|edge| {
            let (from, to) = self.graph.edge_endpoints(edge)?;
            Some((&self.graph[from], &self.graph[to], self.graph[edge]))
        })
    }

    /// The graph in the language of Graphviz: one node for each component, one arrow for each edge.
    #[must_use]
    pub fn dot(&self) -> String {
        use std::fmt::Write;
        let quoted = |text: String| text.replace('\\', "\\\\").replace('"', "\\\"");
        let mut dot = String::from("digraph set {\n  rankdir=LR;\n  node [shape=box];\n");
        for component in self.graph.node_weights() {
            let (id, kind) = (quoted(component.id.to_string()), component.kind);
            // Writing to a string cannot fail.
            let _ = writeln!(
                dot,
                "  \"{id}\" [label=\"{id}\\n{kind}, {}\"];",
                component.bytes
            );
        }
        for (from, to, edge) in self.edges() {
            let (from, to) = (quoted(from.id.to_string()), quoted(to.id.to_string()));
            let _ = writeln!(dot, "  \"{from}\" -> \"{to}\" [label=\"{edge}\"];");
        }
        dot.push_str("}\n");
        dot
    }

    /// How many components there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.graph.node_count()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// When a pipeline uses a component first. `None`: whenever.
const fn stage(kind: Kind) -> Option<u8> {
    match kind {
        Kind::TextEncoder | Kind::ImageEncoder => Some(0),
        Kind::Unet | Kind::Transformer => Some(1),
        Kind::Vae => Some(2),
        _ => None,
    }
}

/// Names without those of sets, and what these say of the order.
#[derive(Default)]
struct Expanded {
    names: Vec<String>,
    orders: Vec<Vec<Vec<String>>>,
}

impl Expanded {
    /// Adds a name; `path` are the sets that it is in. Gives the names that it stands for.
    fn add(
        &mut self,
        sets: &[SetConfig],
        name: &str,
        path: &mut Vec<String>,
    ) -> Result<Vec<String>, ResolveError> {
        let Some(set) = sets.iter().find(|set| set.name == name) else {
            if !self.names.iter().any(|known| known == name) {
                self.names.push(name.to_owned());
            }
            return Ok(vec![name.to_owned()]);
        };
        if let Some(at) = path.iter().position(|outer| outer == name) {
            let mut path = path.split_off(at);
            path.push(name.to_owned());
            return Err(ResolveError::SetCycle { path });
        }
        path.push(name.to_owned());
        let mut all = Vec::new();
        let mut parts = HashMap::new();
        for inner in &set.models {
            let names = self.add(sets, inner, path)?;
            all.extend(names.iter().cloned());
            parts.insert(inner, names);
        }
        path.pop();
        let order: Vec<Vec<String>> = set
            .order
            .iter()
            .filter_map(|name| parts.get(name).cloned())
            .collect();
        self.orders.push(order);
        Ok(all)
    }
}

/// Makes the graph of the models, components and declared sets with these names.
///
/// # Errors
/// [`ResolveError`].
pub fn resolve(
    catalogue: &Catalogue,
    sets: &[SetConfig],
    names: &[String],
    dependencies: bool,
) -> Result<DependencyGraph, ResolveError> {
    let mut expanded = Expanded::default();
    for name in names {
        expanded.add(sets, name, &mut Vec::new())?;
    }
    if expanded.names.is_empty() {
        return Err(ResolveError::Empty);
    }
    let mut chosen: Vec<(Arc<Model>, Vec<Arc<Component>>)> = Vec::new();
    for name in &expanded.names {
        let found = find(catalogue, name)?;
        match chosen
            .iter_mut()
            .find(|(model, _)| model.name == found.0.name)
        {
            None => chosen.push(found),
            Some((_, components)) => components.extend(found.1),
        }
    }
    let mut bases: Vec<(ModelName, ModelName)> = Vec::new();
    if dependencies {
        let named: Vec<Arc<Model>> = chosen.iter().map(|(model, _)| model.clone()).collect();
        for adapter in named.iter().filter(|model| model.kind.is_adapter()) {
            let Some(base) = base_of(catalogue, adapter, &named)? else {
                continue;
            };
            bases.push((adapter.name.clone(), base.name.clone()));
            if !chosen.iter().any(|(model, _)| model.name == base.name) {
                let components = base.components.clone();
                chosen.insert(0, (base, components));
            }
        }
    }
    let mut declared = Vec::new();
    for order in &expanded.orders {
        let parts = order.iter().map(|names| {
            let found = names.iter().map(|name| Ok(find(catalogue, name)?.1));
            let components: Result<Vec<_>, ResolveError> = found.collect();
            Ok(components?.concat())
        });
        declared.push(parts.collect::<Result<Vec<_>, ResolveError>>()?);
    }
    build(&chosen, &bases, &declared)
}

/// A model with all its components, or with the one that is named.
fn find(
    catalogue: &Catalogue,
    name: &str,
) -> Result<(Arc<Model>, Vec<Arc<Component>>), ResolveError> {
    let loadable = |model: &Arc<Model>| {
        let reason: Arc<str> = match (&model.error, model.presence) {
            (Some(reason), _) => reason.clone(),
            (None, Presence::Present) => return Ok(()),
            (None, Presence::Unread) => "it could not be read yet; try again".into(),
            (None, Presence::Incomplete) => {
                "it is still being written; try again when it is whole".into()
            }
            (None, Presence::Gone) => {
                "its files were removed; only leases that exist still hold it".into()
            }
        };
        Err(ResolveError::NotLoadable {
            model: model.name.clone(),
            reason,
        })
    };
    match catalogue.find(name) {
        Ok(model) => {
            loadable(model)?;
            Ok((model.clone(), model.components.clone()))
        }
        Err(whole) => {
            let Some((model, component)) = name
                .rsplit_once('/')
                .and_then(|(model, component)| Some((catalogue.find(model).ok()?, component)))
            else {
                return Err(whole.into());
            };
            loadable(model)?;
            match model.component(component) {
                Some(found) => Ok((model.clone(), vec![found.clone()])),
                None => Err(ResolveError::NoComponent {
                    model: model.name.clone(),
                    component: component.to_owned(),
                    available: model
                        .components
                        .iter()
                        .map(|c| c.id.component.to_string())
                        .collect(),
                }),
            }
        }
    }
}

/// Whether a model can carry an adapter.
const fn is_base(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Pipeline
            | Kind::Checkpoint
            | Kind::Unet
            | Kind::Transformer
            | Kind::LanguageModel
            | Kind::VisionLanguageModel
            | Kind::EmbeddingModel
    )
}

/// The model that an adapter needs: one of the set, else the one in the catalogue. `None` where the adapter does not
/// say what it needs.
fn base_of(
    catalogue: &Catalogue,
    adapter: &Model,
    named: &[Arc<Model>],
) -> Result<Option<Arc<Model>>, ResolveError> {
    let Some(base) = &adapter.base else {
        return Ok(None);
    };
    let wanted = match (&base.name, &base.architecture) {
        (Some(name), Some(architecture)) => format!("{name}, {architecture}"),
        (Some(one), None) | (None, Some(one)) => one.to_string(),
        (None, None) => return Ok(None),
    };
    let loadable_base = |model: &&Arc<Model>| is_base(model.kind) && model.error.is_none();
    let same_architecture = |model: &&Arc<Model>| {
        base.architecture
            .as_ref()
            .is_some_and(|architecture| model.architecture.as_ref() == Some(architecture))
    };
    let in_set: Vec<&Arc<Model>> = named.iter().filter(loadable_base).collect();
    if let Some(found) = in_set.iter().find(|model| same_architecture(model)) {
        return Ok(Some((**found).clone()));
    }
    let by_name = base.name.as_ref().and_then(|name| {
        let last = name.rsplit('/').next().unwrap_or(name);
        catalogue.find(name).or_else(|_| catalogue.find(last)).ok()
    });
    if let Some(found) = by_name.filter(loadable_base)
        && (in_set.is_empty() || in_set.iter().any(|model| model.name == found.name))
    {
        return Ok(Some(found.clone()));
    }
    // An adapter for an unknown architecture cannot be judged against what the set has.
    if base.architecture.is_some()
        && !in_set.is_empty()
        && in_set.iter().all(|model| model.architecture.is_some())
    {
        let mut found: Vec<&str> = in_set
            .iter()
            .filter_map(|model| model.architecture.as_deref())
            .collect();
        found.dedup();
        return Err(ResolveError::BaseIncompatible {
            adapter: adapter.name.clone(),
            base: wanted,
            models: in_set.iter().map(|model| model.name.clone()).collect(),
            found: found.join(", "),
        });
    }
    if !in_set.is_empty() {
        return Ok(Some(in_set[0].clone()));
    }
    let candidates: Vec<&Arc<Model>> = catalogue
        .models()
        .filter(loadable_base)
        .filter(same_architecture)
        .collect();
    match candidates.as_slice() {
        [] => Err(ResolveError::BaseMissing {
            adapter: adapter.name.clone(),
            base: wanted,
        }),
        [one] => Ok(Some((*one).clone())),
        several => Err(ResolveError::BaseAmbiguous {
            adapter: adapter.name.clone(),
            base: wanted,
            candidates: several.iter().map(|model| model.name.clone()).collect(),
        }),
    }
}

fn build(
    chosen: &[(Arc<Model>, Vec<Arc<Component>>)],
    bases: &[(ModelName, ModelName)],
    declared: &[Vec<Vec<Arc<Component>>>],
) -> Result<DependencyGraph, ResolveError> {
    let mut graph = DiGraph::new();
    let mut nodes: HashMap<ContentId, NodeIndex> = HashMap::new();
    let mut of_model: BTreeMap<&ModelName, Vec<NodeIndex>> = BTreeMap::new();
    for (model, components) in chosen {
        for component in components {
            // One content is loaded once, whichever models have it.
            let node = *nodes
                .entry(component.content_id)
                .or_insert_with(|| graph.add_node(component.clone()));
            let own = of_model.entry(&model.name).or_default();
            if !own.contains(&node) {
                own.push(node);
            }
        }
    }
    for own in of_model.values() {
        for &before in own {
            for &after in own {
                if let (Some(first), Some(second)) =
                    (stage(graph[before].kind), stage(graph[after].kind))
                    && first < second
                {
                    graph.update_edge(before, after, Edge::UsedBefore);
                }
            }
        }
    }
    for (adapter, base) in bases {
        for &adapted in of_model.get(base).into_iter().flatten() {
            let carries = matches!(
                graph[adapted].kind,
                Kind::Unet | Kind::Transformer | Kind::LanguageModel | Kind::Checkpoint
            );
            for &after in of_model.get(adapter).into_iter().flatten() {
                if carries && adapted != after && !graph.contains_edge(after, adapted) {
                    graph.update_edge(adapted, after, Edge::Adapts);
                }
            }
        }
    }
    for order in declared {
        for pair in order.windows(2) {
            let [first, second] = pair else { continue };
            for before in first.iter().filter_map(|c| nodes.get(&c.content_id)) {
                for after in second.iter().filter_map(|c| nodes.get(&c.content_id)) {
                    if before != after && !graph.contains_edge(*before, *after) {
                        graph.add_edge(*before, *after, Edge::Declared);
                    }
                }
            }
        }
    }
    match petgraph::algo::toposort(&graph, None) {
        Ok(_) => Ok(DependencyGraph { graph }),
        Err(cycle) => Err(ResolveError::OrderCycle {
            path: cycle_through(&graph, cycle.node_id()),
        }),
    }
}

/// A way from a node back to itself; just the node where there is none.
fn cycle_through(graph: &DiGraph<Arc<Component>, Edge>, node: NodeIndex) -> Vec<ComponentId> {
    let ways = graph.neighbors(node).find_map(|next| {
        let found = petgraph::algo::astar(graph, next, |at| at == node, |_| 1_u32, |_| 0)?;
        Some(found.1)
    });
    std::iter::once(node)
        .chain(ways.unwrap_or_default())
        .filter_map(|node| Some(graph.node_weight(node)?.id.clone()))
        .collect()
}

#[cfg(test)]
mod tests;
