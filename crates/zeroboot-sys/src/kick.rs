//! Forcing a vCPU out of the guest: a timer, or bytes on a socket, signal the vCPU's own thread, and the
//! handler sets `immediate_exit` in that vCPU's `kvm_run`.
//!
//! No kick is lost. `KVM_RUN` looks at `immediate_exit` after it has blocked nothing: a signal that comes
//! before the system call has set the flag, one that comes inside ends the call with EINTR, and one that
//! comes while no vCPU runs at all is remembered in `PENDING` and looked at by the next [`aimed`].

use std::{
    cell::Cell,
    io,
    os::fd::{AsRawFd, BorrowedFd},
    ptr,
    sync::{
        Once,
        atomic::{AtomicU8, Ordering, compiler_fence},
    },
    time::Duration,
};

thread_local! {
    // const-initialised and without a destructor, so that a signal handler may use them: no allocation,
    // no registration, only an access relative to the thread's own segment.
    static TARGET: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
    static PENDING: Cell<bool> = const { Cell::new(false) };
}

extern "C" fn on_signal(_signal: libc::c_int) {
    PENDING.set(true);
    // SAFETY: null, or `aimed` set it on this thread to what it borrows, and takes it back before the borrow ends.
    if let Some(target) = unsafe { TARGET.get().as_ref() } {
        target.store(1, Ordering::Relaxed);
    }
}

/// Runs something while kicks of this thread set that byte, the `immediate_exit` of one vCPU. It is clear afterwards.
pub(crate) fn aimed<T>(immediate_exit: &AtomicU8, run: impl FnOnce() -> T) -> T {
    /// Takes the aim back, also when `run` panics.
    struct Aim<'a>(&'a AtomicU8);
    impl Drop for Aim<'_> {
        fn drop(&mut self) {
            TARGET.set(ptr::null());
            compiler_fence(Ordering::SeqCst);
            // Cleared for the next run; a kick that came in between stays in `PENDING`.
            self.0.store(0, Ordering::Relaxed);
        }
    }
    TARGET.set(immediate_exit);
    let _aim = Aim(immediate_exit);
    compiler_fence(Ordering::SeqCst);
    if PENDING.get() {
        immediate_exit.store(1, Ordering::Relaxed);
    }
    run()
}

/// Whether a kick came since the last call. Clears it.
pub fn take_pending() -> bool {
    PENDING.replace(false)
}

/// A timer that kicks the thread that made it.
#[derive(Debug)]
pub struct Kick {
    timer: libc::timer_t,
}

impl Kick {
    /// Makes the timer (not running) and installs the handler of the kick signals, once in a process.
    pub fn new() -> io::Result<Kick> {
        install()?;
        // SAFETY: an all-zero sigevent is valid; the fields that matter are set below.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = libc::SIGALRM;
        event.sigev_notify_thread_id = thread_id();
        let mut timer: libc::timer_t = ptr::null_mut();
        // SAFETY: both pointers are to live locals.
        check(unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) })?;
        Ok(Kick { timer })
    }

    /// Kicks this thread after `delay` (at least a nanosecond). Replaces what was set before.
    pub fn after(&self, delay: Duration) -> io::Result<()> {
        self.set(delay.max(Duration::from_nanos(1)))
    }

    /// No kick will come any more.
    pub fn disarm(&self) -> io::Result<()> {
        self.set(Duration::ZERO)
    }

    fn set(&self, delay: Duration) -> io::Result<()> {
        let spec = libc::itimerspec {
            it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: libc::timespec {
                tv_sec: libc::time_t::try_from(delay.as_secs()).unwrap_or(libc::time_t::MAX),
                tv_nsec: delay.subsec_nanos().into(),
            },
        };
        // SAFETY: the timer is ours and alive, the pointer is to a live local.
        check(unsafe { libc::timer_settime(self.timer, 0, &spec, ptr::null_mut()) })
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        // SAFETY: the timer is ours; it is used no more after this.
        let r = unsafe { libc::timer_delete(self.timer) };
        debug_assert_eq!(r, 0);
    }
}

/// Kicks this thread whenever something happens on the socket: bytes come, or the other end closes.
pub fn on_activity(socket: BorrowedFd<'_>) -> io::Result<()> {
    install()?;
    let fd = socket.as_raw_fd();
    // The values of <fcntl.h>; libc does not name them for this target.
    const F_SETOWN_EX: libc::c_int = 15;
    const F_OWNER_TID: libc::c_int = 0;
    let owner = [F_OWNER_TID, thread_id()];
    // SAFETY: `owner` has the layout of struct f_owner_ex (two ints) and lives through the call.
    check(unsafe { libc::fcntl(fd, F_SETOWN_EX, owner.as_ptr()) })?;
    // SAFETY: plain calls on a descriptor that the caller holds.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    check(flags)?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_ASYNC | libc::O_NONBLOCK) })
}

/// By the raw call: what a C library remembers is the parent's in a child of `process::clone_into`.
fn thread_id() -> libc::pid_t {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::syscall(libc::SYS_gettid) as libc::pid_t }
}

fn install() -> io::Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        for signal in [libc::SIGALRM, libc::SIGIO] {
            // SAFETY: an all-zero sigaction is valid: no flags, empty mask. No SA_RESTART: a blocking
            // call in the worker is to end as well.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = on_signal as *const () as usize;
            // SAFETY: the handler only touches const-initialised thread locals and a mapped byte.
            if let Err(error) = check(unsafe { libc::sigaction(signal, &action, ptr::null_mut()) }) {
                result = Err(error);
            }
        }
    });
    result
}

fn check(r: libc::c_int) -> io::Result<()> {
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
