//! The HTTP face: the model repository extension of the KServe protocol (what Triton's clients speak), health, metrics and events.
//!
//! A model that is loaded over HTTP is leased by the face's own session until it is unloaded. Without a token it answers this machine
//! alone: it listens on a loopback address, and refuses requests whose `Host` names anything else, so that no web page reaches it.

mod events;
mod metrics;
mod openapi;
mod repository;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use hotset_core::memory::Lease;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{ComponentSet, Health, Hotset, LoadError, ModelName, Session, SessionError};
use metrics::Metrics;

/// The port where the configuration names none.
pub const DEFAULT_PORT: u16 = 7420;

/// Why there is no HTTP face.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// The address cannot be had.
    #[error("cannot listen on {address}: {source}; set another http.listen")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The session of the face was refused.
    #[error(transparent)]
    Session(#[from] SessionError),
}

/// What all requests share.
#[derive(Debug)]
pub(crate) struct Face {
    hotset: Arc<Hotset>,
    session: Session,
    /// What was loaded over HTTP. One lock for all loads and unloads of it, never held while anything is awaited.
    held: std::sync::Mutex<HashMap<ModelName, Vec<Lease>>>,
    metrics: Metrics,
    /// Digest of the token, so that comparing takes the same time wherever they differ.
    token: Option<[u8; 32]>,
    stop: CancellationToken,
}

/// An open HTTP face. Dropping it ends it.
#[derive(Debug)]
pub struct Http {
    address: SocketAddr,
    stop: CancellationToken,
    serving: Option<tokio::task::JoinHandle<()>>,
}

impl Http {
    /// Opens the face of a running system, where its configuration says. `None` where it says nothing and the default port
    /// is taken.
    ///
    /// # Errors
    /// [`HttpError`].
    pub async fn open(hotset: Arc<Hotset>) -> Result<Option<Self>, HttpError> {
        let config = hotset.config().http.clone();
        let address = config
            .listen
            .unwrap_or(SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_PORT)));
        let listener = match TcpListener::bind(address).await {
            Ok(listener) => listener,
            Err(error) if config.listen.is_none() && error.kind() == io::ErrorKind::AddrInUse => {
                tracing::warn!(%address, "no HTTP: the port is taken; set http.listen");
                return Ok(None);
            }
            Err(source) => return Err(HttpError::Listen { address, source }),
        };
        let address = listener.local_addr().unwrap_or(address);
        let stop = CancellationToken::new();
        let face = Arc::new(Face {
            session: hotset.session("http").await?,
            metrics: Metrics::follow(&hotset, stop.clone()),
            hotset,
            held: std::sync::Mutex::default(),
            token: config
                .token
                .filter(|token| !token.is_empty())
                .map(|token| Sha256::digest(token.as_bytes()).into()),
            stop: stop.clone(),
        });
        let told = stop.clone();
        let serving = tokio::spawn(async move {
            let served = axum::serve(listener, router(face))
                .with_graceful_shutdown(async move { told.cancelled().await })
                .await;
            if let Err(error) = served {
                tracing::error!(%error, "HTTP ended");
            }
        });
        Ok(Some(Self {
            address,
            stop,
            serving: Some(serving),
        }))
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends it: no new requests, those under way are answered.
    pub async fn close(mut self) {
        self.stop.cancel();
        if let Some(serving) = self.serving.take() {
            let _ = serving.await;
        }
    }
}

impl Drop for Http {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn router(face: Arc<Face>) -> Router {
    Router::new()
        .route("/v2", get(repository::server))
        .route("/v2/", get(repository::server))
        .route("/v2/health/live", get(|| async { StatusCode::OK }))
        .route("/v2/health/ready", get(ready))
        .route("/v2/models/{*rest}", get(repository::model))
        .route("/v2/repository/index", post(repository::index))
        .route("/v2/repository/models/{*rest}", post(repository::act))
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics::scrape))
        .route("/events", get(events::stream))
        .route("/openapi.json", get(|| async { Json(openapi::document()) }))
        .layer(axum::middleware::from_fn_with_state(face.clone(), guard))
        .with_state(face)
}

/// An error as the KServe protocol has it.
fn refusal(status: StatusCode, error: impl std::fmt::Display) -> Response {
    (status, Json(json!({ "error": error.to_string() }))).into_response()
}

/// Lets in who has the token, or where there is none, who asked for this machine by its own name.
async fn guard(State(face): State<Arc<Face>>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    match face.token {
        Some(token) => {
            let given = text(header::AUTHORIZATION)
                .and_then(|value| value.strip_prefix("Bearer "))
                .map(|given| <[u8; 32]>::from(Sha256::digest(given.as_bytes())));
            // What probes ask tells nothing that is worth a token.
            let is_probe = matches!(
                request.uri().path(),
                "/healthz" | "/v2/health/live" | "/v2/health/ready"
            );
            if given != Some(token) && !is_probe {
                return refusal(
                    StatusCode::UNAUTHORIZED,
                    "send the header `Authorization: Bearer TOKEN` with the server's http.token",
                );
            }
        }
        None if !text(header::HOST).is_some_and(is_local) => {
            return refusal(
                StatusCode::FORBIDDEN,
                "without http.token, requests are answered for localhost alone",
            );
        }
        None => {}
    }
    next.run(request).await
}

fn is_local(host: &str) -> bool {
    let name = match host.parse::<SocketAddr>() {
        Ok(address) => return address.ip().is_loopback(),
        Err(_) => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Whether the load path works: every actor on it is asked, and a load goes through sessions and loader to its end. It is of
/// nothing, so it ends with the refusal that says so.
async fn health(face: &Face) -> (Health, Option<String>) {
    let status = face.hotset.status().await;
    let probe = match face.hotset.session("healthz").await {
        Ok(session) => session
            .load(ComponentSet::new([""; 0]))
            .leases()
            .await
            .map(drop),
        Err(error) => Err(error.into()),
    };
    let problem = match probe {
        Err(LoadError::Resolve(_)) => None,
        Err(error) => Some(error.to_string()),
        Ok(()) => Some("a load of nothing was granted".into()),
    };
    (status.health, problem)
}

async fn healthz(State(face): State<Arc<Face>>) -> Response {
    let (health, problem) = health(&face).await;
    let red = matches!(health, Health::Red { .. }) || problem.is_some();
    let status = if red {
        StatusCode::SERVICE_UNAVAILABLE
    } else {
        StatusCode::OK
    };
    let body = json!({ "health": health, "load_path": problem });
    (status, Json(body)).into_response()
}

async fn ready(State(face): State<Arc<Face>>) -> StatusCode {
    match health(&face).await {
        (Health::Red { .. }, _) | (_, Some(_)) => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::OK,
    }
}
