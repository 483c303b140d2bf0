//! `--kv-events-config` (`vllm/config/kv_events.py`).

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Batches kept for replay unless configured.
const BUFFER_STEPS: usize = 10_000;
/// Messages queued for a subscriber unless configured.
const HWM: usize = 100_000;
/// Batches queued between engine and publisher unless configured.
const MAX_QUEUE_SIZE: usize = 100_000;
/// Most of each of the above.
const MAX_COUNT: usize = 1 << 24;

/// Where and how to publish; field names and defaults are vLLM's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EventsConfig {
    /// Publish at all.
    pub enable_kv_cache_events: bool,
    /// `zmq`, or `null` for nothing.
    pub publisher: Option<String>,
    /// Of the PUB socket: it binds when this holds `*` or `::`, else it connects.
    pub endpoint: String,
    /// Of the ROUTER socket that replays; it always binds.
    pub replay_endpoint: Option<String>,
    /// Batches kept for replay.
    pub buffer_steps: usize,
    /// Messages queued for a subscriber; what does not fit is lost to it.
    pub hwm: usize,
    /// Batches queued between engine and publisher; the engine waits when they do not fit.
    pub max_queue_size: usize,
    /// First frame of every message.
    pub topic: String,
}

impl Default for EventsConfig {
    fn default() -> Self {
        Self {
            enable_kv_cache_events: false,
            publisher: None,
            endpoint: "tcp://*:5557".to_owned(),
            replay_endpoint: None,
            buffer_steps: BUFFER_STEPS,
            hwm: HWM,
            max_queue_size: MAX_QUEUE_SIZE,
            topic: String::new(),
        }
    }
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum EventsConfigError {
    /// Neither `zmq` nor `null`.
    #[error("unknown event publisher {0:?}")]
    Publisher(String),
    /// No address of the form `tcp://host:port`.
    #[error("{0:?} is not tcp://HOST:PORT")]
    Endpoint(String),
    /// The port of a further rank is above 65535.
    #[error("the ports of rank {0} run past 65535")]
    Rank(u16),
    /// Zero or too large.
    #[error("{0} is not within 1..=16777216")]
    Count(&'static str),
}

/// A place in the network as ZeroMQ names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    host: String,
    port: u16,
}

impl Place {
    fn parse(text: &str) -> Result<Self, EventsConfigError> {
        let wrong = || EventsConfigError::Endpoint(text.to_owned());
        let rest = text.strip_prefix("tcp://").ok_or_else(wrong)?;
        let (host, port) = rest.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().map_err(|_| wrong())?;
        if host.is_empty() {
            return Err(wrong());
        }
        Ok(Self {
            host: host.trim_matches(['[', ']']).to_owned(),
            port,
        })
    }

    /// Host and port to bind or connect to.
    pub(super) fn address(&self) -> (&str, u16) {
        let host = if self.host == "*" {
            "0.0.0.0"
        } else {
            &self.host
        };
        (host, self.port)
    }

    /// The place of another rank on the same host.
    fn of_rank(&self, rank: u16) -> Result<Self, EventsConfigError> {
        let port = match self.port {
            // The system chooses for each.
            0 => 0,
            port => port
                .checked_add(rank)
                .ok_or(EventsConfigError::Rank(rank))?,
        };
        Ok(Self {
            host: self.host.clone(),
            port,
        })
    }

    fn text(&self) -> String {
        if self.host.contains(':') {
            format!("tcp://[{}]:{}", self.host, self.port)
        } else {
            format!("tcp://{}:{}", self.host, self.port)
        }
    }
}

impl EventsConfig {
    /// True when something is to be published.
    pub fn publishes(&self) -> bool {
        self.enable_kv_cache_events && self.publisher.as_deref() != Some("null")
    }

    /// The PUB socket listens, instead of dialling.
    pub fn binds(&self) -> bool {
        self.endpoint.contains('*') || self.endpoint.contains("::")
    }

    /// Place of the PUB socket.
    pub(super) fn place(&self) -> Result<Place, EventsConfigError> {
        Place::parse(&self.endpoint)
    }

    /// Place of the ROUTER socket.
    pub(super) fn replay_place(&self) -> Result<Option<Place>, EventsConfigError> {
        self.replay_endpoint
            .as_deref()
            .map(Place::parse)
            .transpose()
    }

    /// The configuration of a further rank on the same host: its ports are `rank` higher. Checks all
    /// of it.
    pub fn of_rank(&self, rank: u16) -> Result<Self, EventsConfigError> {
        match self.publisher.as_deref() {
            None | Some("zmq" | "null") => {}
            Some(other) => return Err(EventsConfigError::Publisher(other.to_owned())),
        }
        let counts = [
            (self.buffer_steps, "buffer_steps"),
            (self.hwm, "hwm"),
            (self.max_queue_size, "max_queue_size"),
        ];
        for (count, name) in counts {
            if !(1..=MAX_COUNT).contains(&count) {
                return Err(EventsConfigError::Count(name));
            }
        }
        let replay = self.replay_place()?;
        let replay = replay.map(|place| place.of_rank(rank)).transpose()?;
        let publisher = if self.enable_kv_cache_events {
            "zmq"
        } else {
            "null"
        };
        Ok(Self {
            publisher: self.publisher.clone().or(Some(publisher.to_owned())),
            endpoint: self.place()?.of_rank(rank)?.text(),
            replay_endpoint: replay.map(|place| place.text()),
            ..self.clone()
        })
    }

    /// `endpoint` with the port that the system chose, when it was to choose.
    pub(super) fn resolved(endpoint: &str, bound: SocketAddr, host: &str) -> String {
        match Place::parse(endpoint) {
            Ok(Place { port: 0, .. }) => Place {
                host: host.to_owned(),
                port: bound.port(),
            }
            .text(),
            _ => endpoint.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> EventsConfig {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn names_and_defaults_are_those_of_vllm() {
        let text = r#"{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:5557","replay_endpoint":null,"buffer_steps":10000,"hwm":100000,"max_queue_size":100000,"topic":""}"#;
        let own = config(r#"{"enable_kv_cache_events":true}"#).of_rank(0);
        assert_eq!(serde_json::to_string(&own.unwrap()).unwrap(), text);
        assert!(serde_json::from_str::<EventsConfig>(r#"{"endpiont":"x"}"#).is_err());
        assert!(!EventsConfig::default().publishes());
        assert!(!config(r#"{"enable_kv_cache_events":true,"publisher":"null"}"#).publishes());
    }

    #[test]
    fn ranks_take_the_ports_behind_the_first() {
        let first = config(r#"{"endpoint":"tcp://*:5561","replay_endpoint":"tcp://[::1]:5661"}"#);
        let second = first.of_rank(1).unwrap();
        assert_eq!(second.endpoint, "tcp://*:5562");
        assert_eq!(second.replay_endpoint.as_deref(), Some("tcp://[::1]:5662"));
        assert_eq!(
            first.of_rank(60_000),
            Err(EventsConfigError::Rank(60_000)),
            "5661 + 60000 is no port"
        );
        let free = config(r#"{"endpoint":"tcp://*:0"}"#).of_rank(7).unwrap();
        assert_eq!(free.endpoint, "tcp://*:0");
        let bound = ([0, 0, 0, 0], 4711).into();
        let resolved = EventsConfig::resolved(&free.endpoint, bound, "10.1.2.3");
        assert_eq!(resolved, "tcp://10.1.2.3:4711");
    }

    #[test]
    fn it_listens_on_wildcards_and_dials_hosts() {
        let binds = |endpoint: &str| {
            let endpoint = endpoint.to_owned();
            EventsConfig {
                endpoint,
                ..EventsConfig::default()
            }
            .binds()
        };
        assert!(binds("tcp://*:5557") && binds("tcp://[::]:5557"));
        assert!(!binds("tcp://10.0.0.1:5557"));
    }

    #[test]
    fn what_cannot_be_served_is_refused() {
        for json in [
            r#"{"endpoint":"ipc:///run/kv"}"#,
            r#"{"endpoint":"tcp://*"}"#,
            r#"{"replay_endpoint":"tcp://:1"}"#,
            r#"{"publisher":"kafka"}"#,
            r#"{"hwm":0}"#,
            r#"{"buffer_steps":99999999}"#,
        ] {
            assert!(config(json).of_rank(0).is_err(), "{json}");
        }
    }
}
