//! Where endpoints come from: a list on the command line or a watched file. Kubernetes will be a
//! third file here. Each writes whole sets into the [`super::EndpointStore`].

pub mod file;
pub mod list;
