//! The pages that host memory lies on.

use serde::{Deserialize, Serialize};

use super::populate::can_collapse;
use crate::units::MIB;

/// Bytes of a huge page on every machine that hotset runs on with 4 KiB base pages.
pub const HUGE_PAGE: u64 = 2 * MIB;

/// Bytes of an ordinary page.
pub(super) const PAGE: u64 = 4096;

/// From this size on a slab lies on huge pages, where there are any: below, rounding up to them would cost more than an
/// eighth of the slab.
pub(in crate::memory) const HUGE_FROM: u64 = 16 * MIB;

/// The pages that host memory lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pages {
    /// 2 MiB pages that the administrator reserved (`vm.nr_hugepages`).
    Hugetlb,
    /// 2 MiB pages where the kernel finds some, since it may give them to shared memory.
    Transparent,
    /// 2 MiB pages that the kernel makes of small ones when asked to (`MADV_COLLAPSE`), whatever is configured for shared
    /// memory; the rest behind the last whole one is on 4 KiB pages.
    Collapsed,
    /// 4 KiB pages.
    Small,
}

impl std::fmt::Display for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Hugetlb => "reserved 2 MiB",
            Self::Transparent => "2 MiB",
            Self::Collapsed => "collapsed 2 MiB",
            Self::Small => "4 KiB",
        })
    }
}

impl Pages {
    /// The unit in which memory is taken.
    pub(in crate::memory) const fn granule(self) -> u64 {
        match self {
            Self::Hugetlb | Self::Transparent => HUGE_PAGE,
            Self::Collapsed | Self::Small => PAGE,
        }
    }

    /// What the kernel allows for shared memory without reserved pages.
    pub(in crate::memory) fn of_shared_memory() -> Self {
        let read = |name: &str| {
            std::fs::read_to_string(format!("/sys/kernel/mm/transparent_hugepage/{name}"))
                .unwrap_or_default()
        };
        let allowed = Self::parse(
            &read("shmem_enabled"),
            &read("hugepages-2048kB/shmem_enabled"),
        );
        // Where pages are huge from the start there is nothing to collapse.
        if allowed == Self::Small && can_collapse() {
            Self::Collapsed
        } else {
            allowed
        }
    }

    /// The two texts are the setting for all sizes and the one for 2 MiB, which may defer to the first. The chosen word
    /// of each is in brackets.
    fn parse(overall: &str, huge: &str) -> Self {
        let chosen = |text: &str| -> Option<String> {
            let (_, rest) = text.split_once('[')?;
            Some(rest.split_once(']')?.0.to_owned())
        };
        let setting = match chosen(huge).as_deref() {
            None | Some("inherit") => chosen(overall),
            Some(own) => Some(own.to_owned()),
        };
        match setting.as_deref() {
            Some("always" | "within_size" | "advise" | "force") => Self::Transparent,
            _ => Self::Small,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_word_on_huge_pages_is_read() {
        let overall = "always within_size advise [never] deny force\n";
        let advise = "always within_size [advise] never deny force\n";
        let inherit = "always [inherit] within_size advise never\n";
        let own = "always inherit within_size [advise] never\n";
        assert_eq!(Pages::parse(overall, inherit), Pages::Small);
        assert_eq!(Pages::parse(overall, own), Pages::Transparent);
        assert_eq!(Pages::parse(advise, inherit), Pages::Transparent);
        assert_eq!(Pages::parse(advise, ""), Pages::Transparent);
        assert_eq!(Pages::parse("", ""), Pages::Small);
    }
}
