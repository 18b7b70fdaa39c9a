//! Letting others go first at the disk.

/// Gives the calling thread the idle class of I/O: the disk serves it when nobody else wants it, as far as the disk's
/// scheduler knows classes (`bfq` does, `none` does not). Gives whether the kernel took it.
///
/// It stays with the thread, so use a thread of your own. See `ioprio_set(2)`.
pub fn idle_io_priority() -> bool {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    const IOPRIO_CLASS_IDLE: libc::c_int = 3;
    const IOPRIO_CLASS_SHIFT: libc::c_int = 13;
    const THIS_THREAD: libc::c_int = 0;
    // SAFETY: the call takes three plain numbers and touches no memory of ours.
    let failed = unsafe {
        libc::syscall(
            libc::SYS_ioprio_set,
            IOPRIO_WHO_PROCESS,
            THIS_THREAD,
            IOPRIO_CLASS_IDLE << IOPRIO_CLASS_SHIFT,
        )
    };
    failed == 0
}

#[cfg(test)]
mod tests {
    #[test]
    fn any_thread_may_step_back() {
        let thread = std::thread::spawn(super::idle_io_priority);
        assert!(thread.join().unwrap());
    }
}
