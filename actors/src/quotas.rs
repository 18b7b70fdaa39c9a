//! What sessions may have: each for itself, and all of one label together.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use hotset_core::catalog::Component;
use hotset_core::config::{Config, QuotaConfig};
use hotset_core::memory::Ledger;
use hotset_core::sync::{Mutex, MutexGuard};
use hotset_core::{Bytes, SessionId, Tier};

use crate::loading::LoadError;

/// A bound, and who has how much of it.
#[derive(Debug)]
struct Account {
    /// Whose it is, in messages.
    whose: String,
    leased: Option<Bytes>,
    loads: Option<usize>,
    tally: Mutex<Tally>,
}

#[derive(Debug, Default)]
struct Tally {
    sessions: HashSet<SessionId>,
    /// Bytes of loads under way.
    promised: Bytes,
    loads: usize,
}

impl Account {
    fn tally(&self) -> MutexGuard<'_, Tally> {
        // Nothing under the lock can panic half-way through a change.
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bounds of one session.
#[derive(Debug)]
pub(crate) struct Bounds {
    session: SessionId,
    accounts: Vec<Arc<Account>>,
}

/// A load that is counted until this is dropped; by then its leases are.
#[derive(Debug)]
pub(crate) struct Counted {
    accounts: Vec<(Arc<Account>, Bytes)>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        for (account, bytes) in &self.accounts {
            let mut tally = account.tally();
            tally.loads = tally.loads.saturating_sub(1);
            tally.promised = tally.promised.saturating_sub(*bytes);
        }
    }
}

/// The accounts of labels.
#[derive(Debug)]
pub(crate) struct Quotas {
    rows: Vec<QuotaConfig>,
    each: Option<Bytes>,
    retry_after: Duration,
    by_label: Mutex<HashMap<String, Arc<Account>>>,
}

fn matches(row: &QuotaConfig, label: &str) -> bool {
    match row.label.strip_suffix('*') {
        Some(prefix) => label.starts_with(prefix),
        None => row.label == label,
    }
}

impl Quotas {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            rows: config.quota.clone(),
            each: config.sessions.quota,
            retry_after: config.sessions.retry_after,
            by_label: Mutex::default(),
        }
    }

    /// The bounds of a new session. They are forgotten with the last session of a label.
    pub(crate) fn open(&self, session: SessionId, label: &str) -> Bounds {
        let mut accounts = Vec::new();
        if let Some(row) = self.rows.iter().find(|row| matches(row, label)) {
            let mut by_label = self.by_label.lock().unwrap_or_else(PoisonError::into_inner);
            by_label.retain(|_, account| Arc::strong_count(account) > 1);
            let account = by_label.entry(label.to_owned()).or_insert_with(|| {
                Arc::new(Account {
                    whose: format!("all sessions of `{label}`"),
                    leased: row.leased,
                    loads: row.loads,
                    tally: Mutex::default(),
                })
            });
            accounts.push(account.clone());
        }
        if let Some(quota) = self.each {
            accounts.push(Arc::new(Account {
                whose: "one session".into(),
                leased: Some(quota),
                loads: None,
                tally: Mutex::default(),
            }));
        }
        for account in &accounts {
            account.tally().sessions.insert(session);
        }
        Bounds { session, accounts }
    }

    /// Counts a load of these components against the bounds of its session.
    pub(crate) fn count(
        &self,
        bounds: &Bounds,
        ledger: &Ledger,
        wanted: &[(Tier, Arc<Component>)],
    ) -> Result<Counted, LoadError> {
        let whole: Bytes = wanted.iter().map(|(_, component)| component.bytes).sum();
        let mut counted = Counted {
            accounts: Vec::with_capacity(bounds.accounts.len()),
        };
        for account in &bounds.accounts {
            let mut tally = account.tally();
            let refused = |held, retry_after| LoadError::Quota {
                whose: account.whose.clone(),
                quota: account.leased.unwrap_or_default(),
                held,
                needed: whole,
                retry_after,
            };
            if account.loads.is_some_and(|loads| tally.loads >= loads) {
                return Err(crate::SessionError::Busy {
                    what: "this label has too many loads under way",
                    limit: account.loads.unwrap_or_default(),
                    retry_after: self.retry_after,
                }
                .into());
            }
            let held = ledger.leased_by(&tally.sessions, &[]);
            let with = ledger.leased_by(&tally.sessions, wanted);
            if let Some(quota) = account.leased
                && with.saturating_add(tally.promised) > quota
            {
                // What never fits is not worth trying again.
                let retry = (whole <= quota).then_some(self.retry_after);
                return Err(refused(held.saturating_add(tally.promised), retry));
            }
            let new = with.saturating_sub(held);
            tally.loads += 1;
            tally.promised = tally.promised.saturating_add(new);
            counted.accounts.push((account.clone(), new));
        }
        Ok(counted)
    }
}

impl Bounds {
    /// Whether there are none.
    pub(crate) const fn is_empty(&self) -> bool {
        self.accounts.is_empty()
    }
}

impl Drop for Bounds {
    fn drop(&mut self) {
        for account in &self.accounts {
            account.tally().sessions.remove(&self.session);
        }
    }
}
