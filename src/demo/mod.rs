//! The demonstration: real Envoy, pinpod and simulated pods as child processes on loopback, the same
//! traffic once per configuration, one table.
//!
//! [`processes`] starts and stops the parts (tests use it too), [`workload`] makes the traffic,
//! [`client`] drives it, [`scrape`] reads the parts' metrics, [`run`] puts these together and [`report`]
//! shows what came out. Knows nothing of the picker's insides.

pub mod client;
pub mod envoy;
pub mod processes;
pub mod report;
pub mod run;
pub mod scrape;
pub mod workload;
