//! Memory for a set, in every tier that it needs, before anything moves.

use std::collections::BTreeMap;
use std::sync::Arc;

use hotset_core::decision::Act;
use hotset_core::memory::{Claim, Never, Reservation, Want};
use hotset_core::plan::{Plan, Priority};
use hotset_core::{Bytes, ContentId, Tier};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::Job;
use crate::admission::Request;
use crate::loader::progress::Board;
use crate::loader::staging::Staging;
use crate::loading::{LoadError, Outlet, Stage};
use crate::ram_cache::RamCacheMessage;
use crate::vram_manager::VramManagerMessage;

impl Job {
    /// Reserves in every tier, in the one global order. On the way to a GPU that is its memory first, then RAM's.
    pub(super) async fn reserve(
        &self,
        plan: &Plan,
        outlet: &Outlet,
        board: &mut Board,
    ) -> Result<(Vec<Claim>, Staging), LoadError> {
        // All there: no need to trouble anybody.
        if let Some(claims) = self.claim_resident(plan) {
            return Ok((claims, Staging::default()));
        }
        board.enter(Stage::WaitingFor(plan.tier), &self.house.phases);
        outlet.show(board.progress(self.started));
        let own = self.ask(plan.tier, plan.wants(plan.tier)).await?;
        let Tier::Vram(_) = plan.tier else {
            return Ok((own.claims, Staging::default()));
        };
        // While it waited, components may have come and gone: from here on they are pinned, so now it is certain which
        // of them have to move.
        let (routed, peers) = self.route(plan)?;
        let mut wants = routed.wants(Tier::Ram);
        let staying = wants.len();
        wants.extend(routed.stage_wants());
        if wants.is_empty() {
            let staging = Staging {
                peers,
                ..Staging::default()
            };
            return Ok((own.claims, staging));
        }
        board.enter(Stage::WaitingFor(Tier::Ram), &self.house.phases);
        outlet.show(board.progress(self.started));
        let mut ram = self.ask(Tier::Ram, wants).await?;
        let stages = ram.claims.split_off(staying);
        let staging = Staging {
            claims: stages
                .into_iter()
                .map(|claim| (claim.component().content_id, claim))
                .collect(),
            ring: ram.scratch.map(|charge| Arc::new(Mutex::new(charge))),
            peers,
        };
        Ok((in_order(plan, own.claims, ram.claims), staging))
    }

    /// Claims on all components of a plan, where each is resident where it goes.
    fn claim_resident(&self, plan: &Plan) -> Option<Vec<Claim>> {
        // What costs nothing takes memory from nobody, but what nobody held may be just what somebody else waits for.
        if self.set.priority != Priority::Interactive && self.must_yield(plan) {
            return None;
        }
        let claim = |tier| {
            let components = plan.components(tier);
            let ledger = &self.house.ledger;
            ledger.claim_resident(tier, &components, Some(self.session))
        };
        let own = claim(plan.tier)?;
        let spilled = match plan.tiers().len() {
            1 => Vec::new(),
            _ => claim(Tier::Ram)?,
        };
        Some(in_order(plan, own, spilled))
    }

    /// The ways by which the components of a plan get to its GPU, and claims on those that come from other GPUs. A claim on
    /// what is resident is had at once or not at all, so it needs no place in the order of reservations.
    fn route(&self, plan: &Plan) -> Result<(Plan, BTreeMap<ContentId, Claim>), LoadError> {
        let outlook = self.house.outlook();
        let mut routed = plan.clone();
        outlook.planner().route(&mut routed)?;
        let mut peers = BTreeMap::new();
        for step in &routed.steps {
            let Some(gpu) = step.peer else { continue };
            let (tier, one) = (Tier::Vram(gpu), std::slice::from_ref(&step.component));
            match self.house.ledger.claim_resident(tier, one, None) {
                Some(claims) => peers.extend(
                    claims
                        .into_iter()
                        .map(|claim| (step.component.content_id, claim)),
                ),
                None => {
                    // It has just gone: then all come the usual way.
                    outlook.without_links().planner().route(&mut routed)?;
                    return Ok((routed, BTreeMap::new()));
                }
            }
        }
        Ok((routed, peers))
    }

    /// Asks the keeper of a tier for memory, and again after each of its restarts.
    async fn ask(&self, tier: Tier, wants: Vec<Want>) -> Result<Reservation, LoadError> {
        let before = self.house.ledger.sums(tier);
        let needed = self.house.ledger.needed(tier, &wants);
        let request = |reply| Request {
            session: self.session,
            request: self.request,
            priority: self.set.priority,
            wants: wants.clone(),
            asked: self.asked,
            reply,
        };
        let asked = Instant::now();
        let answer = match tier {
            Tier::Ram => {
                self.house
                    .ram
                    .insist(|reply| RamCacheMessage::Reserve(request(reply)))
                    .await
            }
            Tier::Vram(gpu) => match self.house.vram.get(&gpu) {
                Some(slot) => {
                    slot.insist(|reply| VramManagerMessage::Reserve(request(reply)))
                        .await
                }
                None => Err(Never::OutOfService {
                    tier,
                    reason: "there is no such GPU".into(),
                }),
            },
        };
        let reservation = answer?;
        self.house.decide(Act::Admit {
            session: self.session,
            request: self.request,
            tier,
            components: reservation
                .claims
                .iter()
                .map(|claim| claim.component().id.clone())
                .collect(),
            needed,
            free: before.map_or(Bytes::ZERO, |sums| sums.free()),
            waited: asked.elapsed(),
        });
        Ok(reservation)
    }
}

/// The claims of a plan in the order of its steps; both kinds are in that order among themselves.
fn in_order(plan: &Plan, own: Vec<Claim>, spilled: Vec<Claim>) -> Vec<Claim> {
    let (mut own, mut spilled) = (own.into_iter(), spilled.into_iter());
    let steps = plan.steps.iter();
    steps
        .filter_map(|step| match step.tier == plan.tier {
            true => own.next(),
            false => spilled.next(),
        })
        .collect()
}
