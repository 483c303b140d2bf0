use super::*;

fn found(variables: &[(&str, &str)]) -> Result<Found, SettingsError> {
    read("llm-d-epp", |name| {
        let found = variables.iter().find(|(n, _)| *n == name);
        found.map(|(_, value)| (*value).to_owned())
    })
}

fn settings(variables: &[(&str, &str)]) -> Settings {
    let found = found(variables).unwrap();
    assert_eq!(found.warnings, Vec::<String>::new());
    found.settings.unwrap()
}

fn collector(variables: &[(&str, &str)]) -> OtlpSettings {
    match settings(variables).exporter {
        ExporterSettings::Otlp(otlp) => otlp,
        ExporterSettings::Console => panic!("no collector"),
    }
}

fn endpoint_of(variables: &[(&str, &str)]) -> String {
    collector(variables).endpoint.to_string()
}

#[test]
fn spans_are_exported_only_when_somebody_asks() {
    assert!(found(&[]).unwrap().settings.is_none());
    assert!(
        found(&[("OTEL_TRACES_SAMPLER_ARG", "1")])
            .unwrap()
            .settings
            .is_none()
    );
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4317");
    assert!(found(&[endpoint]).unwrap().settings.is_some());
    for off in [
        ("OTEL_TRACES_EXPORTER", "none"),
        ("OTEL_SDK_DISABLED", "true"),
    ] {
        assert!(
            found(&[endpoint, off]).unwrap().settings.is_none(),
            "{off:?}"
        );
    }
    let console = settings(&[("OTEL_TRACES_EXPORTER", "console"), endpoint]);
    assert_eq!(console.exporter, ExporterSettings::Console);
    let odd = found(&[("OTEL_TRACES_EXPORTER", "zipkin"), endpoint]).unwrap();
    assert!(odd.settings.is_none());
    assert!(
        odd.warnings[0].contains("\"zipkin\" is not otlp"),
        "{odd:?}"
    );
}

#[test]
fn a_collector_is_found_as_the_specification_says() {
    let otlp = ("OTEL_TRACES_EXPORTER", "otlp");
    let all = "OTEL_EXPORTER_OTLP_ENDPOINT";
    // Without any transport variable: plaintext beside us.
    assert_eq!(endpoint_of(&[otlp]), "http://localhost:4317/");
    assert_eq!(endpoint_of(&[(all, "http://c:1")]), "http://c:1/");
    assert_eq!(endpoint_of(&[(all, "https://c")]), "https://c/");
    assert_eq!(endpoint_of(&[(all, "http://c:1/v1/traces")]), "http://c:1/");
    assert_eq!(endpoint_of(&[(all, " http://[::1]:1 ")]), "http://[::1]:1/");
    let of_traces = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://t:2");
    assert_eq!(
        endpoint_of(&[(all, "http://c:1"), of_traces]),
        "http://t:2/"
    );
    // A scheme wins over INSECURE, which is for endpoints without one.
    let insecure = |value| ("OTEL_EXPORTER_OTLP_INSECURE", value);
    assert_eq!(endpoint_of(&[(all, "c:1")]), "https://c:1/");
    assert_eq!(
        endpoint_of(&[(all, "c:1"), insecure("True")]),
        "http://c:1/"
    );
    assert_eq!(
        endpoint_of(&[(all, "https://c:1"), insecure("true")]),
        "https://c:1/"
    );
    assert_eq!(
        endpoint_of(&[otlp, insecure("false")]),
        "https://localhost:4317/"
    );
    let certificate = ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/ca.pem");
    let secured = collector(&[otlp, certificate]);
    assert!(secured.is_secure());
    assert_eq!(secured.tls.ca, Some("/ca.pem".into()));
}

#[test]
fn headers_and_times_are_read() {
    let otlp = collector(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c"),
        (
            "OTEL_EXPORTER_OTLP_HEADERS",
            "Authorization=Bearer%20x, k = v",
        ),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "250"),
    ]);
    let headers: Vec<_> = otlp
        .headers
        .iter()
        .map(|(k, v)| (k.as_str(), v.to_str().unwrap()))
        .collect();
    assert_eq!(headers, [("authorization", "Bearer x"), ("k", "v")]);
    assert_eq!(otlp.timeout, Duration::from_millis(250));
    let batch = settings(&[
        ("OTEL_TRACES_EXPORTER", "console"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "100"),
        ("OTEL_BSP_SCHEDULE_DELAY", "7"),
    ])
    .batch;
    assert_eq!(
        batch,
        BatchLimits {
            max_queue: 100,
            max_batch: 100,
            delay: Duration::from_millis(7),
            timeout: Duration::from_secs(30),
        }
    );
}

#[test]
fn who_we_are_is_said_by_the_environment() {
    let console = ("OTEL_TRACES_EXPORTER", "console");
    let resource = |more: &[(&'static str, &'static str)]| {
        let variables: Vec<_> = std::iter::once(console)
            .chain(more.iter().copied())
            .collect();
        settings(&variables).resource
    };
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let version = pair("service.version", env!("CARGO_PKG_VERSION"));
    assert_eq!(
        resource(&[]),
        [pair("service.name", "llm-d-epp"), version.clone()]
    );
    let attributes = (
        "OTEL_RESOURCE_ATTRIBUTES",
        "service.name=a,zone=eu%2Cwest,service.version=7",
    );
    assert_eq!(
        resource(&[attributes]),
        [
            pair("service.name", "a"),
            pair("zone", "eu,west"),
            pair("service.version", "7")
        ]
    );
    assert_eq!(
        resource(&[attributes, ("OTEL_SERVICE_NAME", "b")])[0],
        pair("service.name", "b")
    );
}

#[test]
fn what_cannot_be_used_is_told() {
    let console = ("OTEL_TRACES_EXPORTER", "console");
    for (name, value, told) in [
        (
            "OTEL_TRACES_SAMPLER",
            "always_on",
            "only parentbased_traceidratio",
        ),
        ("OTEL_TRACES_SAMPLER_ARG", "1.5", "not within 0 and 1"),
        ("OTEL_TRACES_SAMPLER_ARG", "NaN", "not within 0 and 1"),
        ("OTEL_RESOURCE_ATTRIBUTES", "a=b,c", "an entry without ="),
        ("OTEL_RESOURCE_ATTRIBUTES", "a=%zz", "\"a\" is broken"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "not a number above 0"),
    ] {
        let found = found(&[console, (name, value)]).unwrap();
        let settings = found.settings.unwrap();
        assert_eq!(settings.sampler, Sampler::new(0.1), "{name}");
        assert_eq!(settings.batch, BatchLimits::default(), "{name}");
        assert_eq!(found.warnings.len(), 1, "{name}");
        assert!(found.warnings[0].contains(told), "{:?}", found.warnings);
    }
    let http = ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf");
    let found_http = found(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318"), http]).unwrap();
    assert!(found_http.warnings[0].contains("over grpc"));
    let gzip = ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip");
    let found_gzip = found(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4317"), gzip]).unwrap();
    assert!(found_gzip.warnings[0].contains("\"gzip\" is not used"));
    for endpoint in ["ftp://c:1", "http://", "http://a b", "c:99999"] {
        let refused = found(&[("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)]).unwrap_err();
        assert!(
            refused
                .to_string()
                .starts_with("OTEL_EXPORTER_OTLP_ENDPOINT: "),
            "{refused}"
        );
    }
    let secret = found(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:1"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a=secret%0A"),
    ]);
    let refused = secret.unwrap_err().to_string();
    assert!(
        refused.contains("\"a\" or its value") && !refused.contains("secret"),
        "{refused}"
    );
}

#[test]
fn lists_are_cut_at_their_bounds() {
    let list = |n: usize| {
        (0..n)
            .map(|i| format!("k{i}=v"))
            .collect::<Vec<_>>()
            .join(",")
    };
    let (attributes, headers) = (list(100), list(100));
    let settings = settings(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c"),
        ("OTEL_EXPORTER_OTLP_HEADERS", &headers),
        ("OTEL_RESOURCE_ATTRIBUTES", &attributes),
    ]);
    // Beside the service's name and version.
    assert_eq!(settings.resource.len(), MAX_RESOURCE_ATTRIBUTES + 2);
    match settings.exporter {
        ExporterSettings::Otlp(otlp) => assert_eq!(otlp.headers.len(), MAX_HEADERS),
        ExporterSettings::Console => panic!("no collector"),
    }
}
