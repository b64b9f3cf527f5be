//! The files of a frozen machine: how it is written, read, and refused where it cannot run.
//!
//! ```text
//! memory.img  guest memory from address 0, sparse
//! state.bin   "ZBSTATE\0" · u32 version · u32 body length · BLAKE3 of the body · body (postcard)
//! ```
//!
//! The body names the BLAKE3 of the memory, so that the two files belong together; and the host's facts.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use zeroboot_sys::{
    kvm::{CpuidEntry, CpuidTable, KvmError, XSAVE_MAX},
    memory::{GuestPhys, MemoryImage, PAGE},
};

use super::{Body, Snapshot};
use crate::{CpuDifference, Difference, Host, HostFacts, MAX_MEMORY, StateTables};

const MAGIC: [u8; 8] = *b"ZBSTATE\0";
/// The version of `state.bin`. Counted up with every change of what it holds.
pub const FORMAT_VERSION: u32 = 3;
const HEADER: usize = 8 + 4 + 4 + 32;
/// Most bytes of a state file; a state is some 30 KiB.
const MAX_STATE_FILE: u64 = 4 << 20;
/// The names of the two files in a template's directory.
pub const MEMORY_FILE: &str = "memory.img";
/// See [`MEMORY_FILE`].
pub const STATE_FILE: &str = "state.bin";

/// What a manifest says about a snapshot. `state.bin` is what counts; this is for people and for
/// `template inspect`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotFacts {
    /// Version of `state.bin`.
    pub format_version: u32,
    /// Version of the frames that the frozen agent speaks.
    pub protocol: u16,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// Bytes of it that are not zero pages.
    pub memory_stored_bytes: u64,
    /// BLAKE3 over the pages that are not zero.
    pub memory_blake3: String,
    /// BLAKE3 of `state.bin`'s body.
    pub state_blake3: String,
    /// MSRs in the state.
    pub msrs: usize,
    /// Pages that an exec was seen to write.
    pub working_set_written: u64,
    /// Pages that an exec was seen to read.
    pub working_set_read: u64,
    /// The host it was made on, and the only kind it can be loaded on.
    pub host: HostFacts,
}

/// Why a snapshot could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {path}")]
pub struct SaveError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Why a snapshot was refused. [`LoadSnapshotError::mend`] says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadSnapshotError {
    /// A file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `state.bin` does not begin as one, or ends early, or its checksum is wrong.
    #[error("{STATE_FILE} is damaged: {0}")]
    Damaged(&'static str),
    /// Written by another version of Zeroboot.
    #[error("{STATE_FILE} has format version {found}; this program reads version {FORMAT_VERSION}")]
    Version {
        /// What the file says.
        found: u32,
    },
    /// The frozen agent speaks another version of the frames.
    #[error("the template's agent speaks frames of version {0}; this program speaks version {ours}", ours = zeroboot_proto::VERSION)]
    Protocol(u16),
    /// Built on another kind of host.
    #[error("the template cannot run on this host: {0}")]
    Foreign(Difference),
    /// Built on a CPU that gives guests other features.
    #[error("the template cannot run on this host: it was built on {built} and this is {here}; {features}")]
    ForeignCpu {
        /// The CPU that it was built on.
        built: String,
        /// This host's.
        here: String,
        /// In what they differ.
        features: CpuDifference,
    },
    /// `memory.img` is not the memory that `state.bin` belongs to.
    #[error("{MEMORY_FILE} is damaged: {0}")]
    Memory(&'static str),
    /// The kernel refused what the file holds.
    #[error("the host's KVM refuses the saved state")]
    Kvm(#[from] KvmError),
}

impl LoadSnapshotError {
    /// What the user can do about it.
    pub fn mend(&self) -> &'static str {
        match self {
            LoadSnapshotError::Read { .. } => "check that the template's directory is complete and readable",
            _ => "build the template again on this host",
        }
    }
}

impl Snapshot {
    /// Writes `memory.img` and `state.bin` into a directory and waits until they are on disk. The caller
    /// makes the whole directory appear at once by a rename.
    pub fn save(&self, directory: &Path) -> Result<SnapshotFacts, SaveError> {
        let path = directory.join(MEMORY_FILE);
        let stored = self.save_memory(&path).map_err(|source| SaveError { path, source })?;
        let path = directory.join(STATE_FILE);
        let (bytes, hash) = encode(&self.body);
        let write = || -> io::Result<()> {
            let mut file = File::create_new(&path)?;
            file.write_all(&bytes)?;
            file.sync_all()
        };
        write().map_err(|source| SaveError { path: path.clone(), source })?;
        Ok(self.facts(stored, hash))
    }

    fn save_memory(&self, path: &Path) -> io::Result<u64> {
        let file = File::create_new(path)?;
        file.set_len(self.image.len())?;
        let mut stored = 0;
        each_page(&self.image, |page, bytes| {
            stored += bytes.len() as u64;
            file.write_all_at(bytes, u64::from(page) * PAGE as u64)
        })?;
        file.sync_all()?;
        Ok(stored)
    }

    fn facts(&self, stored: u64, state_hash: blake3::Hash) -> SnapshotFacts {
        SnapshotFacts {
            format_version: FORMAT_VERSION,
            protocol: self.body.protocol,
            memory_bytes: self.body.memory,
            memory_stored_bytes: stored,
            memory_blake3: blake3::Hash::from_bytes(self.body.memory_hash).to_hex().to_string(),
            state_blake3: state_hash.to_hex().to_string(),
            msrs: self.body.state.msrs.len() + 2,
            working_set_written: self.body.working_set.written_pages(),
            working_set_read: self.body.working_set.read_pages(),
            host: self.body.host.clone(),
        }
    }

    /// Reads a snapshot back, checks all of it against its checksums and against this host, and holds its
    /// memory in a sealed memfd: what was checked is what the forks run.
    pub fn load(host: &Host, directory: &Path) -> Result<Snapshot, LoadSnapshotError> {
        use LoadSnapshotError as E;
        let path = directory.join(STATE_FILE);
        let bytes = read_bounded(&path).map_err(|source| E::Read { path, source })?;
        let body = decode(&bytes)?;
        if let Some(error) = foreign(&body, &HostFacts::read(host), host.cpuid()) {
            return Err(error);
        }
        let tsc_khz = scaled_tsc(host, body.state.tsc_khz)?;
        let path = directory.join(MEMORY_FILE);
        let read = |source| E::Read { path: path.clone(), source };
        let file = File::open(&path).map_err(read)?;
        let length = file.metadata().map_err(read)?.len();
        if length != body.memory {
            return Err(E::Memory("it has another length than the saved state says"));
        }
        let mut hasher = MemoryHasher::default();
        let mut page = 0u32;
        let image = MemoryImage::load(&file, length, |part| match part {
            Ok(bytes) => {
                for bytes in bytes.chunks(PAGE) {
                    if !is_zero(bytes) {
                        hasher.page(page, bytes);
                    }
                    page += 1;
                }
            }
            Err(hole) => page += (hole / PAGE as u64) as u32,
        })
        .map_err(read)?;
        if hasher.finish() != body.memory_hash {
            return Err(E::Memory("its checksum is wrong"));
        }
        let (tables, cpuid) = (StateTables::new(&body.state)?, CpuidTable::new(&body.cpuid)?);
        Ok(Snapshot { image, body, tables, cpuid, tsc_khz })
    }
}

/// Why a template cannot run on this host, if so. From the cause to its consequences.
fn foreign(body: &Body, here: &HostFacts, cpuid: &[CpuidEntry]) -> Option<LoadSnapshotError> {
    use LoadSnapshotError as E;
    let fact = body.host.differs(here);
    // Another backend shows guests another CPU.
    if let Some(fact) = fact.as_ref().filter(|_| body.host.kvm != here.kvm) {
        return Some(E::Foreign(fact.clone()));
    }
    let cpu = |facts: &HostFacts| format!("{} ({})", facts.cpu_name, facts.cpu);
    CpuDifference::between(&body.cpuid, cpuid)
        .map(|features| E::ForeignCpu { built: cpu(&body.host), here: cpu(here), features })
        .or_else(|| fact.map(E::Foreign))
}

/// Whether the guest's TSC has to run at another rate than the host's: the guest measured it once and sets its
/// timers by it. (Its clock is KVM's, and right at any rate.) A difference below 250 ppm is what two starts of
/// one machine measure (Firecracker's tolerance); without scaling hardware a template with sleeps wrong by more
/// than one percent is refused.
fn scaled_tsc(host: &Host, saved: u32) -> Result<Option<u32>, LoadSnapshotError> {
    let here = host.tsc_khz()?;
    let difference = u64::from(saved.abs_diff(here)) * 1_000_000 / u64::from(here.max(1));
    match difference {
        0..=250 => Ok(None),
        _ if host.kvm().caps().tsc_control => Ok(Some(saved)),
        251..=10_000 => Ok(None),
        _ => Err(LoadSnapshotError::Foreign(Difference {
            what: "TSC rate",
            saved: format!("{saved} kHz"),
            here: format!("{here} kHz"),
        })),
    }
}

/// BLAKE3 over the pages that are not zero.
pub(super) fn memory_hash(image: &MemoryImage) -> io::Result<[u8; 32]> {
    let mut hasher = MemoryHasher::default();
    each_page(image, |page, bytes| {
        hasher.page(page, bytes);
        Ok(())
    })?;
    Ok(hasher.finish())
}

/// Every page of the image that is not zero, in order.
fn each_page(image: &MemoryImage, mut page: impl FnMut(u32, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut chunk = vec![0u8; 1 << 20];
    for (start, length) in image.data_ranges()? {
        let mut at = start;
        while at < start + length {
            let n = usize::try_from(start + length - at).unwrap_or(chunk.len()).min(chunk.len());
            let part = chunk.get_mut(..n).unwrap_or_default();
            image.read(GuestPhys(at), part)?;
            for (i, bytes) in part.chunks(PAGE).enumerate() {
                if !is_zero(bytes) {
                    page((at / PAGE as u64) as u32 + i as u32, bytes)?;
                }
            }
            at += n as u64;
        }
    }
    Ok(())
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|w| u128::from_ne_bytes(*w) == 0) && rest.iter().all(|&b| b == 0)
}

/// The same hash whether a page of zeros is stored or a hole.
#[derive(Default)]
struct MemoryHasher(blake3::Hasher);

impl MemoryHasher {
    fn page(&mut self, page: u32, bytes: &[u8]) {
        self.0.update(&page.to_le_bytes());
        self.0.update(bytes);
    }

    fn finish(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_STATE_FILE + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn encode(body: &Body) -> (Vec<u8>, blake3::Hash) {
    // Serialising plain data into memory has no way to fail.
    let payload = postcard::to_allocvec(body).unwrap_or_default();
    let hash = blake3::hash(&payload);
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(hash.as_bytes());
    bytes.extend_from_slice(&payload);
    (bytes, hash)
}

/// Reads the bytes of a `state.bin`. Never panics, whatever they are.
fn decode(bytes: &[u8]) -> Result<Body, LoadSnapshotError> {
    use LoadSnapshotError as E;
    const SHORT: E = E::Damaged("it ends early");
    let (magic, rest) = bytes.split_first_chunk::<8>().ok_or(SHORT)?;
    if *magic != MAGIC {
        return Err(E::Damaged("it does not begin with its magic number"));
    }
    let (version, rest) = rest.split_first_chunk::<4>().ok_or(SHORT)?;
    match u32::from_le_bytes(*version) {
        FORMAT_VERSION => {}
        found => return Err(E::Version { found }),
    }
    let (length, rest) = rest.split_first_chunk::<4>().ok_or(SHORT)?;
    let (hash, payload) = rest.split_first_chunk::<32>().ok_or(SHORT)?;
    match (u32::from_le_bytes(*length) as usize).cmp(&payload.len()) {
        std::cmp::Ordering::Greater => return Err(SHORT),
        std::cmp::Ordering::Less => return Err(E::Damaged("it is longer than it says")),
        std::cmp::Ordering::Equal => {}
    }
    if blake3::hash(payload) != *hash {
        return Err(E::Damaged("its checksum is wrong"));
    }
    decode_body(payload)
}

/// The part behind the checksum, which proves nothing about who wrote it.
fn decode_body(payload: &[u8]) -> Result<Body, LoadSnapshotError> {
    use LoadSnapshotError as E;
    let body: Body = postcard::from_bytes(payload).map_err(|_| E::Damaged("its fields cannot be read"))?;
    if body.protocol != zeroboot_proto::VERSION {
        return Err(E::Protocol(body.protocol));
    }
    if body.memory == 0 || !body.memory.is_multiple_of(PAGE as u64) || body.memory > MAX_MEMORY.bytes() {
        return Err(E::Damaged("its size of memory is impossible"));
    }
    let state = &body.state;
    if state.xsave.len() > XSAVE_MAX || state.msrs.len() > 4096 || body.cpuid.len() > 256 {
        return Err(E::Damaged("it holds more state than a vCPU has"));
    }
    if body.mailbox.check(body.memory).is_err() {
        return Err(E::Damaged("its mailbox is not in its memory"));
    }
    let pages = body.memory / PAGE as u64;
    let set = &body.working_set;
    if set.written.iter().chain(&set.read).any(|&(page, n)| n == 0 || u64::from(page) + u64::from(n) > pages) {
        return Err(E::Damaged("its working set is not in its memory"));
    }
    Ok(body)
}

/// For the fuzzer: reads bytes as a `state.bin` and, past the checksum, as its body.
#[doc(hidden)]
pub fn fuzz_decode(bytes: &[u8]) -> bool {
    decode(bytes).is_ok() | decode_body(bytes).is_ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Mailbox, VmState, WakeVector, WorkingSet};

    /// A body as a template of 64 MiB has it, without a KVM to read it from.
    fn body() -> Body {
        let pages = |from: u64| (0..16).map(|i| from + i * 4096).collect::<Vec<u64>>();
        let host = HostFacts {
            cpu: "GenuineIntel family 6 model 85 stepping 7".into(),
            cpu_name: "a CPU".into(),
            kernel: "6.1.0".into(),
            kvm: "kvm_intel".into(),
            features: "fpu avx2".into(),
            xsave: 4096,
        };
        Body {
            host,
            protocol: zeroboot_proto::VERSION,
            memory: 64 << 20,
            memory_hash: [7; 32],
            cpuid: vec![CpuidEntry::default(); 3],
            state: VmState::empty(),
            mailbox: Mailbox::at(0x1000, pages(0x10_0000), pages(0x20_0000)),
            wake: WakeVector::new(0x21).unwrap(),
            about: b"{}".to_vec(),
            working_set: WorkingSet { written: vec![(1, 2)], read: vec![(5, 1)] },
        }
    }

    #[test]
    fn a_state_comes_back_as_it_was_written() {
        let (bytes, _) = encode(&body());
        let back = decode(&bytes).unwrap();
        assert_eq!(encode(&back).0, bytes);
    }

    #[test]
    fn the_files_first_bytes_never_change() {
        // The format's tripwire: change FORMAT_VERSION with anything that this breaks.
        let (bytes, hash) = encode(&body());
        assert_eq!(&bytes[..12], b"ZBSTATE\0\x03\0\0\0");
        assert_eq!((bytes.len(), &hash.to_hex()[..16]), (GOLDEN.0, GOLDEN.1));
    }

    const GOLDEN: (usize, &str) = (6606, "6fc5fbd0979fed7c");

    #[test]
    fn values_that_no_template_has_are_refused() {
        let refused = |change: fn(&mut Body)| {
            let mut body = body();
            change(&mut body);
            decode(&encode(&body).0).unwrap_err().to_string()
        };
        assert!(refused(|b| b.memory = 0).contains("memory"));
        assert!(refused(|b| b.memory += 1).contains("memory"));
        assert!(refused(|b| b.memory = 1 << 40).contains("memory"));
        assert!(refused(|b| b.protocol = 99).contains("frames of version 99"));
        assert!(refused(|b| b.working_set.read = vec![(16384, 1)]).contains("working set"));
        assert!(refused(|b| b.working_set.written = vec![(u32::MAX, u32::MAX)]).contains("working set"));
        assert!(refused(|b| b.state.xsave = vec![0; 1 << 20]).contains("more state"));
        assert!(refused(|b| b.mailbox = Mailbox::at(64 << 20, Vec::new(), Vec::new())).contains("mailbox"));
    }

    #[test]
    fn a_host_that_differs_is_named() {
        let body = body();
        for (change, what) in [
            ((|h| h.kvm = "kvm_amd".into()) as fn(&mut HostFacts), "KVM backend is kvm_intel, this host's is kvm_amd"),
            (|h| h.cpu = "other".into(), "CPU is GenuineIntel family 6 model 85 stepping 7, this host's is other"),
            (|h| h.kernel = "6.2".into(), "host kernel is 6.1.0, this host's is 6.2"),
            (|h| h.xsave = 8192, "XSAVE size is 4096, this host's is 8192"),
        ] {
            let mut here = body.host.clone();
            change(&mut here);
            let text = foreign(&body, &here, &body.cpuid).unwrap().to_string();
            assert_eq!(text, format!("the template cannot run on this host: its {what}"));
        }
        let mut renamed = body.host.clone();
        (renamed.cpu_name, renamed.features) = ("another name".into(), "fpu".into());
        assert!(foreign(&body, &renamed, &body.cpuid).is_none());
    }

    #[test]
    fn a_template_of_another_cpu_is_refused_with_the_features_that_differ() {
        let (gfni, waitpkg, avx2, caches) = (1 << 8, 1 << 5, 1 << 5, 4);
        let leaf7 = |ebx, ecx| CpuidEntry { function: 7, ebx, ecx, ..Default::default() };
        let mut body = body();
        body.cpuid = vec![leaf7(avx2, gfni), CpuidEntry { function: caches, eax: 1, ..Default::default() }];
        let mut here = body.host.clone();
        (here.cpu, here.cpu_name) = ("GenuineIntel family 6 model 79 stepping 1".into(), "an older CPU".into());
        let text = foreign(&body, &here, &[leaf7(avx2, waitpkg)]).unwrap().to_string();
        assert_eq!(
            text,
            "the template cannot run on this host: it was built on a CPU (GenuineIntel family 6 model 85 stepping 7) and this is an \
             older CPU (GenuineIntel family 6 model 79 stepping 1); it was built with gfni, which guests here do not have; it was \
             built without waitpkg, which guests here have"
        );
        // The same CPU, other microcode or kernel parameters.
        let text = foreign(&body, &body.host, &[leaf7(0, gfni)]).unwrap().to_string();
        assert!(text.ends_with("; it was built with avx2, which guests here do not have"), "{text}");
        // The caches of another core of a hybrid CPU.
        assert!(foreign(&body, &body.host, &[leaf7(avx2, gfni)]).is_none());
        // A backend of another kind is the cause of all the rest.
        here.kvm = "kvm_amd".into();
        let text = foreign(&body, &here, &[]).unwrap().to_string();
        assert!(text.contains("KVM backend") && !text.contains("gfni"), "{text}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            fuzz_decode(&bytes);
        }

        #[test]
        fn no_damage_behind_the_checksum_makes_the_reader_panic(
            flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut payload = encode(&body()).0.split_off(HEADER);
            for (at, byte) in flips {
                let at = at.index(payload.len());
                payload[at] = byte;
            }
            let _ = decode_body(&payload);
            payload.truncate(cut.index(payload.len()));
            let _ = decode_body(&payload);
        }

        #[test]
        fn any_changed_byte_is_noticed(at in any::<prop::sample::Index>(), change in 1u8..) {
            let (mut bytes, _) = encode(&body());
            let at = at.index(bytes.len());
            bytes[at] ^= change;
            prop_assert!(decode(&bytes).is_err());
        }
    }
}
