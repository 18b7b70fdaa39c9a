//! Sets that were all there when they were last asked for: the next request for one resolves no names and makes no plan.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, PoisonError};

use hotset_core::catalog::Component;
use hotset_core::plan::{ComponentSet, Plan, Step, Target, There};
use hotset_core::sync::Mutex;

use crate::uses::UsedSet;

/// The most sets that are remembered.
const MOST: usize = 4096;

/// A set that was all there.
#[derive(Debug)]
pub(crate) struct HotSet {
    names: Vec<String>,
    target: Target,
    dependencies: bool,
    /// The catalogue by which its names were resolved.
    generation: u64,
    pub(crate) plan: Arc<Plan>,
    pub(crate) components: Vec<Arc<Component>>,
    pub(crate) used: UsedSet,
}

/// See the module's page.
#[derive(Debug, Default)]
pub(crate) struct HotSets {
    // Clients choose the names, so the hash is seeded at random; two sets of one hash displace each other.
    sets: Mutex<HashMap<u64, Arc<HotSet>>>,
    seed: RandomState,
}

impl HotSets {
    fn key(&self, set: &ComponentSet) -> u64 {
        let place = match set.target {
            Target::Best => (0, 0),
            Target::Ram => (1, 0),
            Target::AnyGpu => (2, 0),
            Target::Gpu(gpu) => (3, gpu.0),
        };
        self.seed.hash_one((&set.names, place, set.dependencies))
    }

    /// What is known of a set under this catalogue.
    pub(crate) fn get(&self, set: &ComponentSet, generation: u64) -> Option<Arc<HotSet>> {
        let key = self.key(set);
        let sets = self.sets.lock().unwrap_or_else(PoisonError::into_inner);
        sets.get(&key)
            .filter(|known| {
                known.generation == generation
                    && known.target == set.target
                    && known.dependencies == set.dependencies
                    && known.names == set.names
            })
            .cloned()
    }

    /// Remembers a set whose plan found all of it there.
    pub(crate) fn remember(&self, set: &ComponentSet, generation: u64, plan: &Arc<Plan>) {
        let elsewhere = |step: &Step| step.there != There::Resident || step.tier != plan.tier;
        if plan.steps.iter().any(elsewhere) {
            return;
        }
        let components = plan.steps.iter().map(|step| step.component.clone());
        let hot = HotSet {
            names: set.names.clone(),
            target: set.target,
            dependencies: set.dependencies,
            generation,
            components: components.clone().collect(),
            used: components.map(|component| (component, true)).collect(),
            plan: plan.clone(),
        };
        let key = self.key(set);
        let mut sets = self.sets.lock().unwrap_or_else(PoisonError::into_inner);
        if sets.len() >= MOST && !sets.contains_key(&key) {
            // Those of older catalogues will never be found again.
            sets.retain(|_, known| known.generation == generation);
            if sets.len() >= MOST {
                sets.clear();
            }
        }
        sets.insert(key, Arc::new(hot));
    }
}
