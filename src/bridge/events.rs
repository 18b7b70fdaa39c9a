//! What a connection hears of: the system's feeds, as messages.

use std::sync::Arc;

use hotset_core::catalog::Change;
use hotset_core::decision::Decision;
use serde_json::Value;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch;

use super::answers::document;
use super::wire::{
    CatalogueEvent, DecisionEvent, ErrorReply, GrantedComponent, GrantedEvent, ModelChange,
    PressureEvent, ServerMessage,
};
use crate::{GpuEvent, Hotset, MonitorView, Pressure, Shortage, Used};

/// The topics that there are.
pub(crate) const TOPICS: [&str; 4] = ["catalogue", "decisions", "granted", "pressure"];

/// The subscriptions of one connection, each with the id of its request.
#[derive(Debug)]
pub(crate) struct Events {
    catalogue: Option<(u64, Receiver<Arc<[Change]>>)>,
    decisions: Option<(u64, Receiver<Decision>)>,
    granted: Option<(u64, Receiver<Used>)>,
    pressure: Option<(u64, watch::Receiver<MonitorView>, Pressure)>,
    shortages: Option<Receiver<Shortage>>,
    gpus: Option<Receiver<GpuEvent>>,
}

/// Something to tell the client, or to act on.
#[derive(Debug)]
pub(crate) enum Event {
    Message(u64, ServerMessage),
    Shortage(Shortage),
    Gpu(GpuEvent),
}

async fn next_of<T: Clone>(feed: &mut Option<(u64, Receiver<T>)>) -> (u64, Result<T, RecvError>) {
    match feed {
        Some((id, receiver)) => (*id, receiver.recv().await),
        None => std::future::pending().await,
    }
}

impl Events {
    pub(crate) const fn new() -> Self {
        Self {
            catalogue: None,
            decisions: None,
            granted: None,
            pressure: None,
            shortages: None,
            gpus: None,
        }
    }

    /// Hears of lost GPUs from now on: the connection may have leases there.
    pub(crate) fn watch_gpus(&mut self, hotset: &Hotset) {
        self.gpus.get_or_insert_with(|| hotset.subscribe_gpus());
    }

    /// Hears of shortages from now on: the connection has leases that may be taken back.
    pub(crate) fn watch_shortages(&mut self, hotset: &Hotset) {
        self.shortages
            .get_or_insert_with(|| hotset.subscribe_shortages());
    }

    /// Subscribes to topics, or to none where one does not exist.
    pub(crate) fn subscribe(
        &mut self,
        hotset: &Hotset,
        id: u64,
        topics: &[String],
    ) -> Result<(), ErrorReply> {
        if let Some(unknown) = topics.iter().find(|t| !TOPICS.contains(&t.as_str())) {
            return Err(ErrorReply {
                code: "not-found".into(),
                message: format!(
                    "there is no topic `{unknown}`; there are {}",
                    TOPICS.join(", ")
                ),
                nearest: TOPICS.map(str::to_owned).to_vec(),
                ..ErrorReply::default()
            });
        }
        for topic in topics {
            match topic.as_str() {
                "catalogue" => self.catalogue = Some((id, hotset.subscribe())),
                "decisions" => self.decisions = Some((id, hotset.subscribe_decisions())),
                "granted" => self.granted = Some((id, hotset.subscribe_granted())),
                _ => {
                    let mut measured = hotset.subscribe_pressure();
                    // The state now is the first event.
                    measured.mark_changed();
                    self.pressure = Some((id, measured, Pressure::Unknown));
                }
            }
        }
        Ok(())
    }

    /// Ends subscriptions; all of them where none is named.
    pub(crate) fn unsubscribe(&mut self, topics: &[String]) {
        let ends = |topic: &str| topics.is_empty() || topics.iter().any(|t| t == topic);
        if ends("catalogue") {
            self.catalogue = None;
        }
        if ends("decisions") {
            self.decisions = None;
        }
        if ends("granted") {
            self.granted = None;
        }
        if ends("pressure") {
            self.pressure = None;
        }
    }

    /// What is subscribed to.
    pub(crate) fn topics(&self) -> Vec<String> {
        let all = [
            self.catalogue.is_some(),
            self.decisions.is_some(),
            self.granted.is_some(),
            self.pressure.is_some(),
        ];
        TOPICS
            .iter()
            .zip(all)
            .filter(|(_, on)| *on)
            .map(|(topic, _)| (*topic).to_owned())
            .collect()
    }

    /// The next event. Safe to drop at any time.
    pub(crate) async fn next(&mut self) -> Event {
        loop {
            tokio::select! {
                (id, heard) = next_of(&mut self.catalogue) => {
                    match heard {
                        Ok(changes) => return Event::Message(id, catalogue_event(&changes)),
                        Err(RecvError::Lagged(missed)) => {
                            let event = CatalogueEvent { changes: Vec::new(), missed };
                            return Event::Message(id, ServerMessage::Catalogue(event));
                        }
                        Err(RecvError::Closed) => self.catalogue = None,
                    }
                }
                (id, heard) = next_of(&mut self.decisions) => {
                    match heard {
                        Ok(decision) => return Event::Message(id, decision_event(&decision)),
                        Err(RecvError::Lagged(missed)) => {
                            let event = DecisionEvent { decision: Value::Null, sentence: String::new(), missed };
                            return Event::Message(id, ServerMessage::Decision(event));
                        }
                        Err(RecvError::Closed) => self.decisions = None,
                    }
                }
                (id, heard) = next_of(&mut self.granted) => {
                    match heard {
                        Ok(used) => return Event::Message(id, granted_event(&used)),
                        Err(RecvError::Lagged(missed)) => {
                            let event = GrantedEvent { missed, ..GrantedEvent::default() };
                            return Event::Message(id, ServerMessage::Granted(event));
                        }
                        Err(RecvError::Closed) => self.granted = None,
                    }
                }
                changed = pressure_changed(&mut self.pressure) => match changed {
                    Some((id, message)) => return Event::Message(id, message),
                    None => self.pressure = None,
                },
                gpu = feed(&mut self.gpus) => match gpu {
                    Ok(event) => return Event::Gpu(event),
                    // More losses than there are GPUs: what was missed is told by the next load.
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => self.gpus = None,
                },
                shortage = feed(&mut self.shortages) => match shortage {
                    Ok(shortage) => return Event::Shortage(shortage),
                    // There will be another one at the next try.
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => self.shortages = None,
                },
            }
        }
    }
}

async fn feed<T: Clone>(feed: &mut Option<Receiver<T>>) -> Result<T, RecvError> {
    match feed {
        Some(receiver) => receiver.recv().await,
        None => std::future::pending().await,
    }
}

/// The next change of the judgement; `None` where nothing is measured any more.
async fn pressure_changed(
    feed: &mut Option<(u64, watch::Receiver<MonitorView>, Pressure)>,
) -> Option<(u64, ServerMessage)> {
    let Some((id, measured, last)) = feed else {
        return std::future::pending().await;
    };
    loop {
        measured.changed().await.ok()?;
        let view = measured.borrow_and_update().clone();
        if view.pressure != *last {
            *last = view.pressure;
            let word = document(&view.pressure);
            let event = PressureEvent {
                pressure: word.as_str().unwrap_or_default().to_owned(),
                host: document(&view.host),
            };
            return Some((*id, ServerMessage::Pressure(event)));
        }
    }
}

fn catalogue_event(changes: &[Change]) -> ServerMessage {
    let changes = changes
        .iter()
        .filter_map(|change| {
            let (what, model) = match change {
                Change::Added(model) => ("added", model),
                Change::Changed(model) => ("changed", model),
                Change::Removed(model) => ("removed", model),
                _ => return None,
            };
            Some(ModelChange {
                change: what.into(),
                name: model.name.to_string(),
            })
        })
        .collect();
    ServerMessage::Catalogue(CatalogueEvent { changes, missed: 0 })
}

fn granted_event(used: &Used) -> ServerMessage {
    let components = used
        .components
        .iter()
        .map(|(component, _)| GrantedComponent {
            component: component.id.to_string(),
            content: component.content_id.to_string(),
            kind: component.kind.to_string(),
            bytes: component.bytes.get(),
        });
    ServerMessage::Granted(GrantedEvent {
        at_s: used.at.as_secs_f64(),
        session: used.session.0,
        components: components.collect(),
        missed: 0,
    })
}

fn decision_event(decision: &Decision) -> ServerMessage {
    ServerMessage::Decision(DecisionEvent {
        sentence: decision.act.sentence(),
        decision: document(decision),
        missed: 0,
    })
}
