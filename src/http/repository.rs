//! The model repository extension: index, load, unload, and whether a model is ready. Names have slashes, so the last words of a
//! path tell what is asked.

use std::sync::{Arc, PoisonError};

use axum::body::Bytes as Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use hotset_core::catalog::Model;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Face, refusal};
use crate::bridge::load_error;
use crate::{ComponentSet, LoadError};

/// The one version that a model has.
const VERSION: &str = "1";

/// `GET /v2`
pub(super) async fn server() -> Json<Value> {
    Json(json!({
        "name": "hotset",
        "version": env!("CARGO_PKG_VERSION"),
        "extensions": ["model_repository", "model_repository(unload_dependents)"],
    }))
}

impl Face {
    fn is_held(&self, model: &Model) -> bool {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.contains_key(&model.name)
    }
}

/// `GET /v2/models/NAME[/versions/V][/ready]`
pub(super) async fn model(State(face): State<Arc<Face>>, Path(rest): Path<String>) -> Response {
    let (name, asks_ready) = match rest.strip_suffix("/ready") {
        Some(name) => (name, true),
        None => (rest.as_str(), false),
    };
    let name = match name.rsplit_once("/versions/") {
        Some((name, version)) if version == VERSION => name,
        Some((_, version)) => {
            return refusal(
                StatusCode::NOT_FOUND,
                format!("there is no version {version}; there is {VERSION}"),
            );
        }
        None => name,
    };
    let catalogue = face.hotset.catalogue();
    let model = match catalogue.find(name) {
        Ok(model) => model,
        Err(error) => return refusal(StatusCode::NOT_FOUND, error),
    };
    if asks_ready {
        return match face.is_held(model) {
            true => StatusCode::OK.into_response(),
            false => refusal(
                StatusCode::BAD_REQUEST,
                format!("{} is not loaded", model.name),
            ),
        };
    }
    Json(json!({
        "name": model.name,
        "versions": [VERSION],
        "platform": format!("hotset_{}", model.format),
        "inputs": [],
        "outputs": [],
    }))
    .into_response()
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct IndexRequest {
    ready: bool,
}

/// `POST /v2/repository/index`
pub(super) async fn index(State(face): State<Arc<Face>>, body: Body) -> Response {
    let request: IndexRequest = match read(&body) {
        Ok(request) => request,
        Err(response) => return response,
    };
    let catalogue = face.hotset.catalogue();
    let rows: Vec<Value> = catalogue
        .models()
        .filter_map(|model| {
            let held = face.is_held(model);
            if request.ready && !held {
                return None;
            }
            Some(json!({
                "name": model.name,
                "version": VERSION,
                "state": if held { "READY" } else { "UNAVAILABLE" },
                "reason": model.error.as_deref().unwrap_or_default(),
            }))
        })
        .collect();
    Json(rows).into_response()
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ActRequest {
    parameters: serde_json::Map<String, Value>,
}

/// `POST /v2/repository/models/NAME/load` and `/unload`
pub(super) async fn act(
    State(face): State<Arc<Face>>,
    Path(rest): Path<String>,
    body: Body,
) -> Response {
    let request: ActRequest = match read(&body) {
        Ok(request) => request,
        Err(response) => return response,
    };
    match rest.rsplit_once('/') {
        Some((name, "load")) => load(&face, name, &request).await,
        Some((name, "unload")) => unload(&face, name),
        _ => refusal(StatusCode::NOT_FOUND, "there is load and unload"),
    }
}

async fn load(face: &Face, name: &str, request: &ActRequest) -> Response {
    let catalogue = face.hotset.catalogue();
    let model = match catalogue.find(name) {
        // By name alone: a path in a URL is none.
        Ok(model) if !name.starts_with('/') => model,
        Ok(_) => return refusal(StatusCode::BAD_REQUEST, "models are loaded by their names"),
        Err(error) => return refusal(StatusCode::NOT_FOUND, error),
    };
    let parameters = &request.parameters;
    if parameters.keys().any(|key| key.starts_with("file:")) {
        return refusal(
            StatusCode::BAD_REQUEST,
            "files cannot be sent; put them into a scanned folder",
        );
    }
    let target = parameters.get("target").and_then(Value::as_str);
    let target = match target.unwrap_or("best").parse() {
        Ok(target) => target,
        Err(error) => return refusal(StatusCode::BAD_REQUEST, error),
    };
    if face.is_held(model) {
        return Json(json!({})).into_response();
    }
    let set = ComponentSet::new([model.name.as_str()]).on(target);
    match face.session.load(set).leases().await {
        Ok(leases) => {
            let mut held = face.held.lock().unwrap_or_else(PoisonError::into_inner);
            // Where two loaded it at a time, the later leases replace the earlier ones.
            held.insert(model.name.clone(), leases);
            Json(json!({})).into_response()
        }
        Err(error) => {
            let status = match &error {
                LoadError::Session(_) | LoadError::TimedOut { .. } | LoadError::Restarted => {
                    StatusCode::SERVICE_UNAVAILABLE
                }
                LoadError::Resolve(_) | LoadError::Plan(_) | LoadError::Never(_) => {
                    StatusCode::BAD_REQUEST
                }
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            };
            let reply = load_error(&error);
            let body = Json(json!({ "error": reply.message, "code": reply.code }));
            (status, body).into_response()
        }
    }
}

fn unload(face: &Face, name: &str) -> Response {
    let catalogue = face.hotset.catalogue();
    let found = catalogue.find(name).map(|model| model.name.clone());
    // What is gone from the catalogue can be let go by its full name.
    let name = found.unwrap_or_else(|_| name.into());
    let leases = {
        let mut held = face.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.remove(&name)
    };
    match leases {
        Some(leases) => {
            drop(leases);
            Json(json!({})).into_response()
        }
        None => refusal(StatusCode::BAD_REQUEST, format!("{name} is not loaded")),
    }
}

/// A body as JSON. Clients may send none, and need not say that it is JSON.
#[expect(clippy::result_large_err, reason = "the response is what is sent")]
fn read<'a, T: Deserialize<'a> + Default>(body: &'a Body) -> Result<T, Response> {
    if body.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(body).map_err(|error| refusal(StatusCode::BAD_REQUEST, error))
}
