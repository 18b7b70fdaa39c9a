//! The dependency graph of a set: which components it consists of, and which of them is used before which.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use petgraph::graph::{DiGraph, NodeIndex};

use crate::catalog::{Catalogue, Component, Kind, Model, Presence};
use crate::config::SetConfig;
use crate::ids::{ComponentId, ContentId, ModelName};

mod base;
mod error;
mod names;

use base::{base_of, target_of, works_on};
pub use error::ResolveError;
use names::{Expanded, Name};

/// Why one component comes before another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    /// The pipeline uses it first: text encoders, then the denoiser, then the VAE.
    UsedBefore,
    /// An adapter is of use only on its base.
    Adapts,
    /// A draft guesses for its target, and has the same tokens.
    Drafts,
    /// The configuration says so (`order` of a `[[set]]`).
    Declared,
}

impl std::fmt::Display for Edge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::UsedBefore => "used before",
            Self::Adapts => "adapts",
            Self::Drafts => "drafts for",
            Self::Declared => "declared to come before",
        })
    }
}

/// The components of a set, each content once, and what comes before what.
#[derive(Debug, Clone)]
pub struct DependencyGraph {
    graph: DiGraph<Arc<Component>, Edge>,
    models: Vec<ModelName>,
    /// The models of each node, by their places in `models`; never none.
    of: Vec<Vec<usize>>,
    /// Pairs of a model and one that is of use only with it.
    bonds: Vec<(usize, usize)>,
}

impl DependencyGraph {
    /// The components in loading order, where none is there yet and bytes take time.
    #[must_use]
    pub fn order(&self) -> Vec<Arc<Component>> {
        self.order_by(|component| component.bytes.as_f64())
    }

    /// The components in loading order. What is used first comes first, and of what is used at the same time, what was
    /// named first. Within a model it is what costs nothing, and then what has the longest way behind it: itself and
    /// what is used after it, one after the other.
    pub fn order_by(&self, cost: impl Fn(&Component) -> f64) -> Vec<Arc<Component>> {
        use petgraph::Direction::{Incoming, Outgoing};
        // Without cycles, see `build`, so this is never empty where there are nodes.
        let sorted = petgraph::algo::toposort(&self.graph, None).unwrap_or_default();
        let mut costs = vec![0.0; self.graph.node_count()];
        let mut ways = vec![0.0_f64; self.graph.node_count()];
        for node in sorted.into_iter().rev() {
            let after = self.graph.neighbors_directed(node, Outgoing);
            let longest = after.map(|after| ways[after.index()]).fold(0.0, f64::max);
            costs[node.index()] = cost(&self.graph[node]);
            ways[node.index()] = costs[node.index()] + longest;
        }
        let mut before: Vec<usize> = self
            .graph
            .node_indices()
            .map(|node| self.graph.neighbors_directed(node, Incoming).count())
            .collect();
        let mut ready: Vec<NodeIndex> = self
            .graph
            .node_indices()
            .filter(|node| before[node.index()] == 0)
            .collect();
        let first = |a: &NodeIndex, b: &NodeIndex| {
            let (i, j) = (a.index(), b.index());
            let model = self.of[i].first().cmp(&self.of[j].first());
            let costs_nothing = (costs[j] <= 0.0).cmp(&(costs[i] <= 0.0));
            let way = ways[j].total_cmp(&ways[i]);
            model.then(costs_nothing).then(way).then(i.cmp(&j))
        };
        let mut order = Vec::with_capacity(before.len());
        while let Some((at, node)) = ready
            .iter()
            .copied()
            .enumerate()
            .min_by(|(_, a), (_, b)| first(a, b))
        {
            ready.swap_remove(at);
            order.push(self.graph[node].clone());
            for after in self.graph.neighbors_directed(node, Outgoing) {
                before[after.index()] -= 1;
                if before[after.index()] == 0 {
                    ready.push(after);
                }
            }
        }
        debug_assert_eq!(order.len(), self.graph.node_count());
        order
    }

    /// The models that the components are of.
    pub(super) fn models(&self) -> &[ModelName] {
        &self.models
    }

    /// A model and what is of use only with it, by their places among the models.
    pub(super) fn bound_to(&self, model: usize) -> BTreeSet<usize> {
        let bound = self.bonds.iter().filter(|(base, _)| *base == model);
        bound.map(|(_, adapter)| *adapter).chain([model]).collect()
    }

    /// The components that are wanted without these models.
    pub(super) fn without(&self, models: &BTreeSet<usize>) -> Vec<Arc<Component>> {
        let stays = |of: &Vec<usize>| of.iter().any(|model| !models.contains(model));
        let nodes = self.graph.node_weights().zip(&self.of);
        let staying = nodes.filter(|(_, of)| stays(of));
        staying.map(|(component, _)| component.clone()).collect()
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
        Kind::Unet
        | Kind::Transformer
        | Kind::Controlnet
        | Kind::ControlLora
        | Kind::T2iAdapter
        | Kind::IpAdapter => Some(1),
        Kind::Vae => Some(2),
        _ => None,
    }
}

/// What is in a set of one model.
struct Chosen {
    model: Arc<Model>,
    components: Vec<Arc<Component>>,
    /// The declared sets that it is in.
    path: Vec<String>,
}

/// One model is of use only with another.
struct Bond {
    adapter: Arc<Model>,
    base: ModelName,
    why: Edge,
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
    let mut chosen: Vec<Chosen> = Vec::new();
    for Name { text, path } in &expanded.names {
        let (model, components) = find(catalogue, text).map_err(|error| error.within(path))?;
        match chosen
            .iter_mut()
            .find(|known| known.model.name == model.name)
        {
            None => chosen.push(Chosen {
                model,
                components,
                path: path.clone(),
            }),
            Some(known) => known.components.extend(components),
        }
    }
    let mut bonds = if dependencies {
        with_bases(catalogue, &mut chosen)?
    } else {
        Vec::new()
    };
    for (drafts, all) in &expanded.drafts {
        let models = |names: &[String]| -> Result<Vec<Arc<Model>>, ResolveError> {
            names
                .iter()
                .map(|name| Ok(find(catalogue, name)?.0))
                .collect()
        };
        let all = models(all)?;
        for draft in models(drafts)? {
            let path = chosen.iter().find(|c| c.model.name == draft.name);
            let path = path.map(|c| c.path.clone()).unwrap_or_default();
            let target = target_of(&draft, &all).map_err(|error| error.within(&path))?;
            bonds.extend(target.map(|target| Bond {
                adapter: draft,
                base: target.name.clone(),
                why: Edge::Drafts,
            }));
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
    build(&chosen, &bonds, &declared)
}

/// Adds to a set what its adapters need: a base that is not in it, and of one that is in it in part, what they work on.
fn with_bases(catalogue: &Catalogue, chosen: &mut Vec<Chosen>) -> Result<Vec<Bond>, ResolveError> {
    let named: Vec<Arc<Model>> = chosen.iter().map(|c| c.model.clone()).collect();
    let mut bonds = Vec::new();
    for adapter in named.iter().filter(|model| model.kind.is_adapter()) {
        let path = chosen.iter().find(|c| c.model.name == adapter.name);
        let path = path.map(|c| c.path.clone()).unwrap_or_default();
        let base = base_of(catalogue, adapter, &named).map_err(|error| error.within(&path))?;
        let Some(base) = base else { continue };
        bonds.push(Bond {
            adapter: adapter.clone(),
            base: base.name.clone(),
            why: match adapter.kind {
                Kind::DraftModel => Edge::Drafts,
                _ => Edge::Adapts,
            },
        });
        match chosen.iter_mut().find(|c| c.model.name == base.name) {
            Some(known) => {
                let needed = base
                    .components
                    .iter()
                    .filter(|c| works_on(adapter.kind, c.kind));
                known.components.extend(needed.cloned());
            }
            None => {
                loadable(&base).map_err(|error| error.within(&path))?;
                let components = base.components.clone();
                let base = Chosen {
                    model: base,
                    components,
                    path,
                };
                chosen.insert(0, base);
            }
        }
    }
    Ok(bonds)
}

/// Whether a model's components can be loaded.
fn loadable(model: &Model) -> Result<(), ResolveError> {
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
}

/// A model with all its components, or with the one that is named.
fn find(
    catalogue: &Catalogue,
    name: &str,
) -> Result<(Arc<Model>, Vec<Arc<Component>>), ResolveError> {
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

fn build(
    chosen: &[Chosen],
    bonds: &[Bond],
    declared: &[Vec<Vec<Arc<Component>>>],
) -> Result<DependencyGraph, ResolveError> {
    let mut graph = DiGraph::new();
    let mut of: Vec<Vec<usize>> = Vec::new();
    let mut nodes: HashMap<ContentId, NodeIndex> = HashMap::new();
    let mut of_model: BTreeMap<&ModelName, Vec<NodeIndex>> = BTreeMap::new();
    for (
        i,
        Chosen {
            model, components, ..
        },
    ) in chosen.iter().enumerate()
    {
        for component in components {
            // One content is loaded once, whichever models have it.
            let node = *nodes.entry(component.content_id).or_insert_with(|| {
                of.push(Vec::new());
                graph.add_node(component.clone())
            });
            of[node.index()].push(i);
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
    let bonded = |bond: &Bond| {
        let of = |name| of_model.get(name).map(Vec::as_slice).unwrap_or_default();
        (of(&bond.base), of(&bond.adapter.name))
    };
    for bond in bonds {
        let (base, adapter) = bonded(bond);
        for &adapted in base {
            let works = match bond.why {
                Edge::Drafts => true,
                _ => works_on(bond.adapter.kind, graph[adapted].kind),
            };
            for &after in adapter {
                if works && adapted != after && !graph.contains_edge(after, adapted) {
                    graph.update_edge(adapted, after, bond.why);
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
    // An adapter is used together with what it adapts, and so before what comes after that, unless the order says else.
    for bond in bonds {
        let (base, adapter) = bonded(bond);
        let last = |node: &&NodeIndex| stage(graph[**node].kind) == Some(2);
        let last: Vec<NodeIndex> = base.iter().filter(last).copied().collect();
        for &before in adapter {
            for &after in &last {
                if before != after
                    && !petgraph::algo::has_path_connecting(&graph, after, before, None)
                {
                    graph.update_edge(before, after, Edge::UsedBefore);
                }
            }
        }
    }
    let place = |name: &ModelName| chosen.iter().position(|c| c.model.name == *name);
    let pairs = bonds
        .iter()
        .filter_map(|bond| Some((place(&bond.base)?, place(&bond.adapter.name)?)))
        .collect();
    match petgraph::algo::toposort(&graph, None) {
        Ok(_) => Ok(DependencyGraph {
            graph,
            models: chosen.iter().map(|c| c.model.name.clone()).collect(),
            of,
            bonds: pairs,
        }),
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
