use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::Condvar;

use super::*;
use crate::catalog::{SourceFile, identity_of};
use crate::io::opened::ReadAt;
use crate::io::pool;
use crate::memory::{Slab, SlabWriter};

const PIECE: usize = 8192;

/// A file of zeroes, read by `double`.
fn opened(double: impl ReadAt + 'static) -> Arc<Opened> {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let source = SourceFile {
        path: file.path().into(),
        identity: identity_of(&file.as_file().metadata().unwrap()),
    };
    let opened = File::open(file.path()).unwrap();
    Arc::new(Opened::with_double(source, opened, Box::new(double)))
}

/// Answers each read with the next of these, then with zeroes.
#[derive(Default)]
struct Script(Mutex<VecDeque<io::Result<usize>>>);

impl ReadAt for Script {
    fn read_at(&self, into: &mut [u8], _offset: u64) -> io::Result<usize> {
        match self.0.lock().unwrap().pop_front() {
            Some(Ok(bytes)) => Ok(bytes.min(into.len())),
            Some(Err(error)) => Err(error),
            None => Ok(into.len()),
        }
    }
}

struct Rig {
    queue: Arc<Queue>,
    file: Arc<Opened>,
    writer: SlabWriter,
    reply: mpsc::UnboundedSender<Done>,
    results: mpsc::UnboundedReceiver<Done>,
}

impl Rig {
    fn new(limits: Limits, double: impl ReadAt + 'static) -> Self {
        let (reply, results) = mpsc::unbounded_channel();
        Self {
            queue: Arc::new(Queue::new(limits, None)),
            file: opened(double),
            writer: Slab::create("test", Bytes(1 << 20)).unwrap(),
            reply,
            results,
        }
    }

    fn push(&mut self, stream: StreamId, way: Way) {
        let piece = self.writer.lend(PIECE).unwrap();
        self.queue.push(Task {
            offset: piece.start(),
            wanted: piece.len(),
            piece,
            file: self.file.clone(),
            index: 0,
            done: 0,
            way,
            cold: false,
            failures: 0,
            stream,
            guessed: false,
            reply: self.reply.clone(),
        });
    }

    fn taken(&self) -> Option<Task> {
        match self.queue.turn(Duty::All) {
            Turn::Take(task) => Some(task),
            Turn::Wait(_) | Turn::End => None,
        }
    }
}

const fn limits() -> Limits {
    Limits {
        in_flight: 2 * PIECE as u64,
        copies: 2,
        prefetch_rate: 0,
    }
}

#[test]
fn a_demand_waits_for_one_piece_of_a_prefetch_at_most() {
    let mut rig = Rig::new(limits(), Script::default());
    let guess = rig.queue.open(Urgency::prefetch());
    for _ in 0..50 {
        rig.push(guess, Way::Direct);
    }
    let under_way = rig.taken().unwrap();
    assert!(
        rig.taken().is_none(),
        "prefetches have one piece at the disk"
    );
    let demand = rig.queue.open(Urgency::default());
    rig.push(demand, Way::Direct);
    rig.push(demand, Way::Direct);
    let first = rig.taken().unwrap();
    assert_eq!(first.stream, demand, "it need not even wait for that one");
    rig.queue.end(under_way, Ok(()));
    assert_eq!(rig.taken().unwrap().stream, demand);
    rig.queue.end(first, Ok(()));
    assert_eq!(
        rig.taken().unwrap().stream,
        guess,
        "idle time is for prefetches"
    );
}

#[test]
fn the_earlier_deadline_is_first_and_urgency_may_rise() {
    let mut rig = Rig::new(
        Limits {
            in_flight: PIECE as u64,
            ..limits()
        },
        Script::default(),
    );
    let seconds = |n| Urgency::demand(Some(Duration::from_secs(n)));
    let raised = Urgency::prefetch();
    let streams = [
        (rig.queue.open(raised.clone()), 0),
        (rig.queue.open(seconds(9)), 2),
        (rig.queue.open(seconds(5)), 1),
        (rig.queue.open(Urgency::default()), 3),
    ];
    for (stream, _) in streams {
        rig.push(stream, Way::Direct);
    }
    raised.raise(Some(Duration::from_secs(1)));
    let mut order = Vec::new();
    while let Some(task) = rig.taken() {
        assert!(rig.taken().is_none(), "one piece fits");
        order.push(streams.iter().find(|(id, _)| *id == task.stream).unwrap().1);
        rig.queue.end(task, Ok(()));
    }
    assert_eq!(order, [0, 1, 2, 3]);
}

#[test]
fn what_is_cached_does_not_wait_for_the_disk() {
    let mut rig = Rig::new(limits(), Script::default());
    let stream = rig.queue.open(Urgency::default());
    for way in [
        Way::Direct,
        Way::Direct,
        Way::Direct,
        Way::Cached,
        Way::Buffered,
        Way::Cached,
    ] {
        rig.push(stream, way);
    }
    let ways: Vec<Way> = std::iter::from_fn(|| rig.taken())
        .map(|task| task.way)
        .collect();
    assert_eq!(ways, [Way::Direct, Way::Direct, Way::Cached, Way::Cached]);
}

#[test]
fn prefetches_keep_to_their_rate_and_demands_do_not() {
    let mut rig = Rig::new(
        Limits {
            // A piece a minute.
            prefetch_rate: PIECE as u64 / 60,
            ..limits()
        },
        Script::default(),
    );
    let guess = rig.queue.open(Urgency::prefetch());
    rig.push(guess, Way::Direct);
    rig.push(guess, Way::Direct);
    let first = rig.taken().unwrap();
    rig.queue.end(first, Ok(()));
    let Turn::Wait(Some(rest)) = rig.queue.turn(Duty::All) else {
        panic!("the next one has to wait");
    };
    assert!(rest <= Duration::from_secs(61) && rest > Duration::from_secs(1));
    let demand = rig.queue.open(Urgency::default());
    rig.push(demand, Way::Direct);
    assert_eq!(rig.taken().unwrap().stream, demand);
}

#[test]
fn a_closed_component_gets_nothing_more() {
    let mut rig = Rig::new(limits(), Script::default());
    let stream = rig.queue.open(Urgency::default());
    for _ in 0..3 {
        rig.push(stream, Way::Direct);
    }
    let task = rig.taken().unwrap();
    assert_eq!(rig.queue.close(stream), 2);
    assert!(rig.taken().is_none());
    rig.queue.back(task, Way::Again);
    assert!(rig.taken().is_none(), "nor what comes back");
    rig.push(stream, Way::Direct);
    assert!(rig.taken().is_none());
}

/// Reads one piece on a thread of the pool.
fn read_one(script: Vec<io::Result<usize>>) -> Result<(), ReadError> {
    let mut rig = Rig::new(limits(), Script(Mutex::new(script.into())));
    pool::start(&rig.queue, 1, Duty::All).unwrap();
    let stream = rig.queue.open(Urgency::default());
    rig.push(stream, Way::Buffered);
    let done = rig.results.blocking_recv().unwrap();
    rig.queue.stop();
    done.result
}

fn os(code: i32) -> io::Result<usize> {
    Err(io::Error::from_raw_os_error(code))
}

#[test]
fn short_reads_and_passing_failures_are_mended() {
    let script = vec![
        Ok(100),
        os(libc::EINTR),
        Ok(1),
        os(libc::EAGAIN),
        os(libc::ENOMEM),
        Ok(4000),
    ];
    assert!(read_one(script).is_ok());
}

#[test]
fn failures_that_stay_say_what_and_where() {
    match read_one(vec![Ok(100), os(libc::EIO)]) {
        Err(ReadError::Io { offset, source, .. }) => {
            assert_eq!((offset, source.raw_os_error()), (100, Some(libc::EIO)));
        }
        other => panic!("{other:?}"),
    }
    let stubborn = (0..9).map(|_| os(libc::EAGAIN)).collect();
    assert!(matches!(read_one(stubborn), Err(ReadError::Io { .. })));
    match read_one(vec![Ok(5000), Ok(0)]) {
        Err(ReadError::Truncated {
            offset, missing, ..
        }) => {
            assert_eq!((offset, missing), (5000, Bytes((1 << 20) - 5000)));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_demand_passes_what_waits_while_a_piece_is_read() {
    /// Says that a read has begun, and lets it end when told.
    #[derive(Default)]
    struct Gate {
        state: Mutex<(usize, usize)>,
        changed: Condvar,
    }
    impl ReadAt for Arc<Gate> {
        fn read_at(&self, into: &mut [u8], _offset: u64) -> io::Result<usize> {
            let mut state = self.state.lock().unwrap();
            state.0 += 1;
            self.changed.notify_all();
            while state.1 == 0 {
                state = self.changed.wait(state).unwrap();
            }
            state.1 -= 1;
            Ok(into.len())
        }
    }
    let gate = Arc::new(Gate::default());
    let mut rig = Rig::new(limits(), gate.clone());
    pool::start(&rig.queue, 2, Duty::All).unwrap();
    let guess = rig.queue.open(Urgency::prefetch());
    for _ in 0..20 {
        rig.push(guess, Way::Buffered);
    }
    let mut state = gate.state.lock().unwrap();
    while state.0 == 0 {
        state = gate.changed.wait(state).unwrap();
    }
    drop(state);
    let demand = rig.queue.open(Urgency::default());
    rig.push(demand, Way::Buffered);
    let demanded = rig.writer.lent().get() - PIECE as u64;
    let mut starts = Vec::new();
    for _ in 0..2 {
        gate.state.lock().unwrap().1 += 1;
        gate.changed.notify_all();
        starts.push(rig.results.blocking_recv().unwrap().piece.start());
    }
    assert_eq!(
        starts,
        [0, demanded],
        "one piece of the prefetch, then the demand"
    );
    rig.queue.stop();
    gate.state.lock().unwrap().1 += 50;
    gate.changed.notify_all();
}

#[test]
fn the_faster_source_of_cached_pieces_is_learned() {
    let queue = Queue::new(limits(), None);
    assert!(queue.prefers_cache(), "until both are known");
    let measured = |bytes: f64, seconds: f64| Meter {
        bytes,
        seconds,
        ..Meter::default()
    };
    queue.lock().cached = measured(8e8, 0.1);
    queue.lock().direct = measured(8e8, 0.4);
    let cached = (0..640).filter(|_| queue.prefers_cache()).count();
    assert_eq!(cached, 630, "but for some that keep the rates true");
    queue.lock().direct = measured(8e8, 0.02);
    assert_eq!((0..640).filter(|_| queue.prefers_cache()).count(), 10);
}
