use super::*;
use crate::kubernetes::objects::Pod;
use crate::kubernetes::testing::{ApiServer, eventually, pod};
use serde_json::json;

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
