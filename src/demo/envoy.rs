//! The shipped Envoy configurations with other ports: what a demo or test runs is the file a user
//! copies, but for addresses.

use std::net::SocketAddr;

use anyhow::Context;
use serde_json::{Value, json};

/// `deploy/envoy/original-dst.yaml`.
pub const ORIGINAL_DST: &str = include_str!("../../deploy/envoy/original-dst.yaml");
/// `deploy/envoy/override-host.yaml`.
pub const OVERRIDE_HOST: &str = include_str!("../../deploy/envoy/override-host.yaml");

/// Addresses to put in.
#[derive(Debug, Clone)]
pub struct Addresses {
    /// Where clients connect.
    pub listener: u16,
    /// Admin interface.
    pub admin: u16,
    /// A listener for readiness, where the file has one.
    pub ready: u16,
    /// The endpoint picker.
    pub picker: u16,
    /// The endpoint set of the override-host file; unused in the other.
    pub endpoints: Vec<SocketAddr>,
    /// Plaintext to the picker, whatever the file says.
    pub plaintext_picker: bool,
}

/// `template` as JSON, which Envoy reads too, with `addresses` in place of the shipped ones.
pub fn configure(template: &str, addresses: &Addresses) -> anyhow::Result<String> {
    let mut config: Value = serde_saphyr::from_str(template).context("Envoy configuration")?;
    let local = |port: u16| json!({"socket_address": {"address": "127.0.0.1", "port_value": port}});
    *at(&mut config, "/admin/address")? = local(addresses.admin);
    for listener in list(&mut config, "/static_resources/listeners")? {
        let port = if listener["name"] == "ready" {
            addresses.ready
        } else {
            addresses.listener
        };
        listener["address"] = local(port);
    }
    for cluster in list(&mut config, "/static_resources/clusters")? {
        let name = cluster["name"].as_str().unwrap_or_default().to_owned();
        let endpoints = match name.as_str() {
            "admin" => vec![json!({"endpoint": {"address": local(addresses.admin)}})],
            "epp" => vec![json!({"endpoint": {"address": local(addresses.picker)}})],
            "model_pool" => {
                let entry = |a: &SocketAddr| {
                    let address = json!({"address": a.ip().to_string(), "port_value": a.port()});
                    json!({"endpoint": {"address": {"socket_address": address}}})
                };
                addresses.endpoints.iter().map(entry).collect()
            }
            _ => continue,
        };
        cluster["load_assignment"]["endpoints"] = json!([{ "lb_endpoints": endpoints }]);
        if name == "epp"
            && addresses.plaintext_picker
            && let Some(fields) = cluster.as_object_mut()
        {
            fields.remove("transport_socket");
            if let Some(check) = fields["health_checks"]
                .pointer_mut("/0")
                .and_then(Value::as_object_mut)
            {
                check.remove("tls_options");
            }
        }
    }
    Ok(config.to_string())
}

fn at<'a>(config: &'a mut Value, path: &str) -> anyhow::Result<&'a mut Value> {
    config
        .pointer_mut(path)
        .with_context(|| format!("Envoy configuration has no {path}"))
}

fn list<'a>(config: &'a mut Value, path: &str) -> anyhow::Result<&'a mut Vec<Value>> {
    at(config, path)?
        .as_array_mut()
        .with_context(|| format!("Envoy configuration: {path} is not a list"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_change() {
        let addresses = Addresses {
            listener: 1,
            admin: 2,
            ready: 3,
            picker: 4,
            endpoints: vec!["127.0.0.1:5".parse().unwrap()],
            plaintext_picker: true,
        };
        for template in [ORIGINAL_DST, OVERRIDE_HOST] {
            let text = configure(template, &addresses).unwrap();
            for shipped in ["8081", "19000", "19001", "9002}", "18001"] {
                assert!(
                    !text.contains(&format!("\"port_value\":{shipped}")),
                    "{shipped} is left"
                );
            }
            assert!(text.contains("FULL_DUPLEX_STREAMED") && !text.contains("transport_socket"));
        }
    }
}
