//! Connections at once: how many there may be, how many of one address, and which one goes when there is no room.
//!
//! ```text
//! entered ── a request with a key ──> proven ── ends by itself ──> left
//!    └── no room, and nothing under way: the oldest of its kind is ended ──> left
//! ```
//!
//! A connection costs its client nothing, and a key is only seen in a request. So until a connection has brought one, it
//! holds its place only while nobody else needs it, and may send little and take little time.

use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
    time::{Instant, sleep, sleep_until, timeout},
};

/// Longest time without a request on a connection that has not yet brought a key.
const STRANGERS_TIME: Duration = Duration::from_secs(10);
/// Most bytes of a request's head on such a connection.
const STRANGERS_HEAD: usize = 16 * 1024;
/// Interval at which a full server searches for idle connections.
const LOOK: Duration = Duration::from_millis(50);
/// Interval at which memory of ended connections without a key is given back, and how many make that worthwhile.
const TIDY: Duration = Duration::from_secs(5);
const MANY: usize = 64;

/// Whose connections share a limit: see [`crate::client_addr::limit_name`]. `None`: a Unix socket, or a proxy of ours,
/// behind which there are many.
pub(crate) type Group = Option<u128>;

#[derive(Debug)]
pub(crate) struct Places {
    most: usize,
    each: usize,
    taken: Mutex<Taken>,
    left: Notify,
    /// Connections that ended without having brought a key.
    strangers: AtomicUsize,
}

#[derive(Debug, Default)]
struct Taken {
    /// Descriptors, also those that wait for a connection and those of connections that are told to end.
    count: usize,
    // In the order of their coming, without those that are told to end.
    groups: HashMap<Group, Vec<Arc<Visit>>>,
}

impl Places {
    /// Room for so many connections, and for so many of them from each address.
    pub(crate) fn new(most: usize, each: usize) -> Arc<Places> {
        Arc::new(Places { most, each, taken: Mutex::default(), left: Notify::new(), strangers: AtomicUsize::new(0) })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a connection can be taken. For that another one may be ended.
    pub(crate) async fn room(self: &Arc<Self>) -> Room {
        loop {
            {
                let mut taken = self.taken();
                if taken.count < self.most {
                    taken.count += 1;
                    return Room(self.clone());
                }
                let staying: usize = taken.groups.values().map(Vec::len).sum();
                if staying == taken.count {
                    taken.end_one_of_most();
                }
            }
            // Or a connection has come to rest, which nobody tells.
            timeout(LOOK, self.left.notified()).await.unwrap_or_default();
        }
    }

    /// Gives memory back after crowds of strangers, for as long as the server runs: the allocator would keep it.
    pub(crate) async fn tidy(&self) {
        loop {
            sleep(TIDY).await;
            if self.strangers.swap(0, Ordering::Relaxed) >= MANY {
                // It takes a moment, in which this thread is not to hold others up. It does not fail.
                tokio::task::spawn_blocking(zeroboot_engine::give_memory_back).await.unwrap_or_default();
            }
        }
    }
}

impl Taken {
    /// Ends the connection of the group that came first of those that can go.
    fn end_one(&mut self, group: Group) -> Option<()> {
        let visit = self.groups.get(&group)?.iter().find(|visit| visit.can_go())?.clone();
        visit.ended.notify_one();
        self.remove(group, &visit);
        Some(())
    }

    /// The same in the group that has most such connections.
    fn end_one_of_most(&mut self) -> Option<()> {
        let can_go = |visits: &Vec<Arc<Visit>>| visits.iter().filter(|visit| visit.can_go()).count();
        let group = *self.groups.iter().max_by_key(|(_, visits)| can_go(visits))?.0;
        self.end_one(group)
    }

    fn remove(&mut self, group: Group, visit: &Arc<Visit>) {
        let Some(visits) = self.groups.get_mut(&group) else { return };
        visits.retain(|known| !Arc::ptr_eq(known, visit));
        if visits.is_empty() {
            self.groups.remove(&group);
        }
    }
}

/// Room for one more connection, until it is dropped.
#[derive(Debug)]
pub(crate) struct Room(Arc<Places>);

impl Room {
    /// A place for a connection; another one of its address may lose its own for it. `None`: all of the address's are in
    /// use.
    pub(crate) fn enter(self, group: Group) -> Option<Place> {
        let visit = Arc::new(Visit::default());
        {
            let mut taken = self.0.taken();
            if group.is_some() && taken.groups.get(&group).is_some_and(|visits| visits.len() >= self.0.each) {
                taken.end_one(group)?;
            }
            taken.groups.entry(group).or_default().push(visit.clone());
        }
        Some(Place { room: self, group, visit })
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.0.taken().count -= 1;
        self.0.left.notify_one();
    }
}

/// A connection's place, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    room: Room,
    group: Group,
    pub(crate) visit: Arc<Visit>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let places = &self.room.0;
        places.taken().remove(self.group, &self.visit);
        if !self.visit.is_proven() {
            places.strangers.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// What is known of a connection.
#[derive(Debug)]
pub(crate) struct Visit {
    proven: AtomicBool,
    activity: Mutex<Activity>,
    /// Bytes since the last request began.
    head: AtomicUsize,
    ended: Notify,
}

#[derive(Debug)]
struct Activity {
    under_way: usize,
    ever: bool,
    last: Instant,
}

impl Default for Visit {
    fn default() -> Visit {
        let activity = Activity { under_way: 0, ever: false, last: Instant::now() };
        Visit {
            proven: AtomicBool::new(false),
            activity: Mutex::new(activity),
            head: AtomicUsize::new(0),
            ended: Notify::new(),
        }
    }
}

impl Visit {
    fn activity(&self) -> MutexGuard<'_, Activity> {
        self.activity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It brought a request that was let in with a key, or on a server that wants none.
    pub(crate) fn prove(&self) {
        self.proven.store(true, Ordering::Relaxed);
    }

    fn is_proven(&self) -> bool {
        self.proven.load(Ordering::Relaxed)
    }

    fn can_go(&self) -> bool {
        !self.is_proven() && self.activity().under_way == 0
    }

    /// Returns when its place is needed, or when it took too long to prove itself.
    pub(crate) async fn ended(&self) {
        let slow = async {
            self.idle_for(STRANGERS_TIME).await;
            if self.is_proven() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = self.ended.notified() => {}
            () = slow => {}
        }
    }

    /// A request, until its answer begins: one that goes on for longer is finished after a graceful end as well.
    pub(crate) fn enter(self: &Arc<Self>) -> UnderWay {
        self.head.store(0, Ordering::Relaxed);
        let mut activity = self.activity();
        activity.under_way += 1;
        activity.ever = true;
        UnderWay(self.clone())
    }

    /// Whether a request came.
    pub(crate) fn ever(&self) -> bool {
        self.activity().ever
    }

    /// Returns when nothing was under way for so long.
    pub(crate) async fn idle_for(&self, time: Duration) {
        loop {
            let until = {
                let activity = self.activity();
                let since = if activity.under_way > 0 { Instant::now() } else { activity.last };
                since + time
            };
            if until <= Instant::now() {
                return;
            }
            sleep_until(until).await;
        }
    }
}

#[derive(Debug)]
pub(crate) struct UnderWay(Arc<Visit>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut activity = self.0.activity();
        activity.under_way -= 1;
        activity.last = Instant::now();
    }
}

/// A stream that ends when a connection without a key sends a long head. (HTTP/2 has its own limit for that.)
pub(crate) struct Heads<I> {
    pub(crate) io: I,
    /// `None`: as long as HTTP's own limit.
    pub(crate) visit: Option<Arc<Visit>>,
}

impl<I: AsyncRead + Unpin> AsyncRead for Heads<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(context, buffer))?;
        let Some(visit) = &self.visit else { return Poll::Ready(Ok(())) };
        if visit.can_go() {
            let read = buffer.filled().len() - before;
            if visit.head.fetch_add(read, Ordering::Relaxed) + read > STRANGERS_HEAD {
                return Poll::Ready(Err(io::Error::other("a long head on a connection without a key")));
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Heads<I> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }
    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn is_ended(place: &Place) -> bool {
        place.visit.ended.notified().now_or_never().is_some()
    }

    fn enter(places: &Arc<Places>, address: u128) -> Option<Place> {
        places.room().now_or_never()?.enter(Some(address))
    }

    #[tokio::test]
    async fn an_address_beyond_its_share_loses_its_own_oldest_connection() {
        let places = Places::new(20, 2);
        let [first, second] = [(); 2].map(|()| enter(&places, 1).unwrap());
        let other = enter(&places, 2).unwrap();
        let third = enter(&places, 1).unwrap();
        assert!(is_ended(&first) && !is_ended(&second) && !is_ended(&third) && !is_ended(&other));
        // Connections that have brought a key stay, and so do those with a request under way.
        second.visit.prove();
        let _under_way = third.visit.enter();
        assert!(enter(&places, 1).is_none());
        drop(second);
        assert!(enter(&places, 1).is_some());
        // Behind a proxy of ours there are many addresses.
        for _ in 0..4 {
            std::mem::forget(places.room().await.enter(None).unwrap());
        }
        assert_eq!(places.taken().groups[&None].len(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_server_makes_room_at_the_address_that_has_most() {
        let places = Places::new(4, 3);
        let mut many: Vec<Place> = (0..3).map(|_| enter(&places, 1).unwrap()).collect();
        let one = enter(&places, 2).unwrap();
        // There is room when the connection has gone, and not before: it has its descriptor until then.
        assert!(enter(&places, 3).is_none());
        assert!(is_ended(&many[0]) && !is_ended(&many[1]) && !is_ended(&one));
        assert!(enter(&places, 3).is_none());
        assert!(!is_ended(&many[1]), "one is enough");
        many.remove(0);
        let new = enter(&places, 3).unwrap();
        assert_eq!(places.taken().count, 4);
        drop((many, one, new));
        assert_eq!(places.taken().count, 0);
        assert!(places.taken().groups.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_server_waits_for_those_with_a_key() {
        let places = Places::new(1, 1);
        let proven = enter(&places, 1).unwrap();
        proven.visit.prove();
        assert!(enter(&places, 2).is_none() && !is_ended(&proven));
        let (room, ()) = tokio::join!(places.room(), async {
            sleep(Duration::from_secs(1)).await;
            drop(proven);
        });
        assert!(room.enter(Some(2)).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_idle_when_nothing_was_under_way_for_the_whole_time() {
        let visit = Arc::new(Visit::default());
        let start = Instant::now();
        let first = visit.enter();
        let ((), ()) = tokio::join!(visit.idle_for(Duration::from_secs(30)), async {
            sleep(Duration::from_secs(100)).await;
            drop(first);
        });
        let time = start.elapsed();
        assert!((Duration::from_secs(130)..Duration::from_secs(131)).contains(&time), "{time:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_never_proves_itself_ends_soon_and_another_does_not() {
        let start = Instant::now();
        Visit::default().ended().await;
        assert_eq!(start.elapsed().as_secs(), STRANGERS_TIME.as_secs());
        let proven = Visit::default();
        proven.prove();
        timeout(Duration::from_secs(3600), proven.ended()).await.unwrap_err();
    }
}
