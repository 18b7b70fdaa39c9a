//! What each session used last. Clients come back for the same: on a production trace, a client group keeps its last base
//! model with a probability of 0.72.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::Seen;
use crate::ids::{ContentId, SessionId};

/// Sessions remembered; past it the one silent for longest is forgotten.
const MAX_SESSIONS: usize = 4_096;

/// Half-life of a session's activity, in requests.
const ACTIVITY: f64 = 256.0;

/// A session's last request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct LastRequest {
    pub(super) at: u64,
    /// Its requests, each halved for each [`ACTIVITY`] since.
    pub(super) activity: f64,
    pub(super) components: Vec<ContentId>,
}

/// The last requests of all sessions.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Sessions {
    last: BTreeMap<SessionId, (u64, LastRequest)>,
    /// Sessions by the number of their last request.
    by_age: BTreeMap<u64, SessionId>,
    requests: u64,
}

impl Sessions {
    pub(super) fn len(&self) -> usize {
        self.last.len()
    }

    /// The session's last request, where it is remembered.
    pub(super) fn last(&self, session: SessionId) -> Option<&LastRequest> {
        self.last.get(&session).map(|(_, last)| last)
    }

    pub(super) fn is_sound(&self) -> bool {
        self.last.len() <= MAX_SESSIONS
            && self.by_age.len() == self.last.len()
            && self.last.iter().all(|(session, (number, last))| {
                self.by_age.get(number) == Some(session) && last.activity.is_finite()
            })
    }

    /// Notes a session's request, and returns the earlier ones that no longer stand: its own last, and that of a session
    /// which is forgotten for it. Also how active the session is.
    pub(super) fn note(
        &mut self,
        now: u64,
        session: SessionId,
        components: &[Seen],
    ) -> (f64, Vec<LastRequest>) {
        let mut left = Vec::new();
        let mut activity = 1.0;
        if let Some((number, last)) = self.last.remove(&session) {
            self.by_age.remove(&number);
            let passed = now.saturating_sub(last.at) as f64;
            activity += last.activity * (-passed / ACTIVITY).exp2();
            left.push(last);
        }
        if self.last.len() >= MAX_SESSIONS
            && let Some((_, silent)) = self.by_age.pop_first()
        {
            left.extend(self.last.remove(&silent).map(|(_, last)| last));
        }
        self.requests += 1;
        self.by_age.insert(self.requests, session);
        let last = LastRequest {
            at: now,
            activity,
            components: distinct(components).into_iter().collect(),
        };
        self.last.insert(session, (self.requests, last));
        (activity, left)
    }
}

pub(super) fn distinct(components: &[Seen]) -> BTreeSet<ContentId> {
    components.iter().map(|seen| seen.content).collect()
}
