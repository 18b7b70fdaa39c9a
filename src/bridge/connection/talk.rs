//! What is said once a client and the server know each other.

use std::collections::HashMap;
use std::future::pending;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::FuturesUnordered;
use hotset_core::LeaseId;
use hotset_core::memory::Lease;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::bridge::answers::{self, document, refusal};
use crate::bridge::channel::{ChannelError, Inbox, Outbox};
use crate::bridge::events::{Event, Events};
use crate::bridge::leases::{Exported, Leases, exported};
use crate::bridge::mapped::{Mapped, Took};
use crate::bridge::wire::{
    Cancelled, ClientMessage, Empty, ErrorReply, Load, PlanReply, Released, Revoke, Scanned,
    ServerMessage, StatusReply, Subscribed, UsageReply,
};
use crate::bridge::{FrameError, Shared};
use crate::{Act, GpuEvent, LoadError, LoadEvent, Loading, Session, SessionId, Shortage, Tier};

use super::{Connection, End, send};

/// Silence after which a client that promised signs of life is taken for hung, as a multiple of its promise.
const SILENCES: u32 = 3;

/// What goes on beside the reading.
enum Finished {
    Load {
        id: u64,
        preemptible: bool,
        outcome: Result<Vec<(Lease, Option<Exported>)>, LoadError>,
    },
    Answer {
        id: u64,
        message: ServerMessage,
    },
    /// The client is too slow for what the work sends.
    Failed(ChannelError),
}

/// Leases of a load that goes on.
struct Came {
    id: u64,
    preemptible: bool,
    leases: Vec<(Lease, Option<Exported>)>,
}

/// A connection with its session open.
pub(super) struct Talk {
    shared: Arc<Shared>,
    outbox: Arc<Outbox>,
    session: Session,
    leases: Leases,
    mapped: Mapped,
    /// What became of them.
    took: mpsc::UnboundedReceiver<Took>,
    events: Events,
    work: FuturesUnordered<BoxFuture<'static, Finished>>,
    /// The loads under way: what cancels each.
    loads: HashMap<u64, oneshot::Sender<()>>,
    /// Leases of loads that go on. As many at most as their sets have components.
    parts: (mpsc::UnboundedSender<Came>, mpsc::UnboundedReceiver<Came>),
    /// Leases that were asked back, and until when.
    revoked: Option<(Instant, Vec<u64>)>,
    promise: Option<Duration>,
    heard: Instant,
    pinged: bool,
}

impl Talk {
    pub(super) fn new(
        connection: &Connection,
        session: Session,
        promise: Option<Duration>,
    ) -> Self {
        let (mapped, took) = Mapped::new();
        Self {
            shared: connection.shared.clone(),
            outbox: connection.outbox.clone(),
            session,
            leases: Leases::default(),
            mapped,
            took,
            events: Events::new(),
            work: FuturesUnordered::new(),
            loads: HashMap::new(),
            parts: mpsc::unbounded_channel(),
            revoked: None,
            promise,
            heard: Instant::now(),
            pinged: false,
        }
    }

    pub(super) async fn run(mut self, inbox: &mut Inbox) -> End {
        let outbox = self.outbox.clone();
        let stop = self.shared.stop.clone();
        let mut flushing = std::pin::pin!(outbox.flush());
        loop {
            let alarm = self.alarm();
            let outcome = tokio::select! {
                biased;
                () = stop.cancelled() => Err(End::Told("draining", "the server ends".into())),
                Some(came) = self.parts.1.recv() => self.came(came),
                Some(took) = self.took.recv() => self.took(took),
                Some(finished) = self.work.next(), if !self.work.is_empty() => self.finished(finished),
                error = &mut flushing => Err(error.into()),
                received = inbox.receive() => match received {
                    Ok(()) => self.received(inbox),
                    Err(error) => Err(error.into()),
                },
                event = self.events.next() => self.event(event),
                () = until(alarm) => self.alarmed(),
            };
            if let Err(end) = outcome {
                return end;
            }
        }
    }

    /// Handles all frames that are whole.
    fn received(&mut self, inbox: &mut Inbox) -> Result<(), End> {
        self.heard = Instant::now();
        self.pinged = false;
        while let Some(frame) = inbox.next_frame()? {
            match ClientMessage::decode(frame) {
                Ok((id, message)) => {
                    let count = match &message {
                        ClientMessage::StillMapped(still) => still.memories.len(),
                        _ => 0,
                    };
                    let descriptors = inbox.take_descriptors(count);
                    self.handle(id, message, descriptors)?;
                }
                Err(error @ FrameError::TooLong { .. }) => {
                    return Err(ChannelError::Frame(error).into());
                }
                Err(error) => {
                    let (id, reply) = answers::frame_error(&error);
                    self.reply(id, ServerMessage::Error(reply))?;
                }
            }
        }
        Ok(())
    }

    fn reply(&self, id: u64, message: ServerMessage) -> Result<(), End> {
        Ok(send(&self.outbox, id, &message)?)
    }

    fn handle(
        &mut self,
        id: u64,
        message: ClientMessage,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), End> {
        let hotset = &self.shared.hotset;
        let answer = match message {
            ClientMessage::Pong(_) => return Ok(()),
            ClientMessage::Ping(_) => Ok(ServerMessage::Pong(Empty {})),
            ClientMessage::Hello(_) => Err(refusal("malformed", "`hello` was said already")),
            ClientMessage::List(list) => answers::list(hotset, &list),
            ClientMessage::Show(show) => answers::show(hotset, &show.name),
            ClientMessage::Why(why) => answers::why(hotset, &why),
            ClientMessage::Load(load) => match self.load(id, load) {
                Ok(Some(finished)) => return self.finished(finished),
                Ok(None) => return Ok(()),
                Err(error) => Err(error),
            },
            ClientMessage::Cancel(cancel) => {
                let found = self.loads.remove(&cancel.request).is_some();
                Ok(ServerMessage::Cancelled(Cancelled { found }))
            }
            ClientMessage::Release(release) => {
                let leases = self.leases.release(&release.leases);
                Ok(ServerMessage::Released(Released { leases }))
            }
            ClientMessage::Subscribe(subscribe) => self
                .events
                .subscribe(hotset, id, &subscribe.topics)
                .map(|()| self.subscribed()),
            ClientMessage::Unsubscribe(unsubscribe) => {
                self.events.unsubscribe(&unsubscribe.topics);
                Ok(self.subscribed())
            }
            ClientMessage::StillMapped(still) => {
                let elsewhere = &self.shared.elsewhere;
                self.mapped
                    .add(hotset, elsewhere, id, &still.memories, descriptors)
                    .map(ServerMessage::Counted)
            }
            ClientMessage::Unmapped(unmapped) => Ok(ServerMessage::Counted(
                self.mapped.remove(hotset, &unmapped.mappings),
            )),
            ClientMessage::Drain(_) => {
                self.shared.drain.notify_one();
                Ok(ServerMessage::Draining(Empty {}))
            }
            question @ (ClientMessage::Plan(_)
            | ClientMessage::PlanMix(_)
            | ClientMessage::Status(_)
            | ClientMessage::Analyse(_)
            | ClientMessage::Scan(_)) => match self.ask(id, question) {
                Ok(()) => return Ok(()),
                Err(error) => Err(error),
            },
        };
        self.reply(id, answer.unwrap_or_else(ServerMessage::Error))
    }

    fn subscribed(&self) -> ServerMessage {
        ServerMessage::Subscribed(Subscribed {
            topics: self.events.topics(),
        })
    }

    /// Whether one more may go on beside the reading.
    fn check_room(&self) -> Result<(), ErrorReply> {
        let limit = self.shared.config.max_requests;
        if self.work.len() < limit {
            return Ok(());
        }
        let retry_after = self.shared.hotset.config().sessions.retry_after;
        Err(answers::session_error(&crate::SessionError::Busy {
            what: "this connection has too many requests under way",
            limit,
            retry_after,
        }))
    }

    /// Questions to actors.
    fn ask(&self, id: u64, question: ClientMessage) -> Result<(), ErrorReply> {
        self.check_room()?;
        let hotset = self.shared.hotset.clone();
        let asked = async move {
            let message = match question {
                ClientMessage::Plan(set) => answers::plan(&hotset, &set)
                    .await
                    .unwrap_or_else(ServerMessage::Error),
                // Up to a second of arithmetic where many sets do not fit.
                ClientMessage::PlanMix(mix) => {
                    let planned = move || answers::plan_mix(&hotset, &mix);
                    match tokio::task::spawn_blocking(planned).await {
                        Ok(planned) => planned.unwrap_or_else(ServerMessage::Error),
                        Err(error) => ServerMessage::Error(refusal("internal", error.to_string())),
                    }
                }
                ClientMessage::Status(_) => ServerMessage::Status(StatusReply {
                    status: document(&hotset.status().await),
                }),
                ClientMessage::Analyse(_) => ServerMessage::Usage(UsageReply {
                    usage: document(&hotset.analyse_usage().await),
                }),
                _ => match hotset.scan().await {
                    Ok(summary) => ServerMessage::Scanned(Scanned {
                        summary: document(&summary),
                    }),
                    Err(error) => ServerMessage::Error(answers::session_error(&error)),
                },
            };
            Finished::Answer { id, message }
        };
        self.work.push(asked.boxed());
        Ok(())
    }

    /// Begins a load; gives its end where that came at once.
    fn load(&mut self, id: u64, load: Load) -> Result<Option<Finished>, ErrorReply> {
        self.check_room()?;
        if self.loads.contains_key(&id) {
            return Err(refusal(
                "malformed",
                format!("the load {id} is still under way; give each its own id"),
            ));
        }
        let (progress, preemptible) = (load.progress, load.preemptible);
        let parts = load.parts.then(|| self.parts.0.clone());
        let set = answers::load_of(load)?;
        self.events.watch_gpus(&self.shared.hotset);
        if preemptible {
            self.events.watch_shortages(&self.shared.hotset);
        }
        let (cancel, cancelled) = oneshot::channel();
        self.loads.insert(id, cancel);
        let loading = self.session.load(set);
        let outbox = self.outbox.clone();
        let pumped = async move {
            let to = To {
                id,
                outbox: &outbox,
                progress,
                preemptible,
                parts,
            };
            match pump(to, loading, cancelled).await {
                Ok(outcome) => Finished::Load {
                    id,
                    preemptible,
                    outcome: match outcome {
                        Ok(leases) => Ok(exported(leases).await),
                        Err(error) => Err(error),
                    },
                },
                Err(error) => Finished::Failed(error),
            }
        };
        let mut pumped = pumped.boxed();
        let finished = (&mut pumped).now_or_never();
        if finished.is_none() {
            self.work.push(pumped);
        }
        Ok(finished)
    }

    fn finished(&mut self, finished: Finished) -> Result<(), End> {
        match finished {
            Finished::Failed(error) => Err(error.into()),
            Finished::Answer { id, message } => self.reply(id, message),
            Finished::Load {
                id,
                preemptible,
                outcome,
            } => {
                // What came on the way goes first.
                while let Ok(came) = self.parts.1.try_recv() {
                    self.came(came)?;
                }
                self.loads.remove(&id);
                match outcome {
                    Err(error) => self.reply(id, ServerMessage::Error(answers::load_error(&error))),
                    Ok(leases) => self.leased(id, leases, preemptible, false),
                }
            }
        }
    }

    fn took(&mut self, took: Took) -> Result<(), End> {
        let id = took.id;
        let (hotset, session) = (&self.shared.hotset, self.session.id());
        match self.mapped.took(hotset, session, took) {
            Some(adopted) => self.reply(id, ServerMessage::Adopted(adopted)),
            None => Ok(()),
        }
    }

    fn came(&mut self, came: Came) -> Result<(), End> {
        self.leased(came.id, came.leases, came.preemptible, true)
    }

    fn leased(
        &mut self,
        id: u64,
        leases: Vec<(Lease, Option<Exported>)>,
        preemptible: bool,
        more: bool,
    ) -> Result<(), End> {
        match self.leases.add(leases, preemptible, &self.shared.tables) {
            Err(error) => {
                // One answer ends a load, and with it what is still to come.
                self.loads.remove(&id);
                self.reply(id, ServerMessage::Error(error))
            }
            Ok((mut leased, descriptors)) => {
                leased.more = more;
                let frame = ServerMessage::Leased(leased)
                    .encode(id)
                    .map_err(ChannelError::from)?;
                Ok(self.outbox.send_with(frame, descriptors)?)
            }
        }
    }

    fn event(&mut self, event: Event) -> Result<(), End> {
        match event {
            Event::Message(id, message) => self.reply(id, message),
            Event::Shortage(shortage) => self.revoke(&shortage),
            Event::Gpu(GpuEvent::Lost {
                tier,
                reason,
                leases,
            }) => self.lost(tier, &reason, &leases),
            // One that is back has nothing of this client's; what others take comes as a shortage too.
            Event::Gpu(_) => Ok(()),
        }
    }

    /// Tells of leases whose memory is gone with its GPU.
    fn lost(
        &mut self,
        tier: Tier,
        reason: &str,
        leases: &[(LeaseId, SessionId)],
    ) -> Result<(), End> {
        let own = |session: &SessionId| *session == self.session.id();
        let leases: Vec<u64> = leases
            .iter()
            .filter(|(_, session)| own(session))
            .map(|(lease, _)| lease.0)
            .collect();
        if leases.is_empty() {
            return Ok(());
        }
        let grace = Instant::now() + self.shared.config.grace;
        self.revoked.get_or_insert((grace, leases.clone()));
        let reason = format!("{tier} is lost, and what these leases held with it: {reason}");
        self.shared.hotset.record(Act::Revoke {
            session: self.session.id(),
            tier,
            components: self.leases.components(&leases),
            grace: Duration::ZERO,
            reason: reason.clone(),
        });
        let revoke = Revoke {
            leases,
            grace_ms: 0,
            reason,
        };
        self.reply(0, ServerMessage::Revoke(revoke))
    }

    /// Asks for leases back that were promised to be given.
    fn revoke(&mut self, shortage: &Shortage) -> Result<(), End> {
        if shortage.session == self.session.id() || self.revoked.is_some() {
            return Ok(());
        }
        let leases = self.leases.preemptible(shortage.tier);
        if leases.is_empty() {
            return Ok(());
        }
        let grace = self.shared.config.grace;
        self.revoked = Some((Instant::now() + grace, leases.clone()));
        let reason = format!(
            "{} waits for {} more of {}",
            shortage.session, shortage.missing, shortage.tier
        );
        self.shared.hotset.record(Act::Revoke {
            session: self.session.id(),
            tier: shortage.tier,
            components: self.leases.components(&leases),
            grace,
            reason: reason.clone(),
        });
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let revoke = Revoke {
            leases,
            grace_ms,
            reason,
        };
        self.reply(0, ServerMessage::Revoke(revoke))
    }

    /// When to look at promises and grace periods next.
    fn alarm(&self) -> Option<Instant> {
        let silence = self.promise.map(|promise| {
            let silences = if self.pinged { SILENCES } else { 1 };
            self.heard + promise * silences
        });
        let grace = self.revoked.as_ref().map(|(until, _)| *until);
        silence.into_iter().chain(grace).min()
    }

    fn alarmed(&mut self) -> Result<(), End> {
        let now = Instant::now();
        if let Some((until, leases)) = &self.revoked
            && now >= *until
        {
            if self.leases.holds_any(leases) {
                let message = "leases were not given back within the grace period".into();
                return Err(End::Told("revoked", message));
            }
            self.revoked = None;
        }
        if let Some(promise) = self.promise {
            if self.pinged && now >= self.heard + promise * SILENCES {
                let message = format!("nothing was heard for {:?}", promise * SILENCES);
                return Err(End::Told("silent", message));
            }
            if !self.pinged && now >= self.heard + promise {
                self.pinged = true;
                return self.reply(0, ServerMessage::Ping(Empty {}));
            }
        }
        Ok(())
    }
}

async fn until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => pending().await,
    }
}

/// Who hears of a load, and how.
struct To<'a> {
    id: u64,
    outbox: &'a Outbox,
    progress: bool,
    preemptible: bool,
    /// Where leases go as they come.
    parts: Option<mpsc::UnboundedSender<Came>>,
}

/// Follows a load to its end, and tells of its progress where that is wanted and the client keeps up. Gives the leases that
/// were not sent on their way.
async fn pump(
    to: To<'_>,
    mut loading: Loading,
    cancelled: oneshot::Receiver<()>,
) -> Result<Result<Vec<Lease>, LoadError>, ChannelError> {
    let (id, outbox) = (to.id, to.outbox);
    let mut leases = Vec::new();
    let mut cancelled = cancelled.fuse();
    loop {
        tokio::select! {
            biased;
            event = loading.next() => match event {
                Some(Ok(LoadEvent::Leased(lease))) => match &to.parts {
                    None => leases.push(lease),
                    Some(parts) => {
                        let leases = exported(vec![lease]).await;
                        // Who would hear of it ends with the connection, and this with it.
                        let _ = parts.send(Came { id, preemptible: to.preemptible, leases });
                    }
                },
                Some(Ok(LoadEvent::Done)) => return Ok(Ok(leases)),
                Some(Ok(LoadEvent::Planned(plan))) if to.progress => {
                    let plan = document(&*plan);
                    send(outbox, id, &ServerMessage::Planned(PlanReply { plan }))?;
                }
                Some(Ok(LoadEvent::Progress(now))) if to.progress && !outbox.is_behind() => {
                    send(outbox, id, &ServerMessage::Progress((&now).into()))?;
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Ok(Err(error)),
                None => return Ok(Err(LoadError::Restarted)),
            },
            // The sender goes when the client cancels, and when the load has ended.
            _ = &mut cancelled => loading.cancel(),
        }
    }
}
