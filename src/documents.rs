//! What the command line, the bridge and HTTP say of the catalogue: the same JSON documents everywhere.

use hotset_core::catalog::{Catalogue, Model};
use hotset_core::plan::{ComponentSet, resolve};
use serde_json::{Value, json};

/// A model. Paths that are not UTF-8 are written with replacement characters.
#[must_use]
pub fn model(model: &Model) -> Value {
    json!({
        "path": model.path.to_string_lossy(),
        "name": model.name,
        "format": model.format,
        "kind": model.kind,
        "architecture": model.architecture,
        "bytes": model.bytes,
        "components": model.components.iter().map(|component| json!({
            "name": component.id.component,
            "kind": component.kind,
            "architecture": component.architecture,
            "dtype": component.dtype,
            "bytes": component.bytes,
            "tensors": component.tensors,
            "content_id": component.content_id,
            "files": component.files.iter().map(|file| file.path.to_string_lossy()).collect::<Vec<_>>(),
        })).collect::<Vec<_>>(),
        "error": model.error,
    })
}

/// A model with all that is known of it, and what it depends on in this catalogue.
#[must_use]
pub fn model_in(catalogue: &Catalogue, found: &Model) -> Value {
    let mut document = model(found);
    document["facts"] = json!(found.facts);
    document["base"] = json!(found.base);
    document["presence"] = json!(found.presence);
    document["identities"] = identities(found);
    document["dependencies"] = dependencies(catalogue, found);
    document
}

/// Size and time of the last change of each weight file, as they were when it was scanned: whoever takes a path for the
/// model's bytes sees whether they are still those.
fn identities(model: &Model) -> Value {
    let files = model.components.iter().flat_map(|c| &c.files);
    let identities: serde_json::Map<String, Value> = files
        .map(|file| {
            let identity = json!([file.identity.size, file.identity.mtime_ns]);
            (file.path.to_string_lossy().into_owned(), identity)
        })
        .collect();
    identities.into()
}

/// The loading order of a model with what it depends on, and why, or the error where its names do not make a set.
#[must_use]
pub fn dependencies(catalogue: &Catalogue, model: &Model) -> Value {
    let set = ComponentSet::new([model.name.as_str()]);
    match resolve(catalogue, &[], &set.names, set.dependencies) {
        Err(error) => json!({ "error": error.to_string() }),
        Ok(graph) => json!({
            "loading_order": graph.order().iter().map(|c| c.id.to_string()).collect::<Vec<_>>(),
            "edges": graph.edges().map(|(before, after, why)| json!({
                "before": before.id.to_string(),
                "after": after.id.to_string(),
                "why": format!("{why}"),
            })).collect::<Vec<_>>(),
        }),
    }
}
