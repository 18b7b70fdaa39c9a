//! What is worth loading before anybody asks for it, and what may go for that.

use std::time::Duration;

use super::{HotsetRetention, Leader};
use crate::policy::rates::Outlook;
use crate::policy::shadow::Asked;
use crate::policy::{Candidate, Prefetch, Score, Victim, together};
use crate::predict::Position;
use crate::units::Bytes;

/// Expected seconds saved must be so many times the expected seconds lost by what goes.
const MARGIN: f64 = 3.0;
/// Expected uses within the horizon below which nothing is loaded on a guess.
const MIN_USES: f64 = 0.7;

impl HotsetRetention {
    /// The cheapest residents with so many bytes, where all of them together are worth far less than `saved_s` in each request.
    pub(super) fn worth_less(
        &mut self,
        now: Duration,
        saved_s: f64,
        residents: &[Candidate],
        needed: Bytes,
    ) -> Option<Vec<Victim>> {
        if needed.is_zero() {
            return Some(Vec::new());
        }
        if !together(residents, needed) {
            return None;
        }
        let victims = self.choose_as(Leader::Predictor, now, residents, needed);
        let (rates, mut outlook) = self.outlook(now);
        let mut lost_s = 0.0;
        for victim in &victims {
            if let Some(held) = residents.iter().find(|c| c.content == victim.content) {
                let (rate, _) = rates.now(&mut outlook, &held.content);
                lost_s += rate * held.restore_s;
            }
        }
        (saved_s > MARGIN * lost_s).then_some(victims)
    }

    /// What is worth most of what went last, with what goes for it; nothing where nothing pays.
    pub(super) fn worth_loading(
        &mut self,
        now: Duration,
        residents: &[Candidate],
        free: Bytes,
    ) -> Option<Prefetch> {
        let board = self.prefetch.as_ref()?;
        if !self.predictor.is_trained() {
            return None;
        }
        let horizon = self.race.horizon();
        let mut outlook = Outlook {
            predictor: &mut self.predictor,
            now,
            horizon,
        };
        // The most seconds saved first; the first that pays for its victims is it.
        let mut wanted: Vec<(Score, Asked)> = self
            .ghosts
            .iter()
            .filter(|ghost| !board.holds(&ghost.content))
            .map(|ghost| {
                let (rate, _) = self.rates.now(&mut outlook, &ghost.content);
                (Score(-rate * ghost.restore_s), *ghost)
            })
            .filter(|(Score(saved), ghost)| -saved * horizon >= MIN_USES * ghost.restore_s)
            .collect();
        wanted.sort_by(|(a, x), (b, y)| a.cmp(b).then(x.content.cmp(&y.content)));
        for (Score(saved), ghost) in wanted {
            let needed = ghost.bytes.saturating_sub(free);
            let Some(victims) = self.worth_less(now, -saved, residents, needed) else {
                continue;
            };
            let restore_s = |victim: &Victim| {
                let held = residents.iter().find(|c| c.content == victim.content);
                held.map_or(0.0, |c| c.restore_s)
            };
            let position = Position {
                content: ghost.content,
                bytes: ghost.bytes,
                load_s: ghost.restore_s,
                victims: victims.iter().map(|v| (v.content, restore_s(v))).collect(),
                until: self.predictor.observed() + (2.0 * horizon) as u64,
            };
            let real = self.prefetch.as_mut()?.open(position)?;
            if !real {
                continue;
            }
            self.ghosts.retain(|other| other.content != ghost.content);
            return Some(Prefetch {
                content: ghost.content,
                bytes: ghost.bytes,
                victims,
            });
        }
        None
    }
}
