//! stub
#![allow(missing_docs)]
use crate::catalog::Kind;
use crate::*;
use std::time::Duration;
pub struct Predictor;
pub struct Seen {
    pub content: ContentId,
    pub kind: Kind,
    pub bytes: Bytes,
}
pub struct Observed<'a> {
    pub session: SessionId,
    pub components: &'a [Seen],
}
pub struct Candidate {
    pub content: ContentId,
    pub bytes: Bytes,
    pub load_s: f64,
}
pub struct Proposal {
    pub content: ContentId,
    pub probability: f64,
}
#[derive(Debug, Clone, serde::Serialize)]
pub struct PredictorStats;
impl Predictor {
    pub fn new(_: &config::PredictConfig) -> Self {
        Self
    }
    pub fn observe(&mut self, _: Duration, _: &Observed<'_>) {}
    pub fn proposals(&mut self, _: Duration, _: &[Candidate], _: usize) -> Vec<Proposal> {
        vec![]
    }
    pub fn stats(&self) -> PredictorStats {
        PredictorStats
    }
}
