//! Engines that connect to the picker: whose events they are is what topic and rank say, while pods come,
//! go, and come back.

use pinpod::datalayer::{EndpointDetails, EndpointSpec};

use super::*;

fn pod(name: &str, address: &str, rank: u32) -> EndpointSpec {
    EndpointSpec {
        name: name.to_owned(),
        namespace: "default".to_owned(),
        address: address.parse().unwrap(),
        labels: std::collections::BTreeMap::new(),
        rank,
        details: EndpointDetails::default(),
    }
}

async fn start(pods: &[(&str, &str, u32)]) -> Gateway {
    let gateway = Gateway::start("10.3.0.9:8000").await;
    gateway.pool(pods);
    gateway
}

impl Gateway {
    fn pool(&self, pods: &[(&str, &str, u32)]) {
        let specs = pods
            .iter()
            .map(|(name, address, rank)| pod(name, address, *rank));
        self.store.replace(specs.collect());
    }

    /// A further process, which connects under a topic of its own.
    async fn engine(&self, publisher: &str) -> Engine {
        Engine::start(self.socket, publisher).await
    }

    /// Blocks of the prompt that each endpoint holds, of those that hold some.
    async fn holders(&self, prompt: &Prompt) -> Vec<(String, u64)> {
        let body = Self::body(prompt).to_string();
        let answer = self.director.explain("/v1/completions", body.into()).await;
        let mut answer = answer.unwrap();
        let known = answer["producers"]["precise-prefix-cache-producer"].take();
        let endpoints = known["prompts"][0]["endpoints"].as_array().unwrap().clone();
        let held = endpoints.iter().filter_map(|on| {
            let blocks = on["matchedBlocks"].as_u64().filter(|blocks| *blocks > 0)?;
            Some((on["endpoint"].as_str().unwrap().to_owned(), blocks))
        });
        held.collect()
    }

    async fn until_held(&self, prompt: &Prompt, expected: &[(&str, u64)]) {
        let expected: Vec<_> = expected
            .iter()
            .map(|(e, n)| ((*e).to_owned(), *n))
            .collect();
        for _ in 0..1000 {
            if self.holders(prompt).await == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let holders = self.holders(prompt).await;
        panic!("{holders:?} instead of {expected:?}: {}", self.overview());
    }

    async fn until_unattributed(&self, expected: u64) {
        for _ in 0..1000 {
            if self.overview()["listener"]["stats"]["unattributed"] == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("not {expected} unattributed: {}", self.overview());
    }
}

#[tokio::test]
async fn a_pod_may_publish_before_the_picker_knows_it() {
    let a = ("a", "10.3.0.1:8000", 0);
    let gateway = start(&[a]).await;
    let mut engine = gateway.engine("b").await;
    engine.serve(&prompt(1)).await;
    gateway.until_unattributed(1).await;
    gateway.pool(&[a, ("b", "10.3.0.2:8000", 0)]);
    engine.serve(&prompt(101)).await;
    gateway
        .until_held(&prompt(101), &[("10.3.0.2:8000", 4)])
        .await;
    gateway.until_held(&prompt(1), &[]).await;
}

#[tokio::test]
async fn a_pod_that_comes_back_under_its_name_starts_empty() {
    let gateway = start(&[("a", "10.3.0.1:8000", 0)]).await;
    let mut old = gateway.engine("a").await;
    old.serve(&prompt(1)).await;
    gateway
        .until_held(&prompt(1), &[("10.3.0.1:8000", 4)])
        .await;
    gateway.pool(&[("a", "10.3.0.2:8000", 0)]);
    gateway.until_held(&prompt(1), &[]).await;
    let mut new = gateway.engine("a").await;
    new.serve(&prompt(101)).await;
    gateway
        .until_held(&prompt(101), &[("10.3.0.2:8000", 4)])
        .await;
    // The old process ends slowly.
    old.serve(&prompt(201)).await;
    gateway.until_unattributed(1).await;
    new.serve(&prompt(301)).await;
    gateway
        .until_held(&prompt(301), &[("10.3.0.2:8000", 4)])
        .await;
    gateway
        .until_held(&prompt(101), &[("10.3.0.2:8000", 4)])
        .await;
    gateway.until_held(&prompt(201), &[]).await;
}

#[tokio::test]
async fn a_process_that_comes_back_at_its_address_starts_empty() {
    let gateway = start(&[("a", "10.3.0.1:8000", 0)]).await;
    let mut engine = gateway.engine("10.3.0.1:8000").await;
    engine.serve(&prompt(1)).await;
    gateway
        .until_held(&prompt(1), &[("10.3.0.1:8000", 4)])
        .await;
    drop(engine);
    let mut engine = gateway.engine("10.3.0.1:8000").await;
    engine.serve(&prompt(101)).await;
    gateway
        .until_held(&prompt(101), &[("10.3.0.1:8000", 4)])
        .await;
    gateway.until_held(&prompt(1), &[]).await;
    // Now it serves another model, as its topic says.
    let mut other = gateway.engine("10.3.0.1:8000").await;
    other.topic.push_str("-2");
    other.serve(&prompt(201)).await;
    gateway
        .until_held(&prompt(201), &[("10.3.0.1:8000", 4)])
        .await;
    gateway.until_held(&prompt(101), &[]).await;
}

#[tokio::test]
async fn ranks_are_told_apart_whatever_the_topic_calls_them() {
    let ranks = ["10.3.0.1:8000", "10.3.0.1:8001"];
    for name in ["10.3.0.1:8000", "10.3.0.1", "a", "a-rank-0"] {
        let gateway = start(&[("a-rank-0", ranks[0], 0), ("a-rank-1", ranks[1], 1)]).await;
        for (rank, endpoint) in (0..).zip(ranks) {
            let mut engine = gateway.engine(name).await;
            engine.rank = Some(rank);
            let own = prompt(1 + 100 * u32::from(rank));
            engine.serve(&own).await;
            gateway.until_held(&own, &[(endpoint, 4)]).await;
        }
        gateway.until_held(&prompt(1), &[(ranks[0], 4)]).await;
    }
}

/// A pod of many ranks behind one port: whatever rank holds a prompt, the endpoint does.
#[tokio::test]
async fn an_endpoint_has_so_many_ranks_and_no_more() {
    let gateway = start(&[("a", "10.3.0.1:8000", 0)]).await;
    let mut engine = gateway.engine("a").await;
    let of = |rank: u8| prompt(1000 * u32::from(rank));
    for rank in 0..128 {
        (engine.rank, engine.seq) = (Some(rank), 0);
        engine.serve(&of(rank)).await;
    }
    for rank in [0, 127] {
        gateway.until_held(&of(rank), &[("10.3.0.1:8000", 4)]).await;
    }
    (engine.rank, engine.seq) = (Some(128), 0);
    engine.serve(&of(128)).await;
    gateway.until_unattributed(1).await;
    // An older engine, which names no rank, is in the place of the endpoint's own.
    let mut older = gateway.engine("10.3.0.1:8000").await;
    older.rank = None;
    older.serve(&of(129)).await;
    gateway.until_held(&of(129), &[("10.3.0.1:8000", 4)]).await;
    gateway.until_held(&of(0), &[]).await;
    gateway.until_held(&of(1), &[("10.3.0.1:8000", 4)]).await;
}
