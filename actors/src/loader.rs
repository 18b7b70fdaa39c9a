//! One session's loads: takes them on up to a bound, runs each as a task, cancels them.
//!
//! It owns the tasks; when it dies, they end, and what they had reserved comes back. It decides nothing about memory. Its
//! session's handle talks to it.

mod handed;
mod load;
mod progress;
mod restarts;
mod staging;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hotset_core::RequestId;
use hotset_core::decision::Act;
use hotset_core::plan::ComponentSet;
use ractor::{ActorProcessingErr, ActorRef};
use tokio_util::task::AbortOnDropHandle;

use crate::counters::add;
use crate::house::House;
use crate::loading::{LoadError, Outlet, SessionError};
use crate::plan;
use crate::sessions::Record;

/// What a loader is asked.
#[derive(Debug)]
pub(crate) enum LoaderMessage {
    /// Load a set. The outlet hears all that happens.
    Load {
        /// Its number.
        request: RequestId,
        /// What.
        set: ComponentSet,
        /// When it was asked for, since the start of the system: its deadline counts from there, however late a loader
        /// hears of it.
        asked: Duration,
        /// Who hears of it.
        outlet: Outlet,
    },
    /// A load has ended.
    Ended(RequestId),
    /// Cancel all loads.
    CancelAll,
}

pub(crate) struct Loader;

pub(crate) struct State {
    house: Arc<House>,
    record: Arc<Record>,
    running: BTreeMap<RequestId, Running>,
}

struct Running {
    cancel: tokio_util::sync::CancellationToken,
    _task: AbortOnDropHandle<()>,
}

#[ractor::actor(message = LoaderMessage, state = State, arguments = (Arc<House>, Arc<Record>))]
impl Loader {
    async fn pre_start(
        &self,
        _myself: ActorRef<LoaderMessage>,
        (house, record): (Arc<House>, Arc<Record>),
    ) -> Result<State, ActorProcessingErr> {
        Ok(State {
            house,
            record,
            running: BTreeMap::new(),
        })
    }

    #[ractor::message(LoaderMessage::Load { request, set, asked, outlet })]
    fn load(
        &self,
        myself: ActorRef<LoaderMessage>,
        request: RequestId,
        set: ComponentSet,
        asked: Duration,
        outlet: Outlet,
        state: &mut State,
    ) {
        let house = &state.house;
        let sessions = &house.config.sessions;
        let busy = |what, limit| {
            LoadError::Session(SessionError::Busy {
                what,
                limit,
                retry_after: sessions.retry_after,
            })
        };
        if house.draining.load(std::sync::atomic::Ordering::Acquire) {
            return outlet.end(Err(SessionError::Draining.into()));
        }
        let refuse = |error: LoadError, outlet: Outlet| {
            add(&house.counters.loads_requested, 1);
            add(&house.counters.loads_refused, 1);
            house.decide(Act::Refuse {
                session: state.record.id,
                request,
                components: plan::concerned(house, &set),
                reason: error.to_string(),
            });
            outlet.end(Err(error));
        };
        if state.running.len() >= sessions.max_loads_per_session {
            let bound = sessions.max_loads_per_session;
            let error = busy("this session has too many loads under way", bound);
            return refuse(error, outlet);
        }
        let Ok(permit) = house.loads.clone().try_acquire_owned() else {
            let error = busy("too many loads are under way", sessions.max_loads);
            return refuse(error, outlet);
        };
        let cancel = outlet.cancel.clone();
        let job = load::Job::new(house.clone(), state.record.clone(), request, set, asked);
        let task = house.tasks.spawn(async move {
            job.run(outlet).await;
            drop(permit);
            let _ = myself.send_message(LoaderMessage::Ended(request));
        });
        state.running.insert(
            request,
            Running {
                cancel,
                _task: AbortOnDropHandle::new(task),
            },
        );
    }

    #[ractor::message(LoaderMessage::Ended(request))]
    fn ended(&self, request: RequestId, state: &mut State) {
        state.running.remove(&request);
    }

    #[ractor::message(LoaderMessage::CancelAll)]
    fn cancel_all(&self, state: &mut State) {
        for running in state.running.values() {
            running.cancel.cancel();
        }
    }
}
