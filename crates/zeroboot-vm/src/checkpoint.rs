//! A running sandbox, saved: what its worker writes into its delta, and how a fork goes on from it. (docs/adr/0019)
//!
//! The state is hostile, since a guest may own the worker that wrote it. What is the template's (mailbox, wake line, CPUID,
//! the list of MSRs, the TSC's rate) is taken from the template, and the rest is read and restored in the jail of the one
//! worker that goes on from it.

use std::io;

use serde::{Deserialize, Serialize};
use zeroboot_sys::{
    delta::Delta,
    kvm::KvmError,
    memory::{Mapping, OutOfBounds, PAGE},
};

use crate::{Fork, ForkError, Host, Snapshot, StateTables, VmState, live::Channels};

/// Why a running sandbox was not saved. It goes on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SaveForkError {
    #[error("its worker has nowhere to save it")]
    NoDelta,
    #[error("cannot read the state of its vCPU")]
    Kvm(#[from] KvmError),
    #[error("the copy of its memory does not fit")]
    Memory(#[from] OutOfBounds),
    #[error("its state cannot be written")]
    Encode(#[from] postcard::Error),
}

/// Why a checkpoint gave no sandbox.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The machine could not be made, or refused the state.
    #[error("cannot go on from the checkpoint")]
    Fork(#[from] ForkError),
    /// The state is none that a sandbox of this template can have.
    #[error("the checkpoint is refused: {0}")]
    Refused(&'static str),
}

impl From<KvmError> for CheckpointError {
    fn from(error: KvmError) -> CheckpointError {
        ForkError::from(error).into()
    }
}

/// What is under way between a sandbox and its front.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Underway {
    pub(crate) channels: Channels,
    /// Bytes of frames that the guest has not taken.
    pub(crate) to_guest: Vec<u8>,
    /// Bytes of the guest's that were no whole frame.
    pub(crate) from_guest: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    vm: VmState,
    underway: Underway,
}

/// Puts a fork that stands still, and what is under way with it, into its delta.
pub(crate) fn save(fork: &mut Fork, template: &Snapshot, underway: Underway) -> Result<(), SaveForkError> {
    let delta = fork.delta.as_ref().ok_or(SaveForkError::NoDelta)?;
    // The pending access of the last exit is completed here, which writes no memory: a doorbell is a port.
    let vm = template.state().of_fork(&mut fork.machine)?;
    let memory = &fork.machine.memory;
    for (at, word) in fork.machine.vm.dirty_log()?.into_iter().enumerate() {
        let mut left = word;
        while left != 0 {
            delta.put_page(memory, at as u64 * 64 + u64::from(left.trailing_zeros()))?;
            left &= left - 1;
        }
    }
    // This process writes those, and KVM does not know.
    for page in fork.mailbox.pages() {
        delta.put_page(memory, page / PAGE as u64)?;
    }
    Ok(delta.put_state(&postcard::to_allocvec(&Saved { vm, underway })?)?)
}

/// A checkpoint in the memory of a process, which forks may go on from.
#[derive(Debug)]
pub struct Checkpoint {
    view: Mapping,
    state: Vec<u8>,
}

impl Checkpoint {
    /// Takes what a worker has put into `delta`. `base`: what the sandbox that it held was forked over.
    pub fn take(base: Mapping, delta: &Delta) -> io::Result<(Checkpoint, u64)> {
        let bytes = delta.copy_into(&base)?;
        Ok((Checkpoint { view: base, state: delta.state()? }, bytes))
    }

    /// The memory, for a checkpoint of a fork of this one. Only in a process that has forked since: it is moved out.
    pub fn into_view(self) -> Mapping {
        self.view
    }

    /// A new machine around the memory, and the state that it waits for: [`Fork::go_on_from`]. For a process that has the
    /// memory to itself.
    pub fn machine(self, host: &Host, template: &Snapshot) -> Result<(Fork, Vec<u8>), ForkError> {
        Ok((template.fork_over(host, self.view, &mut |_| ())?, self.state))
    }
}

impl Fork {
    /// Reads the state of a checkpoint and restores it, but for the clocks.
    pub fn go_on_from(&mut self, state: &[u8], template: &Snapshot) -> Result<Underway, CheckpointError> {
        let Saved { vm, underway } = decode(state, template.state()).map_err(CheckpointError::Refused)?;
        let tables = StateTables::new(&vm)?;
        vm.restore(&tables, &self.machine, &mut |_| ())?;
        self.went_on = Some(Box::new((vm, tables)));
        Ok(underway)
    }
}

fn decode(bytes: &[u8], template: &VmState) -> Result<Saved, &'static str> {
    let saved: Saved = postcard::from_bytes(bytes).map_err(|_| "its fields cannot be read")?;
    template.may_become(&saved.vm)?;
    if saved.underway.channels.len() > zeroboot_proto::live::MAX_OPEN {
        return Err("it has more channels than a sandbox may have");
    }
    Ok(saved)
}

/// For the fuzzer and the tests: bytes that a hostile worker leaves as its state. What is taken is a state of its template.
#[doc(hidden)]
pub fn fuzz_checkpoint(bytes: &[u8]) -> bool {
    let template = VmState::empty();
    let Ok(saved) = decode(bytes, &template) else { return false };
    assert!(template.msrs().iter().zip(saved.vm.msrs()).all(|(a, b)| a.0 == b.0));
    assert!(saved.underway.channels.len() <= zeroboot_proto::live::MAX_OPEN);
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn saved() -> Saved {
        let underway = Underway { to_guest: vec![1; 100], from_guest: vec![2; 7], ..Underway::default() };
        Saved { vm: VmState::empty(), underway }
    }

    #[test]
    fn a_state_that_its_template_cannot_come_to_is_refused() {
        let template = VmState::empty();
        let refused = |change: fn(&mut Saved)| {
            let mut saved = saved();
            change(&mut saved);
            decode(&postcard::to_allocvec(&saved).unwrap(), &template).err()
        };
        assert_eq!(refused(|_| ()), None);
        assert_eq!(refused(|saved| saved.vm.msrs[0].1 = 7), None);
        assert_eq!(refused(|saved| saved.vm.msrs[0].0 = 0x10), Some("it has other MSRs than its template"));
        assert_eq!(refused(|saved| saved.vm.msrs.clear()), Some("it has other MSRs than its template"));
        let state = Some("it has another extended state than its template");
        assert_eq!(refused(|saved| saved.vm.xsave.push(0)), state);
        assert_eq!(refused(|saved| saved.vm.xcrs = None), state);
        assert_eq!(refused(|saved| saved.vm.tsc_khz += 1), Some("its TSC has another rate than its template's"));
    }

    proptest! {
        #[test]
        fn no_bytes_of_a_worker_make_its_child_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300), cut in any::<prop::sample::Index>(), flip: u8,
        ) {
            fuzz_checkpoint(&bytes);
            let mut good = postcard::to_allocvec(&saved()).unwrap();
            let at = cut.index(good.len());
            prop_assert!(!fuzz_checkpoint(&good[..at]));
            good[at] ^= flip;
            fuzz_checkpoint(&good);
        }
    }
}
