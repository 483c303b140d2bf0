use super::*;
use crate::kubernetes::objects::Pod;
use crate::kubernetes::testing::{ApiServer, eventually, pod};
use crate::telemetry::metrics::{recording, sample};
use serde_json::json;
use std::time::SystemTime;

fn pods() -> Collection {
    Collection {
        resource: "pods",
        group: "",
        version: "v1",
        namespace: "default".to_owned(),
        labels: None,
        fields: None,
        optional: false,
    }
}

fn watch(server: &ApiServer, collection: Collection) -> (mpsc::Receiver<Update<Pod>>, ApiContact) {
    let contact = ApiContact::default();
    let (updates, receiver) = mpsc::channel(UPDATE_QUEUE);
    let watcher = Watcher::<Pod>::new(server.client(), collection, &contact);
    tokio::spawn(watcher.run(updates));
    (receiver, contact)
}

async fn next(updates: &mut mpsc::Receiver<Update<Pod>>) -> String {
    let update = timeout(Duration::from_secs(20), updates.recv()).await;
    match update.expect("an update in time").expect("a watcher") {
        Update::Listed(pods) => format!("listed {}", pods.len()),
        Update::Applied(pod) => format!("applied {}", pod.metadata.name),
        Update::Deleted(pod) => format!("deleted {}", pod.metadata.name),
        Update::Absent => "absent".to_owned(),
    }
}

#[tokio::test]
async fn a_list_is_read_in_pages() {
    let server = ApiServer::start().await;
    for n in 0..1201 {
        server.apply(pod(&format!("p{n}"), 1));
    }
    let (mut updates, _) = watch(&server, pods());
    assert_eq!(next(&mut updates).await, "listed 1201");
    // 500, 500, 201.
    let pages = server
        .requests()
        .iter()
        .filter(|r| r.contains("limit=500"))
        .count();
    assert_eq!(pages, 3);
}

#[tokio::test]
async fn bookmarks_move_the_version_on() {
    let server = ApiServer::start().await;
    let (mut updates, _) = watch(&server, pods());
    assert_eq!(next(&mut updates).await, "listed 0");
    eventually("a watch", || server.watches("pods") == 1).await;
    // Without the bookmark the version would be one that is forgotten.
    server.compact();
    server.bookmark("pods");
    server.apply(pod("a", 1));
    assert_eq!(next(&mut updates).await, "applied a");
    server.end_watches();
    server.apply(pod("b", 1));
    assert_eq!(next(&mut updates).await, "applied b");
    assert_eq!(server.lists("pods"), 1);
}

#[tokio::test]
async fn what_cannot_be_read_is_left_out_and_the_rest_goes_on() {
    let server = ApiServer::start().await;
    let mut broken = pod("broken", 1);
    broken["status"]["conditions"] = json!("many");
    server.apply(broken.clone());
    server.apply(pod("a", 1));
    let (mut updates, _) = watch(&server, pods());
    assert_eq!(next(&mut updates).await, "listed 1");
    eventually("a watch", || server.watches("pods") == 1).await;
    server.apply(broken);
    server.apply(pod("b", 1));
    assert_eq!(next(&mut updates).await, "applied b");
    // A line that is no event ends the watch; the next one goes on after the last event.
    server.send("pods", "{no json");
    server.apply(pod("c", 1));
    assert_eq!(next(&mut updates).await, "applied c");
    assert_eq!(server.lists("pods"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_silent_connection_is_given_up() {
    let server = ApiServer::start().await;
    let (mut updates, contact) = watch(&server, pods());
    assert_eq!(next(&mut updates).await, "listed 0");
    eventually("in touch", || contact.is_complete()).await;
    let watches = || {
        server
            .requests()
            .iter()
            .filter(|r| r.contains("watch=true"))
            .count()
    };
    assert_eq!(watches(), 1);
    tokio::time::sleep(SILENCE.saturating_sub(Duration::from_secs(5))).await;
    assert_eq!(watches(), 1);
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert_eq!(watches(), 2);
    assert_eq!(server.lists("pods"), 1);
}

#[tokio::test(start_paused = true)]
async fn what_may_be_missing_is_asked_for_every_minute() {
    let server = ApiServer::start().await;
    server.refuse("pods", 404);
    let optional = Collection {
        optional: true,
        ..pods()
    };
    let (mut updates, contact) = watch(&server, optional);
    assert_eq!(next(&mut updates).await, "absent");
    eventually("fine", || contact.is_complete()).await;
    // First after 0.5, 1, 2, 4 and 8 seconds at most: the cluster may just be set up.
    tokio::time::sleep(Duration::from_secs(16)).await;
    assert!(contact.is_complete());
    assert!(server.lists("pods") >= 6, "{}", server.lists("pods"));
    tokio::time::sleep(ABSENT_INTERVAL).await;
    let before = server.lists("pods");
    tokio::time::sleep(ABSENT_INTERVAL * 5).await;
    // Every 60 to 66 seconds.
    assert!((4..=5).contains(&(server.lists("pods") - before)));
    server.refuse("pods", 0);
    server.apply(pod("a", 1));
    let update = timeout(ABSENT_INTERVAL * 2, updates.recv()).await;
    assert!(
        matches!(update, Ok(Some(Update::Listed(pods))) if pods.len() == 1),
        "said once only"
    );
    // One that goes missing later, as while a server starts, says nothing about its objects.
    server.refuse("pods", 404);
    server.go_down();
    server.come_back().await;
    tokio::time::sleep(ABSENT_INTERVAL * 2).await;
    while let Ok(update) = updates.try_recv() {
        assert!(matches!(update, Update::Absent), "{update:?}");
    }
}

/// For its first seconds a genuine server forbids everything and does not know custom resources.
#[tokio::test(start_paused = true)]
async fn what_was_there_is_soon_asked_for_again() {
    let server = ApiServer::start().await;
    let optional = Collection {
        optional: true,
        ..pods()
    };
    let (mut updates, contact) = watch(&server, optional);
    assert_eq!(next(&mut updates).await, "listed 0");
    eventually("a watch", || contact.is_complete()).await;
    server.go_down();
    tokio::time::sleep(Duration::from_mins(2)).await;
    for status in [403, 404] {
        let asked = server.requests().len();
        server.refuse("pods", status);
        server.come_back().await;
        // Within the longest pause somebody answers; from then on the pauses are short.
        tokio::time::sleep(Duration::from_secs(16)).await;
        assert!(server.requests().len() > asked);
        assert!(!contact.is_complete(), "it is not known to be gone");
        let name = format!("pod-{status}");
        server.apply(pod(&name, 1));
        server.refuse("pods", 0);
        let begun = Instant::now();
        assert_eq!(next(&mut updates).await, format!("applied {name}"));
        // 8 s, or the longest pause if all shorter ones fell into the wait before.
        assert!(
            begun.elapsed() < Duration::from_secs(16),
            "{:?}",
            begun.elapsed()
        );
        assert!(contact.is_complete());
        server.go_down();
        tokio::time::sleep(Duration::from_mins(2)).await;
    }
    // What stays away is given up, without a word about its objects.
    server.refuse("pods", 404);
    server.come_back().await;
    tokio::time::sleep(Duration::from_mins(1)).await;
    assert!(!contact.is_complete());
    tokio::time::sleep(Duration::from_mins(2)).await;
    assert!(contact.is_complete() && updates.try_recv().is_err());
}

/// The cache of a server that was started again begins now: every version from before is forgotten.
#[tokio::test(start_paused = true)]
async fn after_an_outage_a_forgotten_version_costs_a_list_and_no_wait() {
    let server = ApiServer::start().await;
    let (mut updates, contact) = watch(&server, pods());
    assert_eq!(next(&mut updates).await, "listed 0");
    server.go_down();
    tokio::time::sleep(Duration::from_mins(5)).await;
    server.compact();
    server.apply(pod("a", 1));
    let asked = server.requests().len();
    server.come_back().await;
    let begun = Instant::now();
    while server.requests().len() == asked {
        assert!(begun.elapsed() < Duration::from_secs(16));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let answered = Instant::now();
    assert_eq!(next(&mut updates).await, "listed 1");
    assert!(
        answered.elapsed() < Duration::from_secs(1),
        "{:?}",
        answered.elapsed()
    );
    eventually("in touch", || contact.is_complete()).await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_says_when_is_asked_then() {
    let server = ApiServer::start().await;
    server.refuse("pods", 429);
    server.retry_after(1);
    let (_updates, _) = watch(&server, pods());
    tokio::time::sleep(Duration::from_mins(2)).await;
    // Every 1 to 1.5 s; by itself it would have come to 15 s.
    let tries = server.lists("pods");
    assert!((75..=125).contains(&tries), "{tries}");
    // Nobody waits for an hour.
    server.retry_after(3600);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = server.lists("pods");
    tokio::time::sleep(LONGEST_RETRY_AFTER * 6).await;
    // Every 60 to 90 s.
    let tries = server.lists("pods") - before;
    assert!((3..=6).contains(&tries), "{tries}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_fails_is_asked_less_and_less() {
    let server = ApiServer::start().await;
    server.refuse("pods", 503);
    let (mut updates, contact) = watch(&server, pods());
    tokio::time::sleep(Duration::from_mins(2)).await;
    // Pauses of at most 0.5, 1, 2, 4, 8, 15, 15, ... and at least half of each: by two minutes the
    // longest ones make 5 + 104.5 / 15 = 12 tries, the shortest 5 + 112 / 7.5 = 20.
    let tries = server.lists("pods");
    assert!((11..=21).contains(&tries), "{tries}");
    assert!(!contact.is_complete());
    server.refuse("pods", 0);
    assert_eq!(next(&mut updates).await, "listed 0");
}

#[tokio::test]
async fn a_watcher_ends_with_its_receiver() {
    let server = ApiServer::start().await;
    let (mut updates, contact) = watch(&server, pods());
    assert_eq!(next(&mut updates).await, "listed 0");
    eventually("a watch", || server.watches("pods") == 1).await;
    drop(updates);
    eventually("no watch", || server.watches("pods") == 0).await;
    assert!(contact.is_complete());
}

#[tokio::test]
async fn metrics_say_whether_and_how_a_collection_is_followed() {
    recording(|shown| async move {
        let of = |name: &str, labels: &[&str]| {
            let own = [&[r#"resource="pods""#], labels].concat();
            sample(&shown, &format!("pinpod_kubernetes_{name}"), &own)
        };
        let now = || {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            now.unwrap().as_secs_f64()
        };
        let server = ApiServer::start().await;
        server.apply(pod("a", 1));
        let begun = now();
        let (mut updates, _) = watch(&server, pods());
        assert_eq!(
            of("watch_connected", &[]),
            Some(0.0),
            "nothing was heard yet"
        );
        assert_eq!(next(&mut updates).await, "listed 1");
        let connected = |value| move || of("watch_connected", &[]) == Some(value);
        eventually("connected", connected(1.0)).await;
        server.apply(pod("b", 2));
        server.delete("pods", "a");
        assert_eq!(next(&mut updates).await, "applied b");
        assert_eq!(next(&mut updates).await, "deleted a");
        assert_eq!(of("events_total", &[r#"type="applied""#]), Some(1.0));
        assert_eq!(of("events_total", &[r#"type="deleted""#]), Some(1.0));
        let contact = || of("last_contact_timestamp_seconds", &[]).unwrap();
        assert!((begun..=now()).contains(&contact()), "{}", contact());
        assert_eq!(of("failures_total", &[]), None);
        server.go_down();
        eventually("not connected", connected(0.0)).await;
        let gone = now();
        eventually("a failure counts", || {
            of("failures_total", &[r#"reason="connection""#]).is_some()
        })
        .await;
        assert!(contact() <= gone);
        server.come_back().await;
        eventually("connected again", connected(1.0)).await;
        assert!(contact() >= gone);
        // The watch went on where it was.
        assert_eq!(of("lists_total", &[]), Some(1.0));
        drop(updates);
        eventually("nobody follows it", connected(0.0)).await;
    })
    .await;
}
