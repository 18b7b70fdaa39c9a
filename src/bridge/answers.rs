//! Requests that need no state of the connection, and errors as they go over the wire.

use std::collections::BTreeMap;

use hotset_core::catalog::FindError;
use hotset_core::catalog::query::Query;
use hotset_core::memory::FlightFailure;
use hotset_core::plan::{KeepAlive, PlanError, Priority, ResolveError};
use serde::Serialize;
use serde_json::Value;

use super::wire::{
    Decisions, ErrorReply, List, Load, MAX_DECISIONS, MAX_NAMES, MAX_PAGE, MAX_TEXT_BYTES,
    MixReply, ModelReply, Models, PlanMix, PlanReply, Progress, ServerMessage, Set, Why,
};
use super::{frame::FrameError, wire};
use crate::{
    Bytes, ComponentSet, GpuChoice, GpuIndex, Hotset, LoadError, LoadProgress, Phase, SessionError,
    documents,
};

/// How many decisions an answer has where the request does not say.
const DEFAULT_DECISIONS: usize = 100;

/// A value as the documents of the command line have it.
pub(super) fn document(value: &impl Serialize) -> Value {
    serde_json::to_value(value).unwrap_or_else(|error| {
        // Keys are strings and numbers finite: this would be a mistake in a type.
        tracing::error!(%error, "a document cannot be written");
        Value::Null
    })
}

/// An error with its code.
pub(super) fn refusal(code: &str, message: impl Into<String>) -> ErrorReply {
    ErrorReply {
        code: code.into(),
        message: message.into(),
        ..ErrorReply::default()
    }
}

/// Refuses text that is longer than any name is.
pub(super) fn check_text(what: &str, text: &str) -> Result<(), ErrorReply> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(refusal(
            "malformed",
            format!(
                "{what} is {} bytes long; {MAX_TEXT_BYTES} are allowed",
                text.len()
            ),
        ));
    }
    Ok(())
}

fn check_names(names: &[String]) -> Result<(), ErrorReply> {
    if names.len() > MAX_NAMES {
        return Err(refusal(
            "malformed",
            format!("{} names in one set; {MAX_NAMES} are allowed", names.len()),
        ));
    }
    for name in names {
        check_text("a name", name)?;
        if name.starts_with('/') {
            return Err(refusal(
                "names-only",
                format!(
                    "`{name}` is a path; models are loaded by their names in the catalogue, which `show` tells for a path"
                ),
            ));
        }
    }
    Ok(())
}

/// The set of a `plan` request.
pub(super) fn set_of(set: &Set) -> Result<ComponentSet, ErrorReply> {
    check_names(&set.names)?;
    let target = set
        .target
        .parse()
        .map_err(|error| refusal("no-such-tier", format!("{error}")))?;
    let mut wanted = ComponentSet::new(set.names.iter().cloned()).on(target);
    wanted.dependencies = set.dependencies;
    wanted.split = set.split;
    Ok(wanted)
}

/// The set of a `load` request.
pub(super) fn load_of(load: Load) -> Result<ComponentSet, ErrorReply> {
    let priority = match load.priority.as_str() {
        "interactive" => Priority::Interactive,
        "batch" => Priority::Batch,
        "prefetch" => Priority::Prefetch,
        other => {
            return Err(refusal(
                "malformed",
                format!("`{other}` is no priority; there are interactive, batch and prefetch"),
            ));
        }
    };
    let mut wanted = set_of(&Set {
        names: load.names,
        target: load.target,
        dependencies: load.dependencies,
        split: load.split,
    })?
    .with_priority(priority);
    wanted.keep_alive = match load.keep_alive {
        None => None,
        Some(text) => {
            check_text("the keep-alive", &text)?;
            let keep: Result<KeepAlive, _> = text.parse();
            Some(keep.map_err(|error| refusal("malformed", error.to_string()))?)
        }
    };
    wanted.deadline = load.deadline_ms.map(std::time::Duration::from_millis);
    Ok(wanted)
}

/// `list`
pub(super) fn list(hotset: &Hotset, request: &List) -> Result<ServerMessage, ErrorReply> {
    check_text("the query", &request.query)?;
    let query =
        Query::parse(&request.query).map_err(|error| refusal("malformed", error.to_string()))?;
    let catalogue = hotset.catalogue();
    let offset = usize::try_from(request.offset).unwrap_or(usize::MAX);
    let limit = match usize::try_from(request.limit).unwrap_or(usize::MAX) {
        0 => MAX_PAGE,
        limit => limit.min(MAX_PAGE),
    };
    let (total, models): (usize, Vec<Value>) = if query.is_empty() {
        let page = catalogue.models().skip(offset).take(limit);
        (
            catalogue.len(),
            page.map(|model| documents::model(model)).collect(),
        )
    } else {
        let hits = catalogue.search(&query, usize::MAX);
        let page = hits.iter().skip(offset).take(limit);
        (
            hits.len(),
            page.map(|hit| documents::model(&hit.model)).collect(),
        )
    };
    Ok(ServerMessage::Models(Models {
        generation: catalogue.generation(),
        total: total as u64,
        models,
    }))
}

/// `show`
pub(super) fn show(hotset: &Hotset, name: &str) -> Result<ServerMessage, ErrorReply> {
    check_text("the name", name)?;
    let catalogue = hotset.catalogue();
    let model = catalogue.find(name).map_err(|error| find_error(&error))?;
    let mut resident: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for view in hotset.ledger().views() {
        for residency in view.residencies.iter().filter(|r| !r.loading) {
            for component in &model.components {
                if component.content_id == residency.component.content_id {
                    let tiers = resident.entry(component.id.component.to_string());
                    tiers.or_default().push(view.tier.to_string());
                }
            }
        }
    }
    let mut shown = documents::model_in(&catalogue, model);
    shown["resident"] = document(&resident);
    Ok(ServerMessage::Model(ModelReply { model: shown }))
}

/// `plan`
pub(super) async fn plan(hotset: &Hotset, set: &Set) -> Result<ServerMessage, ErrorReply> {
    let plan = hotset
        .plan_split(&set_of(set)?)
        .await
        .map_err(|error| load_error(&error))?;
    Ok(ServerMessage::Plan(PlanReply {
        plan: document(&plan),
    }))
}

/// `plan-mix`
pub(super) fn plan_mix(hotset: &Hotset, mix: &PlanMix) -> Result<ServerMessage, ErrorReply> {
    let many = [mix.sets.len(), mix.gpus.len(), mix.imagined.len()];
    if many.iter().any(|count| *count > MAX_NAMES) {
        return Err(refusal(
            "malformed",
            format!("more than {MAX_NAMES} sets or GPUs in one plan"),
        ));
    }
    if mix.sets.iter().any(|set| set.split) {
        return Err(refusal(
            "malformed",
            "a set that may be split is planned alone, by `plan`",
        ));
    }
    let sets: Vec<ComponentSet> = mix.sets.iter().map(set_of).collect::<Result<_, _>>()?;
    let gpus = match (&mix.imagined[..], &mix.gpus[..]) {
        ([], []) => GpuChoice::All,
        ([], gpus) => GpuChoice::Only(gpus.iter().copied().map(GpuIndex).collect()),
        (imagined, _) => GpuChoice::Imagined(imagined.iter().copied().map(Bytes).collect()),
    };
    let mix = hotset
        .plan_mix(&sets, &gpus)
        .map_err(|error| load_error(&error))?;
    Ok(ServerMessage::Mix(MixReply {
        mix: document(&mix),
    }))
}

/// `why`
pub(super) fn why(hotset: &Hotset, request: &Why) -> Result<ServerMessage, ErrorReply> {
    check_text("the name", &request.name)?;
    let limit = match usize::try_from(request.limit).unwrap_or(usize::MAX) {
        0 => DEFAULT_DECISIONS,
        limit => limit.min(MAX_DECISIONS),
    };
    let decisions = if request.name.is_empty() {
        hotset.decisions(limit)
    } else {
        hotset.why(&request.name, limit)
    };
    Ok(ServerMessage::Decisions(Decisions {
        sentences: decisions.iter().map(|d| d.act.sentence()).collect(),
        decisions: decisions.iter().map(document).collect(),
    }))
}

impl From<&LoadProgress> for Progress {
    fn from(progress: &LoadProgress) -> Self {
        Self {
            stage: progress.stage.to_string(),
            done: progress.done.get(),
            total: progress.total.get(),
            elapsed_s: progress.elapsed_s,
            bytes_per_s: progress.bytes_per_s,
            eta_s: progress.eta_s,
            components: progress
                .components
                .iter()
                .map(|component| wire::ComponentProgress {
                    component: component.component.to_string(),
                    phase: match component.phase {
                        Phase::Waiting => "waiting",
                        Phase::Loading => "loading",
                        Phase::Ready => "ready",
                    }
                    .into(),
                    shared: component.shared,
                    done: component.done.get(),
                    total: component.total.get(),
                })
                .collect(),
        }
    }
}

/// A frame that is no request, with the number that it has, as far as it can be read.
pub(super) fn frame_error(error: &FrameError) -> (u64, ErrorReply) {
    match error {
        FrameError::UnknownType { id, .. } => (*id, refusal("unknown-type", error.to_string())),
        FrameError::Body { id, .. } => (*id, refusal("malformed", error.to_string())),
        _ => (0, refusal("malformed", error.to_string())),
    }
}

/// Why a session was refused.
pub(crate) fn session_error(error: &SessionError) -> ErrorReply {
    let message = error.to_string();
    match error {
        SessionError::Busy { retry_after, .. } => ErrorReply {
            retry_after_ms: Some(u64::try_from(retry_after.as_millis()).unwrap_or(u64::MAX)),
            ..refusal("busy", message)
        },
        SessionError::Draining => refusal("draining", message),
        _ => refusal("not-answering", message),
    }
}

fn names(names: &[crate::ModelName]) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

/// Why a model was not found.
pub(crate) fn find_error(error: &FindError) -> ErrorReply {
    let message = error.to_string();
    match error {
        FindError::NotFound { nearest, .. } => ErrorReply {
            nearest: names(nearest),
            ..refusal("not-found", message)
        },
        FindError::Ambiguous { candidates, .. } => ErrorReply {
            nearest: names(candidates),
            ..refusal("ambiguous", message)
        },
        _ => refusal("not-found", message),
    }
}

/// Why names do not make a set.
fn resolve_error(error: &ResolveError) -> ErrorReply {
    let message = error.to_string();
    match error.cause() {
        ResolveError::Find(error) => ErrorReply {
            message,
            ..find_error(error)
        },
        ResolveError::NoComponent { available, .. } => ErrorReply {
            nearest: available.clone(),
            ..refusal("not-found", message)
        },
        ResolveError::NotLoadable { .. } => refusal("not-loadable", message),
        ResolveError::BaseAmbiguous { candidates, .. }
        | ResolveError::BaseIncompatible {
            fitting: candidates,
            ..
        } => ErrorReply {
            nearest: names(candidates),
            ..refusal("unresolved", message)
        },
        _ => refusal("unresolved", message),
    }
}

/// Why a load failed.
pub(crate) fn load_error(error: &LoadError) -> ErrorReply {
    let message = error.to_string();
    let code = match error {
        LoadError::Session(error) => return session_error(error),
        LoadError::Resolve(error) => return resolve_error(error),
        LoadError::Plan(PlanError::NoSuchTier { .. }) => "no-such-tier",
        LoadError::Plan(_) | LoadError::Never(_) => "never-fits",
        LoadError::Component { failure, .. } => match failure {
            FlightFailure::Read(error)
                if matches!(**error, hotset_core::io::ReadError::SourceChanged { .. }) =>
            {
                "source-changed"
            }
            _ => "load-failed",
        },
        LoadError::Quota { retry_after, .. } => {
            let retry_after_ms =
                retry_after.map(|after| u64::try_from(after.as_millis()).unwrap_or(u64::MAX));
            return ErrorReply {
                retry_after_ms,
                ..refusal("quota", message)
            };
        }
        LoadError::TimedOut { .. } => "timed-out",
        LoadError::Cancelled => "cancelled",
        LoadError::Restarted => "restarted",
        _ => "load-failed",
    };
    refusal(code, message)
}
