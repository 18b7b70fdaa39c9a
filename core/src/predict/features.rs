//! What is remembered of a component's use, and the row of numbers that the model sees.

use serde::{Deserialize, Serialize};

use crate::catalog::Kind;
use crate::ids::{ContentId, SessionId};
use crate::units::Bytes;

/// The length of a row. linfa-ftrl walks all of it at each step, so it stays below 64.
pub(super) const FEATURES: usize = 57;

/// One example.
pub(super) type Row = [f64; FEATURES];

/// Half-lives of the decayed counts, in requests.
pub(super) const HALF_LIVES: [f64; 5] = [16.0, 64.0, 256.0, 1_024.0, 3_072.0];
/// Half-life of what a session used last, in requests.
pub(super) const STICKINESS: f64 = 64.0;
/// The horizon to which features are scaled, in requests, and the time that stands for it, in seconds.
const SCALE: f64 = 64.0;
const SCALE_S: f64 = 3_600.0;
/// Upper edges of the bins of idle time, in seconds; the last bin is open.
const IDLE_EDGES_S: [f64; 9] = [
    60.0, 300.0, 900.0, 1_800.0, 3_600.0, 7_200.0, 14_400.0, 43_200.0, 172_800.0,
];
/// Upper edges of the bins of idle time counted in requests; the last bin is open.
const SINCE_EDGES: [u64; 7] = [1, 4, 16, 64, 256, 1_024, 4_096];
/// Bases that an adapter's uses are counted with.
pub(super) const MAX_BASES: usize = 4;
/// Sessions that a component's uses are counted with.
const MAX_USERS: usize = 6;
/// What is left of the uses that were counted with a base or a session at each further use.
const OLD_USES: f64 = 0.95;
/// Share of the newest gap in the mean and variance of gaps.
const GAP_STEP: f64 = 0.25;

/// The sum of ones that halve each half-life, at the requests of [`HALF_LIVES`].
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(super) struct Counts {
    at: u64,
    values: [f64; HALF_LIVES.len()],
}

impl Counts {
    pub(super) fn add(&mut self, request: u64) {
        self.values = self.at(request).map(|value| value + 1.0);
        self.at = request;
    }

    pub(super) fn at(&self, request: u64) -> [f64; HALF_LIVES.len()] {
        let passed = request.saturating_sub(self.at) as f64;
        let mut values = self.values;
        for (value, half_life) in values.iter_mut().zip(HALF_LIVES) {
            *value *= (-passed / half_life).exp2();
        }
        values
    }

    pub(super) fn is_sound(&self) -> bool {
        self.values.iter().all(|v| v.is_finite() && *v >= 0.0)
    }
}

/// What is left of a session's weight.
pub(super) fn faded(request: u64, since: u64) -> f64 {
    (-(request.saturating_sub(since) as f64) / STICKINESS).exp2()
}

/// Something that a component was used with or by, and how often.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Often<T> {
    pub(super) what: T,
    pub(super) times: f64,
}

impl<T: Copy + PartialEq> Often<T> {
    /// Counts one use, at the cost of the rarest where there are more than `most`.
    fn count(all: &mut Vec<Self>, what: T, most: usize) {
        for one in all.iter_mut() {
            one.times *= OLD_USES;
        }
        if let Some(one) = all.iter_mut().find(|one| one.what == what) {
            one.times += 1.0;
            return;
        }
        if all.len() == most {
            let rarest = (0..most).min_by(|a, b| f64::total_cmp(&all[*a].times, &all[*b].times));
            if let Some(rarest) = rarest {
                all.swap_remove(rarest);
            }
        }
        all.push(Self { what, times: 1.0 });
    }

    fn is_sound(all: &[Self], most: usize) -> bool {
        all.len() <= most && all.iter().all(|one| one.times.is_finite())
    }
}

/// What those who use a component mostly have been doing.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Users {
    /// Requests since the latest of any of them; `None` where they are forgotten.
    pub(super) since: Option<u64>,
    /// The share of their requests that was for the component, summed over all, each halved for each [`STICKINESS`]
    /// since its last.
    pub(super) interest: f64,
}

/// What is remembered of one component.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Tracked {
    pub(super) content: ContentId,
    pub(super) kind: Kind,
    pub(super) bytes: Bytes,
    pub(super) first_s: f64,
    pub(super) last_s: f64,
    /// Number of the request that used it last.
    pub(super) last_request: u64,
    pub(super) uses: u64,
    pub(super) counts: Counts,
    /// Mean of the gaps between uses, in requests, and their variance.
    gap_mean: f64,
    gap_variance: f64,
    /// Sessions whose last request has it, each halved for each [`STICKINESS`] since.
    pub(super) holders: f64,
    /// The same, each weighted by how often it asked lately.
    pub(super) active: f64,
    pub(super) holders_at: u64,
    pub(super) bases: Vec<Often<ContentId>>,
    pub(super) users: Vec<Often<SessionId>>,
}

impl Tracked {
    pub(super) fn new(content: ContentId, kind: Kind, bytes: Bytes, now_s: f64) -> Self {
        Self {
            content,
            kind,
            bytes,
            first_s: now_s,
            last_s: now_s,
            last_request: 0,
            uses: 0,
            counts: Counts::default(),
            gap_mean: 0.0,
            gap_variance: 0.0,
            holders: 0.0,
            active: 0.0,
            holders_at: 0,
            bases: Vec::new(),
            users: Vec::new(),
        }
    }

    /// Counts one use.
    pub(super) fn used(&mut self, now_s: f64, request: u64) {
        if self.uses > 0 {
            let gap = request.saturating_sub(self.last_request) as f64;
            if self.uses == 1 {
                self.gap_mean = gap;
            } else {
                // Exponentially weighted mean and variance (West 1979, in the form with a constant step).
                let off = gap - self.gap_mean;
                self.gap_mean += GAP_STEP * off;
                self.gap_variance = (1.0 - GAP_STEP) * (self.gap_variance + GAP_STEP * off * off);
            }
        }
        self.uses += 1;
        self.last_s = now_s;
        self.last_request = request;
        self.counts.add(request);
    }

    /// Counts one use of an adapter with a base.
    pub(super) fn used_with(&mut self, base: ContentId) {
        Often::count(&mut self.bases, base, MAX_BASES);
    }

    /// Counts one use by a session.
    pub(super) fn used_by(&mut self, session: SessionId) {
        Often::count(&mut self.users, session, MAX_USERS);
    }

    pub(super) fn usual_base(&self) -> Option<ContentId> {
        self.bases
            .iter()
            .max_by(|a, b| f64::total_cmp(&a.times, &b.times))
            .map(|used| used.what)
    }

    pub(super) fn holders_at(&self, request: u64) -> f64 {
        self.holders * faded(request, self.holders_at)
    }

    pub(super) fn active_at(&self, request: u64) -> f64 {
        self.active * faded(request, self.holders_at)
    }

    /// Moves the weight of a session by so much.
    pub(super) fn hold(&mut self, request: u64, holders: f64, active: f64) {
        self.holders = (self.holders_at(request) + holders).max(0.0);
        self.active = (self.active_at(request) + active).max(0.0);
        self.holders_at = request;
    }

    pub(super) fn is_sound(&self) -> bool {
        let numbers = [
            self.first_s,
            self.last_s,
            self.gap_mean,
            self.gap_variance,
            self.holders,
            self.active,
        ];
        numbers.iter().all(|x| x.is_finite())
            && self.counts.is_sound()
            && Often::is_sound(&self.bases, MAX_BASES)
            && Often::is_sound(&self.users, MAX_USERS)
    }
}

/// The moment for which rows are made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    pub(super) now_s: f64,
    /// Requests so far.
    pub(super) request: u64,
    /// The mean gap between requests lately over that of a longer while.
    pub(super) calm: f64,
}

/// The log odds of at least one use within the horizon, if uses came at random with the rate that a decayed count tells.
fn poisson_log_odds(count: f64, half_life: f64, watched: f64, horizon: f64) -> f64 {
    // A count that has not had time to fill up is short by this factor.
    let filled = (1.0 - (-watched / half_life).exp2()).max(0.05);
    let rate = count * std::f64::consts::LN_2 / half_life / filled;
    let p = (1.0 - (-rate * horizon).exp()).clamp(1e-3, 1.0 - 1e-3);
    (p / (1.0 - p)).ln()
}

/// The chance of a use within so many requests from the decayed counts alone, for as long as the models can't be
/// believed.
pub(super) fn chance_from_counts(tracked: &Tracked, moment: &Moment, horizon: f64) -> f64 {
    let counts = tracked.counts.at(moment.request);
    let watched = moment.request as f64;
    let odds = poisson_log_odds(counts[2], HALF_LIVES[2], watched, horizon).exp();
    odds / (1.0 + odds)
}

/// What kinds a component may be of, as the model sees it.
fn group(kind: Kind) -> usize {
    if kind.is_adapter() {
        return 1;
    }
    match kind {
        Kind::Vae | Kind::TextEncoder | Kind::ImageEncoder => 2,
        Kind::Unknown => 3,
        _ => 0,
    }
}

/// Fills a row from the left; what does not fit is a mistake that a test finds.
struct Writer {
    row: Row,
    next: usize,
}

impl Writer {
    fn push(&mut self, value: f64) {
        if let Some(place) = self.row.get_mut(self.next) {
            *place = if value.is_finite() {
                value.clamp(-10.0, 10.0)
            } else {
                0.0
            };
        }
        self.next += 1;
    }

    fn one_hot(&mut self, at: usize, of: usize) {
        (0..of).for_each(|i| self.push(f64::from(u8::from(i == at))));
    }
}

/// The row of a component at a moment; `base` is its usual base where it is an adapter.
pub(super) fn row(
    tracked: &Tracked,
    base: Option<&Tracked>,
    users: &Users,
    moment: &Moment,
) -> Row {
    write(tracked, base, users, moment).row
}

fn write(tracked: &Tracked, base: Option<&Tracked>, users: &Users, moment: &Moment) -> Writer {
    let mut out = Writer {
        row: [0.0; FEATURES],
        next: 0,
    };
    let &Moment { now_s, request, .. } = moment;
    let watched = request as f64;
    let idle = (now_s - tracked.last_s).max(0.0);
    let since = request.saturating_sub(tracked.last_request);
    let log_since = ((since as f64 + 1.0) / SCALE).ln() / 4.0;
    let counts = tracked.counts.at(request);

    // Intercept (1).
    out.push(1.0);
    // Recency in seconds (1 + 10) and in requests (1 + 8).
    out.push(((idle + 1.0) / SCALE_S).ln() / 4.0);
    let bin = IDLE_EDGES_S.partition_point(|edge| *edge <= idle);
    out.one_hot(bin, IDLE_EDGES_S.len() + 1);
    out.push(log_since);
    out.one_hot(
        SINCE_EDGES.partition_point(|edge| *edge < since),
        SINCE_EDGES.len() + 1,
    );
    // Frequency: log odds at each half-life (5), and uses missed since the last at three of their rates (3).
    let mut odds = [0.0; HALF_LIVES.len()];
    for i in 0..odds.len() {
        odds[i] = poisson_log_odds(counts[i], HALF_LIVES[i], watched, SCALE) / 4.0;
        out.push(odds[i]);
    }
    for i in [2, 3, 4] {
        let rate = counts[i] * std::f64::consts::LN_2 / HALF_LIVES[i].min(watched.max(1.0));
        out.push((rate * since as f64).ln_1p() / 2.0);
    }
    // Regularity: the mean gap, its variation, how late the next use is (4).
    let known = tracked.uses >= 2;
    let mean = tracked.gap_mean.max(1.0);
    let variation = (tracked.gap_variance.sqrt() / mean).min(4.0);
    let if_known = |value: f64| if known { value } else { 0.0 };
    out.push(f64::from(u8::from(known)));
    out.push(if_known((mean / SCALE).ln() / 4.0));
    out.push(if_known(variation / 2.0));
    out.push(if_known((since as f64 / mean).ln_1p()));
    // Sessions (3): those whose last request has it, and how active these are.
    let holders = tracked.holders_at(request);
    let active = tracked.active_at(request);
    out.push(holders.ln_1p());
    out.push((holders - 0.5).clamp(0.0, 1.0));
    out.push(active.ln_1p() / 2.0);
    // Those who used it most (4): whether they are about, what they are after, how few and how many they are.
    let since_user = users.since.unwrap_or(u64::MAX).min(100_000) as f64;
    out.push(((since_user + 1.0) / SCALE).ln() / 4.0);
    out.push(users.interest.ln_1p());
    let times = tracked.users.iter().map(|user| user.times);
    let most = times.clone().fold(0.0, f64::max);
    out.push(most / times.sum::<f64>().max(1e-9));
    out.push((tracked.users.len() as f64).ln_1p() / 2.0);
    // The component's own age (2), and number of uses (1).
    let age = (now_s - tracked.first_s).max(0.0);
    out.push(((age + 1.0) / SCALE_S).ln() / 4.0);
    out.push(f64::from(u8::from(age < SCALE_S)));
    out.push((tracked.uses as f64).ln_1p() / 5.0);
    // How calm it is now, against a longer while (1).
    out.push(moment.calm.max(1e-6).ln() / 4.0);
    // Kind (4), and kind with the strongest of the above (4).
    let group = group(tracked.kind);
    out.one_hot(group, 4);
    let adapter = f64::from(u8::from(group == 1));
    out.push(adapter * log_since);
    out.push(adapter * odds[1]);
    out.push(adapter * odds[2]);
    out.push(adapter * holders.ln_1p());
    // An adapter's usual base (4): how idle it is, how likely, and how much of its use goes with the adapter.
    let theirs = base.map(|base| {
        let since = request.saturating_sub(base.last_request);
        (base.counts.at(request), since as f64)
    });
    out.push(f64::from(u8::from(theirs.is_some())));
    out.push(theirs.map_or(0.0, |(_, since)| ((since + 1.0) / SCALE).ln() / 4.0));
    out.push(theirs.map_or(0.0, |(of, _)| {
        poisson_log_odds(of[1], HALF_LIVES[1], watched, SCALE) / 4.0
    }));
    out.push(theirs.map_or(0.0, |(of, _)| (counts[3] / of[3].max(1e-9)).min(1.0)));
    // Size (1).
    out.push((tracked.bytes.as_f64() / 1e9 + 0.01).ln() / 4.0);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(now_s: f64) -> Moment {
        Moment {
            now_s,
            request: 10,
            calm: 1.0,
        }
    }

    #[test]
    fn a_row_is_full_and_finite() {
        let tracked = Tracked::new(ContentId::File([1; 32]), Kind::Lora, Bytes(0), 0.0);
        for now in [0.0, 1.0, 1e4, 1e12] {
            let written = write(&tracked, Some(&tracked), &Users::default(), &moment(now));
            assert_eq!(written.next, FEATURES);
            assert!(written.row.iter().all(|x| x.is_finite()));
        }
        const { assert!(FEATURES <= 64) };
    }

    #[test]
    fn counts_halve() {
        let mut counts = Counts::default();
        counts.add(0);
        counts.add(16);
        let values = counts.at(32);
        assert!((values[0] - 0.75).abs() < 1e-12);
        assert!((values[1] - (2_f64.powf(-0.5) + 2_f64.powf(-0.25))).abs() < 1e-12);
    }

    #[test]
    fn only_a_few_users_are_remembered() {
        let mut tracked = Tracked::new(ContentId::File([1; 32]), Kind::Lora, Bytes(1), 0.0);
        for i in 0..20 {
            tracked.used_by(SessionId(i));
            tracked.used_by(SessionId(99));
        }
        assert_eq!(tracked.users.len(), MAX_USERS);
        let most = tracked
            .users
            .iter()
            .max_by(|a, b| a.times.total_cmp(&b.times));
        assert_eq!(most.unwrap().what, SessionId(99));
        assert!(tracked.is_sound());
    }

    #[test]
    fn only_a_few_bases_are_remembered() {
        let mut adapter = Tracked::new(ContentId::File([1; 32]), Kind::Lora, Bytes(1), 0.0);
        for i in 0..20 {
            adapter.used_with(ContentId::File([i; 32]));
            adapter.used_with(ContentId::File([99; 32]));
        }
        assert_eq!(adapter.bases.len(), MAX_BASES);
        assert_eq!(adapter.usual_base(), Some(ContentId::File([99; 32])));
    }
}
