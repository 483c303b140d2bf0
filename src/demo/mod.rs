//! The demonstration: real Envoy, pinpod and simulated pods as child processes on loopback, the same
//! traffic once per configuration, one table.
//!
//! [`processes`] starts and stops the parts (tests use it too), [`parts`] lays them out, [`workload`]
//! makes the traffic, [`client`] drives it, [`scrape`] reads the parts' metrics, [`run`] puts these
//! together; [`report`] and [`pd_report`] show what came out. Knows nothing of the picker's insides.

pub mod client;
pub mod envoy;
pub mod parts;
pub mod pd_report;
pub mod processes;
pub mod report;
pub mod run;
pub mod scrape;
mod table;
pub mod workload;
