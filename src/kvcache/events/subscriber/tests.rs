use super::super::testing::{Engine, Flaw, Recorder, Told, message, until};
use super::*;

/// Short pauses; waiting for an answer is long enough for a busy machine.
fn timing() -> Timing {
    Timing {
        connect: Duration::from_secs(5),
        backoff_min: Duration::from_millis(5),
        backoff_max: Duration::from_millis(20),
        replay_idle: Duration::from_millis(300),
        replay_pause: Duration::from_millis(1),
        replay_total: Duration::from_secs(10),
        replay_cooldown: Duration::from_mins(1),
    }
}

struct Fixture {
    engine: Engine,
    sink: Recorder,
    stats: Arc<SubscriberStats>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

/// A subscriber of a fresh engine that has already published `(0, 100), (1, 101), ...`.
async fn start(older: u64, with_replay: bool, on_loss: LossPolicy) -> Fixture {
    let mut engine = Engine::start().await;
    for seq in 0..older {
        engine.keep(seq, 100 + seq);
    }
    let sink = Recorder::default();
    let stats = Arc::new(SubscriberStats::default());
    let source = Source {
        live: engine.live,
        replay: with_replay.then_some(engine.replay),
    };
    let options = SubscriberOptions {
        on_loss,
        timing: timing(),
    };
    let subscriber = Subscriber::new(
        source,
        Box::new(sink.clone()),
        Arc::clone(&stats),
        options,
        Arc::new(Semaphore::new(1)),
    );
    let stop = CancellationToken::new();
    let task = tokio::spawn(subscriber.run(stop.clone()));
    engine.subscribed(1).await;
    Fixture {
        engine,
        sink,
        stats,
        stop,
        task,
    }
}

async fn joined(older: u64) -> Fixture {
    let f = start(older, true, LossPolicy::Reset).await;
    f.until_live().await;
    f
}

impl Fixture {
    async fn until_live(&self) {
        until("live", || self.sink.state() == Some(StreamState::Live)).await;
    }

    async fn until_count(&self, what: &str, read: impl Fn(StatsSnapshot) -> bool) {
        until(what, || read(self.stats.snapshot())).await;
    }
}

use super::super::stats::StatsSnapshot;

#[tokio::test]
async fn joining_replays_what_was_before_and_goes_on_live() {
    let f = joined(3).await;
    assert_eq!(f.sink.known(), [100, 101, 102]);
    f.engine.publish(3, 103);
    f.sink.until_known(&[100, 101, 102, 103]).await;
    let stats = f.stats.snapshot();
    assert_eq!(
        (stats.last_seq, stats.replayed, stats.received),
        (Some(3), 3, 1)
    );
    assert_eq!(f.engine.requests(), [0]);
    assert_eq!(
        f.sink.0.lock().states,
        [StreamState::Joining, StreamState::Live]
    );
}

#[tokio::test]
async fn history_the_engine_no_longer_has_is_no_loss_when_joining() {
    let f = start(0, true, LossPolicy::Reset).await;
    f.until_live().await;
    drop(f);
    let engine = Engine::start().await;
    for seq in 5..8 {
        engine.keep(seq, 100 + seq);
    }
    let sink = Recorder::default();
    let stats = Arc::new(SubscriberStats::default());
    let subscriber = Subscriber::new(
        Source {
            live: engine.live,
            replay: Some(engine.replay),
        },
        Box::new(sink.clone()),
        Arc::clone(&stats),
        SubscriberOptions {
            timing: timing(),
            ..SubscriberOptions::default()
        },
        Arc::new(Semaphore::new(1)),
    );
    let _task = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(
        subscriber.run(CancellationToken::new()),
    ));
    sink.until_known(&[105, 106, 107]).await;
    assert_eq!(stats.snapshot().losses, 0);
}

#[tokio::test]
async fn live_batches_wait_for_the_replay_and_are_applied_once() {
    let engine_held = async {
        let mut engine = Engine::start().await;
        engine.hold_replays(true);
        for seq in 0..3 {
            engine.keep(seq, 100 + seq);
        }
        let sink = Recorder::default();
        let stats = Arc::new(SubscriberStats::default());
        let subscriber = Subscriber::new(
            Source {
                live: engine.live,
                replay: Some(engine.replay),
            },
            Box::new(sink.clone()),
            Arc::clone(&stats),
            SubscriberOptions {
                timing: timing(),
                ..SubscriberOptions::default()
            },
            Arc::new(Semaphore::new(1)),
        );
        let task = tokio::spawn(subscriber.run(CancellationToken::new()));
        engine.subscribed(1).await;
        (
            engine,
            sink,
            stats,
            tokio_util::task::AbortOnDropHandle::new(task),
        )
    };
    let (engine, sink, stats, _task) = engine_held.await;
    engine.publish(3, 103);
    until("two live batches", || {
        if stats.snapshot().received == 1 {
            engine.publish(4, 104);
        }
        stats.snapshot().received >= 2
    })
    .await;
    assert_eq!(sink.told(), [], "nothing before the replay");
    engine.hold_replays(false);
    sink.until_known(&[100, 101, 102, 103, 104]).await;
}

#[tokio::test]
async fn a_live_gap_is_filled_by_replay() {
    let f = joined(1).await;
    f.engine.keep(1, 101);
    f.engine.keep(2, 102);
    f.engine.publish(3, 103);
    f.sink.until_known(&[100, 101, 102, 103]).await;
    f.until_live().await;
    let stats = f.stats.snapshot();
    assert_eq!((stats.gaps, stats.losses), (1, 0));
    assert_eq!(f.engine.requests(), [0, 1]);
    assert!(f.sink.0.lock().states.contains(&StreamState::Gap));
}

#[tokio::test]
async fn a_gap_beyond_the_engines_memory_forgets_the_endpoint() {
    let f = joined(1).await;
    f.engine.keep(1, 101);
    f.engine.forget_below(2);
    f.engine.publish(2, 102);
    f.sink.until_known(&[102]).await;
    assert_eq!(
        f.sink.told(),
        [Told::Batch(100), Told::Reset, Told::Batch(102)]
    );
    f.until_live().await;
    assert_eq!(f.stats.snapshot().losses, 1);
}

#[tokio::test]
async fn a_loss_may_keep_the_endpoint_and_call_it_stale() {
    let f = start(0, false, LossPolicy::Keep).await;
    f.engine.send(0, 100);
    f.engine.send(2, 102);
    f.sink.until_known(&[100, 102]).await;
    until("gap", || f.sink.state() == Some(StreamState::Gap)).await;
}

#[tokio::test]
async fn a_hole_in_an_answer_and_a_lost_end_marker_are_asked_for_again() {
    let f = joined(1).await;
    for seq in 1..6 {
        f.engine.keep(seq, 100 + seq);
    }
    f.engine.flaw(Flaw {
        without: vec![3],
        ..Flaw::default()
    });
    f.engine.flaw(Flaw {
        no_end: true,
        ..Flaw::default()
    });
    f.engine.publish(6, 106);
    f.sink
        .until_known(&[100, 101, 102, 103, 104, 105, 106])
        .await;
    f.until_live().await;
    // 1 (hole at 3), 3 (no end after 6), 7 (end).
    assert_eq!(f.engine.requests(), [0, 1, 3, 7]);
    assert_eq!(f.stats.snapshot().losses, 0);
}

#[tokio::test]
async fn a_restart_with_lower_numbers_forgets_and_joins_again() {
    let mut f = joined(3).await;
    f.engine.restart();
    f.engine.keep(0, 200);
    f.engine.close();
    f.engine.subscribed(2).await;
    f.sink.until_known(&[200]).await;
    f.engine.publish(1, 201);
    f.sink.until_known(&[200, 201]).await;
    let stats = f.stats.snapshot();
    assert_eq!((stats.restarts, stats.reconnects), (1, 1));
}

#[tokio::test]
async fn a_restart_that_passed_our_number_is_seen_by_the_clock() {
    let mut f = joined(3).await;
    f.engine.restart();
    for seq in 0..5 {
        f.engine.keep(seq, 200 + seq);
    }
    f.engine.close();
    f.engine.subscribed(2).await;
    f.sink.until_known(&[200, 201, 202, 203, 204]).await;
    // The remembered batch 2 is asked for, then everything.
    assert_eq!(f.engine.requests(), [0, 2, 0]);
    assert_eq!(f.stats.snapshot().restarts, 1);
}

#[tokio::test]
async fn a_reconnect_to_the_same_process_forgets_nothing() {
    let mut f = joined(3).await;
    f.engine.close();
    f.engine.keep(3, 103);
    f.engine.subscribed(2).await;
    f.sink.until_known(&[100, 101, 102, 103]).await;
    f.until_live().await;
    assert!(!f.sink.told().contains(&Told::Reset));
    assert_eq!(f.stats.snapshot().restarts, 0);
}

#[tokio::test]
async fn without_replay_a_lower_number_on_a_new_connection_is_a_restart() {
    let mut f = start(0, false, LossPolicy::Reset).await;
    f.engine.send(0, 100);
    f.engine.send(1, 101);
    f.engine.send(1, 101);
    f.sink.until_known(&[100, 101]).await;
    f.until_count("duplicate", |s| s.duplicates == 1).await;
    f.engine.restart();
    f.engine.close();
    f.engine.subscribed(2).await;
    f.engine.send(0, 200);
    f.sink.until_known(&[200]).await;
    assert_eq!(f.stats.snapshot().restarts, 1);
}

#[tokio::test]
async fn without_replay_a_new_connection_is_a_gap_until_a_batch_follows() {
    let mut f = start(0, false, LossPolicy::Keep).await;
    f.engine.send(0, 100);
    f.sink.until_known(&[100]).await;
    f.until_live().await;
    f.engine.close();
    f.engine.subscribed(2).await;
    until("gap", || f.sink.state() == Some(StreamState::Gap)).await;
    // The one that is known tells nothing of what came after it.
    f.engine.send(0, 100);
    f.until_count("duplicate", |s| s.duplicates == 1).await;
    assert_eq!(f.sink.state(), Some(StreamState::Gap));
    f.engine.send(1, 101);
    f.sink.until_known(&[100, 101]).await;
    f.until_live().await;
    let states = f.sink.0.lock().states.clone();
    assert_eq!(
        states,
        [
            StreamState::Live,
            StreamState::Down,
            StreamState::Gap,
            StreamState::Live
        ]
    );
}

#[tokio::test]
async fn a_failed_replay_after_a_reconnect_leaves_a_gap() {
    let mut f = joined(1).await;
    f.engine.flaw(Flaw {
        oversize: true,
        ..Flaw::default()
    });
    f.engine.close();
    f.engine.subscribed(2).await;
    f.until_count("failure", |s| s.replay_failures == 1).await;
    until("gap", || f.sink.state() == Some(StreamState::Gap)).await;
    f.engine.publish(1, 101);
    f.sink.until_known(&[100, 101]).await;
    f.until_live().await;
}

#[tokio::test]
async fn a_closed_replay_port_leaves_the_live_stream() {
    let mut engine = Engine::start().await;
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let replay = closed.local_addr().unwrap();
    drop(closed);
    let sink = Recorder::default();
    let stats = Arc::new(SubscriberStats::default());
    let subscriber = Subscriber::new(
        Source {
            live: engine.live,
            replay: Some(replay),
        },
        Box::new(sink.clone()),
        Arc::clone(&stats),
        SubscriberOptions {
            timing: timing(),
            ..SubscriberOptions::default()
        },
        Arc::new(Semaphore::new(1)),
    );
    let _task = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(
        subscriber.run(CancellationToken::new()),
    ));
    engine.subscribed(1).await;
    engine.send(7, 107);
    sink.until_known(&[107]).await;
    until("live", || sink.state() == Some(StreamState::Live)).await;
    // A gap in the cool-down is a loss: no second attempt.
    engine.send(9, 109);
    sink.until_known(&[109]).await;
    let stats = stats.snapshot();
    assert_eq!(
        (stats.replays, stats.replay_failures, stats.losses),
        (1, 1, 1)
    );
}

#[tokio::test]
async fn an_oversize_message_costs_the_connection_and_nothing_else() {
    let mut f = joined(1).await;
    // A frame header that claims one byte more than a message may have.
    let mut header = vec![2];
    header.extend((super::super::zmtp::MAX_MESSAGE_BYTES as u64 + 1).to_be_bytes());
    f.engine.send_raw(header);
    f.engine.subscribed(2).await;
    assert_eq!(f.stats.snapshot().oversize, 1);
    f.until_live().await;
    f.engine.publish(1, 101);
    f.sink.until_known(&[100, 101]).await;
}

#[tokio::test]
async fn an_oversize_replay_is_given_up() {
    let f = joined(1).await;
    f.engine.flaw(Flaw {
        oversize: true,
        ..Flaw::default()
    });
    f.engine.publish(2, 102);
    f.sink.until_known(&[102]).await;
    let stats = f.stats.snapshot();
    assert_eq!((stats.replay_failures, stats.losses), (1, 1));
}

#[tokio::test]
async fn messages_and_payloads_that_are_none_are_counted_and_passed_over() {
    let f = joined(1).await;
    f.engine
        .send_raw(message(&[b"topic", b"short", b"payload"]));
    // Not a batch, yet it takes number 1.
    f.engine
        .send_raw(message(&[b"", &1_u64.to_be_bytes(), b"\xc1"]));
    f.engine.publish(2, 102);
    f.sink.until_known(&[100, 102]).await;
    let stats = f.stats.snapshot();
    assert_eq!((stats.bad_frames, stats.bad_payloads), (1, 1));
    assert_eq!((stats.gaps, stats.last_seq), (0, Some(2)));
    // Whatever the payload said is missing, and no later batch brings it.
    until("gap", || f.sink.state() == Some(StreamState::Gap)).await;
    f.engine.publish(3, 103);
    f.sink.until_known(&[100, 102, 103]).await;
    assert_eq!(f.stats.state(), StreamState::Gap);
}

#[tokio::test]
async fn a_restart_ends_the_gap_of_a_bad_payload() {
    let mut f = joined(1).await;
    f.engine
        .send_raw(message(&[b"", &1_u64.to_be_bytes(), b"\xc1"]));
    until("gap", || f.sink.state() == Some(StreamState::Gap)).await;
    f.engine.restart();
    f.engine.keep(0, 200);
    f.engine.close();
    f.engine.subscribed(2).await;
    f.sink.until_known(&[200]).await;
    f.until_live().await;
}

#[tokio::test]
async fn stopping_forgets_the_endpoint() {
    let f = joined(2).await;
    f.stop.cancel();
    f.task.await.unwrap();
    assert_eq!(f.sink.known(), [] as [u64; 0]);
    assert_eq!(f.sink.state(), Some(StreamState::Down));
}

#[tokio::test]
async fn a_first_batch_that_is_lost_is_asked_for() {
    let f = joined(0).await;
    f.engine.keep(0, 100);
    f.engine.publish(1, 101);
    f.sink.until_known(&[100, 101]).await;
    assert_eq!(f.engine.requests(), [0, 0]);
    assert_eq!(f.stats.snapshot().losses, 0);
}

#[tokio::test]
async fn thousands_of_lossy_repeated_and_reordered_batches_arrive_in_order() {
    const BATCHES: u64 = 3000;
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let f = joined(0).await;
    let mut order: Vec<u64> = (0..BATCHES).collect();
    // A batch may come up to three places early, once in twenty.
    for i in 0..order.len() - 3 {
        if random.u8(..) < 12 {
            order.swap(i, i + random.usize(1..=3));
        }
    }
    for _ in 0..10 {
        // The answers lose a batch here and there, and some their end marker.
        f.engine.flaw(Flaw {
            without: (0..BATCHES).filter(|_| random.u8(..) < 2).collect(),
            no_end: random.bool(),
            oversize: false,
        });
    }
    for seq in 0..BATCHES {
        f.engine.keep(seq, seq);
    }
    for (i, seq) in order.into_iter().enumerate() {
        let lost = random.u8(..) < 5 && i as u64 + 1 < BATCHES;
        if !lost {
            f.engine.send(seq, seq);
        }
        if random.u8(..) < 10 {
            f.engine.send(seq, seq);
        }
    }
    f.engine.send(BATCHES - 1, BATCHES - 1);
    until(&format!("all batches, seed {seed}"), || {
        f.stats.snapshot().last_seq == Some(BATCHES - 1)
    })
    .await;
    let expected: Vec<Told> = (0..BATCHES).map(Told::Batch).collect();
    assert_eq!(f.sink.told(), expected, "seed {seed}");
}

#[test]
fn a_full_buffer_drops_its_oldest() {
    let mut buffer = Buffer::default();
    let batch = Bytes::from_static(b"batch");
    for seq in 0..MAX_BUFFERED_BATCHES as u64 {
        assert_eq!(buffer.insert(seq, batch.clone()), 0);
    }
    assert_eq!(buffer.insert(MAX_BUFFERED_BATCHES as u64, batch), 1);
    assert_eq!(buffer.batches.len(), MAX_BUFFERED_BATCHES);
    assert_eq!(buffer.pop_first().map(|(seq, _)| seq), Some(1));
    assert_eq!(buffer.bytes, 5 * (MAX_BUFFERED_BATCHES - 1));
}

#[test]
fn a_buffer_is_bounded_in_bytes() {
    let mut buffer = Buffer::default();
    let half = Bytes::from(vec![0; MAX_BUFFERED_BYTES / 2]);
    assert_eq!(buffer.insert(1, half.clone()), 0);
    assert_eq!(buffer.insert(2, half.clone()), 0);
    assert_eq!(buffer.insert(3, Bytes::from_static(b"x")), 1);
    assert_eq!(buffer.insert(3, half), 0, "the same number replaces");
    assert_eq!(buffer.bytes, MAX_BUFFERED_BYTES);
}

#[test]
fn ports_count_up_with_the_rank() {
    let ip = IpAddr::from([10, 0, 0, 1]);
    let source = Source::of_rank(ip, 5557, 5657, 3).unwrap();
    assert_eq!(source.live, SocketAddr::new(ip, 5560));
    assert_eq!(source.replay, Some(SocketAddr::new(ip, 5660)));
    assert_eq!(Source::of_rank(ip, 5557, 0, 0).unwrap().replay, None);
    assert_eq!(Source::of_rank(ip, 65_535, 0, 1), None);
    assert_eq!(Source::of_rank(ip, 5557, 65_535, 1), None);
}
