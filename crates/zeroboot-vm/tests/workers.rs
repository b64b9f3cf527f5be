//! Zygote and workers as processes, with guests of a few bytes. The program calls itself as the zygote.
#![allow(clippy::print_stderr, clippy::type_complexity, reason = "tests speak to people")]

use std::{
    io::{Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        linux::fs::MetadataExt,
        unix::net::UnixStream,
    },
    path::Path,
    process::{Child, Command},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};
use zeroboot_proto::{
    Decoder, Ending, ExitReport, HEADER_LEN, Identity, Kind, Limits, encode, encode_on,
    live::{self, End, How},
    mailbox::{AREA_PAGES, DOORBELL_PORT, MAGIC, Ring, TABLE_AT, VERSION},
};
use zeroboot_sys::{
    control::{self, CONTROL_FD, Control, REPORT_FD},
    delta::Delta,
    jail::Filter,
    kvm::Regs,
    memory::{BootMemory, GuestPhys, MiB},
    process,
};
use zeroboot_vm::{
    Console, Exits, Host, Machine, Prefault, Snapshot, Stop, WakeVector,
    bench::{self, StandIn},
};

const HEADER: u64 = 0x2000;
const TO_GUEST: u64 = 0x3000;
const FROM_GUEST: u64 = 0x4000;

fn main() {
    if let Some(template) = std::env::args().skip_while(|a| a != "--zygote").nth(1) {
        let (report, control) = (process::inherited_fd(REPORT_FD).unwrap(), process::inherited_fd(CONTROL_FD).unwrap());
        let prefault = match std::env::var("ZEROBOOT_TEST_PREFAULT").as_deref() {
            Ok("all") => Prefault::All,
            _ => Prefault::Nothing,
        };
        let end = zeroboot_vm::zygote(Path::new(&template), prefault, report, control);
        process::exit_now(i32::from(end.is_err()));
    }
    if let Some(template) = std::env::args().skip_while(|a| a != "--worker").nth(1) {
        let host = Host::open().unwrap();
        let snapshot = Snapshot::load(&host, Path::new(&template)).unwrap();
        let (socket, filter) = (std::io::stdin(), Filter::parse(zeroboot_vm::POLICY).unwrap());
        let delta = Delta::new(snapshot.image().len()).unwrap();
        let end = zeroboot_vm::worker(host, &snapshot, socket.as_fd(), Prefault::Nothing, &filter, delta);
        process::exit_now(i32::from(end.is_err()));
    }
    // What `cargo test -- --list` asks for.
    if std::env::args().any(|a| a == "--list") {
        return;
    }
    let host = match Host::open() {
        Ok(host) => host,
        Err(error) if std::env::var_os("ZEROBOOT_REQUIRE_KVM").is_some_and(|v| v == "1") => {
            panic!("ZEROBOOT_REQUIRE_KVM=1 and {error}: {:?}", std::error::Error::source(&error))
        }
        Err(error) => {
            eprintln!("skipped: no usable /dev/kvm ({error})");
            return;
        }
    };
    let tests: [(&str, fn(&Host)); 26] = [
        ("a_worker_carries_an_exec_through_and_ends", a_worker_carries_an_exec_through_and_ends),
        ("a_jailed_worker_ends_by_itself", a_jailed_worker_ends_by_itself),
        ("a_jailed_worker_that_fails_says_why", a_jailed_worker_that_fails_says_why),
        ("a_worker_holds_nothing_that_a_guest_could_want", a_worker_holds_nothing_that_a_guest_could_want),
        ("a_root_that_may_not_mount_is_not_root_in_its_workers", a_root_that_may_not_mount_is_not_root_in_its_workers),
        ("each_worker_has_namespaces_of_its_own", each_worker_has_namespaces_of_its_own),
        ("a_worker_is_in_the_cgroup_that_it_was_given", a_worker_is_in_the_cgroup_that_it_was_given),
        ("a_waiting_worker_is_small", a_waiting_worker_is_small),
        ("a_worker_whose_front_is_gone_ends_at_once", a_worker_whose_front_is_gone_ends_at_once),
        ("no_worker_outlives_a_killed_zygote", no_worker_outlives_a_killed_zygote),
        ("a_spinning_guest_is_stopped_by_its_worker", a_spinning_guest_is_stopped_by_its_worker),
        ("a_run_in_a_write_of_its_own_has_its_deadline", a_run_in_a_write_of_its_own_has_its_deadline),
        ("a_damaged_template_is_refused_with_words", a_damaged_template_is_refused_with_words),
        (
            "workers_alive_at_once_each_give_an_answer_of_their_own",
            workers_alive_at_once_each_give_an_answer_of_their_own,
        ),
        ("sandboxes_that_live_answer_on_their_channels", sandboxes_that_live_answer_on_their_channels),
        (
            "sandboxes_that_live_cost_nothing_while_nothing_happens",
            sandboxes_that_live_cost_nothing_while_nothing_happens,
        ),
        (
            "a_live_guest_that_breaks_says_why_and_its_socket_closes",
            a_live_guest_that_breaks_says_why_and_its_socket_closes,
        ),
        (
            "a_worker_whose_live_guest_floods_it_ends_with_its_front",
            a_worker_whose_live_guest_floods_it_ends_with_its_front,
        ),
        ("branches_go_on_where_their_origin_stood", branches_go_on_where_their_origin_stood),
        ("a_branch_of_a_branch_goes_on_ten_deep", a_branch_of_a_branch_goes_on_ten_deep),
        (
            "a_guest_that_does_not_come_to_rest_is_saved_as_it_runs",
            a_guest_that_does_not_come_to_rest_is_saved_as_it_runs,
        ),
        ("no_branch_runs_without_a_name_of_its_own", no_branch_runs_without_a_name_of_its_own),
        ("a_hostile_checkpoint_harms_its_own_children_alone", a_hostile_checkpoint_harms_its_own_children_alone),
        ("nothing_of_a_branch_outlives_whom_it_depends_on", nothing_of_a_branch_outlives_whom_it_depends_on),
        ("a_zygote_ends_with_its_front", a_zygote_ends_with_its_front),
        ("a_real_template_answers_through_jailed_workers", a_real_template_answers_through_jailed_workers),
    ];
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    for (name, test) in tests {
        if !wanted.is_empty() && !wanted.iter().any(|part| name.contains(part.as_str())) {
            continue;
        }
        eprint!("test {name} ... ");
        test(&host);
        eprintln!("ok");
    }
}

fn ring(asm: &mut Vec<u8>, value: u32) {
    asm.push(0xba);
    asm.extend(DOORBELL_PORT.to_le_bytes());
    asm.extend([0x66, 0xb8]);
    asm.extend(value.to_le_bytes());
    asm.extend([0x66, 0xef]);
}

/// Of guests that take no interrupt: any.
fn vector() -> WakeVector {
    WakeVector::new(0x20).unwrap()
}

/// A template whose guest becomes ready and then does what `rest` says; `answer` lies in its outgoing area.
fn template(host: &Host, rest: &[u8], answer: &[u8]) -> tempfile::TempDir {
    let memory = BootMemory::new(MiB(1)).unwrap();
    let mut machine = Machine::new(host, memory.map().unwrap()).unwrap();
    let mut page = vec![0; 4096];
    page[..4].copy_from_slice(&MAGIC.to_le_bytes());
    page[4..8].copy_from_slice(&VERSION.to_le_bytes());
    for i in 0..AREA_PAGES {
        let to = if i == 0 { TO_GUEST } else { 0x2_0000 + 0x1000 * i as u64 };
        let from = if i == 0 { FROM_GUEST } else { 0x4_0000 + 0x1000 * i as u64 };
        page[TABLE_AT + 8 * i..][..8].copy_from_slice(&to.to_le_bytes());
        page[TABLE_AT + 8 * (AREA_PAGES + i)..][..8].copy_from_slice(&from.to_le_bytes());
    }
    let mut code = Vec::new();
    ring(&mut code, Ring::Ready.encode((HEADER >> 12) as u32));
    code.extend(rest);
    machine.memory().write(GuestPhys(HEADER), &page).unwrap();
    machine.memory().write(GuestPhys(FROM_GUEST), answer).unwrap();
    machine.memory().write(GuestPhys(0x1000), &code).unwrap();
    let vcpu = machine.vcpu();
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.base.cs.base, sregs.base.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&Regs { rip: 0x1000, rsp: 0x7000, rflags: 2, ..Default::default() }).unwrap();
    let stop = machine.run(&mut Console::default(), &mut Exits::default()).unwrap();
    let Stop::Ring(Ring::Ready, argument) = stop else { panic!("{stop:?}") };
    let dir = tempfile::tempdir().unwrap();
    Snapshot::freeze(host, machine, memory, argument, vector()).unwrap().save(dir.path()).unwrap();
    dir
}

/// A guest that answers with these bytes and is done.
fn answering(host: &Host) -> tempfile::TempDir {
    let mut answer = Vec::new();
    encode(&mut answer, Kind::Started, b"");
    encode(&mut answer, Kind::Stdout, b"hello");
    let report = ExitReport { ending: Ending::Exited(3), wall_ns: 1, cpu_ns: 2, peak_memory: 3 };
    encode(&mut answer, Kind::Exit, &report.encode());
    let mut rest = Vec::new();
    ring(&mut rest, Ring::Done.encode(answer.len() as u32));
    template(host, &rest, &answer)
}

fn spinning(host: &Host) -> tempfile::TempDir {
    template(host, &[0xfa, 0xeb, 0xfe], &[])
}

struct Zygote {
    child: Child,
    control: OwnedFd,
    report: UnixStream,
}

impl Zygote {
    fn start(template: &Path) -> Zygote {
        Zygote::start_by(Command::new(std::env::current_exe().unwrap()), template)
    }
    /// `command` goes on with this program.
    fn start_by(mut command: Command, template: &Path) -> Zygote {
        let pair = |kind| socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        let (control, theirs) = pair(SocketType::SEQPACKET);
        let (report, their_report) = pair(SocketType::STREAM);
        command.arg("--zygote").arg(template);
        process::as_zygote(&mut command, their_report, theirs);
        let child = command.spawn().unwrap();
        // The command holds the other ends.
        drop(command);
        let report = UnixStream::from(report);
        // Reading and checking a template of some hundred MiB takes long in an emulated machine.
        report.set_read_timeout(Some(Duration::from_secs(180))).unwrap();
        Zygote { child, control, report }
    }
    fn said(&mut self) -> (Kind, Vec<u8>) {
        frame(&mut self.report, &mut Decoder::new()).unwrap()
    }
    fn ready(&mut self) {
        let (kind, text) = self.said();
        assert_eq!(kind, Kind::Ready, "{}", String::from_utf8_lossy(&text));
    }
    fn fork(&self) -> Worker {
        self.fork_into(None)
    }
    fn fork_into(&self, cgroup: Option<&std::fs::File>) -> Worker {
        let mut worker = fork(&self.control, cgroup);
        let ready = worker.frame();
        assert_eq!(ready.as_ref().map(|(kind, _)| *kind), Some(Kind::Ready), "{ready:?}");
        worker
    }
    fn branch(&self, origin: &Worker) -> Branch {
        Branch::of(&self.control, origin)
    }
}

/// What says nothing yet.
fn fork(zygote: &OwnedFd, cgroup: Option<&std::fs::File>) -> Worker {
    let (socket, theirs) = UnixStream::pair().unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let fds: Vec<_> = [theirs.as_fd()].into_iter().chain(cgroup.map(|file| file.as_fd())).collect();
    control::send(zygote, &Control::Fork { id: 7 }, &fds).unwrap();
    drop(theirs);
    let (message, mut fds) = control::receive(zygote).unwrap().unwrap();
    assert_eq!((message, fds.len()), (Control::Forked { id: 7 }, 2));
    let (delta, pidfd) = (fds.remove(1), fds.remove(0));
    Worker { socket, decoder: Decoder::new(), pidfd, delta }
}

/// A zygote of a checkpoint.
struct Branch {
    control: OwnedFd,
    pidfd: OwnedFd,
    taken: u64,
}

impl Branch {
    /// Of what `origin` has put into its delta.
    fn of(zygote: &OwnedFd, origin: &Worker) -> Branch {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        control::send(zygote, &Control::Checkpoint { id: 9 }, &[theirs.as_fd(), origin.delta.as_fd()]).unwrap();
        drop(theirs);
        let (message, mut fds) = control::receive(zygote).unwrap().unwrap();
        assert_eq!((message, fds.len()), (Control::Forked { id: 9 }, 1));
        let Some((Control::Taken { bytes: taken }, _)) = control::receive(&ours).unwrap() else { panic!("not taken") };
        Branch { control: ours, pidfd: fds.remove(0), taken }
    }
    /// A child that knows who it is, and lives.
    fn child(&self) -> Worker {
        let mut child = fork(&self.control, None);
        let ready = child.frame();
        assert_eq!(ready.as_ref().map(|(kind, _)| *kind), Some(Kind::Ready), "{ready:?}");
        let mut name = Vec::new();
        let identity = Identity { entropy: [3; 64], realtime_ns: 0, sandbox_id: [4; 16] };
        encode(&mut name, Kind::Identity, &identity.encode());
        child.socket.write_all(&name).unwrap();
        child
    }
}

impl Drop for Zygote {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

struct Worker {
    socket: UnixStream,
    decoder: Decoder,
    pidfd: OwnedFd,
    delta: OwnedFd,
}

fn frame(socket: &mut UnixStream, decoder: &mut Decoder) -> Option<(Kind, Vec<u8>)> {
    frame_on_any(socket, decoder).map(|(channel, kind, payload)| {
        assert_eq!(channel, 0, "{kind:?}");
        (kind, payload)
    })
}

fn frame_on_any(socket: &mut UnixStream, decoder: &mut Decoder) -> Option<(u16, Kind, Vec<u8>)> {
    let mut chunk = [0; 4096];
    loop {
        if let Some(frame) = decoder.next_on_any().unwrap() {
            return Some((frame.channel, frame.kind, frame.payload.to_vec()));
        }
        match socket.read(&mut chunk).unwrap() {
            0 => return None,
            n => decoder.feed(&chunk[..n]),
        }
    }
}

/// All frames of a request; `Run` is the last.
fn request(wall: Duration) -> Vec<u8> {
    let mut bytes = setup(wall);
    encode(&mut bytes, Kind::Code, b"the code");
    encode(&mut bytes, Kind::Run, b"");
    bytes
}

/// All frames for a sandbox that lives.
fn live_request() -> Vec<u8> {
    // The wall time is an exec's.
    let mut bytes = setup(Duration::from_nanos(1));
    encode(&mut bytes, Kind::Live, b"");
    bytes
}

fn setup(wall: Duration) -> Vec<u8> {
    let limits = Limits {
        wall_ns: wall.as_nanos() as u64,
        cpu_ns: u64::MAX,
        memory: u64::MAX,
        output: 1000,
        file_size: u64::MAX,
        output_files: 1000,
        processes: 1,
        open_files: 1,
    };
    let mut bytes = Vec::new();
    encode(&mut bytes, Kind::Identity, &Identity { entropy: [1; 64], realtime_ns: 0, sandbox_id: [2; 16] }.encode());
    encode(&mut bytes, Kind::Limits, &limits.encode());
    bytes
}

impl Worker {
    fn frame(&mut self) -> Option<(Kind, Vec<u8>)> {
        frame(&mut self.socket, &mut self.decoder)
    }
    fn request(&mut self, wall: Duration) {
        self.socket.write_all(&request(wall)).unwrap();
    }
    /// Lets it live.
    fn live(&mut self) {
        self.socket.write_all(&live_request()).unwrap();
        assert_eq!(self.frame(), Some((Kind::Started, Vec::new())));
    }
    /// Opens a channel with a number for the stand-in.
    fn ask(&mut self, channel: u16, number: usize) {
        let mut bytes = Vec::new();
        encode_on(&mut bytes, channel, Kind::Arg, bench::input(number).as_bytes());
        let command = live::Open::Command { cwd: None, terminal: None, stdin: false, timeout_ns: u64::MAX };
        encode_on(&mut bytes, channel, Kind::Open, &live::encode(&command));
        self.socket.write_all(&bytes).unwrap();
    }
    /// Checks its `nth` answer, on that channel.
    fn answers(&mut self, channel: u16, number: usize, nth: u8) {
        let mut next = || frame_on_any(&mut self.socket, &mut self.decoder).unwrap();
        assert_eq!(next(), (channel, Kind::Started, 1u32.to_le_bytes().to_vec()));
        assert_eq!(next(), (channel, Kind::Stdout, bench::nth_answer(number, nth).into()));
        let (on, kind, end) = next();
        assert_eq!((on, kind, live::decode::<End>(&end).unwrap().how), (channel, Kind::End, How::Exited(0)));
    }
    /// Has it saved.
    fn freeze(&mut self) {
        let mut bytes = Vec::new();
        encode(&mut bytes, Kind::Freeze, b"");
        self.socket.write_all(&bytes).unwrap();
        let frozen = frame_on_any(&mut self.socket, &mut self.decoder);
        assert_eq!(frozen, Some((0, Kind::Frozen, Vec::new())), "{frozen:?}");
    }
    /// Bytes of its delta.
    fn saved(&self, at: u64) -> [u8; 8] {
        let mut bytes = [0; 8];
        assert_eq!(rustix::io::pread(&self.delta, &mut bytes, at).unwrap(), 8);
        bytes
    }
    /// CPU time that its threads have had, KVM's own included, and how often they have gone to sleep by themselves: since then
    /// they were woken as often.
    fn idled(&self) -> (Duration, u64) {
        let (mut cpu, mut sleeps) = (Duration::ZERO, 0);
        for task in std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap() {
            let read = |file| std::fs::read_to_string(task.as_ref().unwrap().path().join(file)).unwrap();
            cpu += Duration::from_nanos(read("schedstat").split(' ').next().unwrap().parse().unwrap());
            let status = read("status");
            let line = status.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:")).unwrap();
            sleeps += line.trim().parse::<u64>().unwrap();
        }
        (cpu, sleeps)
    }
    fn ended_within(&self, limit: Duration) -> bool {
        ended_within(&self.pidfd, limit)
    }
    fn pid(&self) -> u32 {
        use std::os::fd::AsRawFd;
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.pidfd.as_raw_fd())).unwrap();
        info.lines().find_map(|l| l.strip_prefix("Pid:")).unwrap().trim().parse().unwrap()
    }
}

fn ended_within(pidfd: &OwnedFd, limit: Duration) -> bool {
    let timeout = Timespec::try_from(limit).unwrap();
    poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&timeout)).unwrap() == 1
}

fn a_worker_carries_an_exec_through_and_ends(host: &Host) {
    let template = answering(host);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    for _ in 0..3 {
        let mut worker = zygote.fork();
        worker.request(Duration::from_secs(5));
        let first = worker.frame().unwrap();
        assert_eq!(first.0, Kind::Started, "{:?}", ExitReport::decode(&first.1));
        assert_eq!(worker.frame().unwrap(), (Kind::Stdout, b"hello".to_vec()));
        let (kind, payload) = worker.frame().unwrap();
        assert_eq!((kind, ExitReport::decode(&payload).unwrap().ending), (Kind::Exit, Ending::Exited(3)));
        assert!(worker.frame().is_none());
        assert!(worker.ended_within(Duration::from_secs(5)));
    }
}

/// Nobody sees the status of a zygote's child; so here the worker is ours.
fn a_jailed_worker_ends_by_itself(host: &Host) {
    let template = answering(host);
    let mut out_of_order = Vec::new();
    encode(&mut out_of_order, Kind::Run, b"");
    for (bytes, status) in [(request(Duration::from_secs(5)), 0), (out_of_order, 1)] {
        let (mut socket, theirs) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("--worker").arg(template.path()).stdin(OwnedFd::from(theirs));
        let mut child = command.spawn().unwrap();
        drop(command);
        let mut decoder = Decoder::new();
        assert_eq!(frame(&mut socket, &mut decoder).unwrap().0, Kind::Ready);
        socket.write_all(&bytes).unwrap();
        while frame(&mut socket, &mut decoder).is_some() {}
        assert_eq!(child.wait().unwrap().code(), Some(status));
    }
}

fn a_jailed_worker_that_fails_says_why(host: &Host) {
    let template = answering(host);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    let mut worker = zygote.fork();
    // Without an identity and limits before it.
    let mut run = Vec::new();
    encode(&mut run, Kind::Run, b"");
    worker.socket.write_all(&run).unwrap();
    let (kind, text) = worker.frame().unwrap();
    assert_eq!((kind, String::from_utf8_lossy(&text).contains("Run")), (Kind::Failure, true), "{text:?}");
    assert!(worker.frame().is_none());
}

/// Some namespace of a process, as a number that names it.
fn namespace(pid: u32, space: &str) -> String {
    std::fs::read_link(format!("/proc/{pid}/ns/{space}")).unwrap().to_string_lossy().into_owned()
}

fn a_worker_holds_nothing_that_a_guest_could_want(host: &Host) {
    let template = answering(host);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    // In the pool, and in the middle of a guest.
    let waiting = zygote.fork();
    let spinning = spinning(host);
    let mut spinning = Zygote::start(spinning.path());
    spinning.ready();
    let mut running = spinning.fork();
    running.request(Duration::from_secs(60));
    // One that went on from a checkpoint.
    let living = stand_in(host, StandIn::Live);
    let mut living = Zygote::start(living.path());
    living.ready();
    let mut origin = living.fork();
    origin.live();
    origin.freeze();
    let branch = living.branch(&origin);
    let mut child = branch.child();
    child.ask(1, 0);
    child.answers(1, 0, 1);
    for worker in [&waiting, &running, &origin, &child] {
        let pid = worker.pid();
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
        let status = read("status");
        let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap().trim().to_owned();
        assert_eq!(field("Seccomp:"), "2");
        assert_eq!(field("NoNewPrivs:"), "1");
        // Where a user is refused namespaces, nobody may empty the bounding set; with NoNewPrivs it gives nothing.
        let bounded = ["CapBnd:"].into_iter().filter(|_| zeroboot_vm::workers_have_namespaces().is_ok());
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"].into_iter().chain(bounded) {
            assert_eq!(field(set), "0000000000000000", "{set}");
        }
        assert_eq!(read("oom_score_adj").trim(), "1000");
        // What may not be traced belongs to root.
        assert_eq!(std::fs::metadata(format!("/proc/{pid}/maps")).unwrap().st_uid(), 0);
        if !rustix::process::geteuid().is_root() {
            // Its descriptors cannot be looked at then.
            continue;
        }
        assert_eq!(field("Uid:"), "65534\t65534\t65534\t65534");
        assert_eq!(field("Groups:"), "");
        let root = std::fs::read_dir(format!("/proc/{pid}/root/")).unwrap();
        assert_eq!(root.count(), 0, "the worker's root is not empty");
        let mut open: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .map(|e| {
                let number: u32 = e.as_ref().unwrap().file_name().to_str().unwrap().parse().unwrap();
                let name = std::fs::read_link(e.unwrap().path()).unwrap().to_string_lossy().into_owned();
                if number < 3 { format!("stream {number}") } else { name.split(":[").next().unwrap().to_owned() }
            })
            .collect();
        open.sort();
        // Its VM, the VM's CPU, the sealed image, one socket to the front, and the standard streams. Not /dev/kvm.
        let image = "/memfd:zeroboot-image (deleted)";
        let expected =
            [image, "anon_inode:kvm-vcpu:0", "anon_inode:kvm-vm", "socket", "stream 0", "stream 1", "stream 2"];
        assert_eq!(open, expected);
    }
}

/// As in a container that has all but CAP_SYS_ADMIN, and in one that has only what it takes to become somebody else.
fn a_root_that_may_not_mount_is_not_root_in_its_workers(host: &Host) {
    if !rustix::process::geteuid().is_root() {
        eprint!("skipped: root only ... ");
        return;
    }
    let template = answering(host);
    for bounding in ["-sys_admin", "-all,+setuid,+setgid,+dac_override"] {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set", bounding, "--inh-caps", "-all"]).arg(std::env::current_exe().unwrap());
        let mut zygote = Zygote::start_by(command, template.path());
        zygote.ready();
        let mut worker = zygote.fork();
        for pid in [zygote.child.id(), worker.pid()] {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap().trim().to_owned();
            for ids in ["Uid:", "Gid:"] {
                assert_eq!(field(ids), "65534\t65534\t65534\t65534", "{bounding}");
            }
            assert_eq!(field("Groups:"), "", "{bounding}");
            assert_eq!(field("CapEff:"), "0000000000000000", "{bounding}");
            // What may not be traced belongs to root.
            assert_eq!(std::fs::metadata(format!("/proc/{pid}/maps")).unwrap().st_uid(), 0);
        }
        // With namespaces, as whoever is not root gets them here.
        if std::fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap().trim() != "0" {
            let root = std::fs::read_dir(format!("/proc/{}/root/", zygote.child.id())).unwrap();
            assert_eq!(root.count(), 0, "{bounding}: the zygote's root is not empty");
        }
        worker.request(Duration::from_secs(5));
        assert_eq!(worker.frame().unwrap().0, Kind::Started);
    }
}

fn each_worker_has_namespaces_of_its_own(host: &Host) {
    if !rustix::process::geteuid().is_root() {
        eprint!("skipped: only root can look ... ");
        return;
    }
    if let Err(error) = zeroboot_vm::workers_have_namespaces() {
        eprint!("skipped: none to be had here ({error}) ... ");
        return;
    }
    let template = answering(host);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    let workers = [zygote.fork(), zygote.fork(), zygote.fork()];
    for space in ["user", "pid", "mnt", "ipc", "uts", "cgroup"] {
        let own = [std::process::id(), zygote.child.id()].map(|pid| namespace(pid, space));
        let theirs = workers.iter().map(|worker| namespace(worker.pid(), space));
        let all: std::collections::BTreeSet<String> = own.iter().cloned().chain(theirs).collect();
        // The zygote has no user, pid and cgroup namespace of its own as root.
        let zygotes = usize::from(own[0] != own[1]);
        assert_eq!(all.len(), 1 + zygotes + workers.len(), "{space}: {all:?}");
    }
    for worker in &workers {
        let pid = worker.pid();
        assert_eq!(namespace(pid, "net"), namespace(zygote.child.id(), "net"));
        assert_ne!(namespace(pid, "net"), namespace(std::process::id(), "net"));
        // First and only process of its namespace, and nobody: no user exists there.
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let ids = status.lines().find_map(|l| l.strip_prefix("NSpid:")).unwrap();
        assert!(ids.ends_with("\t1"), "{ids}");
        for map in ["uid_map", "gid_map"] {
            assert_eq!(std::fs::read_to_string(format!("/proc/{pid}/{map}")).unwrap(), "");
        }
    }
    let zygotes = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", zygote.child.id())).unwrap();
    assert_eq!(zygotes, std::fs::read_to_string("/proc/self/oom_score_adj").unwrap());
}

fn a_worker_is_in_the_cgroup_that_it_was_given(host: &Host) {
    let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
    let name = format!("zeroboot-test-{}", std::process::id());
    let group = roots.into_iter().find(|root| root.join("cgroup.controllers").exists()).map(|root| root.join(&name));
    let Some(group) = group.filter(|group| std::fs::create_dir(group).is_ok()) else {
        eprint!("skipped: no cgroup v2 to be had ... ");
        return;
    };
    let procs = std::fs::File::options().write(true).open(group.join("cgroup.procs")).unwrap();
    let template = answering(host);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    let worker = zygote.fork_into(Some(&procs));
    let inside = std::fs::read_to_string(group.join("cgroup.procs")).unwrap();
    let pid = worker.pid();
    let Worker { socket, pidfd, .. } = worker;
    drop(socket);
    assert!(ended_within(&pidfd, Duration::from_secs(5)));
    std::fs::remove_dir(group).unwrap();
    // Before Linux 6.14 a kernel thread of KVM's is with it.
    assert!(inside.lines().any(|line| line == pid.to_string()), "{inside}");
}

fn a_waiting_worker_is_small(host: &Host) {
    if !rustix::process::geteuid().is_root() {
        eprint!("skipped: only root can look ... ");
        return;
    }
    let template = answering(host);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    let worker = zygote.fork();
    let pid = worker.pid();
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let field = |text: &str, name: &str| -> u64 {
        let line = text.lines().find_map(|l| l.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    let (rollup, status) = (read("smaps_rollup"), read("status"));
    let dirty = field(&rollup, "Private_Dirty:");
    let tables = field(&status, "VmPTE:");
    eprint!("private dirty {dirty} KiB, page tables {tables} KiB ... ");
    // The goal of the design is 265 KB; a debug build has larger code and tables.
    assert!(dirty + tables <= 512, "private dirty {dirty} KiB, page tables {tables} KiB");
}

fn a_worker_whose_front_is_gone_ends_at_once(host: &Host) {
    let template = spinning(host);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    // Waiting in the pool.
    let Worker { socket, pidfd, .. } = zygote.fork();
    drop(socket);
    assert!(ended_within(&pidfd, Duration::from_secs(2)));
    // In the middle of a guest that never leaves by itself.
    let mut worker = zygote.fork();
    worker.request(Duration::from_secs(60));
    std::thread::sleep(Duration::from_millis(100));
    let Worker { socket, pidfd, .. } = worker;
    drop(socket);
    assert!(ended_within(&pidfd, Duration::from_secs(2)));
}

fn no_worker_outlives_a_killed_zygote(host: &Host) {
    let template = spinning(host);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    let waiting = zygote.fork();
    let mut running = zygote.fork();
    running.request(Duration::from_secs(60));
    std::thread::sleep(Duration::from_millis(50));
    drop(zygote);
    assert!(waiting.ended_within(Duration::from_secs(2)));
    assert!(running.ended_within(Duration::from_secs(2)));
}

fn a_spinning_guest_is_stopped_by_its_worker(host: &Host) {
    let template = spinning(host);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    let mut worker = zygote.fork();
    let start = Instant::now();
    worker.request(Duration::from_millis(50));
    let (kind, payload) = worker.frame().unwrap();
    assert_eq!((kind, ExitReport::decode(&payload).unwrap().ending), (Kind::Exit, Ending::DeadlinePassed));
    let late = start.elapsed().saturating_sub(Duration::from_millis(50) + zeroboot_vm::DEADLINE_GRACE);
    assert!(late < Duration::from_millis(100), "{late:?}");
}

/// The first guest's `Run` comes as a kick while it spins, the second's when it asks for it. What would come
/// without a deadline comes after the socket's timeout.
fn a_run_in_a_write_of_its_own_has_its_deadline(host: &Host) {
    let mut asking = Vec::new();
    ring(&mut asking, Ring::Want.encode(0));
    asking.extend([0xfa, 0xeb, 0xfe]);
    for template in [spinning(host), template(host, &asking, &[])] {
        let mut zygote = Zygote::start(template.path());
        zygote.ready();
        let mut worker = zygote.fork();
        let bytes = request(Duration::from_millis(50));
        let (first, run) = bytes.split_at(bytes.len() - HEADER_LEN);
        worker.socket.write_all(first).unwrap();
        // Until the guest runs. If it does not yet, this tests less.
        std::thread::sleep(Duration::from_millis(100));
        worker.socket.write_all(run).unwrap();
        let (kind, payload) = worker.frame().unwrap();
        assert_eq!((kind, ExitReport::decode(&payload).unwrap().ending), (Kind::Exit, Ending::DeadlinePassed));
    }
}

fn a_damaged_template_is_refused_with_words(host: &Host) {
    let template = answering(host);
    let path = template.path().join("state.bin");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let mut zygote = Zygote::start(template.path());
    let (kind, text) = zygote.said();
    let text = String::from_utf8(text).unwrap();
    assert_eq!(kind, Kind::Failure);
    assert!(text.contains("checksum") && text.contains("build the template again"), "{text}");
}

fn workers_alive_at_once_each_give_an_answer_of_their_own(host: &Host) {
    let template = stand_in(host, StandIn::Program);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    let mut workers: Vec<Worker> = (0..50).map(|_| zygote.fork()).collect();
    for worker in &mut workers {
        worker.request(Duration::from_secs(60));
        assert_eq!(worker.frame().unwrap().0, Kind::Started);
        assert_eq!(worker.frame().unwrap(), (Kind::Stdout, bench::ALIVE.into()));
    }
    for (number, worker) in workers.iter_mut().enumerate() {
        let mut input = Vec::new();
        encode(&mut input, Kind::Stdin, bench::input(number * 7919).as_bytes());
        worker.socket.write_all(&input).unwrap();
    }
    for (number, worker) in workers.iter_mut().enumerate() {
        assert_eq!(worker.frame().unwrap(), (Kind::Stdout, bench::answer(number * 7919).into()));
        assert_eq!(worker.frame().unwrap().0, Kind::Exit);
        assert!(worker.ended_within(Duration::from_secs(5)));
    }
}

fn stand_in(host: &Host, what: StandIn) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let pages = bench::strewn(MiB(2), 40, 40);
    bench::stand_in(host, what, MiB(4), MiB(2), pages).unwrap().save(dir.path()).unwrap();
    dir
}

fn sandboxes_that_live_answer_on_their_channels(host: &Host) {
    let template = stand_in(host, StandIn::Live);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    let mut workers: Vec<Worker> = (0..20).map(|_| zygote.fork()).collect();
    for worker in &mut workers {
        worker.live();
    }
    for round in 1..4 {
        // The same channel again, its end was seen; each with a number of its own.
        let channel = |at: usize| if round == 3 { live::MAX_CHANNEL } else { at as u16 + 1 };
        for (at, worker) in workers.iter_mut().enumerate() {
            worker.ask(channel(at), 7919 * at + usize::from(round));
        }
        for (at, worker) in workers.iter_mut().enumerate() {
            worker.answers(channel(at), 7919 * at + usize::from(round), round);
        }
    }
    for Worker { socket, pidfd, .. } in workers {
        drop(socket);
        assert!(ended_within(&pidfd, Duration::from_secs(2)));
    }
}

fn branches_go_on_where_their_origin_stood(host: &Host) {
    let template = stand_in(host, StandIn::Live);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    let mut origin = zygote.fork();
    origin.live();
    origin.ask(1, 10);
    origin.answers(1, 10, 1);
    origin.freeze();
    let first = zygote.branch(&origin);
    // The pages of the areas and what the guest wrote: its counter and its stack lie apart.
    assert!((4096..=64 * 4096).contains(&first.taken), "{} bytes", first.taken);
    assert_eq!(origin.saved(0x6000), [0; 8], "what was taken stays charged to the origin");
    let mut children: Vec<Worker> = (0..20).map(|_| first.child()).collect();
    for (at, child) in children.iter_mut().enumerate() {
        // Together with its name, and after it.
        child.ask(2, at);
    }
    // The origin goes on meanwhile, and is branched again.
    origin.ask(3, 11);
    origin.answers(3, 11, 2);
    for (at, child) in children.iter_mut().enumerate() {
        child.answers(2, at, 2);
        child.ask(2, at + 100);
        child.answers(2, at + 100, 3);
    }
    origin.freeze();
    let second = zygote.branch(&origin);
    let mut late = second.child();
    late.ask(1, 12);
    late.answers(1, 12, 3);
    // From the first checkpoint as before.
    let mut again = first.child();
    again.ask(1, 13);
    again.answers(1, 13, 2);
    origin.ask(1, 14);
    origin.answers(1, 14, 3);
}

fn a_branch_of_a_branch_goes_on_ten_deep(host: &Host) {
    let template = stand_in(host, StandIn::Live);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    let mut worker = zygote.fork();
    worker.live();
    let mut branches: Vec<Branch> = Vec::new();
    let mut origins = Vec::new();
    for depth in 1..=8 {
        worker.ask(1, depth);
        worker.answers(1, depth, depth as u8);
        worker.freeze();
        let branch = Branch::of(branches.last().map_or(&zygote.control, |branch| &branch.control), &worker);
        origins.push(std::mem::replace(&mut worker, branch.child()));
        branches.push(branch);
    }
    // Each origin stands where it stood.
    for (at, origin) in origins.iter_mut().enumerate() {
        origin.ask(2, at);
        origin.answers(2, at, at as u8 + 2);
    }
    // Two more without a word in between.
    for _ in 0..2 {
        worker.freeze();
        let branch = Branch::of(&branches.last().unwrap().control, &worker);
        worker = branch.child();
        branches.push(branch);
    }
    worker.ask(1, 9);
    worker.answers(1, 9, 9);
}

/// Lives, and counts for ever.
fn counting(host: &Host) -> tempfile::TempDir {
    let mut lives = Vec::new();
    encode(&mut lives, Kind::Started, b"");
    let mut code = Vec::new();
    ring(&mut code, Ring::Want.encode(0));
    ring(&mut code, Ring::Output.encode(lives.len() as u32));
    // 1: add dword [0x6000], 1; adc dword [0x6004], 0; jmp 1b
    code.extend([0x66, 0x83, 0x06, 0x00, 0x60, 1, 0x66, 0x83, 0x16, 0x04, 0x60, 0, 0xeb, 0xf2]);
    template(host, &code, &lives)
}

fn a_guest_that_does_not_come_to_rest_is_saved_as_it_runs(host: &Host) {
    let template = counting(host);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    let mut origin = zygote.fork();
    origin.live();
    let count = |worker: &mut Worker| {
        worker.freeze();
        u64::from_le_bytes(worker.saved(0x6000))
    };
    let first = count(&mut origin);
    let branch = zygote.branch(&origin);
    let mut children: Vec<Worker> = (0..3).map(|_| branch.child()).collect();
    for child in &mut children {
        assert!(count(child) > first, "{first}");
    }
    assert!(count(&mut origin) > first, "{first}");
    // Nor does it need to have a second time.
    assert!(count(&mut origin) > first, "{first}");
}

fn no_branch_runs_without_a_name_of_its_own(host: &Host) {
    let template = counting(host);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    let mut origin = zygote.fork();
    origin.live();
    origin.freeze();
    let branch = zygote.branch(&origin);
    // Anything else that it is told first ends it: it has run nothing.
    let mut early = fork(&branch.control, None);
    assert_eq!(early.frame().map(|(kind, _)| kind), Some(Kind::Ready));
    early.ask(1, 1);
    let (kind, text) = early.frame().unwrap();
    assert_eq!(kind, Kind::Failure);
    assert!(String::from_utf8_lossy(&text).contains("where it may not"), "{}", String::from_utf8_lossy(&text));
    assert!(early.ended_within(Duration::from_secs(10)));
    // A second one is as much out of place.
    let mut twice = branch.child();
    let mut name = Vec::new();
    let identity = Identity { entropy: [5; 64], realtime_ns: 0, sandbox_id: [6; 16] };
    encode(&mut name, Kind::Identity, &identity.encode());
    twice.socket.write_all(&name).unwrap();
    assert_eq!(twice.frame().map(|(kind, _)| kind), Some(Kind::Failure));
}

/// Whoever owns a worker owns what it leaves: nothing but its children may come of it.
fn a_hostile_checkpoint_harms_its_own_children_alone(host: &Host) {
    const MEMORY: u64 = 4 << 20;
    let template = stand_in(host, StandIn::Live);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    let mut origin = zygote.fork();
    origin.live();
    origin.freeze();
    let mut state = vec![0; 1 << 20];
    let whole = rustix::io::pread(&origin.delta, &mut state, MEMORY).unwrap();
    let length = u32::from_le_bytes(state[..4].try_into().unwrap()) as usize;
    assert!(whole > length && length > 4096, "{length}");
    let put = |bytes: &[u8], length: u32| {
        rustix::io::pwrite(&origin.delta, &length.to_le_bytes(), MEMORY).unwrap();
        rustix::io::pwrite(&origin.delta, bytes, MEMORY + 4).unwrap();
    };
    let good = state[4..4 + length].to_vec();
    // A length that cannot be: the zygote of the checkpoint says so, and ends.
    put(&good, u32::MAX);
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    control::send(&zygote.control, &Control::Checkpoint { id: 9 }, &[theirs.as_fd(), origin.delta.as_fd()]).unwrap();
    drop(theirs);
    let (_, fds) = control::receive(&zygote.control).unwrap().unwrap();
    let said = control::receive(&ours).unwrap();
    assert!(matches!(&said, Some((Control::ForkFailed { id: 0, text }, _)) if text.contains("longer")), "{said:?}");
    assert!(ended_within(&fds[0], Duration::from_secs(10)));
    // Cut short, nonsense, and each part of a good one turned over in turn: registers, segments, extended state, LAPIC,
    // events, MSRs. A child says why, or runs as what it was made, and ends with its front.
    let mut refused = 0;
    let mut attempts = vec![good[..length / 2].to_vec(), vec![0xff; length], Vec::new()];
    for at in (0..length).step_by(length / 60) {
        let mut wild = good.clone();
        let end = (at + 16).min(length);
        wild[at..end].iter_mut().for_each(|byte| *byte = !*byte);
        attempts.push(wild);
    }
    for bytes in attempts {
        origin.delta = {
            let fresh = Delta::new(MEMORY).unwrap();
            fresh.as_fd().try_clone_to_owned().unwrap()
        };
        rustix::io::pwrite(&origin.delta, &(bytes.len() as u32).to_le_bytes(), MEMORY).unwrap();
        rustix::io::pwrite(&origin.delta, &bytes, MEMORY + 4).unwrap();
        let branch = zygote.branch(&origin);
        let mut child = fork(&branch.control, None);
        match child.frame() {
            Some((Kind::Ready, _)) => {
                let mut name = Vec::new();
                let identity = Identity { entropy: [3; 64], realtime_ns: 0, sandbox_id: [4; 16] };
                encode(&mut name, Kind::Identity, &identity.encode());
                // It may have ended already.
                let _gone = child.socket.write_all(&name);
            }
            Some((Kind::Failure, text)) => {
                assert!(String::from_utf8_lossy(&text).contains("checkpoint"), "{}", String::from_utf8_lossy(&text));
                refused += 1;
            }
            other => panic!("{other:?}"),
        }
        let Worker { socket, pidfd, .. } = child;
        drop(socket);
        assert!(ended_within(&pidfd, Duration::from_secs(10)));
    }
    assert!(refused >= 3, "{refused}");
    // The origin, the template's zygote and its other forks are as before.
    origin.ask(1, 5);
    origin.answers(1, 5, 1);
    let mut other = zygote.fork();
    other.live();
    other.ask(1, 6);
    other.answers(1, 6, 1);
}

fn nothing_of_a_branch_outlives_whom_it_depends_on(host: &Host) {
    let limit = Duration::from_secs(10);
    let template = stand_in(host, StandIn::Live);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    let mut origin = zygote.fork();
    origin.live();
    let mut branched = || {
        origin.freeze();
        let branch = zygote.branch(&origin);
        let mut child = branch.child();
        child.ask(1, 1);
        child.answers(1, 1, 1);
        (branch, child)
    };
    // Its front lets go of the checkpoint.
    let (branch, child) = branched();
    drop(branch.control);
    assert!(ended_within(&branch.pidfd, limit) && child.ended_within(limit));
    // Killed.
    let (branch, child) = branched();
    rustix::process::pidfd_send_signal(&branch.pidfd, rustix::process::Signal::KILL).unwrap();
    assert!(ended_within(&branch.pidfd, limit) && child.ended_within(limit));
    // The origin goes: its children stay.
    let (branch, mut child) = branched();
    drop(origin);
    child.ask(2, 2);
    child.answers(2, 2, 2);
    // With the template's zygote, all goes.
    drop(zygote);
    assert!(ended_within(&branch.pidfd, limit) && child.ended_within(limit));
}

/// The measure, with `ZEROBOOT_IDLE_SANDBOXES=1000 ZEROBOOT_IDLE_SECONDS=60`.
fn sandboxes_that_live_cost_nothing_while_nothing_happens(host: &Host) {
    let number = |name: &str, default| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let (sandboxes, seconds) = (number("ZEROBOOT_IDLE_SANDBOXES", 20), number("ZEROBOOT_IDLE_SECONDS", 2));
    let template = stand_in(host, StandIn::Live);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    let mut workers: Vec<Worker> = (0..sandboxes).map(|_| zygote.fork()).collect();
    for (at, worker) in workers.iter_mut().enumerate() {
        worker.live();
        worker.ask(7, at);
        worker.answers(7, at, 1);
    }
    std::thread::sleep(Duration::from_millis(500));
    let busy = || {
        let all = std::fs::read_to_string("/proc/stat").unwrap();
        let cpu: Vec<u64> =
            all.lines().next().unwrap().split_whitespace().skip(1).map(|n| n.parse().unwrap()).collect();
        // user, nice, system; irq, softirq, steal. USER_HZ is 100.
        Duration::from_millis(10 * (cpu[0] + cpu[1] + cpu[2] + cpu[5] + cpu[6]))
    };
    let before: Vec<_> = workers.iter().map(Worker::idled).collect();
    assert!(before.iter().all(|(cpu, sleeps)| !cpu.is_zero() && *sleeps > 0), "nothing is counted here");
    let (start, host_before) = (Instant::now(), busy());
    std::thread::sleep(Duration::from_secs(seconds as u64));
    let (passed, host_cpu) = (start.elapsed(), busy() - host_before);
    let after: Vec<_> = workers.iter().map(Worker::idled).collect();
    let pairs = || before.iter().zip(&after);
    let cpu: Duration = pairs().map(|(before, after)| after.0 - before.0).sum();
    let woken: u64 = pairs().map(|(before, after)| after.1 - before.1).sum();
    let share = cpu.as_secs_f64() / passed.as_secs_f64() * 100.0;
    eprint!(
        "{sandboxes} for {passed:.1?}: {cpu:?}, {share:.3} % of a core, woken {woken} times (the host: {host_cpu:?}) ... "
    );
    assert!(share < 1.0, "{cpu:?} in {passed:?}");
    // Whoever reads a process's files or sends it a stop may wake one; a timer of ours would wake each of them.
    assert!(woken <= sandboxes as u64 / 10, "{woken}");
    // They are all there.
    for (at, worker) in workers.iter_mut().enumerate() {
        worker.ask(7, at + 1);
        worker.answers(7, at + 1, 2);
    }
}

fn a_live_guest_that_breaks_says_why_and_its_socket_closes(host: &Host) {
    let mut lives = Vec::new();
    encode(&mut lives, Kind::Started, b"");
    let mut lies = lives.clone();
    encode_on(&mut lies, 9, Kind::Stdout, b"of a channel that nobody opened");
    let rings = |why: Ring, length: usize, then: &[u8]| {
        let mut code = Vec::new();
        ring(&mut code, why.encode(length as u32));
        code.extend(then);
        code
    };
    for (guest, answer, why) in [
        (rings(Ring::Output, lies.len(), &[]), &lies, "channel 9 that is not open"),
        // The keyboard controller's reset.
        (rings(Ring::Output, lives.len(), &[0xb0, 0xfe, 0xe6, 0x64]), &lives, "it shut down"),
        (rings(Ring::Done, lives.len(), &[]), &lives, "held no end"),
    ] {
        let template = template(host, &guest, answer);
        let mut zygote = Zygote::start(template.path());
        zygote.ready();
        let mut worker = zygote.fork();
        worker.live();
        let (kind, reason) = worker.frame().unwrap();
        assert_eq!(kind, Kind::Crash);
        assert!(String::from_utf8_lossy(&reason).contains(why), "{}", String::from_utf8_lossy(&reason));
        let start = Instant::now();
        assert!(worker.frame().is_none());
        // It waits for nobody to hang up.
        assert!(start.elapsed() < Duration::from_millis(900), "{:?}", start.elapsed());
        assert!(worker.ended_within(Duration::from_secs(5)));
    }
}

/// By its doorbell, with and without bytes, as fast as it can.
fn a_worker_whose_live_guest_floods_it_ends_with_its_front(host: &Host) {
    let mut frames = Vec::new();
    encode(&mut frames, Kind::Started, b"");
    for (name, why, length) in [("output", Ring::Output, 0), ("wants", Ring::Want, 0)] {
        let mut guest = Vec::new();
        ring(&mut guest, Ring::Output.encode(frames.len() as u32));
        let again = guest.len();
        ring(&mut guest, why.encode(length));
        guest.extend([0xeb, 0u8.wrapping_sub((guest.len() - again) as u8 + 2)]);
        let template = template(host, &guest, &frames);
        let mut zygote = Zygote::start(template.path());
        zygote.ready();
        let mut worker = zygote.fork();
        worker.live();
        // More than the worker holds for a guest that takes none of it. Its socket fills up behind that.
        worker.ask(7, 1);
        let mut input = Vec::new();
        encode_on(&mut input, 7, Kind::Stdin, &[b'x'; 300_000]);
        worker.socket.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
        worker.socket.write_all(&input).unwrap();
        worker.socket.set_nonblocking(true).unwrap();
        while worker.socket.write(&input).is_ok() {}
        let Worker { socket, pidfd, .. } = worker;
        drop(socket);
        assert!(ended_within(&pidfd, Duration::from_secs(2)), "{name}");
    }
}

/// In the lane: with the Linux guest of a template that `cargo xtask nested-suite` built.
fn a_real_template_answers_through_jailed_workers(_host: &Host) {
    let home = std::env::var_os("ZEROBOOT_HOME").filter(|_| std::env::var_os("ZEROBOOT_NESTED").is_some());
    let Some(template) = home.map(|home| Path::new(&home).join("templates/python")).filter(|t| t.exists()) else {
        eprint!("skipped: no template ... ");
        return;
    };
    let mut zygote = Zygote::start(&template);
    zygote.ready();
    // More of everything than fits into one piece of anything.
    let mut code = b"import sys, threading, time\nx = '".to_vec();
    code.resize(300_000, b'a');
    code.extend(
        b"'\ntime.sleep(0.05)\nsys.stdout.write(x[:200000] * 10)\nsys.stderr.write(sys.stdin.read())\nsys.exit(7)",
    );
    for round in 0..3 {
        let begin = Instant::now();
        let mut worker = zygote.fork();
        let ready = begin.elapsed();
        let limits = Limits {
            wall_ns: 60_000_000_000,
            cpu_ns: u64::MAX,
            memory: 256 << 20,
            output: 16 << 20,
            file_size: 1 << 20,
            output_files: 1 << 20,
            processes: 64,
            open_files: 256,
        };
        let begin = Instant::now();
        let mut bytes = Vec::new();
        let identity = Identity { entropy: [round; 64], realtime_ns: 0, sandbox_id: [round; 16] };
        encode(&mut bytes, Kind::Identity, &identity.encode());
        encode(&mut bytes, Kind::Limits, &limits.encode());
        encode(&mut bytes, Kind::Arg, b"-c");
        encode(&mut bytes, Kind::Code, &code);
        encode(&mut bytes, Kind::Run, b"");
        encode(&mut bytes, Kind::Stdin, b"to stderr");
        worker.socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        worker.socket.write_all(&bytes).unwrap();
        let (mut stdout, mut stderr) = (0, Vec::new());
        let ending = loop {
            match worker.frame().unwrap() {
                (Kind::Stdout, data) => {
                    stdout += data.len();
                    // The end of the input comes while the code runs and its output flows.
                    if stdout == 2_000_000 {
                        let mut end = Vec::new();
                        encode(&mut end, Kind::StdinEnd, b"");
                        worker.socket.write_all(&end).unwrap();
                    }
                }
                (Kind::Stderr, data) => stderr.extend(data),
                (Kind::Exit, payload) => break ExitReport::decode(&payload).unwrap().ending,
                (Kind::Started, _) => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!((ending, stdout, stderr.as_slice()), (Ending::Exited(7), 2_000_000, b"to stderr".as_slice()));
        eprint!("ready {ready:?}, answered {:?} ... ", begin.elapsed());
        assert!(worker.ended_within(Duration::from_secs(10)));
    }
}

fn a_zygote_ends_with_its_front(host: &Host) {
    let template = answering(host);
    let mut zygote = Zygote::start(template.path());
    zygote.ready();
    let worker = zygote.fork();
    let (replacement, _other) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    drop(std::mem::replace(&mut zygote.control, replacement));
    let start = Instant::now();
    while zygote.child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(worker.ended_within(Duration::from_secs(2)));
}
