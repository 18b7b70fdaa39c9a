//! Random numbers without state: what is drawn depends on a seed and a number alone, so there is nothing to save.

/// The n-th number of a stream of random ones (SplitMix64, Steele et al. 2014).
pub(crate) fn scramble(seed: u64, n: u64) -> u64 {
    let mut z = seed.wrapping_add(n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
