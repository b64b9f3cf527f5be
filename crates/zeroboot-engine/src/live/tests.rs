//! Against a fake worker: the test is the other end of its socket.

use std::{
    process::{Child, Command},
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::timeout,
};
use zeroboot_proto::{
    Decoder, Frame, Kind, encode_on,
    live::{self, CellDone, CellStatus, End, How, MAX_OPEN, Open, Refusal, Reply, ResultChunk, Size, WINDOW},
};

use super::{
    branch::{Known, Moment},
    registry::Origin,
    *,
};
use crate::{forker::Forker, reaper::Reaper, spawn::Spawner, template::Shared, worker::Worker};

/// The other end, and the process that stands for the worker.
struct Peer {
    socket: UnixStream,
    decoder: Decoder,
    child: Child,
}

impl Peer {
    async fn next(&mut self) -> (u16, Kind, Vec<u8>) {
        let mut chunk = vec![0; 64 * 1024];
        loop {
            if let Some(Frame { channel, kind, payload }) = self.decoder.next_on_any().unwrap() {
                return (channel, kind, payload.to_vec());
            }
            let read = timeout(Duration::from_secs(10), self.socket.read(&mut chunk)).await.expect("no frame").unwrap();
            assert!(read > 0, "the engine closed the socket");
            self.decoder.feed(&chunk[..read]);
        }
    }

    /// The next frame of this kind; what is before it is skipped.
    async fn next_of(&mut self, wanted: Kind) -> (u16, Vec<u8>) {
        loop {
            let (channel, kind, payload) = self.next().await;
            if kind == wanted {
                return (channel, payload);
            }
        }
    }

    /// Whether nothing comes for a while.
    async fn is_quiet(&mut self) -> bool {
        timeout(Duration::from_millis(50), self.next()).await.is_err()
    }

    async fn send(&mut self, channel: u16, kind: Kind, payload: &[u8]) {
        let mut bytes = Vec::new();
        encode_on(&mut bytes, channel, kind, payload);
        self.socket.write_all(&bytes).await.unwrap();
    }

    async fn end(&mut self, channel: u16, how: How) {
        self.send(channel, Kind::End, &live::encode(&End { how, wall_ns: 1_000_000, context_lost: false })).await;
    }

    /// The next open channel.
    async fn opened(&mut self) -> (u16, Open) {
        let (channel, payload) = self.next_of(Kind::Open).await;
        (channel, live::decode(&payload).unwrap())
    }

    async fn begin_command(&mut self) -> u16 {
        let (channel, _) = self.opened().await;
        self.send(channel, Kind::Started, &7_u32.to_le_bytes()).await;
        channel
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn worker() -> (Worker, UnixStream, Child) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let child = Command::new("sleep").arg("60").spawn().unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    (Worker::new(ours, pidfd, None, Reaper::start(), None), theirs, child)
}

fn launch(registry: &Arc<Registry>, spec: SandboxSpec) -> (Sandbox, Peer) {
    let (mut worker, socket, child) = worker();
    let (place, permits) = registry.admit(&spec).unwrap();
    worker.charge(permits);
    let origin = Origin {
        language: "python".into(),
        isolation: Isolation::Process,
        pooled: true,
        fork_time: Duration::from_micros(1),
        forker: None,
    };
    let sandbox = registry.launch(worker, spec, origin, place).unwrap();
    (sandbox, Peer { socket, decoder: Decoder::new(), child })
}

async fn alive_as(spec: SandboxSpec) -> (Sandbox, Peer) {
    let registry = Registry::new(SandboxBounds::default());
    let (sandbox, mut peer) = launch(&registry, spec);
    // The sandbox's task needs no registry, only its end does.
    std::mem::forget(registry);
    for kind in [Kind::Limits, Kind::Identity, Kind::Live] {
        assert_eq!(peer.next().await.1, kind);
    }
    peer.send(0, Kind::Started, &[]).await;
    (sandbox, peer)
}

async fn alive() -> (Sandbox, Peer) {
    alive_as(SandboxSpec::new("python")).await
}

fn cell(code: &str) -> RunSpec {
    RunSpec::Cell { context: "default".into(), code: Bytes::copy_from_slice(code.as_bytes()), timeout: None }
}

fn command(stdin: bool) -> RunSpec {
    RunSpec::Command {
        argv: vec!["cat".into()],
        env: Vec::new(),
        cwd: None,
        terminal: None,
        stdin,
        timeout: None,
        tag: None,
    }
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(10), what).await.expect("it takes too long")
}

fn item(event: Option<(u64, RunEvent)>) -> (u64, Item) {
    match event {
        Some((offset, RunEvent::Item(item))) => (offset, item),
        other => panic!("{other:?}"),
    }
}

fn stdout(text: &'static str) -> Item {
    Item::Stdout(Bytes::from_static(text.as_bytes()))
}

#[tokio::test]
async fn a_cell_tells_its_output_its_results_its_error_and_its_end() {
    let (sandbox, mut peer) = alive().await;
    let (_run, mut attached) = sandbox.start_attached(cell("x + 1")).await.unwrap();
    assert_eq!(peer.next_of(Kind::Code).await.1, b"x + 1");
    let (at, open) = peer.opened().await;
    assert_eq!(open, Open::Cell { context: "default".into(), timeout_ns: u64::MAX });
    peer.send(at, Kind::Started, &[]).await;
    peer.send(at, Kind::Stdout, b"out").await;
    peer.send(at, Kind::Stderr, b"err").await;
    let chunk = |append, last, mime, data| ResultChunk { main: true, append, last, mime, data }.encode();
    peer.send(at, Kind::Result, &chunk(false, false, "text/plain", b"4")).await;
    peer.send(at, Kind::Result, &chunk(true, false, "text/plain", b"2")).await;
    peer.send(at, Kind::Result, &chunk(false, true, "text/html", b"<b>")).await;
    peer.send(at, Kind::Error, br#"{"name":"E","value":"v","traceback":"t"}"#).await;
    peer.end(at, How::Cell(CellDone { status: CellStatus::Error, execution_count: 3 })).await;
    assert_eq!(soon(attached.next()).await, Some((0, RunEvent::Started(None))));
    assert_eq!(item(soon(attached.next()).await), (3, stdout("out")));
    assert_eq!(item(soon(attached.next()).await), (6, Item::Stderr(Bytes::from_static(b"err"))));
    let parts =
        vec![("text/plain".into(), Bytes::from_static(b"42")), ("text/html".into(), Bytes::from_static(b"<b>"))];
    assert_eq!(item(soon(attached.next()).await), (7, Item::Result(Arc::new(MimeBundle { main: true, parts }))));
    let error = CellError { name: "E".into(), value: "v".into(), traceback: "t".into() };
    assert_eq!(item(soon(attached.next()).await), (8, Item::Error(Arc::new(error))));
    let Some((8, RunEvent::End(end))) = soon(attached.next()).await else { panic!("no end") };
    assert_eq!(end.how, RunHow::Cell { status: CellStatus::Error, execution_count: 3 });
    assert_eq!(end.wall, Duration::from_millis(1));
    assert_eq!(attached.next().await, None);
}

#[tokio::test]
async fn a_channel_is_used_again_only_after_its_end() {
    let (sandbox, mut peer) = alive().await;
    let mut used = std::collections::BTreeSet::new();
    for _ in 0..8 {
        sandbox.start(command(false)).await.unwrap();
        let (channel, _) = peer.opened().await;
        assert!(used.insert(channel), "{channel} is still in use");
    }
    // All numbers are gone round once: the eight are still left alone, and a freed one is taken.
    sandbox.handle.state().set_next_channel(1);
    peer.end(3, How::Exited(0)).await;
    while sandbox.activity().runs > 7 {
        tokio::task::yield_now().await;
    }
    sandbox.start(command(false)).await.unwrap();
    assert_eq!(peer.opened().await.0, 3);
    sandbox.start(command(false)).await.unwrap();
    assert_eq!(peer.opened().await.0, 9);
}

#[tokio::test]
async fn more_channels_than_there_may_be_are_refused_and_an_interrupt_still_finds_one() {
    let (sandbox, _peer) = alive().await;
    let mut started = 0;
    let error = loop {
        match sandbox.start(command(false)).await {
            Ok(_) => started += 1,
            Err(error) => break error,
        }
    };
    assert_eq!((started, error), (MAX_OPEN - 32, RunError::TooMany(MAX_OPEN - 32)));
    let interrupt = sandbox.context(live::ContextOp::Interrupt { name: "default".into() });
    assert!(timeout(Duration::from_millis(50), interrupt).await.is_err(), "it waits for its answer");
}

#[tokio::test]
async fn a_reader_that_does_not_read_holds_up_its_run_alone() {
    let (sandbox, mut peer) = alive().await;
    let (_slow, mut slow_reader) = sandbox.start_attached(command(false)).await.unwrap();
    let slow = peer.begin_command().await;
    let (_quick, mut quick_reader) = sandbox.start_attached(command(false)).await.unwrap();
    let quick = peer.begin_command().await;
    let chunk = vec![b'x'; 32 * 1024];
    for _ in 0..WINDOW as usize / chunk.len() {
        peer.send(slow, Kind::Stdout, &chunk).await;
    }
    assert!(peer.is_quiet().await, "nothing is granted while nobody reads");
    // The other one goes on, many windows long.
    for _ in 0..3 * WINDOW as usize / chunk.len() {
        peer.send(quick, Kind::Stdout, &chunk).await;
        while !matches!(soon(quick_reader.next()).await, Some((_, RunEvent::Item(_)))) {}
        while let Ok((channel, kind, _)) = timeout(Duration::from_millis(1), peer.next()).await {
            assert_eq!((channel, kind), (quick, Kind::Credit));
        }
    }
    // The slow one's bytes are all there, and reading them grants as many.
    let mut read = 0;
    while read < WINDOW as usize {
        if let Some((_, RunEvent::Item(Item::Stdout(bytes)))) = soon(slow_reader.next()).await {
            read += bytes.len();
        }
    }
    let mut granted = 0;
    while granted < WINDOW / 4 * 3 {
        let (channel, payload) = peer.next_of(Kind::Credit).await;
        assert_eq!(channel, slow);
        granted += live::decode_credit(&payload).unwrap();
    }
}

#[tokio::test]
async fn output_that_nobody_reads_is_kept_up_to_a_bound_and_the_loss_is_said() {
    let (sandbox, mut peer) = alive().await;
    let run = sandbox.start(command(false)).await.unwrap();
    let at = peer.begin_command().await;
    let (chunk, total) = (vec![b'x'; 32 * 1024], 3_u64 << 20);
    let mut ahead = 0_u64;
    for _ in 0..total as usize / chunk.len() {
        while ahead + chunk.len() as u64 > WINDOW.into() {
            ahead -= u64::from(live::decode_credit(&peer.next_of(Kind::Credit).await.1).unwrap());
        }
        peer.send(at, Kind::Stdout, &chunk).await;
        ahead += chunk.len() as u64;
    }
    peer.end(at, How::Exited(3)).await;
    assert_eq!(soon(run.wait()).await.how, RunHow::Exited(3));
    let status = run.status().unwrap();
    assert_eq!(status.offset, total);
    assert!(total - status.first_offset <= 1 << 20 && total - status.first_offset > 900 << 10, "{status:?}");
    let mut attached = run.attach(5);
    assert_eq!(soon(attached.next()).await, Some((5, RunEvent::Started(Some(7)))));
    assert_eq!(item(soon(attached.next()).await), (status.first_offset, Item::Lost(status.first_offset - 5)));
    let mut at = status.first_offset;
    while let Some((offset, RunEvent::Item(Item::Stdout(bytes)))) = soon(attached.next()).await {
        assert_eq!(offset, at + bytes.len() as u64);
        at = offset;
    }
    assert_eq!(at, total);
}

#[tokio::test]
async fn a_reader_that_comes_back_goes_on_where_it_was() {
    let (sandbox, mut peer) = alive().await;
    let (run, mut attached) = sandbox.start_attached(command(false)).await.unwrap();
    let at = peer.begin_command().await;
    peer.send(at, Kind::Stdout, b"abcdef").await;
    soon(attached.next()).await;
    assert_eq!(item(soon(attached.next()).await), (6, stdout("abcdef")));
    drop(attached);
    peer.send(at, Kind::Stdout, b"ghi").await;
    peer.end(at, How::Exited(0)).await;
    let mut again = sandbox.run(run.id()).unwrap().attach(4);
    soon(again.next()).await;
    let mut text = Vec::new();
    while let Some((_, event)) = soon(again.next()).await {
        if let RunEvent::Item(Item::Stdout(bytes)) = event {
            text.extend_from_slice(&bytes);
        }
    }
    assert_eq!(text, b"efghi");
}

#[tokio::test]
async fn input_waits_for_credit_and_ends_when_it_is_said() {
    let (sandbox, mut peer) = alive().await;
    let run = sandbox.start(command(true)).await.unwrap();
    let at = peer.begin_command().await;
    let writer = run.clone();
    let writing = tokio::spawn(async move { writer.write(Bytes::from(vec![b'y'; 2 * WINDOW as usize])).await });
    let mut got = 0;
    while got < WINDOW as usize {
        got += peer.next_of(Kind::Stdin).await.1.len();
    }
    assert_eq!(got, WINDOW as usize);
    assert!(peer.is_quiet().await && !writing.is_finished());
    peer.send(at, Kind::Grant, &WINDOW.to_le_bytes()).await;
    while got < 2 * WINDOW as usize {
        got += peer.next_of(Kind::Stdin).await.1.len();
    }
    soon(writing).await.unwrap().unwrap();
    run.close_stdin().unwrap();
    assert_eq!(peer.next().await, (at, Kind::StdinEnd, Vec::new()));
    assert_eq!(run.write(Bytes::from_static(b"z")).await, Err(RunError::NoStdin));
    peer.end(at, How::Exited(0)).await;
    soon(run.wait()).await;
    assert_eq!(run.write(Bytes::from_static(b"z")).await, Err(RunError::Ended));
}

#[tokio::test]
async fn whoever_waits_to_write_hears_that_the_run_ended() {
    let (sandbox, mut peer) = alive().await;
    let run = sandbox.start(command(true)).await.unwrap();
    let at = peer.begin_command().await;
    let writer = run.clone();
    let writing = tokio::spawn(async move { writer.write(Bytes::from(vec![b'y'; 2 * WINDOW as usize])).await });
    let mut got = 0;
    while got < WINDOW as usize {
        got += peer.next_of(Kind::Stdin).await.1.len();
    }
    peer.end(at, How::Signaled(9)).await;
    assert_eq!(soon(writing).await.unwrap(), Err(RunError::Ended));
}

#[tokio::test]
async fn signals_sizes_and_closing_reach_the_run() {
    let (sandbox, mut peer) = alive().await;
    let size = Size { columns: 80, rows: 24 };
    let mut spec = command(false);
    if let RunSpec::Command { terminal, .. } = &mut spec {
        *terminal = Some(size);
    }
    let run = sandbox.start(spec).await.unwrap();
    let at = peer.begin_command().await;
    run.signal(2).unwrap();
    assert_eq!(peer.next().await, (at, Kind::Signal, vec![2]));
    run.resize(size).unwrap();
    assert_eq!(peer.next().await, (at, Kind::Resize, live::encode(&size)));
    assert!(matches!(run.resize(Size { columns: 0, rows: 0 }), Err(RunError::Invalid(_))));
    assert_eq!(run.signal(0), Err(RunError::BadSignal(0)));
    run.close().unwrap();
    assert_eq!(peer.next().await, (at, Kind::Close, Vec::new()));
    run.close().unwrap();
    assert!(peer.is_quiet().await, "it is closed once");
    peer.end(at, How::Closed).await;
    assert_eq!(soon(run.wait()).await.how, RunHow::Closed);
    assert_eq!(run.signal(2), Err(RunError::Ended));
}

#[tokio::test]
async fn frames_that_no_honest_sandbox_sends_end_it_and_everyone_hears_of_it() {
    let chunk = |append, mime| ResultChunk { main: false, append, last: false, mime, data: b"x" }.encode();
    let bad_end = live::encode(&End { how: How::Signaled(99), wall_ns: 0, context_lost: false });
    let done = live::encode(&End { how: How::Done, wall_ns: 0, context_lost: false });
    // A cell on channel 1 has started.
    let cases: Vec<(u16, Kind, Vec<u8>)> = vec![
        (0, Kind::Started, vec![]),
        (0, Kind::Failure, b"no".to_vec()),
        (0, Kind::Stdout, b"x".to_vec()),
        (0, Kind::Crash, b"only a VM's worker".to_vec()),
        (2, Kind::Stdout, b"x".to_vec()),
        (0x8001, Kind::Stdout, b"x".to_vec()),
        (1, Kind::Started, vec![]),
        (1, Kind::Ready, vec![]),
        (1, Kind::Stdin, b"x".to_vec()),
        (1, Kind::Reply, vec![0]),
        (1, Kind::Result, vec![9, 9, 9]),
        (1, Kind::Result, chunk(true, "text/plain")),
        (1, Kind::Error, b"{}".to_vec()),
        (1, Kind::Error, b"\xff".to_vec()),
        (1, Kind::End, vec![]),
        (1, Kind::End, bad_end),
        (1, Kind::End, done),
        (1, Kind::Grant, vec![1]),
    ];
    for (channel, kind, payload) in cases {
        let (sandbox, mut peer) = alive().await;
        let (run, mut attached) = sandbox.start_attached(cell("1")).await.unwrap();
        assert_eq!(peer.opened().await.0, 1);
        peer.send(1, Kind::Started, &[]).await;
        soon(attached.next()).await;
        peer.send(channel, kind, &payload).await;
        assert_eq!(soon(sandbox.ended()).await, EndReason::Lost, "{channel} {kind:?} {payload:?}");
        let gone = RunHow::Gone(EndReason::Lost);
        assert!(matches!(soon(attached.next()).await, Some((_, RunEvent::End(end))) if end.how == gone));
        assert_eq!(soon(run.wait()).await.how, gone);
        assert_eq!(sandbox.start(cell("2")).await.unwrap_err(), RunError::Gone(EndReason::Lost));
        let status = tokio::task::spawn_blocking(move || peer.child.wait().map(|status| (peer, status)));
        let (_peer, status) = soon(status).await.unwrap().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
    }
}

#[tokio::test]
async fn a_sandbox_that_sends_more_than_it_was_granted_is_ended() {
    let (sandbox, mut peer) = alive().await;
    let (_run, _attached) = sandbox.start_attached(command(false)).await.unwrap();
    let at = peer.begin_command().await;
    for _ in 0..WINDOW / (32 * 1024) {
        peer.send(at, Kind::Stdout, &[b'x'; 32 * 1024]).await;
    }
    assert!(peer.is_quiet().await && sandbox.end_reason().is_none());
    peer.send(at, Kind::Stdout, b"y").await;
    assert_eq!(soon(sandbox.ended()).await, EndReason::Lost);
}

#[tokio::test]
async fn a_result_that_is_too_large_is_lost_and_its_run_goes_on() {
    let (sandbox, mut peer) = alive().await;
    let (_run, mut attached) = sandbox.start_attached(cell("big")).await.unwrap();
    let (at, _) = peer.opened().await;
    peer.send(at, Kind::Started, &[]).await;
    soon(attached.next()).await;
    let data = vec![b'x'; 60 * 1024];
    let (mut sent, mut ahead, mut first) = (0, 0_u64, true);
    while sent <= state::MAX_RESULT {
        let frame = ResultChunk { main: true, append: !first, last: false, mime: "text/plain", data: &data }.encode();
        while ahead + frame.len() as u64 > WINDOW.into() {
            ahead -= u64::from(live::decode_credit(&peer.next_of(Kind::Credit).await.1).unwrap());
        }
        peer.send(at, Kind::Result, &frame).await;
        (sent, ahead, first) = (sent + data.len(), ahead + frame.len() as u64, false);
    }
    let last = ResultChunk { main: true, append: false, last: true, mime: "text/html", data: b"" }.encode();
    peer.send(at, Kind::Result, &last).await;
    peer.end(at, How::Cell(CellDone { status: CellStatus::Ok, execution_count: 1 })).await;
    let (_, lost) = item(soon(attached.next()).await);
    assert!(matches!(lost, Item::Lost(bytes) if bytes as usize > state::MAX_RESULT), "{lost:?}");
    assert!(matches!(soon(attached.next()).await, Some((_, RunEvent::End(_)))));
}

#[tokio::test]
async fn a_lease_ends_when_it_is_over_and_an_extended_one_later() {
    let begun = Instant::now();
    let (sandbox, _peer) =
        alive_as(SandboxSpec { lease: Duration::from_millis(100), ..SandboxSpec::new("python") }).await;
    sandbox.extend(Duration::from_millis(300)).unwrap();
    assert_eq!(soon(sandbox.ended()).await, EndReason::LeaseEnded);
    assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
    assert_eq!(sandbox.extend(Duration::from_secs(1)), Err(RunError::Gone(EndReason::LeaseEnded)));
    let (sandbox, _peer) = alive().await;
    let begun = Instant::now();
    sandbox.extend(Duration::from_millis(100)).unwrap();
    assert_eq!(soon(sandbox.ended()).await, EndReason::LeaseEnded, "a shorter lease counts as well");
    assert!(begun.elapsed() >= Duration::from_millis(100), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn an_idle_sandbox_ends_and_one_with_a_run_or_a_reader_does_not() {
    let idle = Some(Duration::from_millis(100));
    let (sandbox, mut peer) = alive_as(SandboxSpec { idle_timeout: idle, ..SandboxSpec::new("python") }).await;
    let (_run, attached) = sandbox.start_attached(command(false)).await.unwrap();
    let at = peer.begin_command().await;
    tokio::time::sleep(Duration::from_millis(250)).await;
    assert_eq!(sandbox.end_reason(), None);
    peer.end(at, How::Exited(0)).await;
    tokio::time::sleep(Duration::from_millis(250)).await;
    assert_eq!(sandbox.end_reason(), None, "its reader is still there");
    let begun = Instant::now();
    drop(attached);
    assert_eq!(soon(sandbox.ended()).await, EndReason::Idle);
    assert!(begun.elapsed() >= Duration::from_millis(95), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn ending_a_sandbox_kills_its_worker_and_gives_its_places_back() {
    let registry = Registry::new(SandboxBounds { most: 2, ..SandboxBounds::default() });
    let spec = |owner: &str| SandboxSpec { owner: owner.into(), most_of_owner: Some(1), ..SandboxSpec::new("python") };
    let (sandbox, mut peer) = launch(&registry, spec("a"));
    assert!(matches!(registry.admit(&spec("a")), Err(crate::ExecError::TooManySandboxes(1))));
    let (other, _other_peer) = launch(&registry, spec("b"));
    assert!(matches!(registry.admit(&spec("c")), Err(crate::ExecError::Busy { live: 2, .. })));
    assert_eq!(registry.sandboxes().iter().map(Sandbox::id).collect::<Vec<_>>(), [sandbox.id(), other.id()]);
    let ((), reason) = tokio::join!(
        async {
            assert_eq!(soon(sandbox.end(EndReason::Requested)).await, EndReason::Requested);
        },
        other.end(EndReason::Requested)
    );
    assert_eq!(reason, EndReason::Requested);
    let waited = tokio::task::spawn_blocking(move || {
        peer.child.wait().unwrap();
        peer
    });
    let _peer = soon(waited).await.unwrap();
    while registry.live() > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!((registry.promised(), registry.sandboxes().len()), (0, 0));
    assert!(registry.admit(&spec("a")).is_ok());
    // It is still known, and says why it ended.
    assert_eq!(registry.find(sandbox.id()).unwrap().end_reason(), Some(EndReason::Requested));
}

#[tokio::test]
async fn a_worker_that_vanishes_is_noticed_at_once() {
    let (sandbox, mut peer) = alive().await;
    let run = sandbox.start(command(false)).await.unwrap();
    peer.begin_command().await;
    peer.socket.shutdown().await.unwrap();
    assert_eq!(soon(run.wait()).await.how, RunHow::Gone(EndReason::Lost));
    assert_eq!(soon(sandbox.file(live::FileOp::Stat { path: "/".into() })).await, Err(RunError::Gone(EndReason::Lost)));
}

fn entry(name: &str) -> live::Entry {
    live::Entry {
        path: format!("/home/{name}"),
        kind: live::EntryKind::File,
        size: 3,
        mode: 0o644,
        modified_ms: 0,
        uid: 1,
        gid: 1,
        target: None,
    }
}

#[tokio::test]
async fn files_are_listed_read_and_written_on_channels_of_their_own() {
    let (sandbox, mut peer) = alive().await;
    let lister = sandbox.clone();
    let listing = tokio::spawn(async move { lister.file(live::FileOp::List { path: ".".into(), depth: 1 }).await });
    let (at, open) = peer.opened().await;
    assert_eq!(open, Open::File(live::FileOp::List { path: ".".into(), depth: 1 }));
    for name in ["a", "b"] {
        peer.send(at, Kind::Reply, &live::encode(&Reply::Entries(vec![entry(name)]))).await;
    }
    peer.end(at, How::Done).await;
    assert_eq!(soon(listing).await.unwrap(), Ok(vec![entry("a"), entry("b")]));

    let reader = sandbox.clone();
    let reading = tokio::spawn(async move {
        let (entry, mut file) = reader.read("a".into(), 0, 100).await?;
        let mut bytes = Vec::new();
        while let Some(part) = file.next().await? {
            bytes.extend_from_slice(&part);
        }
        Ok::<_, RunError>((entry, bytes))
    });
    let (at, _) = peer.opened().await;
    peer.send(at, Kind::Reply, &live::encode(&Reply::Entry(entry("a")))).await;
    peer.send(at, Kind::Stdout, b"abc").await;
    peer.end(at, How::Done).await;
    assert_eq!(soon(reading).await.unwrap(), Ok((entry("a"), b"abc".to_vec())));

    let mut file = sandbox.write("new".into(), Some(0o600)).await.unwrap();
    let (at, open) = peer.opened().await;
    assert_eq!(open, Open::File(live::FileOp::Write { path: "new".into(), mode: Some(0o600) }));
    file.write(Bytes::from_static(b"xyz")).await.unwrap();
    assert_eq!(peer.next_of(Kind::Stdin).await, (at, b"xyz".to_vec()));
    let finishing = tokio::spawn(file.finish());
    peer.next_of(Kind::StdinEnd).await;
    peer.send(at, Kind::Reply, &live::encode(&Reply::Entry(entry("new")))).await;
    peer.end(at, How::Done).await;
    assert_eq!(soon(finishing).await.unwrap(), Ok(entry("new")));
}

#[tokio::test]
async fn a_write_that_is_refused_says_why_and_one_that_is_given_up_is_closed() {
    let (sandbox, mut peer) = alive().await;
    let mut file = sandbox.write("full".into(), None).await.unwrap();
    let (at, _) = peer.opened().await;
    peer.end(at, How::Refused(Refusal::NoRoom, "the disk is full\n".into())).await;
    let full = RunError::Refused(Refusal::NoRoom, "the disk is full ".into());
    let error = loop {
        if let Err(error) = file.write(Bytes::from_static(b"x")).await {
            break error;
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(error, full);
    let file = sandbox.write("other".into(), None).await.unwrap();
    let (at, _) = peer.opened().await;
    drop(file);
    assert_eq!(peer.next_of(Kind::Close).await.0, at);
    // What was on its way is left alone.
    peer.send(at, Kind::Reply, &live::encode(&Reply::Entry(entry("other")))).await;
    peer.end(at, How::Closed).await;
    let watching = {
        let sandbox = sandbox.clone();
        tokio::spawn(async move { sandbox.watch(".".into(), true).await })
    };
    let (at, _) = peer.opened().await;
    peer.send(at, Kind::Reply, &live::encode(&Reply::Changes(Vec::new()))).await;
    let mut watch = soon(watching).await.unwrap().unwrap();
    let change = live::Change { path: "/home/a".into(), kind: live::ChangeKind::Created };
    peer.send(at, Kind::Reply, &live::encode(&Reply::Changes(vec![change.clone()]))).await;
    assert_eq!(soon(watch.next()).await, Ok(Some(vec![change])));
    drop(watch);
    assert_eq!(peer.next_of(Kind::Close).await.0, at);
}

#[tokio::test]
async fn an_answer_that_is_none_of_the_question_ends_the_sandbox() {
    let (sandbox, mut peer) = alive().await;
    let asker = sandbox.clone();
    let asking = tokio::spawn(async move { asker.file(live::FileOp::Stat { path: "a".into() }).await });
    let (at, _) = peer.opened().await;
    peer.send(at, Kind::Reply, &live::encode(&Reply::Contexts(Vec::new()))).await;
    peer.end(at, How::Done).await;
    assert_eq!(soon(asking).await.unwrap(), Err(RunError::Gone(EndReason::Lost)));
    assert_eq!(soon(sandbox.ended()).await, EndReason::Lost);
}

#[derive(Debug)]
struct Room {
    most: u64,
    held: AtomicU64,
}

impl Hold for Room {
    fn grow(&self, bytes: u64) -> bool {
        let more = |held| Some(held + bytes).filter(|held| *held <= self.most);
        self.held.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).is_ok()
    }
    fn shrink(&self, bytes: u64) {
        self.held.fetch_sub(bytes, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn what_is_held_is_counted_and_what_finds_no_room_falls_out() {
    let room = Arc::new(Room { most: 256 * 1024, held: AtomicU64::new(0) });
    let spec = SandboxSpec { hold: Some(room.clone()), ..SandboxSpec::new("python") };
    let (sandbox, mut peer) = alive_as(spec).await;
    let run = sandbox.start(command(false)).await.unwrap();
    let at = peer.begin_command().await;
    for _ in 0..16 {
        peer.send(at, Kind::Stdout, &[b'x'; 32 * 1024]).await;
        while sandbox.runs()[0].offset % (32 * 1024) != 0 {
            tokio::task::yield_now().await;
        }
        if timeout(Duration::from_millis(2), peer.next()).await.is_ok() {}
    }
    peer.end(at, How::Exited(0)).await;
    soon(run.wait()).await;
    let status = run.status().unwrap();
    let kept = status.offset - status.first_offset;
    assert!(kept > 128 * 1024 && kept <= 256 * 1024, "{status:?}");
    assert!(room.held.load(Ordering::SeqCst) >= kept);
    soon(sandbox.end(EndReason::Requested)).await;
    assert_eq!(room.held.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn ended_runs_are_forgotten_when_they_are_many_or_when_it_is_asked() {
    let (sandbox, mut peer) = alive().await;
    let mut first = None;
    for _ in 0..300 {
        let run = sandbox.start(command(false)).await.unwrap();
        let at = peer.begin_command().await;
        peer.end(at, How::Exited(0)).await;
        soon(run.wait()).await;
        first.get_or_insert(run);
    }
    assert_eq!(sandbox.runs().len(), 256);
    let first = first.unwrap();
    assert_eq!(first.status(), None);
    assert!(matches!(soon(first.attach(0).next()).await, Some((_, RunEvent::End(_)))));
    let known = sandbox.runs()[0].id;
    sandbox.run(known).unwrap().forget();
    assert!(sandbox.run(known).is_none());
}

/// A forker of nobody: what is made here is made by hand.
fn forker() -> Arc<Forker> {
    let shared = Shared {
        spawner: Spawner::new(std::path::Path::new("/bin/false")).unwrap(),
        cgroups: None,
        reaper: Reaper::start(),
        warm_timeout: Duration::from_secs(1),
    };
    Arc::new(Forker::new(Arc::new(shared)).0)
}

/// All of a run's bytes of standard output.
async fn written(run: &Run) -> String {
    let mut attached = run.attach(0);
    let mut all = Vec::new();
    while let Some((_, event)) = attached.next().await {
        if let RunEvent::Item(Item::Stdout(bytes)) = event {
            all.extend_from_slice(&bytes);
        }
    }
    String::from_utf8(all).unwrap()
}

#[tokio::test]
async fn a_branch_knows_what_was_said_before_and_is_told_the_rest_behind_its_name() {
    let registry = Registry::new(SandboxBounds::default());
    let (origin, mut peer) = launch(&registry, SandboxSpec::new("python"));
    for kind in [Kind::Limits, Kind::Identity, Kind::Live] {
        assert_eq!(peer.next().await.1, kind);
    }
    peer.send(0, Kind::Started, &[]).await;
    let run = origin.start(command(true)).await.unwrap();
    let at = peer.begin_command().await;
    peer.send(at, Kind::Stdout, b"one ").await;
    let reader = origin.clone();
    tokio::spawn(async move { reader.read("a".into(), 0, 9).await.map(drop) });
    let (op_at, _) = peer.opened().await;

    let frozen = origin.handle.state().freeze().unwrap();
    origin.handle.poke();
    assert_eq!(peer.next().await, (0, Kind::Freeze, Vec::new()));
    // What it is asked and fed meanwhile waits.
    let second = origin.start(command(false)).await.unwrap();
    run.write(Bytes::from_static(b"fed")).await.unwrap();
    assert!(peer.is_quiet().await);
    // What it says before its answer is the past of both.
    peer.send(at, Kind::Stdout, b"two ").await;
    peer.send(0, Kind::Frozen, &[]).await;
    peer.send(at, Kind::Stdout, b"origin").await;
    let frozen = frozen.await.unwrap().unwrap();
    let (second_at, _) = peer.opened().await;
    assert_eq!(peer.next_of(Kind::Stdin).await, (at, b"fed".to_vec()));

    let moment = Moment { facts: origin.handle.facts.clone(), forker: forker(), frozen, bytes: 0 };
    let mut branches = Vec::new();
    for _ in 0..2 {
        let (worker, socket, child) = worker();
        let spec = SandboxSpec::new("python");
        let (place, _) = registry.admit(&spec).unwrap();
        let made = registry.launch_branch(worker, spec, &moment, None, Duration::ZERO, place).unwrap();
        branches.push((made, Peer { socket, decoder: Decoder::new(), child }));
    }
    let mut names = Vec::new();
    for (branch, peer) in &mut branches {
        assert_eq!(branch.origin(), Some(origin.id()));
        let (channel, kind, name) = peer.next().await;
        assert_eq!((channel, kind), (0, Kind::Identity));
        names.push(name);
        // The same words that the origin had not been told, and nobody waits for its operation here.
        assert_eq!(peer.opened().await.0, second_at);
        assert_eq!(peer.next_of(Kind::Stdin).await, (at, b"fed".to_vec()));
        assert_eq!(peer.next_of(Kind::Close).await.0, op_at);
        peer.end(op_at, How::Closed).await;
        peer.send(at, Kind::Stdout, b"branch").await;
        peer.end(at, How::Exited(0)).await;
        peer.send(second_at, Kind::Started, &8_u32.to_le_bytes()).await;
        peer.end(second_at, How::Exited(0)).await;
        let of_branch = branch.run(run.id()).expect("the run is under way there, too");
        assert_eq!(written(&of_branch).await, "one two branch");
        assert_eq!(branch.activity().begun, 2);
        assert!(branch.run(second.id()).is_some());
    }
    assert_ne!(names[0], names[1]);
    peer.end(at, How::Exited(0)).await;
    assert_eq!(written(&run).await, "one two origin");
}

#[tokio::test]
async fn a_sandbox_that_was_not_saved_goes_on_and_one_that_ends_meanwhile_says_so() {
    let (sandbox, mut peer) = alive().await;
    let frozen = sandbox.handle.state().freeze().unwrap();
    sandbox.handle.poke();
    peer.next_of(Kind::Freeze).await;
    peer.send(0, Kind::Frozen, b"no room\nfor it").await;
    assert_eq!(frozen.await.unwrap().unwrap_err(), "no room for it");
    let run = sandbox.start(command(false)).await.unwrap();
    let at = peer.begin_command().await;
    peer.end(at, How::Exited(3)).await;
    assert_eq!(written(&run).await, "");

    let frozen = sandbox.handle.state().freeze().unwrap();
    sandbox.handle.poke();
    peer.next_of(Kind::Freeze).await;
    sandbox.end(EndReason::Requested).await;
    assert!(frozen.await.is_err(), "nobody answers any more");
    assert_eq!(sandbox.handle.state().freeze().err(), Some(EndReason::Requested));

    // Rest that nobody asked for is nonsense.
    let (sandbox, mut peer) = alive().await;
    peer.send(0, Kind::Frozen, &[]).await;
    assert_eq!(sandbox.ended().await, EndReason::Lost);
}

#[tokio::test]
async fn a_sandbox_of_processes_or_without_a_delta_is_not_branched() {
    let registry = Registry::new(SandboxBounds::default());
    let (sandbox, _peer) = launch(&registry, SandboxSpec::new("python"));
    let spec = || BranchSpec {
        count: 2,
        lease: Duration::from_secs(9),
        metadata: None,
        most_of_owner: None,
        holds: Vec::new(),
    };
    let refused = sandbox.branch(&registry, spec()).await.unwrap_err();
    assert!(matches!(refused, BranchError::NeedsVmEngine), "{refused}");
    for (language, expected) in [("node", "generators"), ("python", "nowhere to save")] {
        let (worker, _socket, mut child) = worker();
        let of = SandboxSpec::new(language);
        let (place, permits) = registry.admit(&of).unwrap();
        let origin = Origin {
            language: language.into(),
            isolation: Isolation::Vm,
            pooled: false,
            fork_time: Duration::ZERO,
            forker: None,
        };
        let sandbox = registry.launch(worker, of, origin, place).unwrap();
        drop(permits);
        let before = (registry.live(), registry.promised());
        let refused = sandbox.branch(&registry, spec()).await.unwrap_err().to_string();
        assert!(refused.contains(expected), "{refused}");
        assert_eq!((registry.live(), registry.promised()), before, "what was admitted is given back");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[tokio::test]
async fn one_that_takes_over_an_id_is_found_under_it_and_the_other_is_not_remembered() {
    let registry = Registry::new(SandboxBounds::default());
    let (old, mut peer) = launch(&registry, SandboxSpec::new("python"));
    for kind in [Kind::Limits, Kind::Identity, Kind::Live] {
        assert_eq!(peer.next().await.1, kind);
    }
    peer.send(0, Kind::Started, &[]).await;
    let frozen = old.handle.state().branched();
    let moment = Moment { facts: old.handle.facts.clone(), forker: forker(), frozen, bytes: 0 };
    let (worker, _socket, mut child) = worker();
    let spec = SandboxSpec::new("python");
    let (place, _permits) = registry.admit(&spec).unwrap();
    let known = Known { id: old.id(), origin: None, created_at: old.created_at() };
    let new = registry.launch_branch(worker, spec, &moment, Some(known), Duration::ZERO, place).unwrap();
    // Nobody has to end it: what is found by nobody must not live.
    assert_eq!(old.ended().await, EndReason::Replaced);
    assert_eq!((new.id(), new.origin(), new.created_at()), (old.id(), None, old.created_at()));
    assert!(registry.find(old.id()).unwrap().end_reason().is_none());
    assert_eq!(registry.sandboxes().len(), 1);
    // What came first has ended since, and takes nothing of the other with it.
    new.end(EndReason::Requested).await;
    assert_eq!(registry.find(new.id()).unwrap().end_reason(), Some(EndReason::Requested));
    child.wait().unwrap();
}

#[tokio::test]
async fn checkpoints_of_processes_are_refused_and_their_places_are_counted() {
    let registry = Registry::new(SandboxBounds { checkpoints: 3, ..SandboxBounds::default() });
    let (sandbox, _peer) = launch(&registry, SandboxSpec::new("python"));
    let spec =
        CheckpointSpec { lease: Duration::from_secs(9), metadata: BTreeMap::new(), most_of_owner: None, hold: None };
    let refused = sandbox.checkpoint(&registry, spec).await.unwrap_err();
    assert!(matches!(refused, BranchError::NeedsVmEngine), "{refused}");
    assert!(matches!(sandbox.roll_back(&registry, None, None).await, Err(BranchError::NeedsVmEngine)));
    assert!(matches!(sandbox.promote(&registry, None).await, Err(BranchError::NeedsVmEngine)));

    let (one, _two) =
        (registry.admit_checkpoint("a", Some(2)).unwrap(), registry.admit_checkpoint("a", Some(2)).unwrap());
    assert!(matches!(registry.admit_checkpoint("a", Some(2)), Err(BranchError::TooManyCheckpoints(2))));
    let _other = registry.admit_checkpoint("b", Some(2)).unwrap();
    assert!(matches!(registry.admit_checkpoint("b", Some(2)), Err(BranchError::TooManyCheckpoints(3))));
    drop(one);
    registry.admit_checkpoint("b", Some(2)).unwrap();
}
