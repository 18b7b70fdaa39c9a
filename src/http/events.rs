//! `/events`: the feeds of the system as server-sent events, with the bodies of the bridge's messages.

use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::State;
use axum::response::sse::{Event as Sent, KeepAlive, Sse};
use futures::Stream;
use serde_json::Value;

use super::Face;
use crate::bridge::events::{Event, Events};
use crate::bridge::wire::ServerMessage;

/// What is heard here.
const HEARD: [&str; 3] = ["catalogue", "decisions", "pressure"];

/// `GET /events`
pub(super) async fn stream(
    State(face): State<Arc<Face>>,
) -> Sse<impl Stream<Item = Result<Sent, Infallible>>> {
    let mut events = Events::new();
    // These topics exist.
    let subscribed = events.subscribe(&face.hotset, 0, &HEARD.map(str::to_owned));
    debug_assert!(subscribed.is_ok(), "all topics exist");
    // Not the face: its session ends when it is closed, also where somebody still listens.
    let stop = face.stop.clone();
    drop(face);
    let stream = futures::stream::unfold((events, stop), |(mut events, stop)| async move {
        loop {
            let event = tokio::select! {
                biased;
                () = stop.cancelled() => return None,
                event = events.next() => event,
            };
            if let Event::Message(_, message) = event
                && let Some(body) = body(&message)
            {
                let sent = Sent::default().event(message.kind()).data(body.to_string());
                return Some((Ok(sent), (events, stop)));
            }
        }
    });
    Sse::new(stream).keep_alive(KeepAlive::default())
}

fn body(message: &ServerMessage) -> Option<Value> {
    match message {
        ServerMessage::Catalogue(event) => serde_json::to_value(event).ok(),
        ServerMessage::Decision(event) => serde_json::to_value(event).ok(),
        ServerMessage::Pressure(event) => serde_json::to_value(event).ok(),
        _ => None,
    }
}
